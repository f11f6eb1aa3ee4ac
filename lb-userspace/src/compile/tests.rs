use std::time::SystemTime;

use lb_common::abi::{Address, DEFAULT_SERVICES, FEW_SLOTS, MANY_SLOTS, ServiceKey};
use proptest::prelude::*;

use super::*;
use crate::{
    config::{self, NewFlowCap, PortRange, Probe, WhenAllDown},
    datapath::Pool,
    model::{
        NextHop,
        fixture::{any_model, backend, model, next_hop, service},
    },
};

const WEB: &str = "web";

fn web() -> Model {
    model(vec![service(
        WEB,
        10,
        &[80, 443],
        vec![backend("a", 11, 8080), backend("b", 12, 0)],
    )])
    .all_up()
}

fn compiled(model: &Model, actual: &Contents) -> Compiled {
    compile(&mut SlotTables::default(), model, actual).unwrap()
}

fn flags_of_first(compiled: &Compiled) -> u16 {
    let id = compiled.directory.backends[WEB][0];
    compiled.contents.backends[&id].flags
}

fn by_slot(pool: &Pool) -> Vec<u32> {
    pool.by_slot().unwrap()
}

fn owners(compiled: &Compiled, service: u32) -> BTreeSet<u32> {
    let pool = &compiled.contents.pools[&service];
    let slots: BTreeSet<u32> = by_slot(pool).into_iter().collect();
    assert_eq!(
        slots,
        pool.members.iter().copied().collect(),
        "each member has slots"
    );
    slots
}

#[test]
fn addresses_and_ports_are_in_network_byte_order() {
    let compiled = compiled(&web(), &Contents::default());
    let key = ServiceKey {
        vip: Address(zerocopy::transmute!([
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 203, 0, 113, 10_u8
        ])),
        port: u16::from_ne_bytes([0, 80]),
        protocol: 6,
        _pad: 0,
    };
    assert_eq!(compiled.contents.service_keys[&key], 0);
    assert_eq!(
        compiled.contents.backends[&1].port,
        u16::from_ne_bytes([0x1f, 0x90])
    );
    assert_eq!(compiled.contents.backends[&2].port, 0);
}

#[test]
fn flags_follow_health_and_administrative_state() {
    use BackendFlags as F;
    let draining = Administrative::Draining {
        since: SystemTime::UNIX_EPOCH,
    };
    let cases = [
        (
            Health::Up,
            Administrative::Enabled,
            F::UP | F::ACCEPTS_NEW | F::KEEPS_UDP,
        ),
        (Health::Up, draining, F::UP | F::DRAINING | F::KEEPS_UDP),
        (Health::Up, Administrative::Disabled, F::UP | F::DISABLED),
        (Health::Down, Administrative::Enabled, F::DOWN),
        (Health::Down, draining, F::DOWN | F::DRAINING),
        (Health::Unknown, Administrative::Enabled, F::KEEPS_UDP),
        (Health::Unknown, Administrative::Disabled, F::DISABLED),
    ];
    for (health, administrative, expected) in cases {
        let mut model = web();
        model.set_health(WEB, "a", health);
        model.set_administrative(WEB, "a", administrative);
        let flags = flags_of_first(&compiled(&model, &Contents::default()));
        assert_eq!(
            flags,
            expected | F::NEXT_HOP_KNOWN,
            "{health:?} {administrative:?}"
        );
    }
}

#[test]
fn weight_zero_keeps_flows_and_gets_no_new_ones() {
    let mut model = web();
    model.config.services[0].backends[0].weight = 0;
    let compiled = compiled(&model, &Contents::default());
    assert_eq!(
        flags_of_first(&compiled) & (BackendFlags::ACCEPTS_NEW | BackendFlags::KEEPS_UDP),
        4
    );
    assert_eq!(owners(&compiled, 0), BTreeSet::from([2]));
}

#[test]
fn a_backend_without_a_probe_is_up() {
    let mut model = web();
    model.health.clear();
    assert_eq!(
        owners(&compiled(&model, &Contents::default()), 0),
        BTreeSet::new()
    );
    model.config.services[0].health.probe = Probe::None;
    assert_eq!(
        owners(&compiled(&model, &Contents::default()), 0),
        BTreeSet::from([1, 2])
    );
}

/// Flags of the candidates and their slots by name.
fn candidates(model: &Model) -> Vec<(String, u16)> {
    let compiled = compiled(model, &Contents::default());
    let new = BackendFlags::ACCEPTS_NEW | BackendFlags::KEEPS_UDP;
    let owners = owners(&compiled, 0);
    let mut candidates = Vec::new();
    let backends = &model.config.services[0].backends;
    for (Backend { name, .. }, id) in backends.iter().zip(&compiled.directory.backends[WEB]) {
        let flags = compiled.contents.backends[id].flags;
        assert_eq!(
            flags & BackendFlags::ACCEPTS_NEW != 0,
            owners.contains(id),
            "{name} gets new flows if it has slots"
        );
        candidates.push((name.clone(), flags & new));
    }
    candidates
}

