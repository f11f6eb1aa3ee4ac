//! SipHash-1-3 over a fixed number of bytes (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012).
//!
//! The input of `n` words is hashed as its `8 * n` bytes in little-endian order, and so is what is left over of a word: the
//! result is that of any other SipHash-1-3. The key is secret and shared by the nodes that serve the same VIPs: who cannot know it
//! cannot choose addresses that all fall on one backend.

use crate::abi::FlowKey;

#[inline(always)]
fn round(v: &mut [u64; 4]) {
    v[0] = v[0].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(13) ^ v[0];
    v[0] = v[0].rotate_left(32);
    v[2] = v[2].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(16) ^ v[2];
    v[0] = v[0].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(21) ^ v[0];
    v[2] = v[2].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(17) ^ v[2];
    v[2] = v[2].rotate_left(32);
}

/// Hashes `N` 64-bit words under a 128-bit key.
#[inline(always)]
pub fn siphash13<const N: usize>(key: [u64; 2], words: [u64; N]) -> u64 {
    siphash13_and(key, words, 0, 0)
}

/// Hashes `N` 64-bit words and what is left over, of seven bytes at most, under a 128-bit key: a round less than for a word more.
#[inline(always)]
pub fn siphash13_and<const N: usize>(key: [u64; 2], words: [u64; N], left: u64, left_bytes: u64) -> u64 {
    debug_assert!(left_bytes < 8 && left >> (8 * left_bytes) == 0);
    let mut v = [
        key[0] ^ 0x736f_6d65_7073_6575,
        key[1] ^ 0x646f_7261_6e64_6f6d,
        key[0] ^ 0x6c79_6765_6e65_7261,
        key[1] ^ 0x7465_6462_7974_6573,
    ];
    let mut i = 0;
    while i < N {
        v[3] ^= words[i];
        round(&mut v);
        v[0] ^= words[i];
        i += 1;
    }
    // The last block holds the length modulo 256 in its top byte.
    let last = ((N as u64) * 8 + left_bytes) << 56 | left;
    v[3] ^= last;
    round(&mut v);
    v[0] ^= last;
    v[2] ^= 0xff;
    round(&mut v);
    round(&mut v);
    round(&mut v);
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

#[inline(always)]
fn word(high: u32, low: u32) -> u64 {
    (high as u64) << 32 | low as u64
}

/// Hash of a flow: what `consistent-hash` looks up.
#[inline(always)]
pub fn flow_hash(seed: [u64; 2], key: &FlowKey) -> u64 {
    let s = &key.source.0;
    let d = &key.destination.0;
    let ports = (key.source_port as u32) << 16 | key.destination_port as u32;
    if key.source.is_v4() && key.destination.is_v4() {
        return siphash13(seed, [word(s[3], d[3]), word(ports, key.protocol)]);
    }
    siphash13(
        seed,
        [
            word(s[0], s[1]),
            word(s[2], s[3]),
            word(d[0], d[1]),
            word(d[2], d[3]),
            word(ports, key.protocol),
        ],
    )
}

/// Hash of a client's address: what `ip-hash` looks up.
#[inline(always)]
pub fn client_hash(seed: [u64; 2], key: &FlowKey) -> u64 {
    let s = &key.source.0;
    siphash13(seed, [word(s[0], s[1]), word(s[2], s[3])])
}

/// Maps a hash to one of so many slots without a division: the high half scaled to their number.
#[inline(always)]
pub const fn slot_of(hash: u64, slots: u32) -> u32 {
    (((hash >> 32) * slots as u64) >> 32) as u32
}

/// A number by which one of several equal backends is chosen for a flow: no two have the same, and each is as often the
/// least, whichever the others are.
#[inline(always)]
pub const fn lot(hash: u64, backend_id: u32) -> u32 {
    let mixed = (hash >> 32) as u32 ^ backend_id.wrapping_mul(0x9e37_79b9);
    (mixed ^ mixed >> 16).wrapping_mul(0x85eb_ca6b)
}

#[cfg(test)]
mod tests {
    use core::hash::Hasher;

    use proptest::prelude::*;
    use siphasher::sip::SipHasher13;

    use super::*;
    use crate::abi::{Address, FEW_SLOTS, MANY_SLOTS, MAX_SLOTS};

    fn reference(key: [u64; 2], words: &[u64]) -> u64 {
        let mut hasher = SipHasher13::new_with_keys(key[0], key[1]);
        for word in words {
            hasher.write(&word.to_le_bytes());
        }
        hasher.finish()
    }

    fn key(source: [u32; 4], destination: [u32; 4], ports: [u16; 2], protocol: u32) -> FlowKey {
        FlowKey {
            source: Address(source),
            destination: Address(destination),
            source_port: ports[0],
            destination_port: ports[1],
            protocol,
        }
    }

    fn v4(source: u32, destination: u32, ports: [u16; 2], protocol: u32) -> FlowKey {
        let mapped = |word| Address::from_v4_word(word).0;
        key(mapped(source), mapped(destination), ports, protocol)
    }

    proptest! {
        #[test]
        fn it_is_siphash_1_3(key: [u64; 2], words: [u64; 5]) {
            prop_assert_eq!(siphash13(key, words), reference(key, &words));
            prop_assert_eq!(siphash13(key, [words[0], words[1]]), reference(key, &words[..2]));
            prop_assert_eq!(siphash13(key, [words[0]]), reference(key, &words[..1]));
            prop_assert_eq!(siphash13(key, []), reference(key, &[]));
        }

        #[test]
        fn what_is_left_over_is_hashed_as_its_bytes(
            key: [u64; 2], words: [u64; 2], left: [u8; 7], left_bytes in 0..=7_usize,
        ) {
            let mut bytes = [0; 8];
            bytes[..left_bytes].copy_from_slice(&left[..left_bytes]);
            let number = u64::from_le_bytes(bytes);
            let reference = |words: &[u64]| {
                let mut hasher = SipHasher13::new_with_keys(key[0], key[1]);
                words.iter().for_each(|word| hasher.write(&word.to_le_bytes()));
                hasher.write(&left[..left_bytes]);
                hasher.finish()
            };
            prop_assert_eq!(siphash13_and(key, words, number, left_bytes as u64), reference(&words));
            prop_assert_eq!(siphash13_and(key, [], number, left_bytes as u64), reference(&[]));
        }

        #[test]
        fn a_flow_over_ipv4_is_hashed_as_its_sixteen_bytes(
            seed: [u64; 2], source: u32, destination: u32, ports: [u16; 2], protocol: u32
        ) {
            let words = [
                u64::from(source) << 32 | u64::from(destination),
                u64::from(ports[0]) << 48 | u64::from(ports[1]) << 32 | u64::from(protocol),
            ];
            let hash = flow_hash(seed, &v4(source, destination, ports, protocol));
            prop_assert_eq!(hash, reference(seed, &words));
        }

        #[test]
        fn every_field_of_a_flow_changes_its_hash(
            seed: [u64; 2], source: [u32; 4], destination: [u32; 4], ports: [u16; 2], protocol: u32, bit in 0..10usize
        ) {
            let one = key(source, destination, ports, protocol);
            let mut other = one;
            match bit {
                0..=3 => other.source.0[bit] ^= 1,
                4..=7 => other.destination.0[bit - 4] ^= 1,
                8 => other.source_port ^= 1,
                _ => other.destination_port ^= 1,
            }
            prop_assert_ne!(flow_hash(seed, &one), flow_hash(seed, &other));
            other = one;
            other.protocol ^= 1;
            prop_assert_ne!(flow_hash(seed, &one), flow_hash(seed, &other));
        }

        #[test]
        fn the_hash_of_a_client_depends_on_its_address_alone(
            seed: [u64; 2], source: [u32; 4], one: ([u32; 4], [u16; 2], u32), other: ([u32; 4], [u16; 2], u32)
        ) {
            let one = client_hash(seed, &key(source, one.0, one.1, one.2));
            prop_assert_eq!(one, client_hash(seed, &key(source, other.0, other.1, other.2)));
            let words = [word(source[0], source[1]), word(source[2], source[3])];
            prop_assert_eq!(one, reference(seed, &words));
        }

        #[test]
        fn a_slot_is_one_of_the_table(hash: u64, slots in 1..=MAX_SLOTS) {
            prop_assert!(slot_of(hash, slots) < slots);
        }
    }

    #[test]
    fn the_ends_of_the_range_are_the_first_and_the_last_slot() {
        for slots in [1, 2, FEW_SLOTS, MANY_SLOTS] {
            assert_eq!(slot_of(0, slots), 0);
            assert_eq!(slot_of(u64::MAX, slots), slots - 1);
        }
    }

    #[test]
    fn a_flow_and_its_reverse_are_hashed_apart() {
        let there = v4(1, 2, [3, 4], 6);
        let back = v4(2, 1, [4, 3], 6);
        assert_ne!(flow_hash([0; 2], &there), flow_hash([0; 2], &back));
    }

    #[test]
    fn equal_backends_win_as_many_flows_each_whichever_they_are() {
        const FLOWS: u64 = 10_000;
        let ids = [1, 2, 3, 4, 7, 8, 100, 101, 16_383, 262_143];
        let hashes: [u64; FLOWS as usize] = core::array::from_fn(|flow| siphash13([1, 2], [flow as u64]));
        let wins = |id, others: &[u32]| {
            let wins = |hash: &&u64| others.iter().all(|other| lot(**hash, id) <= lot(**hash, *other));
            hashes.iter().filter(wins).count() as u64
        };
        for (at, one) in ids.into_iter().enumerate() {
            for other in &ids[..at] {
                let won = wins(one, &[*other]);
                // Five standard deviations of a fair draw.
                assert!(won.abs_diff(FLOWS / 2) <= 250, "{one} beside {other}: {won}");
            }
            let won = wins(one, &ids);
            assert!(won.abs_diff(FLOWS / 10) <= 150, "{one} of ten: {won}");
        }
    }

    #[test]
    fn flows_spread_evenly_over_the_slots() {
        let mut quarters = [0u32; 4];
        for port in 0..40_000u32 {
            let flow = v4(0x0100_000a, 0x0200_000a, [port as u16, 80], 6);
            let slot = slot_of(flow_hash([7, 8], &flow), MANY_SLOTS);
            quarters[(slot * 4 / MANY_SLOTS) as usize] += 1;
        }
        // The standard deviation is 87.
        assert!(
            quarters.iter().all(|count| (9_400..10_600).contains(count)),
            "{quarters:?}"
        );
    }
}
