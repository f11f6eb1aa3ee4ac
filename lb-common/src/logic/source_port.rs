//! Which source ports a flow may be given towards its backend, and in which order they are tried.

use super::hash::flow_hash;
use crate::abi::{FlowKey, Settings};

/// How many source ports are tried for a flow before it is given up.
pub const TRIES: u32 = 16;

/// Where the search for a source port starts: spread by the hash of the flow, so that flows rarely meet.
#[inline(always)]
pub fn first_choice(settings: &Settings, key: &FlowKey) -> u32 {
    flow_hash(settings.seed, key) as u32
}

/// The port of one attempt, host byte order: each of the [`TRIES`] gives another while there are so many. The stride
/// differs from flow to flow, so that flows that meet once do not go on to meet.
#[inline(always)]
pub fn candidate(settings: &Settings, start: u32, attempt: u32) -> u16 {
    let count = settings.source_port_count as u32;
    if count == 0 {
        return settings.source_port_first;
    }
    // All strides together stay within one round.
    let strides = count / TRIES;
    let stride = if strides > 1 {
        1 + (start >> 16) % strides
    } else {
        1
    };
    let offset = (start % count + attempt * stride) % count;
    settings.source_port_first.wrapping_add(offset as u16)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::abi::Address;

    fn settings(first: u16, count: u16) -> Settings {
        Settings {
            seed: [1, 2],
            source_port_first: first,
            source_port_count: count,
            ..Settings::default()
        }
    }

    proptest! {
        #[test]
        fn all_tries_are_of_different_ports_while_there_are_so_many(count in 1..=64_512u16, start: u32) {
            let settings = settings(1024, count);
            let ports: BTreeSet<u16> = (0..TRIES).map(|attempt| candidate(&settings, start, attempt)).collect();
            prop_assert_eq!(ports.len(), TRIES.min(u32::from(count)) as usize);
        }

        #[test]
        fn every_port_is_one_of_those_allowed(first in 1..=u16::MAX, count: u16, start: u32, attempt in 0..TRIES) {
            let count = count.clamp(1, u16::MAX - first + 1);
            let port = candidate(&settings(first, count), start, attempt);
            prop_assert!(port >= first && u32::from(port) < u32::from(first) + u32::from(count));
        }
    }

    #[test]
    fn without_a_range_the_first_port_is_the_only_one() {
        for attempt in 0..TRIES {
            assert_eq!(candidate(&settings(7, 0), 0xdead_beef, attempt), 7);
        }
    }

    #[test]
    fn every_port_of_the_range_is_some_flows_first_choice() {
        let settings = settings(1024, 100);
        let firsts: BTreeSet<u16> = (0..5000u16)
            .map(|port| {
                let key = FlowKey {
                    source: Address::from_v4_word(1),
                    source_port: port,
                    ..FlowKey::default()
                };
                candidate(&settings, first_choice(&settings, &key), 0)
            })
            .collect();
        assert_eq!(firsts.len(), 100);
    }

    #[test]
    fn flows_that_meet_once_mostly_part_at_the_next_try() {
        let settings = settings(1024, 31_744);
        let parted = (1..2000u32)
            .filter(|high| {
                let (one, other) = (31_744 * 3, 31_744 * 3 * (high + 1));
                assert_eq!(candidate(&settings, one, 0), candidate(&settings, other, 0));
                candidate(&settings, one, 1) != candidate(&settings, other, 1)
            })
            .count();
        assert!(parted > 1900, "{parted} of 1999");
    }
}
