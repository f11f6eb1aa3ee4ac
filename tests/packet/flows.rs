//! The flow table: what a flow keeps, when it ends, and that no flow gets the packets of another.

use std::{thread::sleep, time::Duration};

use lb_common::abi::{
    ClientLink, Forward, Kind, Link,
    Reason::{self, NoFlow, NotForService},
    Tags, TcpState,
};
use xlb::datapath::{Datapath, Flow, kernel::monotonic_now};

use crate::{
    fixture::{DNS, Expected, Fixture, INGRESS, MIRROR, RELAY, SHOP, SOURCE, TX, TestService, WEB, WEB6},
    frame::{
        ACK, BALANCER_MAC, FIN_ACK, Frame, ROUTER_MAC, SYN, SYN_ACK, Transport, address, ends, tcp, udp,
    },
};

const CLIENT: &str = "198.51.100.7:5000";
/// Above two ticks of any timeout.
const BEYOND: Duration = Duration::from_millis(250);
const SHORT: u64 = 5_000_000;

fn answer(service: &TestService, which: usize, to: std::net::SocketAddr, flags: u8) -> Frame {
    Frame::answer(
        service.backends[which].address,
        to,
        Transport::Tcp {
            flags,
            options: vec![],
        },
    )
}

impl Fixture {
    /// Removes the flow of a client's packet; tells how many were removed.
    pub(crate) fn remove(&mut self, frame: &Frame) -> u64 {
        self.datapath().remove_flows(&[frame.key()], u64::MAX).unwrap()
    }

    /// Next packets of a flow on a service's first backend, from its client and in reply.
    fn expect_to_go_on(&mut self, service: &TestService, syn: &Frame) {
        let mut ack = syn.clone();
        ack.transport = tcp(CLIENT, service.vip, ACK).transport;
        let expected = Expected::to_backend(service, 0, &ack, ack.source);
        self.expect("of a known flow", &ack.bytes(), expected);
        let reply = answer(service, 0, syn.source, SYN_ACK);
        let expected = Expected::to_client(service, 0, &reply, &ack);
        self.expect("reply", &reply.bytes(), expected);
    }
}

#[test]
fn a_flow_is_recorded_whole() {
    let before = monotonic_now();
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    let flow = fixture.flow(&syn).unwrap();
    // Early by up to a tick: of an hour there are 64 at least.
    let tick = 3_600_000_000_000 / 64;
    assert!(flow.last_seen + tick >= before && flow.last_seen <= monotonic_now());
    let expected = Flow {
        last_seen: flow.last_seen,
        backend: WEB.backends[0].id,
        service: WEB.id,
        source_port: 5000u16.to_be(),
        generation: None,
        tcp_state: TcpState::SynSent,
        forward: Forward::Nat.number(),
    };
    assert_eq!(flow, expected);
    assert_eq!(fixture.flows().len(), 1);
    let link = ClientLink {
        link: Link::new(ROUTER_MAC, BALANCER_MAC),
        ifindex: INGRESS,
        tags: Tags::default(),
        state: ClientLink::VALID,
    };
    assert_eq!(fixture.client_link(&syn), Some(link));
}

#[test]
fn a_flow_whose_source_port_is_translated_is_recorded_with_that_and_its_backends_generation() {
    let mut fixture = Fixture::new();
    fixture.change_backend(&SHOP, 0, |backend| backend.generation = 0xabcd_1234);
    let syn = tcp(CLIENT, SHOP.vip, SYN);
    let (given, _) = ends(&fixture.run(&syn.bytes()).1);
    let flow = fixture.flow(&syn).unwrap();
    assert_eq!(flow.source_port, given.port().to_be());
    assert_eq!(flow.generation, Some(0x1234));
    assert_eq!(
        (fixture.units_of(Kind::Long), fixture.units_of(Kind::Alias)),
        (1, 1)
    );
}

