//! A flood of new flows: more than the flow table is to take are not recorded, where they are selected by hash and go on
//! without. Then the table is not even read, which costs more than all the rest.

use lb_common::{
    abi::{Forward, Service, ServiceFlags, Strategy, opening_budget},
    logic::headers::Packet,
};

use crate::maps;

/// Nanoseconds as a power of two: 1.07 s.
const WINDOW: u32 = 30;

/// Tells whether a connection that a packet opens would not be recorded.
#[inline(always)]
pub fn passes_table(service_id: u32, packet: &Packet, now: u64) -> bool {
    is_over_budget(now)
        && maps::service(service_id).is_some_and(|service| needs_no_record(service, packet.key.protocol))
}

/// Tells whether hashes alone keep a flow of a service on its backend, while the backends stay the same. Not so where flows
/// are counted: for a cap of new ones, or because a backend takes no more.
#[inline(always)]
pub fn needs_no_record(service: &Service, protocol: u32) -> bool {
    !Strategy::is_sequence(service.strategy)
        && !Forward::has_reply_key(service.forward, protocol)
        && service.forward != Forward::Local.number()
        && service.new_flow_rate == 0
        && service.flags & ServiceFlags::HAS_FULL == 0
}

/// Tells whether as many flows have begun on this CPU as may be recorded for now.
#[inline(always)]
pub fn is_over_budget(now: u64) -> bool {
    let Some(openings) = maps::openings() else {
        return false;
    };
    let window = now >> WINDOW;
    if openings.window != window {
        openings.window = window;
        openings.begun = 0;
    }
    openings.begun >= opening_budget(maps::flow_buckets()) as u64
}

/// Counts a flow that is recorded.
#[inline(always)]
pub fn count() {
    if let Some(openings) = maps::openings() {
        openings.begun += 1;
    }
}
