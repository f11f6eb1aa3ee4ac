//! What a balancer can cost at least: the work that none can leave out, each piece in its cheapest form.
//!
//! The service by a hash map; the flow in one bucket of eight slots, a cache line of an array, under a keyed hash; two
//! counters; an outer IPv4 header. It has no TCP states, no ageing, no replies, no second family, and a tag of 31 bits
//! takes some flow for another one: nobody could run it. It is what others are compared with, on the same machine in
//! the same minute.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
    btf_maps::{Array, HashMap, PerCpuArray},
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use lb_common::{
    abi::{Address, Count, FloorBackend, FloorBucket, MANY_SLOTS, ServiceKey},
    logic::{
        hash::siphash13,
        headers::{Frame, View},
    },
};
use lb_ebpf::cursor::Cursor;

/// 4M slots in 32 MiB.
const BUCKETS: u32 = 1 << 19;
const SERVICES: u32 = 4;
const BACKENDS: u32 = 4096;
/// Counters of services come after those of backends that are in use.
const SERVICE_COUNTERS: u32 = 2000;
const SEED: [u64; 2] = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];

/// Service number by what clients connect to. Written by who runs the harness.
#[btf_map]
static FLOOR_SERVICES: HashMap<ServiceKey, u64, 512> = HashMap::new();
#[btf_map]
static FLOOR_FLOWS: Array<FloorBucket, { BUCKETS as usize }> = Array::new();
/// Backends by service and slot; all zero, which is a backend, too.
#[btf_map]
static FLOOR_SLOTS: Array<u32, { (SERVICES * MANY_SLOTS) as usize }> = Array::new();
#[btf_map]
static FLOOR_BACKENDS: Array<FloorBackend, { BACKENDS as usize }> = Array::new();
#[btf_map]
static FLOOR_COUNTERS: PerCpuArray<Count, { BACKENDS as usize }> = PerCpuArray::new();

/// Ethernet, IPv4 without options, and the ports.
const HEADERS: usize = 14 + 20 + 4;
/// Ethernet, an outer IPv4 header and an inner one.
const WRAPPED: usize = 14 + 20 + 20;
const OUTER: i32 = 20;

#[xdp(frags)]
pub fn floor(context: XdpContext) -> u32 {
    balance(&context).unwrap_or(XDP_DROP)
}

#[inline(always)]
fn balance(context: &XdpContext) -> Option<u32> {
    let frame = Cursor::new(context.ctx);
    let length = frame.viewable() as u64;
    let view = frame.view::<HEADERS>(0)?;
    if view.u16(12) != 0x0800_u16.to_be() || view.u8(14) != 0x45 {
        return Some(XDP_PASS);
    }
    let (source, destination, ports, protocol) = (view.u32(26), view.u32(30), view.u32(34), view.u8(23));
    let key = ServiceKey {
        vip: Address::from_v4_word(destination),
        port: (ports >> 16) as u16,
        protocol,
        _pad: 0,
    };
    let Some(service) = FLOOR_SERVICES.get_ptr(&key) else {
        return Some(XDP_PASS);
    };
    // SAFETY: the map's values are written before the program runs.
    let service = unsafe { *service } as u32 % SERVICES;

    let word = |high: u32, low: u32| (high as u64) << 32 | low as u64;
    let hash = siphash13(SEED, [word(destination, source), word(protocol as u32, ports)]);
    let tag = (hash >> 32) as u32 | 1;
    let bucket = FLOOR_FLOWS.get_ptr_mut(hash as u32 & (BUCKETS - 1))?;
    // SAFETY: the harness runs on one CPU at a time.
    let slots = unsafe { &mut (*bucket).slots };
    let backend = match known(slots, tag) {
        0 => begin(slots, service, hash, tag),
        known => known,
    };
    let address = FLOOR_BACKENDS.get(backend)?.address;
    count(backend, length)?;
    count(SERVICE_COUNTERS + service, length)?;
    wrap(frame, address)?;
    Some(XDP_TX)
}

/// The backend of a flow, or 0; all slots are looked at, so that no branch is mispredicted.
#[inline(always)]
fn known(slots: &[u64; 8], tag: u32) -> u32 {
    let mut backend = 0;
    for slot in slots {
        if *slot as u32 == tag {
            backend = (*slot >> 32) as u32 & 0xffff;
        }
    }
    backend
}

/// Records a flow in the first free slot, or in one that its hash names.
#[inline(always)]
fn begin(slots: &mut [u64; 8], service: u32, hash: u64, tag: u32) -> u32 {
    let chosen = ((hash >> 32) * MANY_SLOTS as u64 >> 32) as u32 + service * MANY_SLOTS;
    let backend = 1 + (FLOOR_SLOTS.get(chosen).copied().unwrap_or(0) & 1023);
    let record = (backend as u64) << 32 | tag as u64;
    for slot in slots.iter_mut() {
        if *slot == 0 {
            *slot = record;
            return backend;
        }
    }
    if let Some(slot) = slots.get_mut((hash >> 61) as usize) {
        *slot = record;
    }
    backend
}

#[inline(always)]
fn count(index: u32, bytes: u64) -> Option<()> {
    let count = FLOOR_COUNTERS.get_ptr_mut(index)?;
    // SAFETY: the entry is this CPU's own and the program is not interrupted by itself.
    let count = unsafe { &mut *count };
    count.packets += 1;
    count.bytes += bytes;
    Some(())
}

/// Puts an outer header in front; its checksum is not that of the address, which changes no cost.
#[inline(always)]
fn wrap(frame: Cursor, address: u32) -> Option<()> {
    let frame = frame.with_more_in_front(OUTER)?;
    let view = frame.view::<WRAPPED>(0)?;
    for at in [0, 4, 8] {
        view.set_u32(at, view.u32(OUTER as usize + at));
    }
    view.set_u16(12, 0x0800_u16.to_be());
    view.set_u64(14, u64::from_ne_bytes([0x45, 0, 0, 84, 0, 0, 0, 0]));
    view.set_u64(22, u64::from_ne_bytes([64, 4, 0, 0, 10, 0, 0, 1]));
    view.set_u32(30, u32::from_ne_bytes([10, 0, 0, 2]) ^ address);
    Some(())
}