#[test]
fn packets_of_both_directions_keep_a_flow_young() {
    let mut fixture = Fixture::new();
    // Of the shortest ticks.
    fixture.change_settings(|settings| settings.tcp_opening = 2_000_000_000);
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    let first = fixture.flow(&syn).unwrap();
    sleep(BEYOND);
    fixture.run(&answer(&WEB, 0, syn.source, SYN_ACK).bytes());
    let second = fixture.flow(&syn).unwrap();
    assert!(second.last_seen > first.last_seen);
    sleep(BEYOND);
    fixture.run(&syn.bytes());
    let third = fixture.flow(&syn).unwrap();
    assert!(third.last_seen > second.last_seen);
}

#[test]
fn an_idle_flow_ends_and_its_next_packet_starts_anew() {
    let ack = tcp(CLIENT, WEB.vip, ACK);
    let syn = tcp(CLIENT, WEB.vip, SYN);
    let fin = tcp(CLIENT, WEB.vip, FIN_ACK);
    let query = udp(CLIENT, DNS.vip);
    for (what, service, first) in [
        ("established", WEB, &ack),
        ("opening", WEB, &syn),
        ("closing", WEB, &fin),
        ("UDP", DNS, &query),
    ] {
        let mut fixture = Fixture::new();
        fixture.change_settings(|settings| match what {
            "established" => settings.tcp_idle = SHORT,
            "opening" => settings.tcp_opening = SHORT,
            "closing" => settings.tcp_closing = SHORT,
            _ => settings.udp_idle = SHORT,
        });
        fixture.run(&first.bytes());
        fixture.all_slots(&service, service.backends[1].id);
        sleep(BEYOND);
        let expected = Expected::to_backend(&service, 1, first, first.source).new_flow();
        fixture.expect(what, &first.bytes(), expected);
    }
}

#[test]
fn an_idle_flow_stays_while_its_own_timeout_has_not_passed() {
    let mut fixture = Fixture::new();
    // The timeouts of all states but the flow's own have passed.
    fixture.change_settings(|settings| {
        settings.tcp_opening = SHORT;
        settings.tcp_closing = SHORT;
        settings.udp_idle = SHORT;
    });
    let ack = tcp(CLIENT, WEB.vip, ACK);
    fixture.run(&ack.bytes());
    fixture.all_slots(&WEB, WEB.backends[1].id);
    sleep(BEYOND);
    fixture.expect(
        "established",
        &ack.bytes(),
        Expected::to_backend(&WEB, 0, &ack, ack.source),
    );
}

#[test]
fn a_flow_whose_backends_generation_has_changed_begins_anew_where_its_source_was_the_hosts() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, SHOP.vip, SYN);
    let ack = tcp(CLIENT, SHOP.vip, ACK);
    fixture.run(&syn.bytes());
    fixture.all_slots(&SHOP, SHOP.backends[1].id);
    fixture.change_backend(&SHOP, 0, |backend| backend.generation = 2);
    let (_, output, moved) = fixture.run_counted(&ack.bytes());
    assert_eq!(ends(&output).1, SHOP.backends[1].address);
    assert_eq!(moved.backends[&SHOP.backends[1].id].flows, 1);
}

#[test]
fn a_flow_does_not_follow_an_id_that_nobody_has() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    let ack = tcp(CLIENT, WEB.vip, ACK);
    fixture.run(&syn.bytes());
    fixture.all_slots(&WEB, WEB.backends[1].id);
    fixture.apply(xlb::datapath::Operation::RemoveBackend(WEB.backends[0].id));
    fixture.expect(
        "ACK",
        &ack.bytes(),
        Expected::to_backend(&WEB, 1, &ack, ack.source).new_flow(),
    );
}

#[test]
fn a_reply_to_a_source_that_is_no_more_the_hosts_is_dropped() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, SHOP.vip, SYN);
    let (given, _) = ends(&fixture.run(&syn.bytes()).1);
    fixture.change_backend(&SHOP, 0, |backend| backend.generation = 2);
    let reply = answer(&SHOP, 0, given, SYN_ACK);
    fixture.expect("reply", &reply.bytes(), Expected::dropped(NoFlow));
}

