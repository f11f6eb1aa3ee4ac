//! Memory for one packet, because the stack has 512 bytes: helpers that take keys take them from here as well.

use aya_ebpf::{btf_maps::PerCpuArray, macros::btf_map};
use lb_common::{
    abi::{FlowKey, FragmentKey, FragmentPorts},
    logic::headers::Packet,
};

/// What is known of a packet while the program runs on it. Nothing in it outlives the packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Scratch {
    pub packet: Packet,
    /// The kernel's count of clock ticks when `clock` was read.
    pub clock_tick: u64,
    /// See `flow::now`.
    pub clock: u64,
    /// Length of the frame as it came.
    pub bytes: u64,
    /// The 5-tuple that the packet is given.
    pub tuple: FlowKey,
    /// The client's 5-tuple of the flow that the packet answers.
    pub client: FlowKey,
    /// A key of replies.
    pub reply: FlowKey,
    /// Key and meta of the flow that a search has found, see `flow_table::Entry`.
    pub found_key: u64,
    pub found_meta: u64,
    /// Location of a flow that a search for replies leaves out.
    pub except: u64,
    /// Meta of a flow that begins.
    pub began_meta: u64,
    pub fragment_key: FragmentKey,
    pub fragment_ports: FragmentPorts,
}

/// One entry, this CPU's own. Neither read nor written by the daemon.
#[btf_map]
static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// This CPU's memory; nothing only where the map is not there, which cannot be.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: the entry is this CPU's own, and a program that runs on it is not interrupted by another run of it.
    SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}
