//! What a TCP segment does to its flow.

use lb_common::{
    abi::{BackendFlags, Reason::NoFlow, TcpState},
    logic::tcp_state::{Sender, first, next},
};

use crate::{
    fixture::{Expected, Fixture, TX, WEB},
    frame::{ACK, FIN_ACK, Frame, PSH, RST, SYN, SYN_ACK, Transport, tcp},
};

const CLIENT: &str = "198.51.100.7:5000";

fn client(flags: u8) -> Frame {
    tcp(CLIENT, WEB.vip, flags)
}

fn backend(which: usize, flags: u8) -> Frame {
    Frame::answer(
        WEB.backends[which].address,
        client(0).source,
        Transport::Tcp {
            flags,
            options: vec![],
        },
    )
}

/// Sends segments of a flow on the first backend, each of which is sent on.
#[track_caller]
fn exchange(fixture: &mut Fixture, segments: &[(Sender, u8)]) {
    for (sender, flags) in segments {
        let frame = match sender {
            Sender::Client => client(*flags),
            Sender::Backend => backend(0, *flags),
        };
        assert_eq!(fixture.run(&frame.bytes()).0, TX, "{sender:?} {flags:#x}");
    }
}

use Sender::{Backend, Client};

const HANDSHAKE: [(Sender, u8); 3] = [(Client, SYN), (Backend, SYN_ACK), (Client, ACK)];

/// The first segment that is seen makes a flow on the first backend, then the slots go to the second.
fn moved_slots(segments: &[(Sender, u8)]) -> Fixture {
    let mut fixture = Fixture::new();
    exchange(&mut fixture, segments);
    fixture.all_slots(&WEB, WEB.backends[1].id);
    fixture
}

#[track_caller]
fn expect_stays(fixture: &mut Fixture, what: &str, frame: &Frame) {
    let expected = Expected::to_backend(&WEB, 0, frame, frame.source);
    fixture.expect(what, &frame.bytes(), expected);
}

#[track_caller]
fn expect_starts_anew(fixture: &mut Fixture, what: &str, frame: &Frame) {
    let expected = Expected::to_backend(&WEB, 1, frame, frame.source).new_flow();
    fixture.expect(what, &frame.bytes(), expected);
}

#[test]
fn the_state_of_a_flow_follows_its_segments() {
    let mut fixture = Fixture::new();
    let script = [
        (Client, SYN, TcpState::SynSent),
        (Client, SYN, TcpState::SynSent),
        (Backend, SYN_ACK, TcpState::SynReceived),
        (Client, ACK, TcpState::Established),
        (Client, ACK | PSH, TcpState::Established),
        (Backend, ACK | PSH, TcpState::Established),
        (Client, FIN_ACK, TcpState::FinClient),
        (Backend, ACK, TcpState::FinClient),
        (Backend, FIN_ACK, TcpState::Closed),
        (Client, ACK, TcpState::Closed),
        (Client, SYN, TcpState::SynSent),
        (Backend, RST | ACK, TcpState::Closed),
    ];
    for (step, (sender, flags, state)) in script.into_iter().enumerate() {
        exchange(&mut fixture, &[(sender, flags)]);
        let flow = fixture.flow(&client(SYN)).unwrap();
        assert_eq!(flow.tcp_state, state, "after step {step}");
    }
}

#[test]
fn the_program_has_the_state_machine_of_the_tests() {
    let sane = [
        SYN,
        SYN_ACK,
        RST,
        RST | ACK,
        ACK,
        FIN_ACK,
        ACK | PSH,
        FIN_ACK | PSH,
    ];
    let mut fixture = Fixture::new();
    for start in [SYN, ACK, FIN_ACK] {
        for second in [Client, Backend] {
            for flags in sane {
                for third in sane {
                    // A SYN of the client may start a flow anew, which other tests look at.
                    if second == Client && flags == SYN {
                        continue;
                    }
                    let mut state = first(start);
                    let path = [(Client, start), (second, flags), (Backend, third)];
                    exchange(&mut fixture, &path);
                    for (sender, flags) in &path[1..] {
                        state = next(state, *sender, *flags);
                    }
                    let flow = fixture.flow(&client(SYN)).unwrap();
                    assert_eq!(flow.tcp_state, state, "{path:x?}");
                    let removed = fixture.remove(&client(SYN));
                    assert_eq!(removed, 1);
                }
            }
        }
    }
}

#[test]
fn a_connection_stays_on_its_backend_when_the_slots_change() {
    let mut fixture = moved_slots(&HANDSHAKE);
    expect_stays(&mut fixture, "data", &client(ACK | PSH));
    expect_stays(&mut fixture, "FIN", &client(FIN_ACK));
    expect_stays(&mut fixture, "the last ACK", &client(ACK));
}