#[test]
fn a_late_reply_of_the_backend_that_a_flow_has_left_is_dropped() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    fixture.all_slots(&WEB, WEB.backends[1].id);
    fixture.change_backend(&WEB, 0, |backend| backend.flags = 0);
    let expected = Expected::to_backend(&WEB, 1, &syn, syn.source).new_flow();
    fixture.expect("SYN once more", &syn.bytes(), expected);
    let late = answer(&WEB, 0, syn.source, SYN_ACK);
    fixture.expect("late reply", &late.bytes(), Expected::dropped(NoFlow));
    let reply = answer(&WEB, 1, syn.source, SYN_ACK);
    let expected = Expected::to_client(&WEB, 1, &reply, &syn);
    fixture.expect("reply of the new backend", &reply.bytes(), expected);
}

/// As `10.0.0.11:3000` and `10.0.0.11:3001`: the address alone does not tell the backend.
#[test]
fn a_late_reply_is_dropped_when_the_new_backend_is_another_port_of_the_same_server() {
    {
        let mut fixture = Fixture::new();
        let port = WEB.backends[0].address.port() + 1;
        fixture.change_backend(&WEB, 1, |backend| {
            backend.address = WEB.backends[0].address.ip().into();
            backend.port = port.to_be();
        });
        let syn = tcp(CLIENT, WEB.vip, SYN);
        fixture.run(&syn.bytes());
        fixture.all_slots(&WEB, WEB.backends[1].id);
        fixture.change_backend(&WEB, 0, |backend| backend.flags = 0);
        fixture.run(&syn.bytes());
        let late = answer(&WEB, 0, syn.source, SYN_ACK);
        fixture.expect("late reply", &late.bytes(), Expected::dropped(NoFlow));
        let mut reply = late;
        reply.source.set_port(port);
        let expected = Expected::to_client(&WEB, 1, &reply, &syn);
        fixture.expect("reply of the new backend", &reply.bytes(), expected);
    }
}

/// An idle flow's source port may be taken; when the idle flow comes back it takes another and leaves that alone.
#[test]
fn a_flow_that_starts_anew_leaves_the_source_port_that_another_has_taken() {
    let mut fixture = Fixture::new();
    let (web, mirror) = (tcp(CLIENT, WEB.vip, ACK), tcp(CLIENT, MIRROR.vip, SYN));
    fixture.change_settings(|settings| settings.tcp_idle = SHORT);
    fixture.run(&web.bytes());
    sleep(BEYOND);
    let expected = Expected::to_backend(&MIRROR, 0, &mirror, mirror.source).new_flow();
    fixture.expect("SYN takes the port of the idle flow", &mirror.bytes(), expected);
    let (verdict, output) = fixture.run(&web.bytes());
    let (given, _) = ends(&output);
    assert_eq!(verdict, TX);
    assert_ne!(given, web.source, "it would get the replies of the other");
    let reply = answer(&MIRROR, 0, mirror.source, SYN_ACK);
    let expected = Expected::to_client(&MIRROR, 0, &reply, &mirror);
    fixture.expect("reply of the other", &reply.bytes(), expected);
    let reply = answer(&WEB, 0, given, ACK);
    let expected = Expected::to_client(&WEB, 0, &reply, &web);
    fixture.expect("reply of the one", &reply.bytes(), expected);
}

#[test]
fn a_flow_that_is_removed_is_gone_in_both_directions() {
    for service in [WEB, SHOP] {
        let mut fixture = Fixture::new();
        let syn = tcp(CLIENT, service.vip, SYN);
        let (_, output) = fixture.run(&syn.bytes());
        let (given, _) = ends(&output);
        assert_eq!(fixture.remove(&syn), 1);
        assert_eq!(fixture.flow(&syn), None);
        let reply = answer(&service, 0, given, SYN_ACK);
        fixture.expect("reply", &reply.bytes(), Expected::passed(NotForService));
        assert_eq!(fixture.remove(&syn), 0);
        fixture.tidy();
        assert_eq!(fixture.units(), []);
    }
}

