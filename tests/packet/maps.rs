//! The maps themselves: what is written is read back, survives a restart, and maps of another build are refused.

use std::{fmt::Debug, net::Ipv4Addr};

use aya::maps::{
    Array, HashMap, Map, MapData, PerCpuArray,
    lpm_trie::{Key, LpmTrie},
};
use lb_common::abi::{
    ADDRESS_FILTER_WORDS, Address, Backend, BackendCounters, Bucket, ClientLink, Count, DEFAULT_FLOWS,
    FILTER_ALLOW, FILTER_DENY, FilterKey, Forward, LiveCount, MAX_ADDRESSES, MAX_BACKENDS, MAX_CLIENT_LINKS,
    MAX_SERVICES, MAX_SOURCE_FILTERS, PerCpu, REASON_COUNT, ROLE_BACKEND, ROLE_VIP, SERVICE_BUCKETS,
    SLOT_COUNT, Service, ServiceFlags, ServiceKey, Settings, SourceKey, SourceRate, Strategy, TCP, Tags, UDP,
    buckets, flows,
};
use xlb::{
    compile::SourceFilters,
    datapath::{
        Contents, Datapath, Operation, Pins, contents_dump,
        kernel::{KernelDatapath, Raw, flow_table_memory},
    },
};

use crate::{
    fixture::{EVERY, Expected, Fixture, SETTINGS, WEB, stay_on_this_cpu, unique_pins},
    frame::{ACK, Frame, SYN, packet_of, tcp},
};

fn address(last: u8) -> Address {
    Address::from(Ipv4Addr::new(192, 0, 2, last))
}

fn service_key(last: u8, port: u16, protocol: u8) -> ServiceKey {
    ServiceKey {
        vip: address(last),
        port: port.to_be(),
        protocol,
        _pad: 0,
    }
}

/// Entries at both ends of every map, with no two fields alike.
fn contents() -> Contents {
    let backend = |id: u32| Backend {
        address: address(id as u8),
        source: address(200),
        ifindex: id + 10,
        link: lb_common::abi::Link([id, 2, 3]),
        port: 8080,
        flags: 5,
        service_plus_one: 1,
        generation: id + 20,
        tags: Tags([id + 30, id + 40]),
        mtu: id + 50,
        weight: id + 60,
        max_connections: id + 70,
        _pad: [0; 12],
    };
    let service = |strategy| Service {
        vip: address(100 + strategy),
        strategy,
        forward: 1,
        flags: 3,
        in_use: 1,
        new_flow_rate: 4,
        new_flow_burst: 5,
        rate_prefix_v4: 6,
        rate_prefix_v6: 7,
        _pad: 0,
    };
    let slots = |offset: u32| {
        (0..SLOT_COUNT)
            .map(|slot| slot.wrapping_mul(7) + offset)
            .collect()
    };
    Contents {
        settings: SETTINGS,
        addresses: [(address(1), ROLE_VIP), (address(2), ROLE_VIP | ROLE_BACKEND)].into(),
        service_keys: [
            (service_key(1, 80, TCP), 0),
            (service_key(1, 80, UDP), MAX_SERVICES - 1),
        ]
        .into(),
        services: [(0, service(1)), (MAX_SERVICES - 1, service(2))].into(),
        slots: [(0, slots(1)), (MAX_SERVICES - 1, slots(2))].into(),
        backends: [(1, backend(1)), (MAX_BACKENDS - 1, backend(2))].into(),
        source_filters: [
            ((filter_key(0, Address::default()), 32), FILTER_DENY),
            (
                (
                    filter_key(0, Address::from(Ipv4Addr::new(192, 0, 2, 0))),
                    32 + 96 + 24,
                ),
                FILTER_ALLOW,
            ),
            ((filter_key(MAX_SERVICES - 1, address(7)), 32 + 128), FILTER_DENY),
        ]
        .into(),
    }
}

fn filter_key(service: u32, address: Address) -> FilterKey {
    FilterKey { service, address }
}

