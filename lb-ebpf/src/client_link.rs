//! The ways back to clients. Replies go back the way that the client's packets come, so that the path needs no lookup
//! of a route, and the asymmetry of two routers in front is respected.

use core::{
    intrinsics::{AtomicOrdering, atomic_cxchg},
    ptr::{read_volatile, write_volatile},
};

use lb_common::{
    abi::{ClientLink, Link, MAX_CLIENT_LINKS, Tags},
    logic::headers::Packet,
};

use crate::{cursor::Cursor, maps::CLIENT_LINKS, scratch::scratch};

/// Entries that are tried for a link. Where they are all others', replies are left to the host's stack.
const TRIES: u32 = 16;
/// "No link".
const NONE: u32 = 0;

/// The link of an index; nothing where there is none.
#[inline(always)]
pub fn get(index: u32) -> Option<&'static ClientLink> {
    if index == NONE {
        return None;
    }
    CLIENT_LINKS
        .get(index)
        .filter(|link| link.state == ClientLink::VALID || link.state == ClientLink::UNUSED)
}

/// Tells whether a client's packet came by the link of an index.
#[inline(always)]
pub fn is(index: u32, frame: &Cursor, packet: &Packet) -> bool {
    get(index).is_some_and(|link| {
        is_same(
            link,
            &reversed(&packet.link),
            frame.ingress_ifindex(),
            &packet.tags,
        )
    })
}

#[inline(always)]
fn is_same(entry: &ClientLink, link: &Link, ifindex: u32, tags: &Tags) -> bool {
    entry.link.0[0] == link.0[0]
        && entry.link.0[1] == link.0[1]
        && entry.link.0[2] == link.0[2]
        && entry.ifindex == ifindex
        && entry.tags.0[0] == tags.0[0]
        && entry.tags.0[1] == tags.0[1]
}

/// The index of the link by which the packet in the scratch memory came; 0 where there is no room for it.
///
/// Entries are never given to another link here: flows have their indices. The daemon frees those that no flow has.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn remember(ifindex: u32) -> u32 {
    let Some(scratch) = scratch() else {
        return NONE;
    };
    let packet = &scratch.packet;
    let link = reversed(&packet.link);
    let start = hash(&link, ifindex, &packet.tags);
    for attempt in 0..TRIES {
        // Index 0 is none.
        let index = 1 + (start + attempt) % (MAX_CLIENT_LINKS - 1);
        let Some(entry) = CLIENT_LINKS.get_ptr_mut(index) else {
            return NONE;
        };
        // SAFETY: the pointer is of a map's value; an entry is written by who has swapped its state, and read when that
        // says that it has been.
        unsafe {
            if swap_state(entry, ClientLink::FREE, ClientLink::BUSY) {
                (*entry).link = Link([link.0[0], link.0[1], link.0[2]]);
                (*entry).ifindex = ifindex;
                (*entry).tags = Tags([packet.tags.0[0], packet.tags.0[1]]);
                write_volatile(&raw mut (*entry).state, ClientLink::VALID);
                return index;
            }
            if is_same(&*entry, &link, ifindex, &packet.tags) {
                // Before a flow has it, so that the daemon does not free it.
                swap_state(entry, ClientLink::UNUSED, ClientLink::VALID);
                if read_volatile(&raw const (*entry).state) == ClientLink::VALID {
                    return index;
                }
            }
        }
    }
    NONE
}

/// Replaces the state of an entry if it is `old`, and tells whether it was.
#[inline(always)]
unsafe fn swap_state(entry: *mut ClientLink, old: u64, new: u64) -> bool {
    // SAFETY: the pointer is of a map's value.
    unsafe {
        let state = &raw mut (*entry).state;
        read_volatile(state) == old
            && atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(state, old, new).1
    }
}

/// The link on which an answer goes back: the MAC addresses, swapped.
#[inline(always)]
pub fn reversed(link: &Link) -> Link {
    let [a, b, c] = link.0;
    // Six bytes are one and a half words, so each word of the result is joined from two halves.
    Link([
        (b >> 16) | (c << 16),
        (c >> 16) | (a << 16),
        (a >> 16) | (b << 16),
    ])
}

/// Spreads links over their map; whoever can choose them is on the link.
#[inline(always)]
fn hash(link: &Link, ifindex: u32, tags: &Tags) -> u32 {
    let mut hash = ifindex;
    for word in [link.0[0], link.0[1], link.0[2], tags.0[0], tags.0[1]] {
        // The multiplier of Knuth's multiplicative hash (TAOCP 6.4).
        hash = (hash ^ word).wrapping_mul(0x9e37_79b1).rotate_left(13);
    }
    hash >> 8
}
