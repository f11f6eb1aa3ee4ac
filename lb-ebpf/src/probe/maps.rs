//! Every map.

use aya_ebpf::{
    btf_maps::{Array, LruHashMap},
    macros::btf_map,
};
use lb_common::abi::{Address, FlowKey, MAX_PROBE_PATHS, MAX_PROBES, ProbePath};

/// By number. Written by the daemon.
#[btf_map]
static PATHS: Array<ProbePath, { MAX_PROBE_PATHS as usize }> = Array::new();

/// From the 5-tuple of answers to the backend's address that the probe's socket knows. Neither read nor written by the
/// daemon; LRU, so that nobody has to clear it.
#[btf_map]
pub static PROBES: LruHashMap<FlowKey, Address, { MAX_PROBES as usize }> = LruHashMap::new();

#[inline(always)]
pub fn path(number: u32) -> Option<&'static ProbePath> {
    PATHS.get(number)
}

/// The backend whose answers have this 5-tuple.
#[inline(always)]
pub fn backend(answer: &FlowKey) -> Option<Address> {
    // SAFETY: an entry may be recycled under its reader; what is read then is the address of another backend, and the
    // packet meets no socket.
    unsafe { PROBES.get(answer) }.map(Address::by_words)
}
