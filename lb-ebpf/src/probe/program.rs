//! The entry points.

use core::mem::offset_of;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use lb_common::{
    abi::{PROBE_MARK, PROBE_MARK_MASK, TCP},
    logic::headers::Packet,
};
use network_types::{tcp::TcpHdr, udp::UdpHdr};

use crate::{answer, frame::Transport, out};

/// On what leaves an interface.
#[classifier]
pub fn xlb_probe_out(context: TcContext) -> i32 {
    let context = context.skb.skb;
    // SAFETY: the context is the one that the kernel called the program with.
    let mark = unsafe { (*context).mark };
    if mark & PROBE_MARK_MASK != PROBE_MARK {
        return TC_ACT_UNSPEC;
    }
    // As it is it would ask the backend's own address, and prove nothing of the path.
    conclude(out::travel(context, mark))
}

/// On what the host's stack gets from an interface.
#[classifier]
pub fn xlb_probe_in(context: TcContext) -> i32 {
    conclude(answer::take(context.skb.skb))
}

/// On to further programs, or dropped.
#[inline(always)]
fn conclude(done: Option<()>) -> i32 {
    if done.is_some() {
        TC_ACT_UNSPEC
    } else {
        TC_ACT_SHOT
    }
}

/// The checksum of a packet of TCP or UDP.
#[inline(always)]
pub fn transport(packet: &Packet) -> Transport {
    let is_udp = packet.key.protocol != TCP as u32;
    let at = if is_udp {
        offset_of!(UdpHdr, check)
    } else {
        offset_of!(TcpHdr, check)
    };
    Transport {
        checksum: packet.transport_offset + at as u32,
        is_udp,
    }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
