use std::time::SystemTime;

use lb_common::abi::{
    self, BackendFlags, FlowKey, ROLE_BACKEND, ROLE_VIP, ServiceFlags, SettingsFlags, TcpState,
};
use proptest::prelude::*;

use super::*;
use crate::{
    compile::{SlotTables, compile},
    config::Backend,
    datapath::{
        Contents, Datapath, Flow, Operation, Pool, contents_dump,
        faulty::{FaultyDatapath, Schedule},
        memory::MemoryDatapath,
    },
    model::{
        Administrative, Health, Model,
        fixture::{any_model, backend, model, service},
    },
};

type Testbed = Reconciler<FaultyDatapath<MemoryDatapath>>;

fn testbed() -> Testbed {
    Reconciler::new(FaultyDatapath::new(MemoryDatapath::default(), Schedule::Never)).unwrap()
}

/// Compiles and reconciles; tells how many operations it took.
fn settle(testbed: &mut Testbed, model: &Model) -> usize {
    let desired = compile(&mut SlotTables::default(), model, testbed.actual())
        .unwrap()
        .contents;
    let applied = testbed.reconcile(desired.clone()).unwrap();
    assert_eq!(testbed.datapath().read().unwrap(), desired);
    assert_eq!(testbed.actual(), &desired);
    applied.operations
}

fn swept(testbed: &mut Testbed, now: u64) -> Swept {
    let scope = Scope {
        now,
        ..Scope::default()
    };
    let mut sweep = testbed.begin_sweep(&scope).unwrap();
    loop {
        if let Some(swept) = testbed.sweep(&mut sweep).unwrap().swept {
            return swept;
        }
    }
}

/// The maps without the settings, which stay the same.
fn dump(testbed: &Testbed) -> Vec<String> {
    let lines = contents_dump(&testbed.datapath().inner.contents);
    lines
        .into_iter()
        .filter(|line| !line.starts_with("settings "))
        .collect()
}

fn web(backends: Vec<Backend>) -> Model {
    model(vec![service("web", 10, &[80, 443], backends)]).all_up()
}

fn a() -> Backend {
    backend("a", 11, 8080)
}

fn b() -> Backend {
    backend("b", 12, 0)
}

fn c() -> Backend {
    backend("c", 13, 8080)
}

const A: &str = "service 0 10.0.0.11:8080 generation 3aef83b1";
const B: &str = "service 0 10.0.0.12 generation 6787a748";
const C: &str = "service 0 10.0.0.13:8080 generation 40ecde2d";

fn way(host: u8) -> String {
    format!("interface 3 source 10.0.0.1 link 02:00:00:00:00:01 > 02:00:00:00:00:{host:02x}")
}