#[test]
fn backups_get_new_flows_while_no_other_backend_is_up_and_keep_their_flows_after() {
    use BackendFlags as F;
    let named = |a, b| vec![("a".to_owned(), a), ("b".to_owned(), b)];
    let both = F::ACCEPTS_NEW | F::KEEPS_UDP;
    let mut model = web();
    model.config.services[0].backends[1].backup = true;
    assert_eq!(candidates(&model), named(both, F::KEEPS_UDP));
    let gone: [&dyn Fn(&mut Model); 4] = [
        &|model| model.set_health(WEB, "a", Health::Down),
        &|model| model.set_health(WEB, "a", Health::Unknown),
        &|model| model.set_administrative(WEB, "a", Administrative::Disabled),
        &|model| model.config.services[0].backends[0].weight = 0,
    ];
    for (number, change) in gone.iter().enumerate() {
        let mut model = model.clone();
        change(&mut model);
        let found = candidates(&model);
        assert_eq!(found[1].1, both, "{number}");
        assert_eq!(found[0].1 & F::ACCEPTS_NEW, 0, "{number}");
    }
}

#[test]
fn when_all_are_down_all_that_are_enabled_are_tried_if_the_service_says_so() {
    use BackendFlags as F;
    let mut model = web();
    let service = &mut model.config.services[0];
    service.backends[1].backup = true;
    service
        .backends
        .extend([backend("c", 13, 0), backend("d", 14, 0), backend("e", 15, 0)]);
    service.backends[4].weight = 0;
    model.set_health(WEB, "a", Health::Down);
    model.set_health(WEB, "b", Health::Down);
    model.set_health(WEB, "d", Health::Up);
    model.set_health(WEB, "e", Health::Up);
    model.set_administrative(WEB, "d", Administrative::Disabled);
    let named = |flags: [u16; 5]| {
        ["a", "b", "c", "d", "e"]
            .map(str::to_owned)
            .into_iter()
            .zip(flags)
            .collect::<Vec<_>>()
    };
    assert_eq!(candidates(&model), named([0, 0, F::KEEPS_UDP, 0, F::KEEPS_UDP]));

    model.config.services[0].when_all_down = WhenAllDown::TryAll;
    let both = F::ACCEPTS_NEW | F::KEEPS_UDP;
    assert_eq!(candidates(&model), named([both, both, both, 0, F::KEEPS_UDP]));

    model.set_health(WEB, "b", Health::Up);
    assert_eq!(
        candidates(&model),
        named([0, both, F::KEEPS_UDP, 0, F::KEEPS_UDP])
    );
}

#[test]
fn a_backend_that_starts_slowly_has_its_part_of_even_the_smallest_weight() {
    let mut model = web();
    for backend in &mut model.config.services[0].backends {
        backend.weight = 1;
    }
    let whole = compiled(&model, &Contents::default()).contents;
    assert_eq!((whole.backends[&1].weight, whole.backends[&2].weight), (1, 1));
    model.ramps.insert((WEB.to_owned(), "a".to_owned()), 10);
    let contents = compiled(&model, &whole).contents;
    assert_eq!(
        (contents.backends[&1].weight, contents.backends[&2].weight),
        (10, 100)
    );
    let share = shares(&contents, 0)[&1];
    assert!((share - 10.0 / 110.0).abs() < 0.001, "{share}");
    let [before, after] = [&whole, &contents].map(|contents| by_slot(&contents.pools[&0]));
    assert_eq!(before.len(), FEW_SLOTS as usize);
    assert_eq!(after.len(), before.len());
    for (before, after) in before.into_iter().zip(after) {
        assert!(
            before == after || before == 1,
            "no slot goes to the backend that has fewer"
        );
    }

    // Alone it gets all, and where it gets none nothing changes.
    model.set_health(WEB, "b", Health::Down);
    assert_eq!(
        shares(&compiled(&model, &contents).contents, 0),
        BTreeMap::from([(1, 1.0)])
    );
    model.set_health(WEB, "b", Health::Up);
    model.set_health(WEB, "a", Health::Down);
    let contents = compiled(&model, &contents).contents;
    assert_eq!(contents.backends[&2].weight, 1);
}

#[test]
fn the_pools_of_a_sequence_have_a_slot_for_each_turn_or_member() {
    let mut model = web();
    model.config.services[0].backends[0].weight = 200;
    model.config.services[0].strategy = config::Strategy::RoundRobin;
    let first = compiled(&model, &Contents::default()).contents;
    assert_eq!(by_slot(&first.pools[&0]), [1, 2, 1]);
    assert_eq!(first.services[&0].strategy, abi::Strategy::RoundRobin.number());

    model.config.services[0].strategy = config::Strategy::LeastConnections;
    let second = compiled(&model, &first).contents;
    assert_eq!(second.pools[&0], Pool::of([1, 2]));
    assert_eq!(
        (second.backends[&1].weight, second.backends[&2].weight),
        (200, 100)
    );
    let thirds = BTreeMap::from([(1, 2.0 / 3.0), (2, 1.0 / 3.0)]);
    assert_eq!(shares(&first, 0), thirds);
    assert_eq!(shares(&second, 0), thirds);

    model.health.clear();
    let empty = compiled(&model, &second).contents;
    assert_eq!(empty.pools[&0], Pool::default());
    assert_eq!(shares(&empty, 0), BTreeMap::new());
}

