//! What a packet changes of its flow: its state and its age.

use super::{
    ageing::ticks,
    tcp_state::{
        Sender,
        flags::{FIN, RST, SYN},
        next, next_of_client_alone,
    },
};
use crate::abi::{Forward, Meta, Settings, TcpState};

/// The flow after a packet; of UDP all but the first confirm it.
#[inline(always)]
pub const fn advanced(settings: &Settings, former: Meta, sender: Sender, tcp_flags: u8, now: u64) -> Meta {
    let state = former.state();
    if former.is_udp() {
        return former.confirmed().with_age(ticks(settings, state, now));
    }
    let state = if tcp_flags == 0 {
        state
    } else if Forward::sees_replies(former.forward()) {
        next(state, sender, tcp_flags)
    } else {
        next_of_client_alone(state, tcp_flags)
    };
    former.with_state(state).with_age(ticks(settings, state, now))
}

/// Tells by few instructions that a flow is not over and stays as it is with a packet of either end, as with most: it is
/// open, the packet neither begins nor ends a connection, and another one was there in the same tick.
#[inline(always)]
pub const fn changes_nothing(settings: &Settings, meta: Meta, tcp_flags: u8, now: u64) -> bool {
    let ticks = if meta.is_established() {
        ticks(settings, TcpState::Established, now)
    } else if meta.is_confirmed() {
        ticks(settings, TcpState::None, now)
    } else {
        return false;
    };
    tcp_flags & (SYN | FIN | RST) == 0 && ticks == meta.age()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        abi::Kind,
        logic::{
            ageing::{
                is_over,
                tests::{SECOND, settings},
            },
            tcp_state::flags::{ACK, PSH},
        },
    };

    fn meta(state: TcpState, forward: u8) -> Meta {
        Meta::new(Kind::Short, 1, 2, forward).with_state(state)
    }

    #[test]
    fn of_an_open_flow_a_second_packet_in_the_same_tick_changes_nothing() {
        let settings = settings();
        let now = 1_000_000 * SECOND;
        let aged = |meta: Meta| meta.with_age(ticks(&settings, meta.state(), now));
        let tcp = aged(meta(TcpState::Established, Forward::IpIp.number()));
        let udp = aged(meta(TcpState::None, Forward::IpIp.number()));
        assert!(changes_nothing(&settings, tcp, ACK, now));
        assert!(changes_nothing(&settings, tcp, PSH | ACK, now));
        assert!(changes_nothing(&settings, udp.confirmed(), 0, now));
        assert!(!changes_nothing(&settings, udp, 0, now));
        assert!(!changes_nothing(&settings, tcp, FIN | ACK, now));
        assert!(!changes_nothing(&settings, tcp, ACK, now + 3600 * SECOND / 64));
    }

    proptest! {
        #[test]
        fn what_is_said_to_change_nothing_changes_nothing(
            number in prop_oneof![Just(3), Just(7), 0..8_u8], forward in 1..=6_u8,
            tcp_flags in prop_oneof![Just(0), Just(ACK), 0..64_u8], from_client: bool,
            seen in 0..1_000_000 * SECOND, idle in prop_oneof![0..SECOND, 0..10_000 * SECOND],
        ) {
            let settings = settings();
            let mut meta = Meta::new(Kind::Short, 1, 2, forward).with_state(TcpState::from_number(number % 7));
            if number == 7 {
                meta = meta.confirmed();
            }
            let meta = meta.with_age(ticks(&settings, meta.state(), seen));
            let (now, sender) = (seen + idle, if from_client { Sender::Client } else { Sender::Backend });
            if changes_nothing(&settings, meta, tcp_flags, now) {
                prop_assert!(!is_over(&settings, meta, now));
                prop_assert_eq!(advanced(&settings, meta, sender, tcp_flags, now), meta);
            }
        }
    }
}