#[test]
fn the_maps_follow_a_service_through_its_life() {
    let mut testbed = testbed();

    // Start.
    let mut model = web(vec![a(), b()]);
    settle(&mut testbed, &model);
    let healthy = "next-hop-known,accepts-new,keeps-udp,up";
    assert_eq!(
        dump(&testbed),
        [
            "address 10.0.0.11 backend".to_owned(),
            "address 10.0.0.12 backend".to_owned(),
            "address 203.0.113.10 vip".to_owned(),
            format!("backend 1 {A} {healthy} {}", way(11)),
            format!("backend 2 {B} {healthy} {}", way(12)),
            "service 0 consistent-hash nat".to_owned(),
            "service-key tcp 203.0.113.10:80 service 0".to_owned(),
            "service-key tcp 203.0.113.10:443 service 0".to_owned(),
            "pool 0 members 2,1 slots 16381 table f662e4e9e675f9b8".to_owned(),
        ]
    );
    let started = dump(&testbed);
    assert_eq!(settle(&mut testbed, &model), 0);

    // One goes down: its entry and the table change, nothing else.
    model.set_health("web", "b", Health::Down);
    assert_eq!(settle(&mut testbed, &model), 2);
    let mut expected = started.clone();
    expected[4] = format!("backend 2 {B} next-hop-known,down {}", way(12));
    expected[8] = "pool 0 members 1".to_owned();
    assert_eq!(dump(&testbed), expected);
    model.set_health("web", "b", Health::Up);
    settle(&mut testbed, &model);
    assert_eq!(dump(&testbed), started);

    // The other is drained.
    model.set_administrative(
        "web",
        "a",
        Administrative::Draining {
            since: SystemTime::UNIX_EPOCH,
        },
    );
    assert_eq!(settle(&mut testbed, &model), 2);
    let mut expected = started.clone();
    expected[3] = format!("backend 1 {A} next-hop-known,keeps-udp,up,draining {}", way(11));
    expected[8] = "pool 0 members 2".to_owned();
    assert_eq!(dump(&testbed), expected);

    // A reload replaces it while it has a flow.
    let mut model = web(vec![b(), c()]);
    model.next_hops.extend(web(vec![a()]).next_hops);
    settle(&mut testbed, &model);
    let mut expected = started;
    expected.insert(2, "address 10.0.0.13 backend".to_owned());
    expected[4] = format!("backend 1 {A} next-hop-known,removed {}", way(11));
    expected.insert(6, format!("backend 3 {C} {healthy} {}", way(13)));
    expected[10] = "pool 0 members 2,3 slots 16381 table 7349dd5540f438a4".to_owned();
    assert_eq!(dump(&testbed), expected);
    let key = FlowKey {
        destination: model.config.services[0].vip.into(),
        destination_port: 443_u16.to_be(),
        protocol: u32::from(abi::TCP),
        ..FlowKey::default()
    };
    let flow = Flow {
        backend: 1,
        last_seen: 1,
        tcp_state: TcpState::Established,
        ..Flow::default()
    };
    testbed.datapath_mut().inner.flows.insert(key, flow);
    model.live_flows = swept(&mut testbed, 1).live;
    assert_eq!(settle(&mut testbed, &model), 0);

    // The flow ends, and with it the last trace of the backend.
    testbed.datapath_mut().inner.flows.clear();
    model.live_flows = swept(&mut testbed, 2).live;
    assert_eq!(settle(&mut testbed, &model), 2);
    expected.remove(4);
    expected.remove(0);
    assert_eq!(dump(&testbed), expected);

    // Somebody else meddles with every map.
    let contents = &mut testbed.datapath_mut().inner.contents;
    contents.addresses.clear();
    contents.backends.get_mut(&3).unwrap().flags = 0;
    contents.services.insert(5, Default::default());
    contents.pools.insert(0, Pool::default());
    contents.service_keys.pop_first();
    contents.settings.tcp_idle = 1;
    assert_eq!(testbed.refresh().unwrap(), 8);
    assert_eq!(settle(&mut testbed, &model), 8);
    assert_eq!(dump(&testbed), expected);
    assert_eq!(testbed.refresh().unwrap(), 0);

    // The configuration is emptied.
    settle(&mut testbed, &self::model(Vec::new()));
    assert_eq!(
        dump(&testbed),
        [
            "address 10.0.0.12 backend".to_owned(),
            "address 10.0.0.13 backend".to_owned(),
            format!("backend 2 {B} removed"),
            format!("backend 3 {C} removed"),
            "service 0 consistent-hash nat removed".to_owned(),
        ]
    );
    settle_without_flows(&mut testbed);
}

/// Without a service, and after a sweep, there is nothing left.
fn settle_without_flows(testbed: &mut Testbed) {
    let mut model = self::model(Vec::new());
    settle(testbed, &model);
    let swept = swept(testbed, 3);
    (model.live_flows, model.left_services) = (swept.live, swept.left_services);
    settle(testbed, &model);
    assert_eq!(dump(testbed), [""; 0]);
}

#[test]
fn the_seed_is_not_written_down() {
    let mut testbed = testbed();
    let mut model = web(vec![a()]);
    model.seed = [0x1234_5678_9abc_def0, 7];
    settle(&mut testbed, &model);
    let lines = contents_dump(testbed.actual());
    let settings: Vec<_> = lines
        .iter()
        .filter(|line| line.starts_with("settings "))
        .collect();
    assert_eq!(
        settings,
        [
            "settings tcp-idle 3600000 ms, tcp-opening 60000 ms, tcp-closing 60000 ms, udp-idle 60000 ms, \
          31744 source ports from 1024"
        ]
    );
}

