//! Every map: who writes it, who reads it, and why it has its capacity.
//!
//! All are BTF maps, so that bpftool and libbpf can load the object too. Where the size is a number of services or
//! backends, the daemon sets another one at load time.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr::read_volatile,
};

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, ArrayOfMaps, HashMap, LpmTrie, LruHashMap, PerCpuArray},
    helpers::bpf_get_smp_processor_id,
    macros::btf_map,
};
use lb_common::abi::{
    ADDRESS_FILTER_WORDS, Address, Backend, BackendCounters, Bucket, CHUNK_LINES, ClientLink, Count,
    DEFAULT_BACKENDS, DEFAULT_FLOWS, DEFAULT_SERVICES, FilterKey, FragmentKey, FragmentPorts, LINE_WORDS,
    LiveCount, MAX_CHUNKS, MAX_CLIENT_LINKS, MAX_FRAGMENTS, MAX_SOURCE_FILTERS, MAX_SOURCES, PerCpu,
    REASON_ENTRIES, SERVICE_BUCKETS, Service, Settings, SourceKey, SourceRate, buckets, of_cpu, place_of,
};

use crate::bucket::InKernel;

/// Backends, and the entry of the id that is none.
const BACKEND_ENTRIES: usize = DEFAULT_BACKENDS as usize + 1;

/// What holds for all services. Written by the daemon.
#[btf_map]
static SETTINGS: Array<Settings, 1> = Array::new();

/// Roles of the addresses of VIPs and backends. Written by the daemon.
#[btf_map]
pub static ADDRESSES: HashMap<Address, u32, { (DEFAULT_SERVICES + DEFAULT_BACKENDS) as usize }> =
    HashMap::new();

/// What [`ADDRESSES`] has, less exact but faster, see `lb_common::logic::address_filter`. Written by the daemon, through its
/// memory.
#[btf_map]
static ADDRESS_FILTER: Array<AddressFilter, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// See [`ADDRESS_FILTER`].
type AddressFilter = [u64; ADDRESS_FILTER_WORDS as usize];

/// Service id by what clients connect to; one entry for each port, see `lb_common::logic::service_table`. Written by the
/// daemon, through its memory.
#[btf_map]
static SERVICE_KEYS: Array<Bucket, { SERVICE_BUCKETS as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// By service id. Written by the daemon.
#[btf_map]
static SERVICES: Array<Service, { DEFAULT_SERVICES as usize }> = Array::new();

/// By service id: the line of the pool that new flows are spread over, 0 for none. Written by the daemon, through its
/// memory: a pool is swapped for another by one store.
#[btf_map]
static POOLS: Array<u64, { DEFAULT_SERVICES as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// The lines of pools and slot tables, by chunk. Written by the daemon, through its memory, which adds chunks as it needs
/// them; see docs/design/slot-tables.md. A line is an array, not a struct: before 6.2 (kernel commit db559117828d) the map of
/// chunks, which has BTF, takes no map without BTF if a value is a struct.
#[btf_map]
static POOL_CHUNKS: ArrayOfMaps<
    Array<[u64; LINE_WORDS], { CHUNK_LINES as usize }, { BPF_F_MMAPABLE as usize }>,
    { MAX_CHUNKS as usize },
> = ArrayOfMaps::new();

/// By backend id. Written by the daemon.
#[btf_map]
static BACKENDS: Array<Backend, { BACKEND_ENTRIES }> = Array::new();

/// `FILTER_ALLOW` or `FILTER_DENY` by service and prefix of the client's address: the longest that holds it decides
/// about a new flow. Written by the daemon. A trie is never preallocated: prefixes that are not there cost nothing.
#[btf_map]
pub static SOURCE_FILTERS: LpmTrie<FilterKey, u32, { MAX_SOURCE_FILTERS as usize }> = LpmTrie::new();

/// By backend id: flows that began and that ended. Written here and by the daemon, through its memory: both add to it
/// atomically.
#[btf_map]
pub static LIVE: Array<LiveCount, { BACKEND_ENTRIES }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// The flow table. Written here and by the daemon, which ages it, through its memory; that also begins with a page, so that
/// a bucket is two cache lines and not parts of three. The daemon sets the size at load time.
#[btf_map]
pub static FLOWS: Array<Bucket, { buckets(DEFAULT_FLOWS) as usize }, { BPF_F_MMAPABLE as usize }> =
    Array::new();

/// Buckets of `FLOWS`. The daemon sets it at load time.
#[unsafe(no_mangle)]
static FLOW_BUCKETS: u32 = buckets(DEFAULT_FLOWS);

/// The ways back to clients. Written here; freed by the daemon where no flow has the index.
#[btf_map]
pub static CLIENT_LINKS: Array<ClientLink, { MAX_CLIENT_LINKS as usize }, { BPF_F_MMAPABLE as usize }> =
    Array::new();

/// Flows that began on this CPU lately. Neither read nor written by the daemon.
#[btf_map]
static OPENINGS: PerCpuArray<Openings, 1> = PerCpuArray::new();

/// See [`OPENINGS`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Openings {
    /// Which second or so it is.
    pub window: u64,
    pub begun: u64,
}

/// The ports of packets that come in fragments, from their first. Neither read nor written by the daemon.
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, { MAX_FRAGMENTS as usize }> = LruHashMap::new();

/// New flows that a source prefix may start at a service. Neither read nor written by the daemon.
#[btf_map]
pub static SOURCES: LruHashMap<SourceKey, SourceRate, { MAX_SOURCES as usize }> = LruHashMap::new();

/// By service id: this CPU's position in the sequence of `round-robin`. Neither read nor written by the daemon.
#[btf_map]
static ROUND_ROBIN: PerCpuArray<u32, { DEFAULT_SERVICES as usize }> = PerCpuArray::new();

/// Packets by verdict, read by the daemon, as are the counters below; and what is known of the packet that is being
/// handled, see `scratch`.
#[btf_map]
pub static PER_CPU: PerCpuArray<PerCpu, 1> = PerCpuArray::new();

/// By CPU and reason: packets that belong to no service. The daemon reads this and the next ones through their memory. They
/// are not arrays for each CPU: of those the kernel allocates entry by entry, looks up where one is in one more cache line,
/// and copies each out by itself.
#[btf_map]
static COUNTERS: Array<Count, { REASON_ENTRIES as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// By service id and CPU, and then by reason.
#[btf_map]
static SERVICE_COUNTERS: Array<
    Count,
    { (DEFAULT_SERVICES * REASON_ENTRIES) as usize },
    { BPF_F_MMAPABLE as usize },
> = Array::new();

/// By backend id and CPU.
#[btf_map]
static BACKEND_COUNTERS: Array<BackendCounters, { BACKEND_ENTRIES }, { BPF_F_MMAPABLE as usize }> =
    Array::new();

/// CPUs that have counters of their own: those with a lower number. The daemon sets it at load time, and makes room for those
/// of all.
#[unsafe(no_mangle)]
static CPUS: u32 = 1;

#[inline(always)]
pub fn flow_buckets() -> u32 {
    // SAFETY: read as volatile, since the value is another one than the compiler sees.
    unsafe { read_volatile(&raw const FLOW_BUCKETS) }
}

#[inline(always)]
pub fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

#[inline(always)]
pub fn service(id: u32) -> Option<&'static Service> {
    SERVICES.get(id)
}

#[inline(always)]
pub fn backend(id: u32) -> Option<&'static Backend> {
    BACKENDS.get(id)
}