#[test]
fn a_new_connection_after_the_slots_have_changed_goes_to_the_other_backend() {
    let mut fixture = moved_slots(&HANDSHAKE);
    let mut other = client(SYN);
    other.source.set_port(5001);
    expect_starts_anew(&mut fixture, "SYN", &other);
}

#[test]
fn a_syn_that_is_sent_again_stays_while_the_backend_accepts() {
    for segments in [&HANDSHAKE[..1], &HANDSHAKE[..2], &HANDSHAKE[..]] {
        let mut fixture = moved_slots(segments);
        expect_stays(&mut fixture, "SYN once more", &client(SYN));
    }
}

#[test]
fn a_syn_that_is_sent_again_moves_when_the_backend_does_not_accept() {
    for segments in [&HANDSHAKE[..1], &HANDSHAKE[..2], &HANDSHAKE[..]] {
        let mut fixture = moved_slots(segments);
        fixture.change_backend(&WEB, 0, |backend| backend.flags &= !BackendFlags::ACCEPTS_NEW);
        expect_starts_anew(&mut fixture, "SYN once more", &client(SYN));
    }
}

#[test]
fn a_connection_stays_on_a_backend_that_does_not_accept() {
    let mut fixture = moved_slots(&HANDSHAKE);
    fixture.change_backend(&WEB, 0, |backend| backend.flags = BackendFlags::NEXT_HOP_KNOWN);
    expect_stays(&mut fixture, "data", &client(ACK | PSH));
    let reply = backend(0, ACK);
    fixture.expect(
        "reply",
        &reply.bytes(),
        Expected::to_client(&WEB, 0, &reply, &client(SYN)),
    );
}

#[test]
fn a_syn_on_a_connection_that_is_ending_starts_anew() {
    for end in [
        &[(Client, FIN_ACK)][..],
        &[(Backend, FIN_ACK)],
        &[(Client, FIN_ACK), (Backend, FIN_ACK)],
        &[(Client, RST)],
        &[(Client, RST | ACK)],
        &[(Backend, RST)],
        &[(Backend, RST | ACK)],
    ] {
        let mut fixture = moved_slots(&[&HANDSHAKE, end].concat());
        expect_stays(&mut fixture, &format!("ACK after {end:x?}"), &client(ACK));
        expect_starts_anew(&mut fixture, &format!("SYN after {end:x?}"), &client(SYN));
        let flow = fixture.flow(&client(SYN)).unwrap();
        assert_eq!(flow.backend, WEB.backends[1].id);
        assert_eq!(flow.tcp_state, TcpState::SynSent);
        let reply = backend(1, SYN_ACK);
        let expected = Expected::to_client(&WEB, 1, &reply, &client(SYN));
        fixture.expect("reply of the new one", &reply.bytes(), expected);
        let late = backend(0, ACK);
        fixture.expect(
            "late reply of the old one",
            &late.bytes(),
            Expected::dropped(NoFlow),
        );
    }
}

#[test]
fn a_segment_in_the_middle_of_an_unknown_connection_is_taken_up() {
    for (flags, state) in [
        (ACK, TcpState::Established),
        (ACK | PSH, TcpState::Established),
        (FIN_ACK, TcpState::FinClient),
    ] {
        let mut fixture = Fixture::new();
        let segment = client(flags);
        let expected = Expected::to_backend(&WEB, 0, &segment, segment.source).new_flow();
        fixture.expect("in the middle", &segment.bytes(), expected);
        assert_eq!(fixture.flow(&segment).unwrap().tcp_state, state);
    }
}

#[test]
fn a_segment_that_ends_or_answers_an_unknown_connection_is_dropped() {
    let mut fixture = Fixture::new();
    for flags in [RST, RST | ACK, SYN_ACK] {
        let segment = client(flags);
        let expected = Expected::dropped(NoFlow).of(&WEB);
        fixture.expect(&format!("flags {flags:#x}"), &segment.bytes(), expected);
    }
    assert!(fixture.flows().is_empty());
}

#[test]
fn a_new_connection_to_a_service_without_backends_is_reset() {
    let mut fixture = Fixture::new();
    exchange(&mut fixture, &HANDSHAKE);
    fixture.all_slots(&WEB, 0);
    let mut other = client(SYN);
    other.source.set_port(5001);
    fixture.expect("SYN", &other.bytes(), Expected::rejected(&other).of(&WEB));
    expect_stays(&mut fixture, "data of a known connection", &client(ACK));
}

#[test]
fn a_service_without_a_slot_table_resets_new_connections() {
    let mut fixture = Fixture::new();
    fixture.apply(xlb::datapath::Operation::RemovePool(WEB.id));
    let syn = client(SYN);
    fixture.expect("SYN", &syn.bytes(), Expected::rejected(&syn).of(&WEB));
}