#[test]
fn a_service_of_all_ports_has_one_key_and_a_setting_says_that_there_is_one() {
    let mut model = web();
    let before = compiled(&model, &Contents::default());
    assert_eq!(before.contents.settings.flags, 0);
    model.config.services[0].ports = vec![PortRange::ANY];
    let any = compiled(&model, &before.contents);
    assert_eq!(any.contents.settings.flags, SettingsFlags::ANY_PORT);
    let keys: Vec<u16> = any.contents.service_keys.keys().map(|key| key.port).collect();
    assert_eq!(keys, [0]);
    assert_eq!(any.directory, before.directory, "ids stay, and so do the flows");
    assert_eq!(compiled(&web(), &any.contents).contents, before.contents);
    assert_eq!(compiled(&web(), &any.contents).directory, before.directory);
}

#[test]
fn a_setting_says_that_there_is_a_service_of_this_host() {
    let mut model = web();
    model.config.services[0].forward = config::Forward::Local;
    let local = compiled(&model, &Contents::default());
    assert_eq!(local.contents.settings.flags, SettingsFlags::LOCAL);
    assert_eq!(compiled(&web(), &local.contents).contents.settings.flags, 0);
}

#[test]
fn a_setting_says_that_packets_come_in_by_the_loopback_interface() {
    let mut model = web();
    model.config.interfaces.push("lo".to_owned());
    let on_loopback = compiled(&model, &Contents::default());
    assert_eq!(on_loopback.contents.settings.flags, SettingsFlags::ON_LOOPBACK);
}

#[test]
fn a_service_of_all_ports_takes_no_id_that_another_service_has() {
    let mut model = web();
    let before = compiled(&model, &Contents::default());
    let mut any = service("any", 10, &[], vec![]);
    any.ports = vec![PortRange::ANY];
    any.protocol = Protocol::Udp;
    model.config.services.insert(0, any);
    let with_udp = compiled(&model, &before.contents);
    assert_eq!(with_udp.directory.services[WEB], 0);
    assert_eq!(with_udp.directory.services["any"], 1);
    // Of one protocol the validation would not let them be together; the id is that of the exact key all the same.
    model.config.services[0].protocol = Protocol::Tcp;
    assert_eq!(compiled(&model, &before.contents).directory.services[WEB], 0);
}

#[test]
fn what_sources_may_do_is_in_the_entry_of_the_service() {
    let mut model = web();
    model.config.services[0].new_flow_cap = Some(NewFlowCap {
        rate: 20,
        burst: 50,
        prefix_v4: 24,
        prefix_v6: 56,
    });
    model.config.services[0].allow = vec!["192.0.2.0/24".parse().unwrap()];
    let contents = compiled(&model, &Contents::default()).contents;
    let entry = contents.services[&0];
    assert_eq!((entry.new_flow_rate, entry.new_flow_burst), (20, 50));
    assert_eq!((entry.rate_prefix_v4, entry.rate_prefix_v6), (24, 56));
    let flags = abi::ServiceFlags::HAS_FILTERS | abi::ServiceFlags::DENIES_OTHERS;
    assert_eq!(entry.flags, flags);
    assert_eq!(contents.source_filters.len(), 1);
    assert_eq!(compiled(&web(), &contents).contents.source_filters.len(), 0);
}

#[test]
fn tcp_flows_of_a_removed_backend_are_reset_if_the_service_says_so() {
    for (protocol, reset_on_removal, expected) in [
        (Protocol::Tcp, true, BackendFlags::RESETS),
        (Protocol::Tcp, false, 0),
        (Protocol::Udp, true, 0),
    ] {
        let mut model = web();
        model.config.services[0].protocol = protocol;
        model.config.services[0].reset_on_removal = reset_on_removal;
        let whole = model.clone();
        let first = compiled(&model, &Contents::default()).contents;
        model.config.services[0].backends.remove(0);
        let second = compiled(&model, &first).contents;
        let flags = second.backends[&1].flags & !BackendFlags::NEXT_HOP_KNOWN;
        assert_eq!(
            flags,
            BackendFlags::REMOVED | expected,
            "{protocol} {reset_on_removal}"
        );
        assert_eq!(second.backends[&2].flags & BackendFlags::RESETS, 0);
        // As long as it has flows, and not after it has come back.
        model.live_flows.insert(1, 3);
        assert_eq!(compiled(&model, &second).contents, second);
        let back = compiled(&whole, &second).contents;
        assert_eq!(back.backends[&1].flags, first.backends[&1].flags);
    }
}

