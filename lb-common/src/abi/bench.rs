//! What the program of `cargo xtask bench` is told and tells; nothing of it is ever pinned.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The first bytes of a frame in words, as many as can be restored.
pub const TEMPLATE_WORDS: usize = 10;

/// The frame that the harness sets up before each run of the program under test. It is set before the harness is
/// loaded, so that the verifier knows it and what it does not ask for costs nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BenchTemplate {
    /// The headers as they lie in memory.
    pub words: [u64; TEMPLATE_WORDS],
    /// Length of the frame in bytes.
    pub length: u32,
    /// Non-zero to restore all words, zero for the first eight.
    pub restores_all: u32,
    /// Non-zero where the client's address and port differ from flow to flow.
    pub varies: u32,
    /// Non-zero for IPv6.
    pub is_v6: u32,
    /// Offset of the client's address, or of its last word for IPv6.
    pub address_at: u32,
    /// Offset of the client's port.
    pub port_at: u32,
    /// Offset of the checksum of TCP or UDP.
    pub checksum_at: u32,
    /// Ones' complement sum of the IPv4 header without address and checksum.
    pub ip_sum: u32,
    /// The same of the segment with its pseudo-header, without address, port and checksum.
    pub sum: u32,
    pub _pad: u32,
}

const _: () = assert!(size_of::<BenchTemplate>() == 120);

/// What the harness is to do in one run, and what it has done.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BenchProgress {
    /// Packets so far.
    pub packets: u64,
    /// Number of the packet at which the clock starts.
    pub first_timed: u64,
    /// Number of the packet at which it stops.
    pub last: u64,
    /// Number of the next packet's flow.
    pub flow: u64,
    /// Flows go round from here
    pub flows_begin: u64,
    /// to before this one.
    pub flows_end: u64,
    /// `CLOCK_MONOTONIC` in nanoseconds at the first timed packet.
    pub started: u64,
    /// The same at the last packet.
    pub stopped: u64,
    /// Written for the order of memory that comes with it.
    pub fence: u64,
}

const _: () = assert!(size_of::<BenchProgress>() == 72);

/// A bucket of the floor's flow table: one cache line, eight times a tag and a backend.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FloorBucket {
    pub slots: [u64; 8],
}

const _: () = assert!(size_of::<FloorBucket>() == 64);

/// A backend of the floor, of which only the address is used; as large as one needs to be.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FloorBackend {
    pub _link: [u32; 2],
    /// Network byte order.
    pub address: u32,
    pub _pad: [u32; 5],
}

const _: () = assert!(size_of::<FloorBackend>() == 32);
