//! Memory for one packet, because the stack has 512 bytes: helpers that take keys take them from here as well.

use lb_common::{
    abi::{self, FlowKey, FragmentKey, FragmentPorts, Totals},
    logic::headers::Packet,
};

use crate::maps::PER_CPU;

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
    /// Hash of the source of a client's packet; not set where `is_in_flood` is.
    pub hash: u64,
    /// Key and meta of the flow that a search has found, see `flow_table::Entry`.
    pub found_key: u64,
    pub found_meta: u64,
    /// Id of the service that the packet is for.
    pub service_id: u32,
    /// Whether the flow of a client's packet goes on without a record in a flood: 1. From when its flow was not found until it
    /// has begun.
    pub is_in_flood: u32,
    /// Location of a flow that a search for replies leaves out.
    pub except: u64,
    /// Meta of a flow that begins.
    pub began_meta: u64,
    pub fragment_key: FragmentKey,
    pub fragment_ports: FragmentPorts,
}

const _: () = assert!(size_of::<Scratch>() <= size_of::<abi::Scratch>());

/// This CPU's memory; nothing only where the map is not there, which cannot be.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    Some(per_cpu()?.1)
}

/// This CPU's totals and memory, as [`scratch`].
#[inline(always)]
pub fn per_cpu() -> Option<(&'static mut Totals, &'static mut Scratch)> {
    let per_cpu = PER_CPU.get_ptr_mut(0)?;
    // SAFETY: the entry is this CPU's own, and a program that runs on it is not interrupted by another run of it; the
    // memory is large enough and has no values that would not be of the type.
    unsafe {
        Some((
            &mut (*per_cpu).totals,
            &mut *(&raw mut (*per_cpu).scratch).cast::<Scratch>(),
        ))
    }
}