#[test]
fn an_ipv6_service_is_compiled_as_an_ipv4_one() {
    let mut model = model(vec![Service {
        vip: "2001:db8::10".parse().unwrap(),
        backends: vec![Backend {
            address: "fd00::11".parse().unwrap(),
            ..backend("a", 0, 8080)
        }],
        ..service(WEB, 10, &[80], Vec::new())
    }]);
    let source: IpAddr = "fd00::1".parse().unwrap();
    let hop = NextHop {
        source,
        ..next_hop(11)
    };
    model.next_hops.insert("fd00::11".parse().unwrap(), hop);
    model.set_health(WEB, "a", Health::Up);
    let first = compiled(&model, &Contents::default());
    let key = first.contents.service_keys.keys().next().unwrap();
    assert_eq!(IpAddr::from(key.vip), model.config.services[0].vip);
    let entry = first.contents.backends[&1];
    assert_eq!(
        (entry.address.to_string(), entry.source.to_string()),
        ("fd00::11".to_owned(), "fd00::1".to_owned())
    );
    assert_eq!(first.contents.addresses.len(), 2);
    assert_eq!(owners(&first, 0), BTreeSet::from([1]));
    assert_eq!(compiled(&model, &first.contents).contents, first.contents);
    let restored = restore(
        &model.config,
        &first.contents,
        &model.sizes,
        SystemTime::UNIX_EPOCH,
    );
    assert_eq!(restored.health, model.health);
}

#[test]
fn too_many_source_prefixes_are_refused() {
    let mut model = web();
    model.config.services[0].deny = (0..=MAX_SOURCE_FILTERS)
        .map(|number| std::net::Ipv4Addr::from_bits(number << 8))
        .map(|address| ipnet::Ipv4Net::new(address, 24).unwrap().into())
        .collect();
    let error = compile(&mut SlotTables::default(), &model, &Contents::default())
        .map(drop)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the configuration has 65537 source prefixes, 65536 fit: remove some"
    );
}

#[test]
fn a_next_hop_counts_as_known_with_its_mac_address() {
    let mut model = web();
    let hop = model
        .next_hops
        .get_mut(&model.config.services[0].backends[0].address)
        .unwrap();
    hop.next_hop_mac = None;
    model
        .next_hops
        .remove(&model.config.services[0].backends[1].address);
    let contents = compiled(&model, &Contents::default()).contents;
    let known = |id: u32| contents.backends[&id].flags & BackendFlags::NEXT_HOP_KNOWN != 0;
    assert!(!known(1) && !known(2));
    assert_eq!(
        (contents.backends[&1].ifindex, contents.backends[&2].ifindex),
        (3, 0)
    );
    assert_eq!(IpAddr::from(contents.backends[&1].source).to_string(), "10.0.0.1");
    assert_eq!(contents.backends[&1].link, Link::default());

    let contents = compiled(&web(), &contents).contents;
    assert_eq!(
        contents.backends[&1].link,
        Link::new([2, 0, 0, 0, 0, 11], [2, 0, 0, 0, 0, 1])
    );
}

#[test]
fn flows_of_full_nat_begin_anew_when_this_hosts_address_towards_the_backend_changes() {
    for (forward, begin_anew) in [(Forward::Nat, false), (Forward::FullNat, true)] {
        let mut model = web();
        model.config.services[0].forward = forward;
        let first = compiled(&model, &Contents::default()).contents;
        let address = model.config.services[0].backends[0].address;

        // A route that goes and comes back changes nothing.
        let hop = model.next_hops.remove(&address).unwrap();
        let without = compiled(&model, &first).contents;
        assert_eq!(without.backends[&1].source, first.backends[&1].source);
        model.next_hops.insert(address, hop);
        assert_eq!(compiled(&model, &without).contents, first);

        model.next_hops.get_mut(&address).unwrap().source = "10.0.0.2".parse().unwrap();
        let moved = compiled(&model, &first).contents;
        assert_eq!(IpAddr::from(moved.backends[&1].source).to_string(), "10.0.0.2");
        assert_eq!(
            moved.backends[&1].generation != first.backends[&1].generation,
            begin_anew
        );
        assert_eq!(moved.backends[&2], first.backends[&2]);
        assert_eq!(compiled(&model, &moved).contents, moved);
    }
}

#[test]
fn a_service_keeps_its_id_as_long_as_it_keeps_a_key() {
    let first = compiled(&web(), &Contents::default());
    let mut renamed = web();
    renamed.config.services[0].name = "shop".to_owned();
    renamed.config.services[0].ports.remove(0);
    renamed
        .config
        .services
        .insert(0, service("other", 20, &[80], vec![backend("a", 11, 8080)]));
    let second = compiled(&renamed, &first.contents);
    assert_eq!(
        second.directory.services,
        BTreeMap::from([("shop".to_owned(), 0), ("other".to_owned(), 1)])
    );
    assert_eq!(second.directory.backends["shop"], [1, 2]);
    assert_eq!(second.directory.backends["other"], [3]);
}

#[test]
fn a_removed_backend_stays_until_a_sweep_has_found_no_flow_of_it() {
    let first = compiled(&web(), &Contents::default());
    let mut model = web();
    model.config.services[0].backends.remove(0);

    let second = compiled(&model, &first.contents);
    let known = BackendFlags::NEXT_HOP_KNOWN;
    assert_eq!(second.contents.backends[&1].flags, BackendFlags::REMOVED | known);
    assert_eq!(
        second.contents.backends[&1].generation,
        first.contents.backends[&1].generation
    );
    assert_eq!(owners(&second, 0), BTreeSet::from([2]));
    assert!(!second.directory.all_backends().contains(&1));

    model.live_flows.insert(1, 5);
    let third = compiled(&model, &second.contents);
    assert_eq!(third.contents, second.contents);

    model.live_flows.insert(1, 0);
    let fourth = compiled(&model, &third.contents);
    assert_eq!(fourth.contents.backends.keys().collect::<Vec<_>>(), [&2]);
    assert_eq!(fourth.contents.addresses.len(), 2);
}