fn put_operations(contents: &Contents) -> Vec<Operation> {
    let mut operations = vec![Operation::PutSettings(contents.settings)];
    operations.extend(
        contents
            .addresses
            .iter()
            .map(|(k, v)| Operation::PutAddress(*k, *v)),
    );
    operations.extend(
        contents
            .backends
            .iter()
            .map(|(k, v)| Operation::PutBackend(*k, *v)),
    );
    operations.extend(
        contents
            .slots
            .iter()
            .map(|(k, v)| Operation::PutSlots(*k, v.clone())),
    );
    operations.extend(
        contents
            .services
            .iter()
            .map(|(k, v)| Operation::PutService(*k, *v)),
    );
    operations.extend(
        contents
            .service_keys
            .iter()
            .map(|(k, v)| Operation::PutServiceKey(*k, *v)),
    );
    operations.extend(
        contents
            .source_filters
            .iter()
            .map(|((key, length), v)| Operation::PutFilter(*key, *length, *v)),
    );
    operations
}

fn filled() -> (Fixture, Contents) {
    let mut fixture = Fixture::empty(1024);
    let contents = contents();
    for operation in put_operations(&contents) {
        fixture.apply(operation);
    }
    (fixture, contents)
}

#[test]
fn new_maps_are_empty() {
    let mut fixture = Fixture::empty(1024);
    assert_eq!(fixture.datapath().read().unwrap(), Contents::default());
    assert_eq!(fixture.flows().len(), 0);
    assert_eq!(
        fixture.counted().since(&fixture.counted()),
        crate::fixture::Counted::default()
    );
}

