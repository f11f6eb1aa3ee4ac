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

/// The shift that makes ticks of nanoseconds for a timeout: from 64 to 127 ticks for one of four seconds and more.
///
/// Ticks start over after 256. What is idle for so long looks young again, unless the daemon has met it before: its sweeps
/// have 17 seconds at least, three times their interval, and as long as the timeout is.
pub const fn tick_shift(timeout: u64) -> u8 {
    let mut shift = SHORTEST;
    while timeout >> shift >= 128 {
        shift += 1;
    }
    shift
}

/// The shift for ticks of 67 milliseconds.
const SHORTEST: u8 = 26;

/// The shifts for the timeouts of some settings, as [`Settings::tick_shifts`] has them.
pub const fn tick_shifts(settings: &Settings) -> [u8; 4] {
    [
        tick_shift(settings.tcp_idle),
        tick_shift(settings.tcp_opening),
        tick_shift(settings.tcp_closing),
        tick_shift(settings.udp_idle),
    ]
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
    is_over_after(settings, meta.state(), idle_ticks(settings, meta, now))
}

/// As [`is_over`], after so many idle ticks.
#[inline(always)]
pub const fn is_over_after(settings: &Settings, state: TcpState, idle_ticks: u32) -> bool {
    let allowed = (idle_timeout(settings, state) >> shift(settings, state)) as u32;
    settings.flags & SettingsFlags::AGELESS == 0 && idle_ticks > allowed + 1
}

/// As [`is_over`], by the time of the last packet: see [`last_seen`].
pub const fn is_over_since(settings: &Settings, state: TcpState, last_seen: u64, now: u64) -> bool {
    let shift = shift(settings, state);
    let ticks = (now >> shift).saturating_sub(last_seen >> shift);
    is_over_after(
        settings,
        state,
        if ticks > u32::MAX as u64 {
            u32::MAX
        } else {
            ticks as u32
        },
    )
}

/// When the last packet of a flow was seen: nanoseconds of the clock of `now`, early by up to a tick.
pub const fn last_seen(settings: &Settings, meta: Meta, now: u64) -> u64 {
    let shift = shift(settings, meta.state());
    (now >> shift).saturating_sub(idle_ticks(settings, meta, now) as u64) << shift
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::abi::Kind;

    pub const SECOND: u64 = 1_000_000_000;

    pub fn settings() -> Settings {
        let mut settings = Settings {
            tcp_idle: 3600 * SECOND,
            tcp_opening: 60 * SECOND,
            tcp_closing: 10 * SECOND,
            udp_idle: SECOND,
            ..Settings::default()
        };
        settings.tick_shifts = tick_shifts(&settings);
        settings
    }

    const STATES: [(TcpState, u64); 7] = [
        (TcpState::None, 1),
        (TcpState::SynSent, 60),
        (TcpState::SynReceived, 60),
        (TcpState::Established, 3600),
        (TcpState::FinClient, 10),
        (TcpState::FinBackend, 10),
        (TcpState::Closed, 10),
    ];

    fn seen_at(settings: &Settings, state: TcpState, time: u64) -> Meta {
        Meta::new(Kind::Short, 1, 2, 1)
            .with_state(state)
            .with_age(ticks(settings, state, time))
    }

    #[test]
    fn each_state_has_its_timeout() {
        for (state, seconds) in STATES {
            assert_eq!(idle_timeout(&settings(), state), seconds * SECOND, "{state:?}");
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
    fn a_timeout_has_64_to_127_ticks_and_they_start_over_long_after_it() {
        for seconds in [5, 7, 60, 3600, 86_400, 10_000_000] {
            let ticks = (seconds * SECOND) >> tick_shift(seconds * SECOND);
            assert!((64..128).contains(&ticks), "{seconds}: {ticks}");
        }
        for timeout in [0, 1, SECOND, 4 * SECOND, 5 * SECOND, 60 * SECOND, 1 << 50] {
            let over = 256 << tick_shift(timeout);
            assert!(over >= 17 * SECOND && over >= 2 * timeout, "{timeout}");
        }
    }

    #[test]
    fn a_flow_of_any_age_lives_while_ages_are_being_changed() {
        let mut settings = settings();
        settings.flags = SettingsFlags::AGELESS;
        for age in 0..=255 {
            let meta = seen_at(&settings, TcpState::SynSent, 0).with_age(age);
            assert!(!is_over(&settings, meta, 1000 * SECOND));
            // Soon after the machine has started, too.
            assert!(last_seen(&settings, meta, SECOND) <= SECOND);
        }
    }

    #[test]
    fn a_flow_seen_after_the_clock_was_read_stays() {
        let settings = settings();
        for (state, _) in STATES {
            let tick = 1 << shift(&settings, state);
            let meta = seen_at(&settings, state, 1000 * SECOND + 3 * tick);
            assert!(!is_over(&settings, meta, 1000 * SECOND), "{state:?}");
            assert!(last_seen(&settings, meta, 1000 * SECOND) <= 1000 * SECOND);
        }
    }

    proptest! {
        #[test]
        fn a_flow_ends_late_by_up_to_two_ticks_and_never_early(
            which in 0..STATES.len(), seen in 0..1_000_000 * SECOND, idle in 0..3 * 3600 * SECOND,
        ) {
            let settings = settings();
            let (state, _) = STATES[which];
            let (timeout, tick) = (idle_timeout(&settings, state), 1 << shift(&settings, state));
            // What is idle for longer than 251 ticks looks young again: the daemon looks sooner.
            let idle = idle % (251 * tick);
            let meta = seen_at(&settings, state, seen);
            let is_over = is_over(&settings, meta, seen + idle);
            if idle <= timeout {
                prop_assert!(!is_over);
            }
            if idle > timeout + 3 * tick {
                prop_assert!(is_over);
            }
            let last_seen = last_seen(&settings, meta, seen + idle);
            prop_assert!(last_seen <= seen && seen - last_seen < tick);
            prop_assert_eq!(is_over_since(&settings, state, last_seen, seen + idle), is_over);
        }
    }
}