#[test]
fn a_sweep_changes_what_the_maps_shall_hold_only_if_it_lets_something_go_or_age() {
    let first = compiled(&web(), &Contents::default()).contents;
    let mut model = web();
    model.live_flows = BTreeMap::from([(1, 5), (2, 0)]);
    assert!(!is_changed_by_sweep(&model, &first), "both are still there");
    model.config.services[0].backends.remove(0);
    let without = compiled(&model, &first).contents;
    assert!(!is_changed_by_sweep(&model, &without), "it has flows");
    model.live_flows.insert(1, 0);
    assert!(is_changed_by_sweep(&model, &without));
    let after = compiled(&model, &without).contents;
    assert!(!is_changed_by_sweep(&model, &after), "it is gone");

    model.config.services.clear();
    let leaving = compiled(&model, &after).contents;
    model.live_flows = BTreeMap::from([(2, 1)]);
    assert!(!is_changed_by_sweep(&model, &leaving));
    model.left_services.insert(0);
    assert!(is_changed_by_sweep(&model, &leaving));

    let mut model = web();
    let mut ageless = first;
    ageless.settings.flags |= SettingsFlags::AGELESS;
    assert!(!is_changed_by_sweep(&model, &ageless));
    model.ages_are_renewed = true;
    assert!(is_changed_by_sweep(&model, &ageless));
}

#[test]
fn a_removed_backend_that_comes_back_gets_its_id() {
    let first = compiled(&web(), &Contents::default());
    let mut model = web();
    model.config.services[0].backends.remove(0);
    let without = compiled(&model, &first.contents);
    assert_eq!(compiled(&web(), &without.contents).contents, first.contents);
}

#[test]
fn a_new_backend_gets_an_id_that_no_flow_can_follow() {
    let first = compiled(&web(), &Contents::default());
    let mut model = web();
    model.config.services[0].backends[0] = backend("c", 13, 8080);
    let second = compiled(&model, &first.contents);
    assert_eq!(second.directory.backends[WEB], [3, 2]);

    // The id is free again, and its next owner has another generation, also when the maps were empty between.
    let mut gone = self::model(Vec::new());
    let leaving = compiled(&gone, &second.contents).contents;
    (gone.left_services, gone.live_flows) = (BTreeSet::from([0]), BTreeMap::from([(1, 0), (2, 0), (3, 0)]));
    let empty = compiled(&gone, &leaving);
    let third = compiled(&model, &empty.contents);
    assert_eq!(third.directory.backends[WEB][0], 1);
    assert_ne!(
        third.contents.backends[&1].generation,
        first.contents.backends[&1].generation
    );
}

#[test]
fn the_ids_of_a_removed_service_and_its_backends_are_given_away_once_a_sweep_has_met_no_flow_of_them() {
    let first = compiled(&web(), &Contents::default()).contents;
    let other = || service("other", 20, &[80], vec![backend("a", 11, 8080)]);
    let mut model = model(vec![other()]);
    let second = compiled(&model, &first);
    assert_eq!(second.directory.services["other"], 1);
    assert_eq!(second.directory.backends["other"], [3]);
    let leaving = second.contents.services[&0];
    assert_eq!(leaving.flags, ServiceFlags::REMOVED);
    assert_eq!(leaving.vip, first.services[&0].vip, "its flows are told by it");
    assert!(second.contents.service_keys.values().all(|id| *id == 1));
    assert_eq!(second.contents.pools.keys().collect::<Vec<_>>(), [&1]);
    for id in [1, 2] {
        assert_eq!(second.contents.backends[&id].flags, BackendFlags::REMOVED);
    }
    // As long as no sweep has said that there are none.
    model.live_flows = BTreeMap::from([(1, 7), (2, 7)]);
    assert_eq!(compiled(&model, &second.contents).contents, second.contents);

    (model.left_services, model.live_flows) = (BTreeSet::from([0]), BTreeMap::from([(1, 0), (2, 0)]));
    let third = compiled(&model, &second.contents).contents;
    assert_eq!(third.services.keys().collect::<Vec<_>>(), [&1]);
    assert_eq!(third.backends.keys().collect::<Vec<_>>(), [&3]);
    (model.left_services, model.live_flows) = Default::default();
    model
        .config
        .services
        .push(service("new", 30, &[80], vec![backend("b", 12, 0)]));
    let fourth = compiled(&model, &third);
    assert_eq!(fourth.directory.services["new"], 0);
    assert_eq!(fourth.directory.backends["new"], [1]);
}

