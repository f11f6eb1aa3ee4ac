use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Address;

/// What a health check's packets become, so that they reach a backend as those of clients do.
///
/// They leave the probe's socket for the backend's address, with a mark that has the number of their path.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct ProbePath {
    /// Where the probe's socket sends to.
    pub backend: Address,
    /// Where the packets are for.
    pub vip: Address,
    /// Outer source address of `ipip`, without the bits that vary from flow to flow; `gue` has the packet's own.
    pub outer_source: Address,
    /// The bits that vary, of its last word; network byte order.
    pub outer_varying: u32,
    /// A [`Forward`](super::Forward) as its number.
    pub forward: u8,
    pub _pad: [u8; 3],
}

const _: () = assert!(size_of::<ProbePath>() == 56);

/// Marks of packets that travel a path: this, and the path's number in the other 16 bits.
pub const PROBE_MARK: u32 = 0x786c_0000;
/// The bits that are the same in each of them.
pub const PROBE_MARK_MASK: u32 = 0xffff_0000;

/// Paths that there is room for: as many as the mark tells apart. Number 0 is none.
pub const MAX_PROBE_PATHS: u32 = !PROBE_MARK_MASK + 1;
/// 5-tuples of probes that are remembered at a time; the one that was used last is forgotten last.
pub const MAX_PROBES: u32 = 65_536;
