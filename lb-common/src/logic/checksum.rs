//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Words are taken as they lie in memory: ones' complement addition commutes with a swap of bytes (RFC 1071
//! section 2 B), so neither side converts.

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
