//! Runs another program again and again on a frame that is the same each time but for its flow.
//!
//! `BPF_PROG_TEST_RUN` with a repeat count hands a program the frame as its last run left it: wrapped once more, or
//! rewritten to a backend's address and so for no service. So what is repeated is this program. It sets the frame up
//! and tail-calls the one under test, whose verdict is the verdict. Its own work does not depend on what the other
//! did; so the same harness in front of [`empty`] costs what is to be subtracted.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr::read_volatile,
};

use aya_ebpf::{
    bindings::xdp_action::{XDP_ABORTED, XDP_TX},
    btf_maps::{Array, ProgramArray},
    helpers::bpf_ktime_get_ns,
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use lb_common::{
    abi::{BenchProgress, BenchTemplate, TEMPLATE_WORDS},
    logic::{bench_flow, headers::Frame},
};
use lb_ebpf::cursor::Cursor;

/// Set before the program is loaded.
#[unsafe(no_mangle)]
static TEMPLATE: BenchTemplate = BenchTemplate {
    words: [0; TEMPLATE_WORDS],
    length: 64,
    restores_all: 0,
    varies: 0,
    is_v6: 0,
    address_at: 0,
    port_at: 0,
    checksum_at: 0,
    ip_sum: 0,
    sum: 0,
    _pad: 0,
};

/// Written and read by who runs the harness.
#[btf_map]
static PROGRESS: Array<BenchProgress, 1> = Array::new();

/// The program under test.
#[btf_map]
static UNDER_TEST: ProgramArray<1> = ProgramArray::new();

/// Offsets in an IPv4 frame.
const IP: usize = 14;
const IP_CHECKSUM: usize = 10;
/// Bytes that are always restored: through the end of a TCP header over IPv4.
const SHORT: usize = 64;
const LONG: usize = TEMPLATE_WORDS * size_of::<u64>();

/// A field of the template. Volatile, as the compiler would take the values that are above.
macro_rules! template {
    ($($field:tt)+) => {
        // SAFETY: the static is never written while the program runs.
        unsafe { read_volatile(&raw const TEMPLATE.$($field)+) }
    };
}

#[xdp(frags)]
pub fn harness(context: XdpContext) -> u32 {
    if set_up(&context).is_some() {
        // SAFETY: nothing here has to be dropped.
        unsafe { UNDER_TEST.tail_call(&context, 0) };
    }
    XDP_ABORTED
}

/// What is subtracted.
#[xdp(frags)]
pub fn empty(_: XdpContext) -> u32 {
    XDP_TX
}

#[inline(always)]
fn set_up(context: &XdpContext) -> Option<()> {
    // SAFETY: the harness runs on one CPU at a time, and its map is neither read nor written meanwhile.
    let progress = unsafe { &mut *PROGRESS.get_ptr_mut(0)? };
    let number = progress.packets;
    progress.packets = number + 1;
    // SAFETY: the helper takes no argument.
    let clock = || unsafe { bpf_ktime_get_ns() };
    if number == progress.first_timed {
        progress.started = clock();
    }
    if number == progress.last {
        progress.stopped = clock();
    }

    let frame = Cursor::new(context.ctx);
    // By the helper: the verifier does not follow what the compiler makes of a difference of pointers here.
    let missing = template!(length) as i32 - frame.length() as i32;
    // Also when none is missing: each packet costs the same.
    let frame = frame.with_more_in_front(missing)?;
    let head = frame.view::<SHORT>(0)?;
    head.set_u64(0, template!(words[0]));
    head.set_u64(8, template!(words[1]));
    head.set_u64(16, template!(words[2]));
    head.set_u64(24, template!(words[3]));
    head.set_u64(32, template!(words[4]));
    head.set_u64(40, template!(words[5]));
    head.set_u64(48, template!(words[6]));
    head.set_u64(56, template!(words[7]));
    if template!(restores_all) != 0 {
        let rest = frame.view::<{ LONG - SHORT }>(SHORT)?;
        rest.set_u64(0, template!(words[8]));
        rest.set_u64(8, template!(words[9]));
    }
    if template!(varies) != 0 {
        let flow = progress.flow;
        let next = flow + 1;
        progress.flow = if next >= progress.flows_end {
            progress.flows_begin
        } else {
            next
        };
        let is_v6 = template!(is_v6) != 0;
        let (address, port) = bench_flow::client(flow as u32, is_v6);
        frame
            .view::<4>(template!(address_at) as usize)?
            .set_u32(0, address);
        frame.view::<2>(template!(port_at) as usize)?.set_u16(0, port);
        if !is_v6 {
            head.set_u16(
                IP + IP_CHECKSUM,
                bench_flow::checksum(template!(ip_sum), address, 0),
            );
        }
        let checksum = bench_flow::checksum(template!(sum), address, port);
        frame
            .view::<2>(template!(checksum_at) as usize)?
            .set_u16(0, checksum);
    }
    // A locked operation: what was stored is in the cache before the program under test loads, as a packet that was
    // received is. Otherwise its loads wait for stores of other sizes to drain, and it overlaps with the harness.
    // SAFETY: the pointer is of a map's value and aligned as its type.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut progress.fence, 1) };
    Some(())
}
