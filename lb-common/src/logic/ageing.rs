//! When an idle flow is over.

use crate::abi::{Forward, Settings, TcpState};

/// Idle time in nanoseconds after which a flow in this state ends.
#[inline(always)]
pub const fn idle_timeout(settings: &Settings, state: TcpState) -> u64 {
    match state {
        TcpState::None => settings.udp_idle,
        TcpState::SynSent | TcpState::SynReceived => settings.tcp_opening,
        TcpState::Established => settings.tcp_idle,
        TcpState::FinClient | TcpState::FinBackend | TcpState::Closed => settings.tcp_closing,
    }
}

/// Tells whether a flow in this state is counted as ended, though its record stays until it is idle.
///
/// Where the backend answers the client directly its FIN is not seen, so the client's is the end.
#[inline(always)]
pub const fn has_ended(forward: u8, state: TcpState) -> bool {
    match state {
        TcpState::Closed => true,
        TcpState::FinClient => !Forward::sees_replies(forward),
        TcpState::None
        | TcpState::SynSent
        | TcpState::SynReceived
        | TcpState::Established
        | TcpState::FinBackend => false,
    }
}

/// Tells whether a flow last seen at `last_seen` has been idle for longer than its state allows at `now`, both in
/// nanoseconds of one clock. A packet seen after `now` was read is no reason to end the flow.
#[inline(always)]
pub const fn is_over(settings: &Settings, state: TcpState, last_seen: u64, now: u64) -> bool {
    now.saturating_sub(last_seen) > idle_timeout(settings, state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Address;

    const SETTINGS: Settings = Settings {
        seed: [0; 2],
        tcp_idle: 1000,
        tcp_opening: 100,
        tcp_closing: 10,
        udp_idle: 1,
        source_port_first: 0,
        source_port_count: 0,
        flags: 0,
        ipip_source_v4: Address([0; 4]),
        ipip_source_v6: Address([0; 4]),
        ipip_varying_v4: 0,
        ipip_varying_v6: 0,
    };

    #[test]
    fn each_state_has_its_timeout() {
        let expected = [
            (TcpState::None, 1),
            (TcpState::SynSent, 100),
            (TcpState::SynReceived, 100),
            (TcpState::Established, 1000),
            (TcpState::FinClient, 10),
            (TcpState::FinBackend, 10),
            (TcpState::Closed, 10),
        ];
        for (state, timeout) in expected {
            assert_eq!(idle_timeout(&SETTINGS, state), timeout, "{state:?}");
        }
    }

    #[test]
    fn a_flow_whose_replies_are_not_seen_has_ended_with_the_clients_fin() {
        let two_way = [Forward::Nat, Forward::FullNat, Forward::Local];
        let one_way = [Forward::Dsr, Forward::IpIp, Forward::Gue];
        let ended = |forward: Forward, state| has_ended(forward.number(), state);
        for forward in two_way.into_iter().chain(one_way) {
            assert!(ended(forward, TcpState::Closed), "{forward:?}");
            assert!(!ended(forward, TcpState::None), "{forward:?}");
            assert!(!ended(forward, TcpState::Established), "{forward:?}");
        }
        assert!(
            two_way
                .iter()
                .all(|forward| !ended(*forward, TcpState::FinClient))
        );
        assert!(one_way.iter().all(|forward| ended(*forward, TcpState::FinClient)));
    }

    #[test]
    fn a_flow_ends_only_beyond_its_timeout() {
        assert!(!is_over(&SETTINGS, TcpState::Established, 5000, 6000));
        assert!(is_over(&SETTINGS, TcpState::Established, 5000, 6001));
    }

    #[test]
    fn a_flow_seen_after_the_clock_was_read_stays() {
        assert!(!is_over(&SETTINGS, TcpState::None, 6001, 6000));
    }
}