#[test]
fn a_flow_that_was_seen_since_is_not_removed() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    let flow = fixture.flow(&syn).unwrap();
    let key = syn.key();
    assert_eq!(
        fixture.datapath().remove_flows(&[key], flow.last_seen).unwrap(),
        0
    );
    assert_eq!(
        fixture
            .datapath()
            .remove_flows(&[key], flow.last_seen + 1)
            .unwrap(),
        1
    );
    assert!(fixture.flows().is_empty());
}

#[test]
fn what_leads_from_replies_to_no_flow_is_removed_and_the_rest_is_not() {
    let mut fixture = Fixture::new();
    let gone = tcp(CLIENT, SHOP.vip, SYN);
    let mut stays = tcp(CLIENT, SHOP.vip, SYN);
    stays.source.set_port(5001);
    let sources = [&gone, &stays].map(|syn| ends(&fixture.run(&syn.bytes()).1).0);
    fixture.tidy();
    assert_eq!(fixture.units_of(Kind::Alias), 2);
    // Also where its backend is gone.
    fixture.apply(xlb::datapath::Operation::RemoveBackend(SHOP.backends[0].id));
    assert_eq!(fixture.remove(&gone), 1);
    fixture.change_backend(&SHOP, 0, |_| ());
    fixture.tidy();
    assert_eq!(fixture.units_of(Kind::Alias), 1);
    fixture.tidy();
    assert_eq!(fixture.units_of(Kind::Alias), 1);
    let reply = answer(&SHOP, 0, sources[1], SYN_ACK);
    let expected = Expected::to_client(&SHOP, 0, &reply, &stays);
    fixture.expect("reply of the flow that stays", &reply.bytes(), expected);
    let reply = answer(&SHOP, 0, sources[0], SYN_ACK);
    fixture.expect(
        "reply of the one that is gone",
        &reply.bytes(),
        Expected::passed(NotForService),
    );
}

#[test]
fn what_tells_late_replies_of_a_backend_that_a_flow_has_left_is_removed_when_they_are_over() {
    for (service, aliases) in [(WEB, 0), (SHOP, 1)] {
        let mut fixture = Fixture::new();
        let syn = tcp(CLIENT, service.vip, SYN);
        fixture.run(&syn.bytes());
        fixture.all_slots(&service, service.backends[1].id);
        fixture.change_backend(&service, 0, |backend| backend.flags = 0);
        let (_, output) = fixture.run(&syn.bytes());
        fixture.tidy();
        assert_eq!(fixture.units().len(), 2 * (1 + aliases), "of both backends");
        assert_eq!(fixture.flows().len(), 1, "as the callers see it");
        fixture.change_settings(|settings| settings.tcp_closing = SHORT);
        sleep(BEYOND);
        // What leads to it may be looked at before it.
        fixture.tidy();
        fixture.tidy();
        assert_eq!(fixture.units().len(), 1 + aliases);
        let reply = answer(&service, 1, ends(&output).0, SYN_ACK);
        let expected = Expected::to_client(&service, 1, &reply, &syn);
        fixture.expect("reply of the backend that it has", &reply.bytes(), expected);
        // Or at once when nobody has the id any more.
        fixture.change_settings(|_| ());
        fixture.all_slots(&service, service.backends[0].id);
        fixture.change_backend(&service, 0, |_| ());
        fixture.change_backend(&service, 1, |backend| backend.flags = 0);
        fixture.run(&syn.bytes());
        fixture.tidy();
        assert_eq!(fixture.units().len(), 2 * (1 + aliases));
        fixture.apply(xlb::datapath::Operation::RemoveBackend(service.backends[1].id));
        fixture.tidy();
        fixture.tidy();
        assert_eq!(fixture.units().len(), 1 + aliases);
    }
}

