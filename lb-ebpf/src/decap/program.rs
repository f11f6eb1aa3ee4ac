//! The entry point.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS},
    macros::xdp,
    programs::XdpContext,
};
use lb_common::{
    abi::DecapReason,
    logic::encapsulation::{Decision, decide},
};
use lb_ebpf::cursor::Cursor;

use crate::{
    maps::{self, Maps},
    unwrap::unwrap,
};

#[xdp(frags)]
pub fn xlb_decap(context: XdpContext) -> u32 {
    let frame = Cursor::new(context.ctx);
    // What counts is all of a frame that goes on in further buffers, and its length as it came.
    let length = frame.length();
    let (action, reason) = match decide(&frame, &Maps) {
        Decision::Pass(reason) => (XDP_PASS, reason),
        Decision::Drop(reason) => (XDP_DROP, reason),
        Decision::Unwrap(unwrapping) => match unwrap(frame, &unwrapping) {
            Some(()) => (XDP_PASS, unwrapping.reason),
            None => (XDP_DROP, DecapReason::Internal),
        },
    };
    maps::count(reason, length);
    action
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
