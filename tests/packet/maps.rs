//! The maps themselves: what is written is read back, survives a restart, and maps of another build are refused.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd},
};

use aya::{
    maps::{
        Array, ArrayOfMaps, HashMap, IterableMap, Map, MapData,
        lpm_trie::{Key, LpmTrie},
    },
    util::nr_cpus,
};
use lb_common::abi::{
    ADDRESS_FILTER_WORDS, Address, Backend, BackendCounters, Bucket, CHUNK_LINES, ClientLink, Count,
    DEFAULT_BACKENDS, DEFAULT_FLOWS, DEFAULT_SERVICES, FEW_SLOTS, FILTER_ALLOW, FILTER_DENY, FilterKey,
    Forward, LINE_WORDS, LiveCount, MANY_SLOTS, MAX_CHUNKS, MAX_CLIENT_LINKS, MAX_MEMBERS,
    MAX_SOURCE_FILTERS, PerCpu, PoolLine, REASON_ENTRIES, ROLE_BACKEND, ROLE_VIP, Reason, SERVICE_BUCKETS,
    Service, ServiceFlags, ServiceKey, Settings, SourceKey, SourceRate, Strategy, TCP, Tags, UDP, buckets,
    flows,
};
use lb_common::logic::hash::{flow_hash, siphash13, slot_of};
use xlb::{
    compile::SourceFilters,
    datapath::{
        Contents, Datapath, Operation, Pins, Pool, RankTable, Sizes, contents_dump,
        kernel::{KernelDatapath, Raw, flow_table_memory},
    },
};

use crate::{
    fixture::{
        EVERY, Expected, Fixture, SETTINGS, SHOP, TestBackend, TestService, WEB, allowed_cpus, stay_on_cpu,
        stay_on_this_cpu, unique_pins,
    },
    frame::{ACK, Frame, SYN, packet_of, tcp},
};