#[test]
fn a_failure_at_any_change_leaves_what_a_retry_completes() {
    let before = web(vec![a(), b()]);
    let mut after = web(vec![b(), c()]);
    after
        .config
        .services
        .push(service("other", 20, &[53], vec![backend("x", 11, 53)]));
    let after = after.all_up();
    for call in 0.. {
        let mut testbed = testbed();
        settle(&mut testbed, &before);
        testbed.datapath_mut().set_schedule(Schedule::Call(call));
        let desired = compile(&mut SlotTables::default(), &after, testbed.actual())
            .unwrap()
            .contents;
        let total = plan(testbed.actual(), &desired).len();
        let outcome = testbed.reconcile(desired.clone());
        assert_eq!(testbed.actual(), &testbed.datapath().inner.contents);
        if call as usize == total {
            assert_eq!(outcome.unwrap(), Applied { operations: total });
            break;
        }
        match outcome.unwrap_err() {
            ReconcileError::Apply {
                number, total: of, ..
            } => {
                assert_eq!((number, of), (call as usize + 1, total));
            }
            error @ ReconcileError::Read(_) => panic!("{error}"),
        }
        // Both what was compiled before and what is compiled now lead there.
        assert_eq!(
            compile(&mut SlotTables::default(), &after, testbed.actual())
                .unwrap()
                .contents,
            desired
        );
        let retried = testbed.reconcile(desired).unwrap();
        assert_eq!(retried.operations, total - call as usize);
        settle_without_flows(&mut testbed);
    }
}

#[test]
fn a_failed_refresh_leaves_what_is_known() {
    let mut testbed = testbed();
    settle(&mut testbed, &web(vec![a()]));
    let known = testbed.actual().clone();
    testbed.datapath_mut().set_schedule(Schedule::Call(0));
    assert!(matches!(testbed.refresh(), Err(ReconcileError::Read(_))));
    assert_eq!(testbed.actual(), &known);
    assert_eq!(testbed.refresh().unwrap(), 0);
}

#[test]
fn what_somebody_else_has_removed_needs_no_removal() {
    let mut testbed = testbed();
    settle(&mut testbed, &web(vec![a(), b()]));
    testbed.datapath_mut().inner.contents = Contents::default();
    let empty = compile(&mut SlotTables::default(), &model(Vec::new()), testbed.actual())
        .unwrap()
        .contents;
    testbed.reconcile(empty).unwrap();
    testbed.refresh().unwrap();
    settle_without_flows(&mut testbed);
}

#[test]
fn flows_do_not_age_before_the_ticks_change() {
    let mut testbed = testbed();
    let mut model = web(vec![a()]);
    settle(&mut testbed, &model);
    model.config.flow_table.tcp_idle_timeout *= 4;
    let desired = compile(&mut SlotTables::default(), &model, testbed.actual())
        .unwrap()
        .contents;
    let mut settings = testbed.actual().settings;
    let ticks = settings.tick_shifts;
    let mut puts = 0;
    for operation in plan(testbed.actual(), &desired) {
        let Operation::PutSettings(next) = operation else {
            continue;
        };
        let is_ageless = |settings: &abi::Settings| settings.flags & SettingsFlags::AGELESS != 0;
        let same = (settings.tick_shifts, settings.tcp_idle) == (next.tick_shifts, next.tcp_idle);
        assert!(same || is_ageless(&settings) && is_ageless(&next));
        settings = next;
        puts += 1;
    }
    assert_eq!(puts, 2);
    assert!(settings.tick_shifts != ticks);

    // A sweep later they age by the new ones, and not before.
    settle(&mut testbed, &model);
    model.ages_are_renewed = swept(&mut testbed, 1).are_ages_renewed;
    assert!(model.ages_are_renewed);
    assert_eq!(settle(&mut testbed, &model), 1);
    assert_eq!(testbed.actual().settings.flags & SettingsFlags::AGELESS, 0);
}

/// What must hold whenever a packet may arrive.
fn check_invariants(contents: &Contents) -> Result<(), TestCaseError> {
    for (key, id) in &contents.service_keys {
        prop_assert!(contents.services.contains_key(id), "{key:?} leads to no service");
        prop_assert!(contents.pools.contains_key(id), "{key:?} leads to no pool");
        let roles = contents.addresses.get(&key.vip).copied().unwrap_or(0);
        prop_assert!(roles & ROLE_VIP != 0, "{} is not known as a VIP", key.vip);
    }
    let any_port = contents.settings.flags & SettingsFlags::ANY_PORT != 0;
    let has_any = contents.service_keys.keys().any(|key| key.port == 0);
    prop_assert!(any_port || !has_any, "a service of all ports is not looked for");
    for (id, service) in &contents.services {
        let has_filters = service.flags & ServiceFlags::HAS_FILTERS != 0;
        let filters: Vec<u32> = (contents.source_filters.iter())
            .filter(|((key, _), _)| key.service == *id)
            .map(|(_, value)| *value)
            .collect();
        let is_found = contents.service_keys.values().any(|found| found == id);
        let looks_in_vain =
            is_found && has_filters && service.flags & ServiceFlags::DENIES_OTHERS == 0 && filters.is_empty();
        prop_assert!(!looks_in_vain, "the filters of service {} are missing", id);
    }
    for (service, pool) in &contents.pools {
        // Without a service no packet gets there.
        if !contents.services.contains_key(service) {
            continue;
        }
        // Each slot leads to a member.
        let ranks = pool.table.as_ref().map_or(0, |table| table.members);
        prop_assert!(ranks as usize <= pool.members.len());
        for id in &*pool.members {
            let backend = contents.backends.get(id);
            prop_assert_eq!(backend.map(|backend| backend.service_plus_one), Some(service + 1));
        }
    }
    for backend in contents.backends.values() {
        let roles = contents.addresses.get(&backend.address).copied().unwrap_or(0);
        prop_assert!(
            roles & ROLE_BACKEND != 0,
            "{} is not known as a backend",
            backend.address
        );
    }
    Ok(())
}

