//! Which addresses may be those of VIPs or backends: a bit for each of their hashes. A packet between two others is not
//! ours, and leaves with a look at two words.

use super::headers::{Frame, View, ethertype};
use crate::abi::{ADDRESS_FILTER_WORDS, Address, ROLE_BACKEND, ROLE_VIP, TCP, UDP};

/// Addresses have two bits each, of [`ROLE_VIP`] and [`ROLE_BACKEND`], and 32 of them a word.
const PER_WORD: u32 = 32;

/// The word and the shift of an address's bits.
#[inline(always)]
pub const fn place(address: &Address) -> (u32, u32) {
    let [a, b, c, d] = &address.0;
    place_of(if address.is_v4() {
        *d
    } else {
        // The multiplier is odd, so that each word changes the result; operators choose these addresses.
        (((*a ^ c.rotate_left(9)).wrapping_mul(0x9e37_79b1) ^ *b).rotate_left(15)).wrapping_mul(0x85eb_ca6b)
            ^ *d
    })
}

#[inline(always)]
const fn place_of(word: u32) -> (u32, u32) {
    let hash = word.wrapping_mul(0x9e37_79b1);
    let hash = hash ^ hash >> 15;
    ((hash / PER_WORD) % ADDRESS_FILTER_WORDS, hash % PER_WORD * 2)
}

/// Whose packet a frame may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// The destination may be a VIP.
    pub to_vip: bool,
    /// The source may be a backend.
    pub from_backend: bool,
}

impl Ends {
    /// Of what is left to the decoder: frames with VLAN tags or extension headers, and all that is not TCP or UDP.
    const UNKNOWN: Self = Self {
        to_vip: true,
        from_backend: true,
    };

    /// Tells whether it is surely none of ours.
    #[inline(always)]
    pub const fn is_foreign(self) -> bool {
        !self.to_vip && !self.from_backend
    }
}

/// Tells whose packet a frame may be, given the filter's words by index.
#[inline(always)]
pub fn ends<F: Frame>(frame: &F, word: impl Fn(u32) -> u64) -> Ends {
    let Some(view) = frame.view::<34>(0) else {
        return Ends::UNKNOWN;
    };
    let ether_type = view.u16(12);
    if ether_type == ethertype::IPV4 {
        let protocol = view.u8(23);
        let (source, destination) = (place_of(view.u32(26)), place_of(view.u32(30)));
        if !is_transport(protocol) {
            return Ends::UNKNOWN;
        }
        return Ends {
            to_vip: has(&word, destination, ROLE_VIP),
            from_backend: has(&word, source, ROLE_BACKEND),
        };
    }
    if ether_type != ethertype::IPV6 {
        return Ends::UNKNOWN;
    }
    let Some(view) = frame.view::<54>(0) else {
        return Ends::UNKNOWN;
    };
    let address = |at| {
        Address([
            view.u32(at),
            view.u32(at + 4),
            view.u32(at + 8),
            view.u32(at + 12),
        ])
    };
    if !is_transport(view.u8(20)) {
        return Ends::UNKNOWN;
    }
    Ends {
        to_vip: has(&word, place(&address(38)), ROLE_VIP),
        from_backend: has(&word, place(&address(22)), ROLE_BACKEND),
    }
}

/// Offset in bytes at which the packet of a frame of [foreign](Ends::is_foreign) ends says that it ends; the largest where
/// it does not say (jumbograms, RFC 2675, and Linux's BIG TCP).
#[inline(always)]
pub fn packet_end<F: Frame>(frame: &F) -> usize {
    let Some(view) = frame.view::<20>(0) else {
        return usize::MAX;
    };
    let (start, length) = if view.u16(12) == ethertype::IPV4 {
        (14, view.u16(16))
    } else {
        (54, view.u16(18))
    };
    if length == 0 {
        usize::MAX
    } else {
        start + u16::from_be(length) as usize
    }
}

#[inline(always)]
const fn is_transport(protocol: u8) -> bool {
    protocol == TCP || protocol == UDP
}

#[inline(always)]
fn has(word: &impl Fn(u32) -> u64, (index, shift): (u32, u32), role: u32) -> bool {
    word(index) >> shift & role as u64 != 0
}