#[test]
fn a_service_with_another_vip_or_protocol_is_another_one_and_so_is_a_backend_with_another_address() {
    let first = compiled(&web(), &Contents::default());
    let changes: [&dyn Fn(&mut Service); 2] = [
        &|service| service.vip = "203.0.113.11".parse().unwrap(),
        &|service| service.protocol = Protocol::Udp,
    ];
    for change in changes {
        let mut model = web();
        change(&mut model.config.services[0]);
        let second = compiled(&model, &first.contents);
        assert_eq!(second.directory.services[WEB], 1);
        assert_eq!(second.directory.backends[WEB], [3, 4]);
    }
    let changes: [&dyn Fn(&mut Backend); 2] = [
        &|backend| backend.address = "10.0.0.19".parse().unwrap(),
        &|backend| backend.port = Some(8081),
    ];
    for change in changes {
        let mut model = web();
        change(&mut model.config.services[0].backends[0]);
        let second = compiled(&model, &first.contents);
        assert_eq!(second.directory.backends[WEB][0], 3);
    }
}

#[test]
fn the_flow_table_keeps_its_seed_when_the_seed_changes() {
    let first = compiled(&web(), &Contents::default()).contents;
    assert_eq!(first.settings.table_seed, first.settings.seed);
    let mut model = web();
    model.seed = [3, 4];
    let second = compiled(&model, &first).contents;
    assert_eq!(second.settings.seed, [3, 4]);
    assert_eq!(second.settings.table_seed, first.settings.table_seed);
}

#[test]
fn flows_do_not_age_from_a_change_of_timeouts_on_until_a_sweep_has_brought_them_to_the_new_ticks() {
    let ageless = |contents: &Contents| contents.settings.flags & SettingsFlags::AGELESS != 0;
    let mut model = web();
    let first = compiled(&model, &Contents::default()).contents;
    assert!(!ageless(&first), "new maps have no flows");
    // The same ticks, if more of them.
    model.config.flow_table.tcp_idle_timeout += Duration::from_secs(60);
    let first = compiled(&model, &first).contents;
    assert!(!ageless(&first));

    model.config.flow_table.tcp_idle_timeout *= 4;
    let second = compiled(&model, &first).contents;
    assert!(ageless(&second) && second.settings.tick_shifts != first.settings.tick_shifts);
    assert_eq!(compiled(&model, &second).contents, second);
    model.ages_are_renewed = true;
    let third = compiled(&model, &second).contents;
    assert!(!ageless(&third));
    // What was renewed is no good after the next change.
    model.config.flow_table.udp_idle_timeout *= 4;
    assert!(ageless(&compiled(&model, &third).contents));
}

#[test]
fn an_address_may_have_both_roles() {
    let mut model = web();
    model
        .config
        .services
        .push(service("inner", 20, &[8080], vec![backend("web", 0, 80)]));
    model.config.services[1].backends[0].address = model.config.services[0].vip;
    let contents = compiled(&model, &Contents::default()).contents;
    assert_eq!(
        contents.addresses[&model.config.services[0].vip.into()],
        ROLE_VIP | ROLE_BACKEND
    );
    assert_eq!(contents.addresses[&model.config.services[1].vip.into()], ROLE_VIP);
    assert_eq!(
        contents.addresses[&model.config.services[0].backends[0].address.into()],
        ROLE_BACKEND
    );
}

#[test]
fn services_with_the_same_backends_and_weights_have_one_table() {
    let backends = |weight| {
        let mut backends = vec![backend("a", 11, 80), backend("b", 12, 80), backend("c", 13, 80)];
        for backend in &mut backends {
            backend.weight *= weight;
        }
        backends
    };
    let mut reversed = backends(1);
    reversed.reverse();
    let mut heavier = backends(1);
    heavier[0].weight = 200;
    let model = model(vec![
        service("one", 10, &[80], backends(1)),
        service("in-another-order", 20, &[80], reversed),
        service("with-twice-the-weights", 30, &[80], backends(2)),
        service("with-another-weight", 40, &[80], heavier),
    ])
    .all_up();
    let mut tables = SlotTables::default();
    let contents = compile(&mut tables, &model, &Contents::default())
        .unwrap()
        .contents;
    let table = |id| contents.pools[&id].table.as_ref().unwrap();
    assert!(std::ptr::eq(&raw const **table(0), &raw const **table(1)));
    assert!(std::ptr::eq(&raw const **table(0), &raw const **table(2)));
    assert_ne!(table(0), table(3));
    // The same slots go to the same servers.
    let addresses = |id| -> Vec<Address> {
        let slots = by_slot(&contents.pools[&id]);
        slots.iter().map(|id| contents.backends[id].address).collect()
    };
    assert!(addresses(0) == addresses(1) && addresses(0) == addresses(2));
    assert!(addresses(0) != addresses(3));
}