const LAST_SERVICE: u32 = DEFAULT_SERVICES - 1;

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
    let pool = |members: u32| {
        let identities = (0..members).map(|number| (u64::from(number) << 33 | 5, 1));
        Pool {
            members: (0..members).map(|number| number * 7 + 1).collect(),
            table: Some(RankTable::by_hash(identities.collect(), FEW_SLOTS).into()),
        }
    };
    Contents {
        settings: SETTINGS,
        addresses: [(address(1), ROLE_VIP), (address(2), ROLE_VIP | ROLE_BACKEND)].into(),
        service_keys: [
            (service_key(1, 80, TCP), 0),
            (service_key(1, 80, UDP), LAST_SERVICE),
        ]
        .into(),
        services: [(0, service(1)), (LAST_SERVICE, service(2))].into(),
        pools: [(0, pool(2)), (LAST_SERVICE, pool(30))].into(),
        backends: [(1, backend(1)), (DEFAULT_BACKENDS, backend(2))].into(),
        source_filters: [
            ((filter_key(0, Address::default()), 32), FILTER_DENY),
            (
                (
                    filter_key(0, Address::from(Ipv4Addr::new(192, 0, 2, 0))),
                    32 + 96 + 24,
                ),
                FILTER_ALLOW,
            ),
            ((filter_key(LAST_SERVICE, address(7)), 32 + 128), FILTER_DENY),
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
            .pools
            .iter()
            .map(|(k, v)| Operation::PutPool(*k, v.clone())),
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
    let filter = filter_key(LAST_SERVICE, address(7));
    let removals: [(Operation, Change<'_>); 6] = [
        (Operation::RemoveFilter(filter, 32 + 128), &|contents| {
            contents.source_filters.remove(&(filter, 32 + 128));
        }),
        (Operation::RemoveServiceKey(key), &|contents| {
            contents.service_keys.remove(&key);
        }),
        // Before their service: without one they are not looked for.
        (Operation::RemovePool(LAST_SERVICE), &|contents| {
            contents.pools.remove(&LAST_SERVICE);
        }),
        (Operation::RemoveService(LAST_SERVICE), &|contents| {
            contents.services.remove(&(LAST_SERVICE));
        }),
        (Operation::RemoveBackend(DEFAULT_BACKENDS), &|contents| {
            contents.backends.remove(&DEFAULT_BACKENDS);
        }),
        (Operation::RemoveAddress(address(2)), &|contents| {
            contents.addresses.remove(&address(2));
        }),
    ];
    for (operation, change) in removals {
        fixture.apply(operation.clone());
        change(&mut expected);
        let read = fixture.datapath().read().unwrap();
        assert_eq!(contents_dump(&read), contents_dump(&expected), "{operation:?}");
        assert!(read == expected, "{operation:?}");
    }
    // Each a second time with other values.
    expected.settings.udp_idle += 1;
    *expected.addresses.get_mut(&address(1)).unwrap() = ROLE_BACKEND;
    expected.backends.get_mut(&1).unwrap().flags = 0;
    expected.pools.insert(0, Pool::of([9]));
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

/// Words of the slot tables' memory, as somebody else would write them.
fn chunk(fixture: &Fixture) -> Array<MapData, Raw<PoolLine>> {
    let data = MapData::from_pin(fixture.pins().map("POOL_CHUNKS")).unwrap();
    let chunks: ArrayOfMaps<MapData, Array<MapData, Raw<PoolLine>>> =
        ArrayOfMaps::try_from(Map::ArrayOfMaps(data)).unwrap();
    chunks.get(&0, 0).unwrap()
}

#[test]
fn a_damaged_table_is_found_and_written_anew_elsewhere() {
    let (mut fixture, expected) = filled();
    let slots = fixture.datapath().by_slot(LAST_SERVICE).unwrap().unwrap();
    assert_eq!(slots, expected.pools[&LAST_SERVICE].by_slot().unwrap());
    let mut chunk = chunk(&fixture);
    // Ranks fill their words; members have small ids here.
    let is_table = |line: &PoolLine| line.0.iter().all(|word| *word >> 48 != 0);
    let damaged: Vec<u32> = (0..CHUNK_LINES)
        .filter(|line| is_table(&chunk.get(line, 0).unwrap().0))
        .collect();
    for line in damaged {
        chunk.set(line, Raw(PoolLine([7; LINE_WORDS])), 0).unwrap();
    }
    let read = fixture.datapath().read().unwrap();
    assert_eq!(read.pools.keys().collect::<Vec<_>>(), [&0, &LAST_SERVICE]);
    for id in [0, LAST_SERVICE] {
        assert_ne!(read.pools[&id], expected.pools[&id]);
        fixture.apply(Operation::PutPool(id, expected.pools[&id].clone()));
    }
    assert!(fixture.datapath().read().unwrap() == expected);
    assert_eq!(fixture.datapath().by_slot(LAST_SERVICE).unwrap().unwrap(), slots);
}

/// One table for all that have the same, as long as somebody has it, also after a restart; and room that is used again.
#[test]
fn services_share_tables_and_what_is_left_is_used_again() {
    let mut fixture = Fixture::empty(1024);
    let shared = Pool {
        members: (1..=1000).collect(),
        table: Some(
            RankTable::by_hash((1..=1000).map(|identity| (identity, 1)).collect(), MANY_SLOTS).into(),
        ),
    };
    for service in 0..100 {
        fixture.apply(Operation::PutPool(service, shared.clone()));
    }
    // 128 KiB of ranks and 100 times 4 KiB of members.
    let mebibyte = 1 << 20;
    let words = u64::from(DEFAULT_SERVICES + MAX_CHUNKS) * 8;
    let memory = |fixture: &mut Fixture| fixture.datapath().memory().slot_tables - words;
    assert_eq!(memory(&mut fixture), mebibyte);
    fixture.restart(1024);
    // Were nothing used again, 4000 pools of 4 KiB would take 16 MiB.
    for round in 0..4000 {
        let service = round % 100;
        if round % 7 == 0 {
            fixture.apply(Operation::RemovePool(service));
        }
        fixture.apply(Operation::PutPool(service, shared.clone()));
        if round % 200 == 0 {
            assert_eq!(
                fixture.datapath().by_slot(service).unwrap(),
                shared.by_slot(),
                "round {round}"
            );
            // Lines wait for programs to end before they are used again.
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
    assert!(memory(&mut fixture) <= 6 * mebibyte, "{}", memory(&mut fixture));
    for service in 0..100 {
        fixture.apply(Operation::RemovePool(service));
    }
    fixture.restart(1024);
    let before = memory(&mut fixture);
    for service in 0..100 {
        fixture.apply(Operation::PutPool(service, shared.clone()));
    }
    assert_eq!(memory(&mut fixture), before);
}

#[test]
fn many_entries_are_read_back_whole() {
    let mut fixture = Fixture::empty(1024);
    let mut expected = Contents::default();
    for number in 0..10_000u32 {
        let key = service_key((number / 4000) as u8, (number % 4000) as u16 + 1, TCP);
        expected.service_keys.insert(key, number % DEFAULT_SERVICES);
        let prefix = filter_key(number % DEFAULT_SERVICES, Address([0, 0, 0, number.to_be()]));
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
            Operation::PutBackend(DEFAULT_BACKENDS + 1, Backend::default()),
            "BACKENDS[16385]",
        ),
        (
            Operation::PutService(DEFAULT_SERVICES, Service::default()),
            "SERVICES[1024]",
        ),
        (
            Operation::PutPool(DEFAULT_SERVICES, Pool::default()),
            "POOLS[1024]",
        ),
        (Operation::RemovePool(1), "POOLS[1]"),
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
    let last = DEFAULT_BACKENDS;
    fixture.adjust_live(last, 7);
    fixture.adjust_live(last, -3);
    fixture.adjust_live(1, -3);
    let error = fixture
        .datapath()
        .adjust_live(DEFAULT_BACKENDS + 1, 1)
        .unwrap_err();
    assert_eq!(error.object, "LIVE[16385]");
    let error = fixture
        .datapath()
        .live_counts(&[DEFAULT_BACKENDS + 1])
        .unwrap_err();
    assert_eq!(error.object, "LIVE[16385]");
    fixture.restart(1024);
    let live = fixture.datapath().live_counts(&[1, last]).unwrap();
    let count = |opened, ended| LiveCount { opened, ended };
    assert_eq!(live, [count(0, 3), count(7, 3)]);
    assert_eq!((live[0].flows(), live[1].flows()), (0, 4));
    // Whatever was counted, the next owner of the id begins with none.
    for id in [1, last] {
        fixture.apply(Operation::RemoveBackend(id));
        let LiveCount { opened, ended } = fixture.datapath().live_counts(&[id]).unwrap()[0];
        assert_eq!(opened, ended);
    }
}

#[test]
fn what_each_processor_has_counted_is_added_up_and_goes_with_its_entry_alone() {
    const FLOWS: u64 = 40;
    let mut fixture = Fixture::new();
    for service in [WEB, SHOP] {
        let both: Vec<u32> = service.backends.iter().map(|backend| backend.id).collect();
        fixture.sequence(&service, &both);
    }
    let cpus = allowed_cpus();
    for cpu in &cpus {
        stay_on_cpu(*cpu);
        for number in 0..FLOWS {
            for service in [WEB, SHOP] {
                let source = format!("198.51.{cpu}.7:{}", 5000 + number);
                fixture.run(&tcp(&source, service.vip, SYN).bytes());
            }
        }
    }
    let counted = fixture.counted();
    let of = |service: &TestService| {
        let reasons = counted.reasons.iter();
        let packets = reasons.filter(|((id, _), _)| *id == Some(service.id));
        let packets: u64 = packets.map(|(_, count)| count.packets).sum();
        let backends = service
            .backends
            .iter()
            .map(|backend| counted.backends[&backend.id]);
        let backends: Vec<_> = backends.map(|of| (of.forwarded.packets, of.flows)).collect();
        assert!(backends.iter().all(|(packets, _)| *packets > 0), "{backends:?}");
        let sums = backends
            .iter()
            .fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
        (packets, sums.0, sums.1)
    };
    let all = FLOWS * cpus.len() as u64;
    assert_eq!((of(&WEB), of(&SHOP)), ((all, all, all), (all, all, all)));

    // Those before and after it have been counted, too.
    let removed = SHOP.backends[0].id;
    fixture.apply(Operation::RemoveBackend(removed));
    fixture.apply(Operation::RemoveService(WEB.id));
    let mut expected = counted.clone();
    expected.backends.remove(&removed);
    expected.reasons.retain(|(id, _), _| *id != Some(WEB.id));
    let mut remaining = fixture.counted();
    let left = remaining.backends.remove(&removed).unwrap_or_default();
    assert_eq!(left, BackendCounters::default());
    assert_eq!(remaining.backends, expected.backends);
    assert_eq!(remaining.reasons, expected.reasons);
    assert_eq!(remaining.totals, counted.totals, "totals are not of the service");
}

#[test]
fn counters_are_told_of_the_last_entry_and_of_none_beyond() {
    let mut fixture = Fixture::empty(1024);
    let (services, backends) = (DEFAULT_SERVICES, DEFAULT_BACKENDS);
    let counters = fixture
        .datapath()
        .counters(
            &[services, services - 1, 0],
            &[backends + 1, backends, u32::MAX, 1],
        )
        .unwrap();
    let none = vec![Count::default(); Reason::ALL.len()];
    assert_eq!(
        counters.services,
        BTreeMap::from([(0, none.clone()), (services - 1, none)])
    );
    let zero = BackendCounters::default();
    assert_eq!(counters.backends, [(1, zero), (backends, zero)]);
    fixture.apply(Operation::PutBackend(backends, Backend::default()));
    fixture.apply(Operation::RemoveBackend(backends));
    fixture.apply(Operation::PutService(services - 1, Service::default()));
    fixture.apply(Operation::RemoveService(services - 1));
}

#[test]
fn a_restarted_daemon_finds_all_as_it_was() {
    let (mut fixture, expected) = filled();
    fixture.restart(1024);
    assert!(fixture.datapath().read().unwrap() == expected);
    fixture.restart(4096);
    assert!(fixture.datapath().read().unwrap() == expected);
    assert_eq!(
        fixture.datapath().sizes().flows,
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
    let error = KernelDatapath::open(pins.0.clone(), Sizes::of_flows(1024)).unwrap_err();
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
        let map = HashMap::<MapData, [u8; 4], u32>::create(DEFAULT_SERVICES + DEFAULT_BACKENDS, 0).unwrap();
        map.pin(pins.map("ADDRESSES")).unwrap();
    });
    let other_kind = refusal(|pins| {
        let map = HashMap::<MapData, u32, [u8; size_of::<Settings>()]>::create(1, 0).unwrap();
        map.pin(pins.map("SETTINGS")).unwrap();
    });
    // As from a build that knows some reasons less, whose counters lie elsewhere.
    let fewer = refusal(|pins| {
        let map =
            Array::<MapData, [u8; 16]>::create(nr_cpus().unwrap() as u32 * (REASON_ENTRIES - 4), 0).unwrap();
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
    let cpus = nr_cpus().unwrap() as u32;
    for (name, key, value, entries) in [
        ("SETTINGS", 4, size_of::<Settings>(), 1),
        (
            "ADDRESSES",
            size_of::<Address>(),
            4,
            DEFAULT_SERVICES + DEFAULT_BACKENDS,
        ),
        ("ADDRESS_FILTER", 4, 8 * ADDRESS_FILTER_WORDS as usize, 1),
        ("SERVICE_KEYS", 4, size_of::<Bucket>(), SERVICE_BUCKETS),
        ("SERVICES", 4, size_of::<Service>(), DEFAULT_SERVICES),
        ("POOLS", 4, 8, DEFAULT_SERVICES),
        ("POOL_CHUNKS", 4, 4, MAX_CHUNKS),
        ("BACKENDS", 4, size_of::<Backend>(), DEFAULT_BACKENDS + 1),
        (
            "SOURCE_FILTERS",
            4 + size_of::<FilterKey>(),
            4,
            MAX_SOURCE_FILTERS,
        ),
        ("LIVE", 4, size_of::<LiveCount>(), DEFAULT_BACKENDS + 1),
        ("FLOWS", 4, size_of::<Bucket>(), buckets(DEFAULT_FLOWS)),
        ("CLIENT_LINKS", 4, size_of::<ClientLink>(), MAX_CLIENT_LINKS),
        ("PER_CPU", 4, size_of::<PerCpu>(), 1),
        ("COUNTERS", 4, size_of::<Count>(), cpus * REASON_ENTRIES),
        (
            "SERVICE_COUNTERS",
            4,
            size_of::<Count>(),
            DEFAULT_SERVICES * cpus * REASON_ENTRIES,
        ),
        (
            "BACKEND_COUNTERS",
            4,
            size_of::<BackendCounters>(),
            (DEFAULT_BACKENDS + 1) * cpus,
        ),
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

/// Bytes that the kernel says a map takes.
fn memory_of(map: &MapData) -> u64 {
    let info =
        std::fs::read_to_string(format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd())).unwrap();
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("memlock:"))
        .unwrap();
    line.trim().parse().unwrap()
}

/// What the kernel says that all pinned maps of a fixture take, with those that are in other maps.
fn memory_of_all(fixture: &Fixture) -> u64 {
    let settings = fixture.pins().map("SETTINGS");
    let folder = settings.parent().unwrap();
    let pinned = std::fs::read_dir(folder).unwrap();
    let pinned: u64 = pinned
        .map(|entry| memory_of(&MapData::from_pin(entry.unwrap().path()).unwrap()))
        .sum();
    let data = MapData::from_pin(fixture.pins().map("POOL_CHUNKS")).unwrap();
    let chunks: ArrayOfMaps<MapData, Array<MapData, Raw<PoolLine>>> =
        ArrayOfMaps::try_from(Map::ArrayOfMaps(data)).unwrap();
    let chunks = (0..).map_while(|index| chunks.get(&index, 0).ok());
    pinned + chunks.map(|chunk| memory_of(chunk.map())).sum::<u64>()
}

/// It takes less lines than it has members, and a third of a chunk.
#[test]
fn the_largest_pool_is_read_back_and_taken_over_by_the_next_daemon() {
    let sizes = Sizes {
        flows: 1024,
        services: 16,
        backends: MAX_MEMBERS + 1,
    };
    let mut fixture = Fixture::of_sizes(sizes);
    let members: Vec<u32> = (1..=MAX_MEMBERS).collect();
    let identities = members.iter().map(|id| (u64::from(*id) << 20, 1)).collect();
    let pool = Pool {
        members: members.into(),
        table: Some(RankTable::by_hash(identities, MANY_SLOTS).into()),
    };
    for id in [0, 1] {
        let entry = Service {
            in_use: 1,
            ..Service::default()
        };
        fixture.apply(Operation::PutService(id, entry));
    }
    fixture.apply(Operation::PutPool(0, pool.clone()));
    assert!(fixture.datapath().read().unwrap().pools.get(&0) == Some(&pool));
    let mut next = KernelDatapath::open(fixture.pins().clone(), sizes).unwrap();
    assert!(next.read().unwrap().pools.get(&0) == Some(&pool));
    // Nor are its lines given to others.
    let small = Pool {
        members: vec![7, 8].into(),
        table: None,
    };
    next.apply(&Operation::PutPool(1, small.clone())).unwrap();
    let pools = next.read().unwrap().pools;
    assert!(pools.get(&0) == Some(&pool) && pools.get(&1) == Some(&small));
}

#[test]
fn ten_thousand_services_of_ten_backends_of_their_own_take_less_than_256_mebibytes() {
    const SERVICES: u32 = 10_000;
    const MEMBERS: u32 = 10;
    let sizes = Sizes {
        // The default of a machine with a lot of memory.
        flows: 1 << 20,
        services: 16_383,
        backends: 262_143,
    };
    let mut fixture = Fixture::of_sizes(sizes);
    fixture.apply(Operation::PutSettings(SETTINGS));
    let vip = |service: u32| SocketAddr::from(([203, 0, 113, 7], 1000 + service as u16));
    for service in 0..SERVICES {
        let first = service * MEMBERS + 1;
        let pool = Pool {
            members: (first..first + MEMBERS).collect(),
            table: Some(
                RankTable::by_hash(
                    (0..MEMBERS)
                        .map(|rank| (siphash13([1, 2], [u64::from(service), u64::from(rank)]), 1))
                        .collect(),
                    FEW_SLOTS,
                )
                .into(),
            ),
        };
        fixture.apply(Operation::PutPool(service, pool));
        // Whom packets go to is looked at for the first and the last.
        if service != 0 && service != SERVICES - 1 {
            continue;
        }
        for id in first..first + MEMBERS {
            let entry = TestBackend {
                id,
                ..WEB.backends[0]
            }
            .entry(service);
            fixture.apply(Operation::PutBackend(id, entry));
        }
        let entry = Service {
            vip: Address::from(vip(service).ip()),
            strategy: Strategy::ConsistentHash.number(),
            forward: Forward::Nat.number(),
            in_use: 1,
            ..Service::default()
        };
        fixture.apply(Operation::PutService(service, entry));
        let key = ServiceKey {
            vip: Address::from(vip(service).ip()),
            port: vip(service).port().to_be(),
            protocol: TCP,
            _pad: 0,
        };
        fixture.apply(Operation::PutServiceKey(key, service));
    }
    fixture.apply(Operation::PutAddress(Address::from(vip(0).ip()), ROLE_VIP));
    fixture.apply(Operation::PutAddress(
        Address::from(WEB.backends[0].address.ip()),
        ROLE_BACKEND,
    ));

    let (told, counted) = (fixture.datapath().memory().total(), memory_of_all(&fixture));
    // Its own sum may leave out small maps, no more.
    assert!(
        told.abs_diff(counted) < counted / 10,
        "{told} told, {counted} counted"
    );
    // What each CPU has of its own counts once here: machines differ in how many they have.
    let of_cpus = 16 * u64::from(sizes.services * REASON_ENTRIES) + 64 * u64::from(sizes.backends + 1);
    let others = of_cpus * (nr_cpus().unwrap() as u64 - 1);
    assert!(
        counted - others < 256 << 20,
        "{counted} bytes, of which {others} for further CPUs"
    );

    for service in [0, SERVICES - 1] {
        let slots = fixture.datapath().by_slot(service).unwrap().unwrap();
        for port in 5000..5050 {
            let syn = tcp(&format!("198.51.100.7:{port}"), vip(service), SYN);
            fixture.run(&syn.bytes());
            let flow = fixture.flow(&syn).unwrap();
            let slot = slot_of(flow_hash(SETTINGS.seed, &syn.key()), FEW_SLOTS);
            assert_eq!((flow.service, flow.backend), (service, slots[slot as usize]));
            assert_eq!((flow.backend - 1) / MEMBERS, service);
        }
    }
}