#[test]
fn every_operation_is_read_back() {
    let (mut fixture, mut expected) = filled();
    assert!(fixture.datapath().read().unwrap() == expected);
    let key = service_key(1, 80, UDP);
    type Change<'a> = &'a dyn Fn(&mut Contents);
    let filter = filter_key(MAX_SERVICES - 1, address(7));
    let removals: [(Operation, Change<'_>); 6] = [
        (Operation::RemoveFilter(filter, 32 + 128), &|contents| {
            contents.source_filters.remove(&(filter, 32 + 128));
        }),
        (Operation::RemoveServiceKey(key), &|contents| {
            contents.service_keys.remove(&key);
        }),
        // Before their service: without one they are not looked for.
        (Operation::RemoveSlots(MAX_SERVICES - 1), &|contents| {
            contents.slots.remove(&(MAX_SERVICES - 1));
        }),
        (Operation::RemoveService(MAX_SERVICES - 1), &|contents| {
            contents.services.remove(&(MAX_SERVICES - 1));
        }),
        (Operation::RemoveBackend(MAX_BACKENDS - 1), &|contents| {
            contents.backends.remove(&(MAX_BACKENDS - 1));
        }),
        (Operation::RemoveAddress(address(2)), &|contents| {
            contents.addresses.remove(&address(2));
        }),
    ];
    for (operation, change) in removals {
        fixture.apply(operation.clone());
        change(&mut expected);
        let read = fixture.datapath().read().unwrap();
        // Not the contents themselves: slot tables fill a screen.
        assert_eq!(contents_dump(&read), contents_dump(&expected), "{operation:?}");
        assert!(read == expected, "{operation:?}");
    }
    // Each a second time with other values.
    expected.settings.udp_idle += 1;
    *expected.addresses.get_mut(&address(1)).unwrap() = ROLE_BACKEND;
    expected.backends.get_mut(&1).unwrap().flags = 0;
    expected.slots.insert(0, vec![9; SLOT_COUNT as usize].into());
    expected.services.get_mut(&0).unwrap().forward = 2;
    *expected.service_keys.get_mut(&service_key(1, 80, TCP)).unwrap() = 3;
    for value in expected.source_filters.values_mut() {
        *value = FILTER_ALLOW + FILTER_DENY - *value;
    }
    for operation in put_operations(&expected) {
        fixture.apply(operation);
    }
    assert!(fixture.datapath().read().unwrap() == expected);
}

#[test]
fn many_entries_are_read_back_whole() {
    let mut fixture = Fixture::empty(1024);
    let mut expected = Contents::default();
    for number in 0..10_000u32 {
        let key = service_key((number / 4000) as u8, (number % 4000) as u16 + 1, TCP);
        expected.service_keys.insert(key, number % MAX_SERVICES);
        let prefix = filter_key(number % MAX_SERVICES, Address([0, 0, 0, number.to_be()]));
        expected.source_filters.insert((prefix, 32 + 128), FILTER_DENY);
    }
    for operation in put_operations(&expected) {
        fixture.apply(operation);
    }
    assert!(fixture.datapath().read().unwrap() == expected);
}

#[test]
fn what_does_not_fit_is_refused_with_the_map_and_the_key() {
    let mut fixture = Fixture::empty(1024);
    for (operation, object) in [
        (
            Operation::PutBackend(MAX_BACKENDS, Backend::default()),
            "BACKENDS[16384]",
        ),
        (
            Operation::PutService(MAX_SERVICES, Service::default()),
            "SERVICES[1024]",
        ),
        (
            Operation::PutSlots(MAX_SERVICES, vec![0; SLOT_COUNT as usize].into()),
            "SLOT_TABLES[1024]",
        ),
        (
            Operation::PutSlots(1, vec![0; SLOT_COUNT as usize + 1].into()),
            "SLOT_TABLES[1]",
        ),
        (Operation::RemoveAddress(address(9)), "ADDRESSES[192.0.2.9]"),
        (
            Operation::RemoveFilter(filter_key(0, address(9)), 160),
            "SOURCE_FILTERS[192.0.2.9]",
        ),
        (
            Operation::PutFilter(filter_key(0, address(9)), 161, FILTER_DENY),
            "SOURCE_FILTERS[192.0.2.9]",
        ),
    ] {
        let error = fixture.datapath().apply(&operation).unwrap_err();
        assert_eq!(error.object, object, "{error}");
    }
    assert_eq!(fixture.datapath().read().unwrap(), Contents::default());
}

/// The daemon ends flows of denied sources by its own reading of the filters.
#[test]
fn the_daemon_judges_sources_as_the_kernels_trie_does() {
    let mut fixture = Fixture::empty(1024);
    let v4 = |text: &str| Address::from(text.parse::<Ipv4Addr>().unwrap());
    let v6 = |text: &str| {
        Address::from(std::net::IpAddr::from(
            text.parse::<std::net::Ipv6Addr>().unwrap(),
        ))
    };
    let filters = [
        (0, v4("10.0.0.0"), 32 + 96 + 8, FILTER_ALLOW),
        (0, v4("10.1.0.0"), 32 + 96 + 16, FILTER_DENY),
        (0, v4("10.1.2.3"), 32 + 128, FILTER_ALLOW),
        (1, v4("0.0.0.0"), 32 + 96, FILTER_DENY),
        (1, v6("2001:db8::"), 32 + 33, FILTER_ALLOW),
        (256, v4("10.0.0.0"), 32 + 96 + 7, FILTER_DENY),
    ];
    let mut contents = Contents::default();
    for (service, address, length, value) in filters {
        let entry = Service {
            flags: ServiceFlags::HAS_FILTERS,
            ..Service::default()
        };
        contents.services.insert(service, entry);
        contents
            .source_filters
            .insert((filter_key(service, address), length), value);
    }
    for operation in put_operations(&contents) {
        fixture.apply(operation);
    }
    let data = MapData::from_pin(fixture.pins().map("SOURCE_FILTERS")).unwrap();
    let trie: LpmTrie<MapData, Raw<FilterKey>, u32> = LpmTrie::try_from(Map::LpmTrie(data)).unwrap();
    let judged = SourceFilters::new(&contents);
    let mut seen = std::collections::BTreeSet::new();
    for service in [0, 1, 2, 256] {
        for address in [
            v4("10.0.0.1"),
            v4("10.1.0.1"),
            v4("10.1.2.3"),
            v4("10.1.2.2"),
            v4("11.0.0.1"),
            v4("12.0.0.1"),
            v6("2001:db8::1"),
            v6("2001:db8:7fff::1"),
            v6("2001:db8:8000::1"),
            v6("::a00:1"),
        ] {
            let key = Key::new(32 + 128, Raw(filter_key(service, address)));
            let found = trie.get(&key, 0).ok();
            let expected = found != Some(FILTER_DENY);
            assert_eq!(
                judged.allow(service, address),
                expected,
                "{service} {address} {found:?}"
            );
            seen.insert(found);
        }
    }
    assert_eq!(seen, [None, Some(FILTER_ALLOW), Some(FILTER_DENY)].into());
}

#[test]
fn live_flows_are_adjusted_and_survive_a_restart() {
    let mut fixture = Fixture::empty(1024);
    let last = MAX_BACKENDS - 1;
    fixture.adjust_live(last, 7);
    fixture.adjust_live(last, -3);
    fixture.adjust_live(1, -3);
    let error = fixture.datapath().adjust_live(MAX_BACKENDS, 1).unwrap_err();
    assert_eq!(error.object, "LIVE[16384]");
    let error = fixture.datapath().live_counts(&[MAX_BACKENDS]).unwrap_err();
    assert_eq!(error.object, "LIVE[16384]");
    fixture.restart(1024);
    let live = fixture.datapath().live_counts(&[1, last]).unwrap();
    let count = |opened, ended| LiveCount { opened, ended };
    assert_eq!(live, [(1, count(0, 3)), (last, count(7, 3))].into());
    assert_eq!((live[&1].flows(), live[&last].flows()), (0, 4));
    // Whatever was counted, the next owner of the id begins with none.
    for id in [1, last] {
        fixture.apply(Operation::RemoveBackend(id));
        let LiveCount { opened, ended } = fixture.datapath().live_counts(&[id]).unwrap()[&id];
        assert_eq!(opened, ended);
    }
}

#[test]
fn the_counters_of_an_entry_that_is_removed_start_from_zero() {
    let mut fixture = Fixture::new();
    let empty = Fixture::empty(1024).counted();
    fixture.run(&tcp("198.51.100.7:5000", WEB.vip, SYN).bytes());
    fixture.apply(Operation::RemoveBackend(WEB.backends[0].id));
    fixture.apply(Operation::RemoveService(WEB.id));
    let counted = fixture.counted();
    assert_eq!(counted.backends, empty.backends);
    assert_eq!(counted.reasons, empty.reasons);
    assert_eq!(counted.totals.transmitted, 1, "totals are not of the service");
}

#[test]
fn a_restarted_daemon_finds_all_as_it_was() {
    let (mut fixture, expected) = filled();
    fixture.restart(1024);
    assert!(fixture.datapath().read().unwrap() == expected);
    fixture.restart(4096);
    assert!(fixture.datapath().read().unwrap() == expected);
    assert_eq!(
        fixture.datapath().flow_table_size(),
        1024,
        "the pinned table's size is kept"
    );
}

/// The program finds flows by the number of buckets that it was told when it was loaded.
#[test]
fn flows_are_found_after_a_restart_with_another_size() {
    for size in [1, 1000, 4096] {
        let mut fixture = Fixture::with_flow_table(1024);
        let ack = tcp("198.51.100.7:5000", WEB.vip, ACK);
        fixture.run(&ack.bytes());
        fixture.all_slots(&WEB, WEB.backends[1].id);
        fixture.restart(size);
        let expected = Expected::to_backend(&WEB, 0, &ack, ack.source);
        fixture.expect("known flow", &ack.bytes(), expected);
        assert_eq!(fixture.remove(&ack), 1);
    }
}

#[test]
fn four_million_flows_take_96_mebibytes() {
    assert_eq!(flow_table_memory(4 << 20), 96 << 20);
    // Room for a half more units than flows, in whole buckets.
    for size in [1, 2, 5, 6, 1000, 1024, 65_536, 100_000] {
        assert!(flows(buckets(size)) >= size);
        assert_eq!(buckets(flows(buckets(size))), buckets(size));
    }
}

#[test]
fn flows_and_counters_go_on_after_a_restart() {
    let mut fixture = Fixture::with_flow_table(65_536);
    let syn = tcp("198.51.100.7:5000", WEB.vip, SYN);
    fixture.run(&syn.bytes());
    fixture.all_slots(&WEB, WEB.backends[1].id);
    let (flows, counted) = (fixture.flows(), fixture.counted());
    fixture.restart(65_536);
    assert_eq!(fixture.flows(), flows);
    assert_eq!(fixture.counted(), counted);
    let ack = tcp("198.51.100.7:5000", WEB.vip, ACK);
    let expected = Expected::to_backend(&WEB, 0, &ack, ack.source);
    fixture.expect("known flow", &ack.bytes(), expected);
}

#[test]
fn two_instances_share_nothing() {
    let mut one = Fixture::new();
    let mut other = Fixture::empty(1024);
    let syn = tcp("198.51.100.7:5000", WEB.vip, SYN);
    one.run(&syn.bytes());
    assert_eq!(other.datapath().read().unwrap(), Contents::default());
    assert!(other.flows().is_empty());
    let before = other.counted();
    one.run(&syn.bytes());
    assert_eq!(other.counted(), before);
}

/// What becomes of packets that leave something in each map that the program writes.
fn all_that_is_kept(fixture: &mut Fixture) -> impl PartialEq + Debug + use<> {
    let mut seen = vec![];
    for service in EVERY {
        fixture.change_service(&service, |service| {
            service.strategy = Strategy::RoundRobin.number();
            (service.new_flow_rate, service.new_flow_burst) = (1, 100);
        });
        fixture.sequence(&service, &service.backends.map(|backend| backend.id));
        let client = |port| {
            if service.vip.is_ipv4() {
                format!("198.51.100.7:{port}")
            } else {
                format!("[2001:db8:7::7]:{port}")
            }
        };
        let mut first = packet_of(service.protocol, &client(5000), service.vip);
        first.payload = vec![1; 300];
        let parts = first.fragments(&[0, 80]);
        // The program knows none of its replies, and later fragments are told their ports by the first.
        if Forward::translates(service.forward.number()) {
            for backend in service.backends {
                let reply = Frame::answer(backend.address, first.source, first.transport.clone());
                seen.push(fixture.run(&reply.bytes()));
            }
        }
        let other = |port| packet_of(service.protocol, &client(port), service.vip).bytes();
        for bytes in [&parts[1], &parts[0], &parts[1], &other(5001), &other(5002)] {
            seen.push(fixture.run(bytes));
        }
    }
    let live = EVERY.map(|service| service.backends.map(|backend| fixture.live(backend.id)));
    let flows: Vec<_> = fixture.flows().into_keys().collect();
    fixture.adjust_live(WEB.backends[0].id, 5);
    (seen, fixture.counted(), live, flows)
}

/// How much a source may still start changes by the second: no packet is asked.
fn has_source_rates(fixture: &mut Fixture) -> bool {
    let map = fixture.datapath().ebpf_mut().map_mut("SOURCES").unwrap();
    let sources = HashMap::<_, Raw<SourceKey>, Raw<SourceRate>>::try_from(map).unwrap();
    sources.keys().next().is_some()
}

#[test]
fn maps_that_another_test_had_before_are_as_new_ones() {
    // Positions in a sequence are each CPU's own.
    stay_on_this_cpu();
    let mut fixture = Fixture::with_flow_table(65_536).again(&EVERY);
    let on_new_maps = all_that_is_kept(&mut fixture);
    assert!(has_source_rates(&mut fixture));
    let mut fixture = fixture.again(&EVERY);
    assert_eq!(all_that_is_kept(&mut fixture), on_new_maps);
    let mut fixture = fixture.again(&[]);
    assert!(!has_source_rates(&mut fixture));
    let mut new = Fixture::empty(1024).again(&[]);
    assert_eq!(fixture.datapath().read().unwrap(), new.datapath().read().unwrap());
}

/// Pins that are removed whatever becomes of the test.
struct Removed(Pins);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = self.0.remove_all();
    }
}