#[test]
fn the_number_of_slots_follows_the_configuration_alone() {
    let slots = |model: &Model| {
        let contents = compiled(model, &Contents::default()).contents;
        contents.pools[&0].slots()
    };
    let of = |weights: &[u32]| {
        let backends = (1..).zip(weights).map(|(host, weight)| Backend {
            weight: *weight,
            ..backend(&format!("b{host}"), host, 80)
        });
        model(vec![service(WEB, 10, &[80], backends.collect())]).all_up()
    };
    for (weights, expected) in [
        (&[100; 12][..], FEW_SLOTS),
        (&[100; 13], MANY_SLOTS),
        (&[1, 11], FEW_SLOTS),
        (&[1, 12], MANY_SLOTS),
        (&[1, 1, 0], FEW_SLOTS),
    ] {
        let mut model = of(weights);
        assert_eq!(slots(&model), expected, "{weights:?}");
        // Whoever is down, or starts slowly, or is drained.
        model.ramps.insert((WEB.to_owned(), "b1".to_owned()), 10);
        assert_eq!(slots(&model), expected, "{weights:?}");
        if weights.len() > 2 {
            let down = if weights[2] == 0 { "b3" } else { "b2" };
            model.set_health(WEB, down, Health::Down);
            assert_eq!(slots(&model), expected, "{weights:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_its_number() {
    let all = vec![PortRange {
        first: 2,
        last: 65_535,
    }];
    let mut model = model(vec![
        service("one", 1, &[], vec![]),
        service("two", 2, &[], vec![]),
    ]);
    model.config.services[0].ports = all.clone();
    model.config.services[1].ports = all;
    let error = compile(&mut SlotTables::default(), &model, &Contents::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the configuration has 131068 ports, 65536 fit: remove some"
    );

    let second = model.config.services.remove(1);
    let actual = compiled(&model, &Contents::default()).contents;
    model.config.services = vec![second];
    let error = compile(&mut SlotTables::default(), &model, &actual).unwrap_err();
    let too_many = CompileError::TooManyAtOnce {
        objects: "ports",
        needed: 131_068,
        limit: 65_536,
    };
    assert_eq!(error, too_many);

    let many = (0..=DEFAULT_SERVICES as u16)
        .map(|n| service(&format!("s{n}"), 1, &[n + 1], vec![]))
        .collect();
    let error = compile(
        &mut SlotTables::default(),
        &self::model(many),
        &Contents::default(),
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the configuration has 1025 services, and the maps were made for 1024: `limits.services` (\"auto\", or at least \
         1025) takes effect with new maps, after `xlb detach`, which ends all flows, and a start"
    );
    let mut small = web();
    small.sizes.backends = 1;
    let error = compile(&mut SlotTables::default(), &small, &Contents::default()).unwrap_err();
    assert_eq!(
        error,
        CompileError::TooManyForMaps {
            objects: "backends",
            needed: 2,
            limit: 1
        }
    );
    small.sizes.backends = 2;
    let actual = compiled(&small, &Contents::default()).contents;
    small.config.services[0].backends[0] = backend("c", 13, 8080);
    let error = compile(&mut SlotTables::default(), &small, &actual).unwrap_err();
    assert!(
        matches!(
            error,
            CompileError::TooManyAtOnce {
                objects: "backends",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn ten_thousand_services_are_compiled_and_planned() {
    use crate::{
        datapath::{Datapath, Sizes, memory::MemoryDatapath},
        reconcile::plan,
    };
    let services = (0..10_000_u32).map(|number| {
        let [_, _, high, low] = number.to_be_bytes();
        // Every other service has the same servers, the others have some of their own.
        let backends = (0..10_u8).map(|host| Backend {
            address: if number % 2 == 0 {
                [10, 0, 0, host].into()
            } else {
                [10, high + 1, low, host].into()
            },
            ..backend(&format!("b{host}"), host, 80)
        });
        Service {
            vip: [203, 0, high, low].into(),
            ..service(&format!("s{number}"), 10, &[80], backends.collect())
        }
    });
    let mut model = model(services.collect()).all_up();
    let sizes = Sizes {
        services: 16_383,
        backends: 262_143,
        ..Sizes::default()
    };
    model.sizes = sizes;
    let mut datapath = MemoryDatapath {
        sizes,
        ..MemoryDatapath::default()
    };
    let mut tables = SlotTables::default();
    let compiled = compile(&mut tables, &model, &Contents::default()).unwrap();
    assert_eq!(compiled.directory.all_backends().len(), 100_000);
    for operation in plan(&Contents::default(), &compiled.contents) {
        datapath.apply(&operation).unwrap();
    }
    assert!(datapath.contents == compiled.contents);
    let distinct: BTreeSet<u64> = (compiled.contents.pools.values())
        .filter_map(|pool| Some(pool.table.as_ref()?.digest))
        .collect();
    assert_eq!(distinct.len(), 5001);

    // One goes down: its entry and the pool of its service change, nothing else.
    model.set_health("s5000", "b3", Health::Down);
    let next = compile(&mut tables, &model, &datapath.contents).unwrap().contents;
    assert_eq!(plan(&datapath.contents, &next).len(), 2);
}

#[test]
fn a_restarted_daemon_reads_back_health_and_administrative_state() {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    let mut model = web();
    let service = &mut model.config.services[0];
    service
        .backends
        .extend([backend("c", 13, 0), backend("d", 14, 0), backend("e", 15, 0)]);
    model.set_health(WEB, "b", Health::Down);
    model.set_health(WEB, "c", Health::Up);
    model.set_administrative(
        WEB,
        "c",
        Administrative::Draining {
            since: SystemTime::UNIX_EPOCH,
        },
    );
    model.set_administrative(WEB, "d", Administrative::Disabled);
    let actual = compiled(&model, &Contents::default()).contents;

    // What the configuration does not name any more is left out.
    model.config.services[0]
        .backends
        .retain(|backend| backend.name != "b");
    let restored = restore(&model.config, &actual, &model.sizes, now);
    let name = |backend: &str| (WEB.to_owned(), backend.to_owned());
    assert_eq!(
        restored.health,
        BTreeMap::from([(name("a"), Health::Up), (name("c"), Health::Up)])
    );
    let draining = Administrative::Draining { since: now };
    let disabled = Administrative::Disabled;
    assert_eq!(
        restored.administrative,
        BTreeMap::from([(name("c"), draining), (name("d"), disabled)])
    );
}

#[test]
fn contents_that_make_no_sense_are_mended() {
    let good = compiled(&web(), &Contents::default());
    let mut bad = good.contents.clone();
    bad.backends.insert(0, bad.backends[&1]);
    bad.backends.insert(
        9,
        abi::Backend {
            service_plus_one: 0,
            ..bad.backends[&1]
        },
    );
    bad.backends.insert(
        10,
        abi::Backend {
            service_plus_one: u32::MAX,
            flags: u16::MAX,
            ..bad.backends[&1]
        },
    );
    bad.backends.insert(u32::MAX, bad.backends[&1]);
    bad.services.insert(u32::MAX, abi::Service::default());
    bad.pools.insert(7, Pool::of([3, 4]));
    for id in bad.service_keys.values_mut() {
        *id = u32::MAX;
    }
    assert_eq!(compiled(&web(), &bad).contents, good.contents);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn compiling_from_the_result_changes_nothing(before in any_model(), after in any_model()) {
        let actual = compiled(&before, &Contents::default()).contents;
        let first = compiled(&after, &actual);
        let mut second_model = after;
        // A backend that leaves now was counted before it left.
        second_model.live_flows.clear();
        let second = compiled(&second_model, &first.contents);
        prop_assert_eq!(&first.directory, &second.directory);
        prop_assert_eq!(first.contents, second.contents);
    }

    #[test]
    fn a_sweep_that_lets_nothing_go_changes_nothing(before in any_model(), after in any_model(), age_anew: bool) {
        let actual = compiled(&before, &Contents::default()).contents;
        let mut model = after;
        let found = std::mem::take(&mut model.live_flows);
        let actual = compiled(&model, &actual).contents;
        (model.live_flows, model.ages_are_renewed) = (found, age_anew);
        if !is_changed_by_sweep(&model, &actual) {
            prop_assert_eq!(compiled(&model, &actual).contents, actual);
        }
    }

    #[test]
    fn an_id_in_use_never_changes_its_owner(before in any_model(), after in any_model()) {
        let actual = compiled(&before, &Contents::default()).contents;
        let desired = compiled(&after, &actual).contents;
        for (id, new) in &desired.backends {
            if let Some(old) = actual.backends.get(id) {
                prop_assert_eq!(
                    (old.service_plus_one, old.address, old.port, old.generation),
                    (new.service_plus_one, new.address, new.port, new.generation)
                );
            }
        }
        let protocol = |contents: &Contents, id: u32| {
            let of_service = contents.service_keys.iter().find(|(_, found)| **found == id);
            of_service.map(|(key, _)| key.protocol)
        };
        for (id, new) in &desired.services {
            if let Some(old) = actual.services.get(id) {
                prop_assert_eq!(old.vip, new.vip);
                let (old, new) = (protocol(&actual, *id), protocol(&desired, *id));
                prop_assert!(old == new || new.is_none());
            }
        }
    }
}

proptest! {
    #[test]
    fn following_the_states_of_a_service_leads_where_compiling_all_does(
        mut model in any_model(),
        chosen in any::<(prop::sample::Index, prop::sample::Index)>(),
        health in prop::sample::select(vec![Health::Up, Health::Down]),
        is_disabled: bool,
        ramp in prop::option::of(10_u32..100),
    ) {
        prop_assume!(!model.config.services.is_empty());
        let first = compiled(&model, &Contents::default());
        // What was found out about backends that leave is not of interest here.
        model.live_flows.clear();
        let service = chosen.0.get(&model.config.services).clone();
        prop_assume!(!service.backends.is_empty());
        let backend = &chosen.1.get(&service.backends).name;
        model.set_health(&service.name, backend, health);
        let name = (service.name.clone(), backend.clone());
        match ramp {
            Some(percent) => drop(model.ramps.insert(name, percent)),
            None => drop(model.ramps.remove(&name)),
        }
        if is_disabled {
            model.set_administrative(&service.name, backend, Administrative::Disabled);
        }
        let mut followed = first.contents.clone();
        let operations = follow_states(
            &mut SlotTables::default(),
            &model,
            &service,
            &first.directory,
            &first.contents,
        );
        for operation in operations.unwrap() {
            followed.record(&operation);
        }
        prop_assert_eq!(followed, compiled(&model, &first.contents).contents);
    }

    #[test]
    fn remembered_slot_tables_change_no_result(models in proptest::collection::vec(any_model(), 1..5)) {
        let mut tables = SlotTables::default();
        let mut actual = Contents::default();
        for model in &models {
            let cold = compile(&mut SlotTables::default(), model, &actual).unwrap().contents;
            let warm = compile(&mut tables, model, &actual).unwrap().contents;
            prop_assert!(warm == cold);
            actual = warm;
        }
    }
}