#[test]
fn flows_that_find_no_room_in_their_bucket_are_found_in_another_in_both_directions() {
    use lb_common::{
        abi::TCP,
        logic::flow_table::{bucket_of, end_hash},
    };
    let mut fixture = Fixture::with_flow_table(1024);
    let seed = crate::fixture::SETTINGS.table_seed;
    let in_one_bucket = (0..60_000_u32).filter_map(|number| {
        let mut syn = tcp(CLIENT, WEB.vip, SYN);
        syn.source = address(&format!("198.51.{}.{}:7000", number / 250, 1 + number % 250));
        let key = syn.key();
        let hash = end_hash(seed, &key.source, key.source_port, u32::from(TCP));
        (bucket_of(hash, lb_common::abi::buckets(1024)) == 77).then_some(syn)
    });
    let flows: Vec<Frame> = in_one_bucket.take(12).collect();
    assert_eq!(flows.len(), 12);
    for syn in &flows {
        let expected = Expected::to_backend(&WEB, 0, syn, syn.source).new_flow();
        fixture.expect("first", &syn.bytes(), expected);
    }
    assert_eq!(fixture.flows().len(), 12);
    for syn in &flows {
        fixture.expect_to_go_on(&WEB, syn);
        assert_eq!(fixture.remove(syn), 1);
    }
    assert_eq!(fixture.units().len(), 0);
}

#[test]
fn a_flow_in_the_other_line_of_its_bucket_is_found_in_both_directions_when_its_own_line_is_empty() {
    use lb_common::{
        abi::{Meta, TCP, buckets},
        logic::flow_table::{BUCKET, bucket_of, end_hash, line_of, mark_of, meta_at, other_line},
    };
    let seed = crate::fixture::SETTINGS.table_seed;
    for (service, network, in_a_line) in [(WEB, "198.51", 4), (WEB6, "[2001:db8:7", 2)] {
        let mut fixture = Fixture::with_flow_table(1024).with(&[WEB6]);
        let mut line = None;
        let in_one_line = (0..60_000_u32).filter_map(|number| {
            let mut syn = tcp(CLIENT, service.vip, SYN);
            let host = (number / 250, 1 + number % 250);
            syn.source = address(&match service.vip.is_ipv4() {
                true => format!("{network}.{}.{}:7000", host.0, host.1),
                false => format!("{network}::{}:{}]:7000", host.0, host.1),
            });
            let key = syn.key();
            let hash = end_hash(seed, &key.source, key.source_port, u32::from(TCP));
            let is_there = bucket_of(hash, buckets(1024)) == 77
                && *line.get_or_insert_with(|| line_of(hash)) == line_of(hash);
            is_there.then_some(syn)
        });
        let flows: Vec<Frame> = in_one_line.take(in_a_line + 2).collect();
        let line = line.unwrap();
        let begin = |fixture: &mut Fixture, syn: &Frame| {
            let expected = Expected::to_backend(&service, 0, syn, syn.source).new_flow();
            fixture.expect("first", &syn.bytes(), expected);
        };
        let marks = |fixture: &mut Fixture| {
            let words = fixture.bucket(77).0;
            [mark_of(line), mark_of(other_line(line)), BUCKET]
                .map(|unit| Meta(words[meta_at(unit)]).overflows())
        };
        flows[..in_a_line].iter().for_each(|syn| begin(&mut fixture, syn));
        assert_eq!(marks(&mut fixture), [false; 3]);
        let displaced = &flows[in_a_line];
        begin(&mut fixture, displaced);
        assert_eq!(marks(&mut fixture), [true, false, false]);
        for syn in &flows[..in_a_line] {
            assert_eq!(fixture.remove(syn), 1);
        }
        // One more, where there is room again.
        begin(&mut fixture, &flows[in_a_line + 1]);
        for syn in &flows[in_a_line..] {
            fixture.expect_to_go_on(&service, syn);
        }
        assert_eq!(fixture.flows().len(), 2);
        assert_eq!(marks(&mut fixture), [true, false, false]);
    }
}