fn refusal(pin: impl FnOnce(&Pins)) -> String {
    let pins = Removed(unique_pins());
    pins.0.create().unwrap();
    pin(&pins.0);
    let error = KernelDatapath::open(pins.0.clone(), 1024).unwrap_err();
    format!("{error}: {}", error.source)
}

#[test]
fn a_pinned_map_of_another_build_is_refused_with_what_to_do() {
    let smaller = refusal(|pins| {
        let map = Array::<MapData, [u8; 8]>::create(1, 0).unwrap();
        map.pin(pins.map("SETTINGS")).unwrap();
    });
    let larger = refusal(|pins| {
        let map = Array::<MapData, [u8; 64]>::create(1, 0).unwrap();
        map.pin(pins.map("SETTINGS")).unwrap();
    });
    let other_key = refusal(|pins| {
        let map = HashMap::<MapData, [u8; 4], u32>::create(MAX_ADDRESSES, 0).unwrap();
        map.pin(pins.map("ADDRESSES")).unwrap();
    });
    let other_kind = refusal(|pins| {
        let map = HashMap::<MapData, u32, [u8; size_of::<Settings>()]>::create(1, 0).unwrap();
        map.pin(pins.map("SETTINGS")).unwrap();
    });
    // As from a build that knows one reason less, whose counters lie elsewhere.
    let fewer = refusal(|pins| {
        let map = PerCpuArray::<MapData, [u8; 16]>::create(REASON_COUNT - 1, 0).unwrap();
        map.pin(pins.map("COUNTERS")).unwrap();
    });
    for (error, map) in [
        (smaller, "SETTINGS"),
        (larger, "SETTINGS"),
        (other_key, "ADDRESSES"),
        (other_kind, "SETTINGS"),
        (fewer, "COUNTERS"),
    ] {
        assert!(error.starts_with(&format!("open failed on {map}: ")), "{error}");
        assert!(error.contains("`xlb detach`"), "{error}");
    }
}