#[inline(always)]
pub fn round_robin(service_id: u32) -> Option<&'static mut u32> {
    // SAFETY: as in `counter`.
    ROUND_ROBIN
        .get_ptr_mut(service_id)
        .map(|position| unsafe { &mut *position })
}

/// The line in which the pool of a service begins; 0 for none.
#[inline(always)]
pub fn pool(service_id: u32) -> u32 {
    match POOLS.get_ptr(service_id) {
        // SAFETY: the pointer is of a map's value; the daemon writes whole words.
        Some(word) => unsafe { read_volatile(word) as u32 },
        None => 0,
    }
}

#[inline(always)]
pub fn pool_line(line: u32) -> Option<&'static [u64; LINE_WORDS]> {
    let (chunk, index) = place_of(line);
    // What a program has found does not change as long as it runs: the daemon waits for that before it uses lines again.
    POOL_CHUNKS.get_value(chunk, &index)
}

#[inline(always)]
pub fn address_filter() -> Option<&'static AddressFilter> {
    ADDRESS_FILTER.get(0)
}

#[inline(always)]
pub fn service_bucket(index: u32) -> Option<InKernel> {
    SERVICE_KEYS.get_ptr_mut(index).map(InKernel)
}

#[inline(always)]
pub fn openings() -> Option<&'static mut Openings> {
    // SAFETY: as in `counter`.
    OPENINGS.get_ptr_mut(0).map(|openings| unsafe { &mut *openings })
}

#[inline(always)]
pub fn counter(reason: u32) -> Option<&'static mut Count> {
    // SAFETY: the entry is this CPU's own and the program is not interrupted by itself.
    COUNTERS
        .get_ptr_mut(of_this_cpu(0)? * REASON_ENTRIES + reason)
        .map(|count| unsafe { &mut *count })
}

#[inline(always)]
pub fn service_counter(service_id: u32, reason: u32) -> Option<&'static mut Count> {
    // SAFETY: as in `counter`.
    SERVICE_COUNTERS
        .get_ptr_mut(of_this_cpu(service_id)? * REASON_ENTRIES + reason)
        .map(|count| unsafe { &mut *count })
}

#[inline(always)]
pub fn backend_counters(backend_id: u32) -> Option<&'static mut BackendCounters> {
    // SAFETY: as in `counter`.
    BACKEND_COUNTERS
        .get_ptr_mut(of_this_cpu(backend_id)?)
        .map(|counters| unsafe { &mut *counters })
}

/// Nothing on a CPU that no room was made for: it would write another's.
#[inline(always)]
fn of_this_cpu(id: u32) -> Option<u32> {
    // SAFETY: read as volatile, since the value is another one than the compiler sees; and the helper needs nothing.
    let (cpus, cpu) = unsafe { (read_volatile(&raw const CPUS), bpf_get_smp_processor_id()) };
    (cpu < cpus).then(|| of_cpu(id, cpus, cpu))
}

/// Counts a flow that began on a backend.
#[inline(always)]
pub fn count_opened(backend_id: u32) {
    if let Some(count) = LIVE.get_ptr_mut(backend_id) {
        // SAFETY: the pointer is of a map's value and aligned as its type; other CPUs add to it atomically, too.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*count).opened, 1) };
    }
}

/// Counts a flow of a backend that was seen to end.
#[inline(always)]
pub fn count_ended(backend_id: u32) {
    if let Some(count) = LIVE.get_ptr_mut(backend_id) {
        // SAFETY: as in `count_opened`.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*count).ended, 1) };
    }
}