/// Three units for each of them in a table that is almost half full: some of either are in their second bucket.
#[test]
fn what_leads_from_replies_stays_wherever_there_was_room_for_it() {
    use lb_common::{
        abi::{Address, Meta, TCP, buckets},
        logic::flow_table::{bucket_of, end_hash, key_at, meta_at},
    };
    let mut fixture = Fixture::with_flow_table(1024);
    let number_of = 240_u32;
    let mut sent = Vec::new();
    for number in 0..number_of {
        let mut syn = tcp(CLIENT, SHOP.vip, SYN);
        syn.source = address(&format!("198.51.{}.{}:7003", number / 250, 1 + number % 250));
        let (_, output) = fixture.run(&syn.bytes());
        // The source port that the backend sees.
        sent.push((syn, u16::from_be_bytes([output[34], output[35]])));
    }
    let mut elsewhere = |kind, ends: &mut dyn Iterator<Item = (Address, u16, u16)>| {
        ends.filter(|(address, port, source_port)| {
            let seed = crate::fixture::SETTINGS.table_seed;
            let hash = end_hash(seed, address, port.to_be(), u32::from(TCP));
            let words = fixture.bucket(bucket_of(hash, buckets(1024))).0;
            !(0..8).any(|unit| {
                Meta(words[meta_at(unit)]).is(kind)
                    && (words[key_at(unit)] >> 32) as u16 == source_port.to_be()
            })
        })
        .count()
    };
    let clients = |(syn, port): &(Frame, u16)| (Address::from(syn.source.ip()), syn.source.port(), *port);
    let given = |(_, port): &(Frame, u16)| (Address::from(SOURCE), *port, *port);
    assert!(elsewhere(Kind::Long, &mut sent.iter().map(clients)) > 0);
    assert!(elsewhere(Kind::Alias, &mut sent.iter().map(given)) > 0);
    assert_eq!(fixture.units_of(Kind::Alias), number_of as usize);
    fixture.tidy();
    fixture.tidy();
    assert_eq!(fixture.units_of(Kind::Alias), number_of as usize);
    for (syn, port) in sent {
        let reply = answer(&SHOP, 0, std::net::SocketAddr::new(SOURCE, port), SYN_ACK);
        let expected = Expected::to_client(&SHOP, 0, &reply, &syn);
        fixture.expect("reply", &reply.bytes(), expected);
    }
}

#[test]
fn what_leads_from_replies_to_an_open_flow_gives_way_to_none_that_opens() {
    let mut fixture = Fixture::with_flow_table(1024);
    let datagram = udp(CLIENT, RELAY.vip);
    let (_, output) = fixture.run(&datagram.bytes());
    fixture.run(&datagram.bytes());
    for number in 0..5000_u32 {
        let mut other = udp(CLIENT, DNS.vip);
        other.source = address(&format!("198.51.{}.{}:7000", number / 250, 1 + number % 250));
        fixture.run(&other.bytes());
    }
    let port = u16::from_be_bytes([output[34], output[35]]);
    let transport = datagram.transport.clone();
    let reply = Frame::answer(
        RELAY.backends[0].address,
        std::net::SocketAddr::new(SOURCE, port),
        transport,
    );
    let expected = Expected::to_client(&RELAY, 0, &reply, &datagram);
    fixture.expect("reply", &reply.bytes(), expected);
}

