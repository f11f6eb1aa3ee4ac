//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Words are taken as they lie in memory: ones' complement addition commutes with a swap of bytes (RFC 1071
//! section 2 B), so neither side converts.

use crate::abi::Address;

/// Folds a sum of 16-bit words into 16 bits.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The difference that the change of one 32-bit word makes; differences add up, see [`update`].
#[inline(always)]
pub const fn difference32(old: u32, new: u32) -> u32 {
    difference16(old as u16, new as u16) + difference16((old >> 16) as u16, (new >> 16) as u16)
}

/// The difference that the change of an address makes. Of a mapped IPv4 address only the last word counts, as only that
/// is in a packet.
#[inline(always)]
pub const fn difference_of_addresses(old: &Address, new: &Address) -> u32 {
    let last = difference32(old.0[3], new.0[3]);
    if old.is_v4() {
        return last;
    }
    difference32(old.0[0], new.0[0])
        + difference32(old.0[1], new.0[1])
        + difference32(old.0[2], new.0[2])
        + last
}

/// The difference that the change of one 16-bit word makes: `~old + new` (RFC 1624 equation 3).
#[inline(always)]
pub const fn difference16(old: u16, new: u16) -> u32 {
    (!old) as u32 + new as u32
}

/// A checksum after a change: `~(~checksum + difference)` (RFC 1624 equation 3). The difference is a sum of at
/// most 32,000 words.
#[inline(always)]
pub const fn update(checksum: u16, difference: u32) -> u16 {
    !fold((!checksum) as u32 + difference)
}

/// A UDP checksum after a change: zero stays zero, because it means that there is none, and a result of zero is
/// written as all ones (RFC 768).
#[inline(always)]
pub const fn update_udp(checksum: u16, difference: u32) -> u16 {
    if checksum == 0 {
        return 0;
    }
    match update(checksum, difference) {
        0 => 0xffff,
        updated => updated,
    }
}

/// The checksum of a run of bytes; an odd last byte counts as the high half of a word with a zero.
pub fn of_bytes(bytes: &[u8], start: u32) -> u16 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !fold(sum)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn the_example_of_rfc_1071_has_its_sum() {
        // Section 3: the words 0001 f203 f4f5 f6f7 add up to ddf2.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(u16::from_be(!of_bytes(&bytes, 0)), 0xddf2);
    }

    #[test]
    fn a_known_ip_header_has_its_checksum() {
        let header = [
            0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0x00, 0x00, 0xc0, 0xa8, 0x00, 0x01,
            0xc0, 0xa8, 0x00, 0xc7,
        ];
        assert_eq!(u16::from_be(of_bytes(&header, 0)), 0xb861);
    }

    #[test]
    fn the_example_of_rfc_1624_is_right() {
        // Section 4: the checksum dd2f with 5555 changed to 3285 becomes 0000, which equation 2 got wrong.
        let (checksum, old, new) = (0xdd2f_u16.to_be(), 0x5555_u16.to_be(), 0x3285_u16.to_be());
        assert_eq!(update(checksum, difference16(old, new)), 0);
        assert_eq!(update_udp(checksum, difference16(old, new)), 0xffff);
    }

    #[test]
    fn an_odd_byte_counts_as_the_first_of_a_word() {
        assert_eq!(
            of_bytes(&[0x12, 0x34, 0x56], 0),
            of_bytes(&[0x12, 0x34, 0x56, 0x00], 0)
        );
    }

    #[test]
    fn a_fold_of_the_largest_sum_fits() {
        assert_eq!(fold(u32::MAX), 0xffff);
        assert_eq!(fold(0x1_fffe), 0xffff);
        assert_eq!(fold(0x1_0000), 1);
        assert_eq!(fold(0), 0);
    }

    #[test]
    fn a_missing_udp_checksum_stays_missing() {
        for difference in [0, 1, 0xffff, 0x1_0000, u32::MAX >> 1] {
            assert_eq!(update_udp(0, difference), 0);
        }
    }

    /// Words 4 to 7 are what a change of both addresses is; the rest stands for the payload.
    fn words() -> impl Strategy<Value = Vec<u8>> {
        vec(any::<u8>(), 12..200)
    }

    proptest! {
        #[test]
        fn an_update_gives_what_computing_anew_gives(
            before in words(), source: u32, destination: u32, ports: [u16; 2]
        ) {
            // A packet is never all zeros, for which alone ones' complement has two checksums.
            prop_assume!(before.iter().skip(12).any(|byte| *byte != 0));
            let mut after = before.clone();
            after[0..4].copy_from_slice(&source.to_ne_bytes());
            after[4..8].copy_from_slice(&destination.to_ne_bytes());
            after[8..10].copy_from_slice(&ports[0].to_ne_bytes());
            after[10..12].copy_from_slice(&ports[1].to_ne_bytes());
            let u32_at = |at: usize| u32::from_ne_bytes([before[at], before[at + 1], before[at + 2], before[at + 3]]);
            let u16_at = |at: usize| u16::from_ne_bytes([before[at], before[at + 1]]);
            let difference = difference32(u32_at(0), source)
                + difference32(u32_at(4), destination)
                + difference16(u16_at(8), ports[0])
                + difference16(u16_at(10), ports[1]);
            prop_assert_eq!(update(of_bytes(&before, 0), difference), of_bytes(&after, 0));
            let udp = |checksum| if checksum == 0 { 0xffff } else { checksum };
            prop_assert_eq!(update_udp(udp(of_bytes(&before, 0)), difference), udp(of_bytes(&after, 0)));
        }

        #[test]
        fn a_change_to_the_same_leaves_the_checksum(checksum in 0..0xffff_u16, word: u32) {
            prop_assert_eq!(update(checksum, difference32(word, word)), checksum);
        }

        #[test]
        fn a_change_and_its_reverse_leave_the_checksum(checksum in 1..0xffff_u16, old: u32, new: u32) {
            let there = update(checksum, difference32(old, new));
            prop_assert_eq!(update(there, difference32(new, old)), checksum);
        }

        #[test]
        fn bytes_with_their_checksum_sum_to_zero(mut bytes in vec(any::<u8>(), 2..100)) {
            bytes.truncate(bytes.len() & !1);
            let checksum = of_bytes(&bytes, 0);
            bytes.extend_from_slice(&checksum.to_ne_bytes());
            prop_assert_eq!(of_bytes(&bytes, 0), 0);
        }
    }
}
