use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Packets and their bytes, Ethernet header included.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

const _: () = assert!(size_of::<Count>() == 16);

/// Packets by verdict, for each CPU; received = passed + dropped + transmitted + redirected.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Totals {
    pub received: u64,
    pub passed: u64,
    pub dropped: u64,
    pub transmitted: u64,
    pub redirected: u64,
}

const _: () = assert!(size_of::<Totals>() == 40);

/// What the program touches for every packet, in one place of each CPU's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PerCpu {
    pub totals: Totals,
    /// What the program knows of a packet while it runs on it; nobody else's business.
    pub scratch: Scratch,
}

/// See [`PerCpu::scratch`].
pub type Scratch = [[u64; 8]; 6];

/// Where the counters of an id are that one CPU has: those of each CPU side by side, those of the next id behind them. So those
/// of few ids are together, however many there is room for.
#[inline(always)]
pub const fn of_cpu(id: u32, cpus: u32, cpu: u32) -> u32 {
    id * cpus + cpu
}

/// Counters by reason that a CPU has of a service: one for each, and as many more as fill a cache line, which another CPU's
/// would share.
pub const REASON_ENTRIES: u32 = super::REASON_COUNT.next_multiple_of(4);

/// What a backend was sent and has answered, for each CPU; by [`of_cpu`]. A cache line, so that no CPU writes another's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BackendCounters {
    /// From clients to the backend.
    pub forwarded: Count,
    /// From the backend to clients.
    pub returned: Count,
    /// Flows that were put on this backend.
    pub flows: u64,
    pub _pad: [u64; 3],
}

const _: () = assert!(size_of::<BackendCounters>() == 64);

/// Flows of a backend that began and that ended, on all CPUs; indexed by backend id.
///
/// Who takes a flow's entry from one state to another by a compare-and-swap counts its end, once.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LiveCount {
    pub opened: u64,
    pub ended: u64,
}

const _: () = assert!(size_of::<LiveCount>() == 16);

impl LiveCount {
    /// Flows that are live. 0 where an end was added before the beginning, which is so for a moment.
    #[inline(always)]
    pub const fn flows(&self) -> u64 {
        let flows = self.opened.wrapping_sub(self.ended);
        if flows as i64 <= 0 { 0 } else { flows }
    }
}
