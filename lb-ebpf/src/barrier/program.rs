//! The entry point.

use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::generated::bpf_ktime_get_coarse_ns,
    macros::classifier,
    programs::TcContext,
};
// For the panic handler.
use lb_ebpf as _;

/// Nanoseconds of the monotonic clock, set before the program is loaded: from then on it does nothing. As a filter it
/// stays when the daemon is killed, and must not cut the host off.
#[unsafe(no_mangle)]
static XLB_BARRIER_ENDS: u64 = 0;

/// On what the host's stack gets from an interface.
#[classifier]
pub fn xlb_barrier(_context: TcContext) -> i32 {
    // SAFETY: a static that nothing writes; volatile, because the compiler knows only what it holds here.
    let ends = unsafe { read_volatile(&raw const XLB_BARRIER_ENDS) };
    // SAFETY: the helper has no preconditions.
    if unsafe { bpf_ktime_get_coarse_ns() } < ends {
        TC_ACT_SHOT
    } else {
        TC_ACT_UNSPEC
    }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
