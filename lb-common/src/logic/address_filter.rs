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

/// Tells whether a frame is a TCP or UDP packet of which neither the destination is a VIP nor the source a backend,
/// given the filter's words by index. Frames with VLAN tags or extension headers are left to the decoder.
#[inline(always)]
pub fn is_foreign<F: Frame>(frame: &F, word: impl Fn(u32) -> u64) -> bool {
    let Some(view) = frame.view::<34>(0) else {
        return false;
    };
    let ether_type = view.u16(12);
    if ether_type == ethertype::IPV4 {
        let protocol = view.u8(23);
        let (source, destination) = (place_of(view.u32(26)), place_of(view.u32(30)));
        return is_transport(protocol)
            && !has(&word, destination, ROLE_VIP)
            && !has(&word, source, ROLE_BACKEND);
    }
    if ether_type != ethertype::IPV6 {
        return false;
    }
    let Some(view) = frame.view::<54>(0) else {
        return false;
    };
    let address = |at| {
        Address([
            view.u32(at),
            view.u32(at + 4),
            view.u32(at + 8),
            view.u32(at + 12),
        ])
    };
    is_transport(view.u8(20))
        && !has(&word, place(&address(38)), ROLE_VIP)
        && !has(&word, place(&address(22)), ROLE_BACKEND)
}

#[inline(always)]
const fn is_transport(protocol: u8) -> bool {
    protocol == TCP || protocol == UDP
}

#[inline(always)]
fn has(word: &impl Fn(u32) -> u64, (index, shift): (u32, u32), role: u32) -> bool {
    word(index) >> shift & role as u64 != 0
}
