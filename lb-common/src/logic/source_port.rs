//! Which source ports a flow may be given towards its backend, and in which order they are tried.

use super::hash::flow_hash;
use crate::abi::{FlowKey, Settings};

/// Where the search for a source port starts: spread by the hash of the flow, so that flows rarely meet.
#[inline(always)]
pub fn first_choice(settings: &Settings, key: &FlowKey) -> u32 {
    flow_hash(settings.seed, key) as u32
}

/// The port of one attempt, host byte order; a stride that grows keeps flows that meet once from meeting again.
#[inline(always)]
pub fn candidate(settings: &Settings, start: u32, attempt: u32) -> u16 {
    let count = settings.source_port_count as u32;
    if count == 0 {
        return settings.source_port_first;
    }
    let stride = 1 + (start >> 16);
    let offset = start.wrapping_add(attempt.wrapping_mul(stride)) % count;
    settings.source_port_first.wrapping_add(offset as u16)
}
