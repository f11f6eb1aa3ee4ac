use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Address, Link};

/// One server of one service and the way to it, one cache line; indexed by backend id.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Backend {
    pub address: Address,
    /// This host's address on the route to the backend: the source that `full-nat` writes.
    pub source: Address,
    /// Interface that the route to the backend leaves by; 0 while it is not known.
    pub ifindex: u32,
    /// From that interface to the next hop.
    pub link: Link,
    /// Network byte order; 0 keeps the port that the client used.
    pub port: u16,
    /// Bits of [`BackendFlags`].
    pub flags: u16,
    /// Service id plus one; 0 marks an unused entry.
    pub service_plus_one: u32,
    /// Changes whenever the id is given to another server, so that a flow never follows a recycled id.
    pub generation: u32,
    pub _pad: u32,
}

const _: () = assert!(size_of::<Backend>() == 64);

/// Bits of [`Backend::flags`].
///
/// The data path reads only [`NEXT_HOP_KNOWN`](Self::NEXT_HOP_KNOWN), [`ACCEPTS_NEW`](Self::ACCEPTS_NEW) and
/// [`KEEPS_UDP`](Self::KEEPS_UDP). The others let a restarted daemon go on where the last one stopped.
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
}