/// Contents without any sense: what may be read back after somebody else has meddled.
fn any_contents() -> impl Strategy<Value = Contents> {
    (
        any_model(),
        any_model(),
        prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    )
        .prop_map(|(one, other, chosen)| {
            let one = compile(&mut SlotTables::default(), &one, &Contents::default())
                .unwrap()
                .contents;
            let other = compile(&mut SlotTables::default(), &other, &Contents::default())
                .unwrap()
                .contents;
            let operations = plan(&one, &other);
            let mut contents = one;
            if !operations.is_empty() {
                chosen
                    .iter()
                    .for_each(|index| contents.record(index.get(&operations)));
            }
            contents
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_leads_to_what_is_desired_and_then_to_nothing_more(
        actual in any_contents(),
        desired in any_contents(),
    ) {
        let mut contents = actual.clone();
        plan(&actual, &desired).iter().for_each(|operation| contents.record(operation));
        prop_assert_eq!(plan(&contents, &desired), Vec::<Operation>::new());
        prop_assert_eq!(contents, desired);
    }

    #[test]
    fn every_step_of_a_plan_leaves_whole_maps(models in prop::collection::vec(any_model(), 1..4)) {
        let mut datapath = MemoryDatapath::default();
        for model in models {
            let before = datapath.contents.clone();
            let desired = compile(&mut SlotTables::default(), &model, &before).unwrap().contents;
            for operation in plan(&before, &desired) {
                datapath.apply(&operation).unwrap();
                check_invariants(&datapath.contents)?;
                for key in desired.service_keys.keys().filter(|key| before.service_keys.contains_key(key)) {
                    prop_assert!(datapath.contents.service_keys.contains_key(key), "{:?} is missing", key);
                }
            }
            prop_assert_eq!(&datapath.contents, &desired);
        }
    }

    #[test]
    fn meddling_is_mended_whatever_it_was(actual in any_contents(), model in any_model()) {
        let datapath = MemoryDatapath { contents: actual, ..MemoryDatapath::default() };
        let mut reconciler = Reconciler::new(datapath).unwrap();
        let desired = compile(&mut SlotTables::default(), &model, reconciler.actual()).unwrap().contents;
        reconciler.reconcile(desired).unwrap();
        check_invariants(&reconciler.datapath().contents)?;
    }

    #[test]
    fn random_failures_only_delay(
        models in prop::collection::vec(any_model(), 1..4),
        seed in any::<u64>(),
    ) {
        let mut testbed = testbed();
        testbed.datapath_mut().set_schedule(Schedule::Random { seed, one_in: 4 });
        for model in &models {
            let is_done = (0..500).any(|_| {
                let desired = compile(&mut SlotTables::default(), model, testbed.actual()).unwrap().contents;
                testbed.reconcile(desired).is_ok()
            });
            prop_assert!(is_done);
            prop_assert_eq!(testbed.actual(), &testbed.datapath().inner.contents);
            check_invariants(testbed.actual())?;
        }
        testbed.datapath_mut().set_schedule(Schedule::Never);
        settle_without_flows(&mut testbed);
    }

    #[test]
    fn removed_backends_get_no_new_flows(before in any_model(), after in any_model()) {
        let actual = compile(&mut SlotTables::default(), &before, &Contents::default()).unwrap().contents;
        let desired = compile(&mut SlotTables::default(), &after, &actual).unwrap().contents;
        for (id, backend) in &desired.backends {
            if backend.flags & BackendFlags::REMOVED != 0 {
                let not = BackendFlags::ACCEPTS_NEW | BackendFlags::KEEPS_UDP;
                prop_assert_eq!(backend.flags & not, 0);
                prop_assert!(desired.pools.values().all(|pool| !pool.members.contains(id)));
            }
        }
    }
}
