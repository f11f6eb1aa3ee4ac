use std::time::SystemTime;

use lb_common::abi::{Address, ServiceKey};
use proptest::prelude::*;

use super::*;
use crate::{
    config::{PortRange, Probe},
    model::fixture::{any_model, backend, model, service},
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

fn flags_of(compiled: &Compiled, backend: &str) -> u16 {
    let id = compiled.directory.backends[&(WEB.to_owned(), backend.to_owned())];
    compiled.contents.backends[&id].flags
}

fn owners(compiled: &Compiled, service: u32) -> BTreeSet<u32> {
    compiled.contents.slots[&service].iter().copied().collect()
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
        let flags = flags_of(&compiled(&model, &Contents::default()), "a");
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
        flags_of(&compiled, "a") & (BackendFlags::ACCEPTS_NEW | BackendFlags::KEEPS_UDP),
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
        BTreeSet::from([0])
    );
    model.config.services[0].health.probe = Probe::None;
    assert_eq!(
        owners(&compiled(&model, &Contents::default()), 0),
        BTreeSet::from([1, 2])
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
    assert_eq!(second.directory.backends[&("shop".to_owned(), "b".to_owned())], 2);
    assert_eq!(
        second.directory.backends[&("other".to_owned(), "a".to_owned())],
        3
    );
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
    assert!(!second.directory.backends.values().any(|id| *id == 1));

    model.live_flows.insert(1, 5);
    let third = compiled(&model, &second.contents);
    assert_eq!(third.contents, second.contents);

    model.live_flows.insert(1, 0);
    let fourth = compiled(&model, &third.contents);
    assert_eq!(fourth.contents.backends.keys().collect::<Vec<_>>(), [&2]);
    assert_eq!(fourth.contents.addresses.len(), 2);
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
    assert_eq!(second.directory.backends[&(WEB.to_owned(), "c".to_owned())], 3);

    // The id is free again, and its next owner has another generation, also when the maps were empty between.
    let empty = compiled(&self::model(Vec::new()), &second.contents);
    let third = compiled(&model, &empty.contents);
    assert_eq!(third.directory.backends[&(WEB.to_owned(), "c".to_owned())], 1);
    assert_ne!(
        third.contents.backends[&1].generation,
        first.contents.backends[&1].generation
    );
}

#[test]
fn the_backends_of_a_removed_service_leave_at_once() {
    let first = compiled(&web(), &Contents::default());
    let mut model = model(Vec::new());
    model.live_flows = BTreeMap::from([(1, 7), (2, 7)]);
    let settings = first.contents.settings;
    assert_eq!(
        compiled(&model, &first.contents).contents,
        Contents {
            settings,
            ..Contents::default()
        }
    );
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
fn an_unchanged_slot_table_is_not_built_into_new_memory() {
    let first = compiled(&web(), &Contents::default());
    let second = compiled(&web(), &first.contents);
    assert!(Arc::ptr_eq(&first.contents.slots[&0], &second.contents.slots[&0]));
}

#[test]
fn what_does_not_fit_is_refused_with_its_number() {
    let all = vec![PortRange {
        first: 1,
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
        "the configuration has 131070 ports, 65536 fit: remove some"
    );

    let second = model.config.services.remove(1);
    let actual = compiled(&model, &Contents::default()).contents;
    model.config.services = vec![second];
    let error = compile(&mut SlotTables::default(), &model, &actual).unwrap_err();
    let too_many = CompileError::TooManyAtOnce {
        objects: "ports",
        needed: 131_070,
        limit: 65_536,
    };
    assert_eq!(error, too_many);

    let many = (0..=MAX_SERVICES as u16)
        .map(|n| service(&format!("s{n}"), 1, &[n + 1], vec![]))
        .collect();
    let error = compile(
        &mut SlotTables::default(),
        &self::model(many),
        &Contents::default(),
    )
    .unwrap_err();
    assert_eq!(
        error,
        CompileError::TooMany {
            objects: "services",
            needed: 1025,
            limit: 1024
        }
    );
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
    let restored = restore(&model.config, &actual, now);
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
    bad.slots.insert(7, vec![3, 4].into());
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
    }
}

proptest! {
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