/// Their address may be any, so they are told from others by the program that they come by.
#[test]
fn packets_of_other_hosts_are_no_answers_of_processes_on_this_one() {
    use lb_common::{
        abi::{Bucket, Meta},
        logic::flow_table::{bucket_of, end_hash, key_at, line_of, meta_at, short_key},
    };
    let mut fixture = Fixture::with_flow_table(1024);
    let key = udp(CLIENT, DNS.vip).key();
    let seed = crate::fixture::SETTINGS.table_seed;
    let hash = end_hash(seed, &key.source, key.source_port, key.protocol);
    let index = bucket_of(hash, lb_common::abi::buckets(1024));
    let mut bucket = Bucket::default();
    let unit = line_of(hash) / 2;
    bucket.0[key_at(unit)] = short_key(key.source.v4_word(), key.source_port, key.destination_port);
    let local = Meta::new(Kind::Short, DNS.id, DNS.backends[0].id, Forward::Local.number());
    let settings = crate::fixture::SETTINGS;
    let age =
        lb_common::logic::ageing::ticks(&settings, local.state(), xlb::datapath::kernel::monotonic_now());
    bucket.0[meta_at(unit)] = local.confirmed().with_age(age).0;
    fixture.put_bucket(index, bucket);
    for tags in [Tags::default(), Tags([0x8100_0001_u32.to_be(), 0])] {
        let from = std::net::SocketAddr::new("192.0.2.99".parse().unwrap(), DNS.backends[0].address.port());
        let mut packet = Frame::answer(from, address(CLIENT), udp(CLIENT, DNS.vip).transport);
        packet.tags = tags;
        let expected = Expected::passed(Reason::NotForService);
        fixture.expect("of another host", &packet.bytes(), expected);
    }
}

/// As when the daemon is killed between the two.
#[test]
fn a_place_that_nobody_writes_to_its_end_is_free_after_two_passes() {
    use lb_common::{
        abi::{Bucket, Meta, TCP},
        logic::flow_table::{bucket_of, end_hash, key_at, meta_at},
    };
    let mut fixture = Fixture::with_flow_table(1024);
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    let key = syn.key();
    let hash = end_hash(
        crate::fixture::SETTINGS.table_seed,
        &key.source,
        key.source_port,
        u32::from(TCP),
    );
    let buckets = lb_common::abi::buckets(1024);
    let index = bucket_of(hash, buckets);
    let mut bucket = fixture.bucket(index);
    let is_free = |bucket: &Bucket, unit: usize| bucket.0[meta_at(unit)] == 0;
    let short = (0..8).find(|unit| is_free(&bucket, *unit)).unwrap();
    bucket.0[meta_at(short)] = Meta::default().busy(Kind::Short).0;
    let long = (0..8)
        .step_by(2)
        .find(|unit| is_free(&bucket, *unit) && is_free(&bucket, unit + 1))
        .unwrap();
    bucket.0[meta_at(long)] = Meta::default().busy(Kind::Long).0;
    bucket.0[key_at(long + 1)] = 1;
    bucket.0[meta_at(long + 1)] = 2;
    fixture.put_bucket(index, bucket);
    fixture.tidy();
    assert_eq!(fixture.units().len(), 3);
    assert_eq!(fixture.flows().len(), 1);
    fixture.tidy();
    assert_eq!(fixture.units().len(), 1);
    let free = fixture.bucket(index);
    assert_eq!((free.0[meta_at(long + 1)], free.0[key_at(long + 1)]), (0, 0));
    let reply = answer(&WEB, 0, syn.source, SYN_ACK);
    let expected = Expected::to_client(&WEB, 0, &reply, &syn);
    fixture.expect("reply of the flow beside them", &reply.bytes(), expected);
}

#[test]
fn a_way_back_is_free_when_no_flow_had_it_for_two_passes() {
    let mut fixture = Fixture::new();
    let syn = tcp(CLIENT, WEB.vip, SYN);
    fixture.run(&syn.bytes());
    for _ in 0..3 {
        fixture.tidy();
        assert_eq!(fixture.link_states(), [ClientLink::VALID]);
    }
    fixture.remove(&syn);
    fixture.tidy();
    assert_eq!(fixture.link_states(), [ClientLink::UNUSED]);
    // A flow that begins just now has it again.
    fixture.run(&syn.bytes());
    assert_eq!(fixture.link_states(), [ClientLink::VALID]);
    let reply = answer(&WEB, 0, syn.source, SYN_ACK);
    let expected = Expected::to_client(&WEB, 0, &reply, &syn);
    fixture.expect("reply", &reply.bytes(), expected);
    fixture.remove(&syn);
    fixture.tidy();
    fixture.tidy();
    assert_eq!(fixture.link_states(), [0; 0]);
    fixture.run(&syn.bytes());
    assert_eq!(fixture.link_states(), [ClientLink::VALID]);
}

