//! Which service a packet is for.

use lb_common::abi::{
    Address, FlowKey, Forward, ROLE_BACKEND, ROLE_VIP, ServiceKey, Settings, SettingsFlags,
};

use crate::maps::{self, ADDRESSES, SERVICE_KEYS};

/// The id of the service that a packet's destination belongs to.
#[inline(always)]
pub fn find(settings: &Settings, key: &FlowKey) -> Option<u32> {
    let mut service_key = ServiceKey {
        vip: key.destination.by_words(),
        port: key.destination_port,
        protocol: key.protocol as u8,
        _pad: 0,
    };
    if let Some(id) = id(&service_key) {
        return Some(id);
    }
    // Asked only where there is such a service: the others pay for one lookup.
    if settings.flags & SettingsFlags::ANY_PORT == 0 {
        return None;
    }
    service_key.port = 0;
    id(&service_key)
}

#[inline(always)]
fn id(service_key: &ServiceKey) -> Option<u32> {
    // SAFETY: the daemon may replace the value while it is read; a u32 is read whole.
    unsafe { SERVICE_KEYS.get(service_key) }.copied()
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
