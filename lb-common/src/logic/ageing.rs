//! When an idle flow is over.

use crate::abi::{Forward, Meta, Settings, SettingsFlags, TcpState};

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

/// The shift that makes ticks of nanoseconds for a timeout: at least 64 ticks, and fewer than 128 unless there is no
/// time at all.
pub const fn tick_shift(timeout: u64) -> u8 {
    let mut shift = 0;
    while timeout >> shift >= 128 {
        shift += 1;
    }
    shift
}

/// The time of a flow in this state in ticks, which start over at 256.
#[inline(always)]
pub const fn ticks(settings: &Settings, state: TcpState, now: u64) -> u8 {
    (now >> shift(settings, state)) as u8
}

#[inline(always)]
const fn shift(settings: &Settings, state: TcpState) -> u8 {
    let [idle, opening, closing, udp] = &settings.tick_shifts;
    63 & match state {
        TcpState::None => *udp,
        TcpState::SynSent | TcpState::SynReceived => *opening,
        TcpState::Established => *idle,
        TcpState::FinClient | TcpState::FinBackend | TcpState::Closed => *closing,
    }
}

/// Ticks since the last packet of a flow. One that another CPU has seen after `now` was read counts as seen now.
#[inline(always)]
pub const fn idle_ticks(settings: &Settings, meta: Meta, now: u64) -> u32 {
    let ticks = ticks(settings, meta.state(), now).wrapping_sub(meta.age());
    if ticks >= FUTURE { 0 } else { ticks as u32 }
}

/// Ticks from which on a time is taken for one that is still to come.
const FUTURE: u8 = 0xfc;

/// Tells whether a flow has been idle for longer than its state allows. It ends late by up to two ticks, never early.
#[inline(always)]
pub const fn is_over(settings: &Settings, meta: Meta, now: u64) -> bool {
    is_over_after(settings, meta, idle_ticks(settings, meta, now))
}

/// As [`is_over`], after so many idle ticks.
#[inline(always)]
pub const fn is_over_after(settings: &Settings, meta: Meta, idle_ticks: u32) -> bool {
    let state = meta.state();
    let allowed = (idle_timeout(settings, state) >> shift(settings, state)) as u32;
    settings.flags & SettingsFlags::AGELESS == 0 && idle_ticks > allowed + 1
}

/// When the last packet of a flow was seen: nanoseconds of the clock of `now`, late by up to a tick.
#[inline(always)]
pub const fn last_seen(settings: &Settings, meta: Meta, now: u64) -> u64 {
    let shift = shift(settings, meta.state());
    ((now >> shift) - idle_ticks(settings, meta, now) as u64) << shift
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