/// The object and the daemon are built from one source, by two compilers for two machines.
#[test]
fn the_objects_maps_have_the_sizes_of_the_shared_types() {
    let fixture = Fixture::empty(DEFAULT_FLOWS);
    for (name, key, value, entries) in [
        ("SETTINGS", 4, size_of::<Settings>(), 1),
        ("ADDRESSES", size_of::<Address>(), 4, MAX_ADDRESSES),
        ("ADDRESS_FILTER", 4, 8 * ADDRESS_FILTER_WORDS as usize, 1),
        ("SERVICE_KEYS", 4, size_of::<Bucket>(), SERVICE_BUCKETS),
        ("SERVICES", 4, size_of::<Service>(), MAX_SERVICES),
        ("SLOT_TABLES", 4, 4, MAX_SERVICES),
        ("BACKENDS", 4, size_of::<Backend>(), MAX_BACKENDS),
        (
            "SOURCE_FILTERS",
            4 + size_of::<FilterKey>(),
            4,
            MAX_SOURCE_FILTERS,
        ),
        ("LIVE", 4, size_of::<LiveCount>(), MAX_BACKENDS),
        ("FLOWS", 4, size_of::<Bucket>(), buckets(DEFAULT_FLOWS)),
        ("CLIENT_LINKS", 4, size_of::<ClientLink>(), MAX_CLIENT_LINKS),
        ("PER_CPU", 4, size_of::<PerCpu>(), 1),
        ("COUNTERS", 4, size_of::<Count>(), REASON_COUNT),
        (
            "SERVICE_COUNTERS",
            4,
            size_of::<Count>(),
            MAX_SERVICES * REASON_COUNT,
        ),
        ("BACKEND_COUNTERS", 4, size_of::<BackendCounters>(), MAX_BACKENDS),
    ] {
        let info = MapData::from_pin(fixture.pins().map(name))
            .unwrap()
            .info()
            .unwrap();
        let found = (
            info.key_size() as usize,
            info.value_size() as usize,
            info.max_entries(),
        );
        assert_eq!(found, (key, value, entries), "{name}");
    }
}

#[test]
fn removing_the_pins_leaves_nothing_behind() {
    let fixture = Fixture::empty(1024);
    let pins = fixture.pins().clone();
    assert!(pins.exist());
    assert!(pins.remove_all().unwrap());
    assert!(!pins.exist());
    assert!(!pins.remove_all().unwrap(), "there were none any more");
    assert!(!pins.links().exists());
}