#[test]
fn flows_go_on_when_timeouts_change_and_count_as_seen_then() {
    let mut fixture = Fixture::new();
    let (web, shop) = (tcp(CLIENT, WEB.vip, SYN), tcp(CLIENT, SHOP.vip, SYN));
    let query = udp(CLIENT, DNS.vip);
    let (_, to_shop) = fixture.run(&shop.bytes());
    fixture.run(&web.bytes());
    fixture.run(&query.bytes());
    for service in [WEB, SHOP, DNS] {
        fixture.all_slots(&service, service.backends[1].id);
    }
    // By these ticks they are of any age; they do not age until a pass has brought them to the new ones.
    let now = monotonic_now();
    fixture.change_settings(|settings| {
        settings.tcp_opening = 20_000_000_000;
        settings.udp_idle = 20_000_000_000;
    });
    let tick = 20_000_000_000 / 64;
    for (key, flow) in fixture.flows() {
        assert!(
            flow.last_seen + tick >= now,
            "{key:?}: {} before {now}",
            flow.last_seen
        );
    }
    for (service, frame) in [(WEB, &web), (DNS, &query)] {
        let expected = Expected::to_backend(&service, 0, frame, frame.source);
        fixture.expect("known flow", &frame.bytes(), expected);
    }
    let expected = Expected::to_backend(&SHOP, 0, &shop, ends(&to_shop).0);
    fixture.expect("known flow", &shop.bytes(), expected);
}

#[test]
fn a_flow_is_found_whatever_the_seed_of_the_backends_is() {
    let mut fixture = Fixture::new();
    let ack = tcp(CLIENT, WEB.vip, ACK);
    fixture.run(&ack.bytes());
    fixture.all_slots(&WEB, WEB.backends[1].id);
    fixture.change_settings(|settings| settings.seed = [5, 6]);
    let expected = Expected::to_backend(&WEB, 0, &ack, ack.source);
    fixture.expect("known flow", &ack.bytes(), expected);
    assert_eq!(fixture.remove(&ack), 1);
}

#[test]
fn a_full_flow_table_still_takes_new_flows() {
    let mut fixture = Fixture::with_flow_table(1024);
    for number in 0..5000u32 {
        let mut syn = tcp(CLIENT, WEB.vip, SYN);
        syn.source = address(&format!("198.51.{}.{}:7000", number / 250, 1 + number % 250));
        let expected = Expected::to_backend(&WEB, 0, &syn, syn.source).new_flow();
        if number < 4990 {
            assert_eq!(fixture.run(&syn.bytes()).0, TX, "flow {number}");
        } else {
            fixture.expect("one of the last", &syn.bytes(), expected);
            let reply = answer(&WEB, 0, syn.source, SYN_ACK);
            let expected = Expected::to_client(&WEB, 0, &reply, &syn);
            fixture.expect("its reply", &reply.bytes(), expected);
        }
    }
    // Rather half as many units again.
    assert!(fixture.flows().len() <= 1536);
}

#[test]
fn flows_that_only_differ_in_one_field_are_different_flows() {
    let mut fixture = Fixture::new();
    let flows = [
        tcp("198.51.100.7:5000", WEB.vip, SYN),
        tcp("198.51.100.7:5001", WEB.vip, SYN),
        tcp("198.51.100.8:5000", WEB.vip, SYN),
        tcp("198.51.100.7:5000", SHOP.vip, SYN),
        udp("198.51.100.7:5000", DNS.vip),
    ];
    for frame in &flows {
        fixture.run(&frame.bytes());
    }
    assert_eq!(fixture.flows().len(), flows.len());
    fixture.all_slots(&WEB, 0);
    let other = tcp("198.51.100.9:5000", WEB.vip, SYN);
    fixture.expect(
        "another address",
        &other.bytes(),
        Expected::rejected(&other).of(&WEB),
    );
}
