//! Which service a packet is for.

use core::ptr::read_volatile;

use lb_common::{
    abi::{Address, Forward, ROLE_BACKEND, ROLE_VIP, ServiceKey, Settings, SettingsFlags},
    logic::{flow_table::other_line, service_table},
};

use crate::{
    flow_table,
    maps::{self, ADDRESSES},
    scratch::{Scratch, scratch},
};

/// The id of the service that the destination of a 5-tuple in the scratch memory belongs to; see `flow_table::of`.
#[inline(always)]
pub fn find(which: u32) -> Option<u32> {
    match find_id(which) {
        NONE => None,
        id => Some(id),
    }
}

/// As [`find`] of the packet's own destination, with a look at the line that it is in mostly.
#[inline(always)]
pub fn of_packet(scratch: &mut Scratch) -> Option<u32> {
    let tuple = &scratch.packet.key;
    let key = ServiceKey {
        vip: tuple.destination.by_words(),
        port: tuple.destination_port,
        protocol: tuple.protocol as u8,
        _pad: 0,
    };
    let place = service_table::place(&key, 0);
    let words = maps::service_bucket(place.bucket)?;
    scratch.service_id = match service_table::in_line(&words, place.line, &key) {
        Some(id) => id,
        None => find_id(flow_table::of::PACKET),
    };
    // SAFETY: it is a reference. Read as volatile, since the verifier then has one case to follow and not one for each
    // way that led to it: a quarter of its steps for all that comes.
    match unsafe { read_volatile(&raw const scratch.service_id) } {
        NONE => None,
        id => Some(id),
    }
}

/// "No service".
const NONE: u32 = u32::MAX;

/// A function that the verifier checks for itself.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_id(which: u32) -> u32 {
    let (Some(scratch), Some(settings)) = (scratch(), maps::settings()) else {
        return NONE;
    };
    let tuple = flow_table::tuple(scratch, which);
    let key = ServiceKey {
        vip: tuple.destination.by_words(),
        port: tuple.destination_port,
        protocol: tuple.protocol as u8,
        _pad: 0,
    };
    let id = id(&key);
    // Asked only where there is such a service: the others pay for one lookup.
    if id != NONE || settings.flags & SettingsFlags::ANY_PORT == 0 {
        return id;
    }
    self::id(&ServiceKey { port: 0, ..key })
}

#[inline(always)]
fn id(key: &ServiceKey) -> u32 {
    for step in 0..4 {
        let place = service_table::place(key, step >> 1);
        let Some(words) = maps::service_bucket(place.bucket) else {
            return NONE;
        };
        let line = if step & 1 == 0 {
            place.line
        } else {
            other_line(place.line)
        };
        if let Some(id) = service_table::in_line(&words, line, key) {
            return id;
        }
        if step == 1 && !service_table::overflows(&words) {
            return NONE;
        }
    }
    NONE
}

/// Tells whether a service is delivered to processes on this host.
#[inline(always)]
pub fn is_local(settings: &Settings, service_id: u32) -> bool {
    // Asked only where there is such a service.
    settings.flags & SettingsFlags::LOCAL != 0
        && maps::service(service_id).is_some_and(|service| service.forward == Forward::Local.number())
}

/// Tells whether an address is the VIP of a service.
#[inline(always)]
pub fn is_vip(address: &Address) -> bool {
    roles(address) & ROLE_VIP != 0
}

/// Tells whether an address is that of a backend, so that its packets may be replies.
#[inline(always)]
pub fn is_backend(address: &Address) -> bool {
    roles(address) & ROLE_BACKEND != 0
}

#[inline(always)]
fn roles(address: &Address) -> u32 {
    // SAFETY: as in `id`.
    unsafe { ADDRESSES.get(address) }.copied().unwrap_or(0)
}
