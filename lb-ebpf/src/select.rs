//! Which backend a new flow gets.

use lb_common::{
    abi::{Backend, FlowKey, Service, Settings, Strategy},
    logic::hash::{client_hash, flow_hash, slot_of},
};

use crate::maps::{self, SLOT_TABLES};

/// The backend for a flow and its id, or nothing where no backend may get new flows.
#[inline(always)]
pub fn backend(
    settings: &Settings,
    service: &Service,
    service_id: u32,
    key: &FlowKey,
) -> Option<(u32, &'static Backend)> {
    let hash = if service.strategy == Strategy::IpHash.number() {
        client_hash(settings.seed, key)
    } else {
        flow_hash(settings.seed, key)
    };
    let id = *SLOT_TABLES.get_value(service_id, &slot_of(hash))?;
    if id == 0 {
        return None;
    }
    Some((id, maps::backend(id)?))
}
