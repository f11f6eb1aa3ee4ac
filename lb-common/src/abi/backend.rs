use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Address, Link, Tags};

/// One server of one service and the way to it; indexed by backend id.
///
/// What a packet of a known flow needs is in the first of its two cache lines.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Backend {
    pub address: Address,
    /// This host's address on the route to the backend: the source that `full-nat` and `gue` write.
    pub source: Address,
    /// Interface that the route to the backend leaves by; 0 while it is not known.
    pub ifindex: u32,
    /// From that interface to the next hop.
    pub link: Link,
    /// Network byte order; 0 keeps the port that the client used.
    pub port: u16,
    /// Bits of [`BackendFlags`].
    pub flags: u16,
    /// Changes whenever the id is given to another server, so that a flow never follows a recycled id.
    pub generation: u32,
    /// VLAN tags that frames to the next hop carry.
    pub tags: Tags,
    /// Service id plus one; 0 marks an unused entry.
    pub service_plus_one: u32,
    /// Largest IP packet, outer headers included, that the route to the backend takes; 0 while it is not known.
    pub mtu: u32,
    /// Share of new flows in proportion to the other backends'; read by `least-connections`.
    pub weight: u32,
    /// Live flows that it takes; 0 for no limit.
    pub max_connections: u32,
    pub _pad: [u32; 12],
}

const _: () = assert!(size_of::<Backend>() == 128);

/// Bits of [`Backend::flags`].
///
/// The data path reads only [`NEXT_HOP_KNOWN`](Self::NEXT_HOP_KNOWN), [`ACCEPTS_NEW`](Self::ACCEPTS_NEW),
/// [`KEEPS_UDP`](Self::KEEPS_UDP) and [`RESETS`](Self::RESETS). The others let a restarted daemon go on where the last
/// one stopped.
#[derive(Clone, Copy, Debug)]
pub struct BackendFlags;

impl BackendFlags {
    /// `ifindex` and both MAC addresses are valid.
    pub const NEXT_HOP_KNOWN: u16 = 1 << 0;
    /// New flows may be put on this backend.
    pub const ACCEPTS_NEW: u16 = 1 << 1;
    /// Existing UDP flows may stay on this backend.
    pub const KEEPS_UDP: u16 = 1 << 2;
    /// The last known health was `up`.
    pub const UP: u16 = 1 << 3;
    /// The last known health was `down`.
    pub const DOWN: u16 = 1 << 4;
    /// The administrative state is `draining`.
    pub const DRAINING: u16 = 1 << 5;
    /// The administrative state is `disabled`.
    pub const DISABLED: u16 = 1 << 6;
    /// Gone from the configuration; the entry stays until its last flow has ended.
    pub const REMOVED: u16 = 1 << 7;
    /// TCP flows of this backend are answered with RST at their next packet.
    pub const RESETS: u16 = 1 << 8;
}
