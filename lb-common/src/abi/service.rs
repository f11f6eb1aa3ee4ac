use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Address, UDP};

/// What a packet's destination must be to belong to a service.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
pub struct ServiceKey {
    pub vip: Address,
    /// Network byte order.
    pub port: u16,
    pub protocol: u8,
    pub _pad: u8,
}

const _: () = assert!(size_of::<ServiceKey>() == 20);

/// How new flows of a service get a backend and how packets reach it; indexed by service id.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Service {
    /// What its flows' clients connect to.
    pub vip: Address,
    /// A [`Strategy`] as its number.
    pub strategy: u8,
    /// A [`Forward`] as its number.
    pub forward: u8,
    /// Bits of [`ServiceFlags`].
    pub flags: u16,
    /// Non-zero while the entry is in use, so that ids survive a restart of the daemon.
    pub in_use: u32,
    /// New flows a second that one source prefix may start; 0 for no cap.
    pub new_flow_rate: u32,
    /// New flows that one source prefix may start at once after a rest.
    pub new_flow_burst: u32,
    /// Bits of an IPv4 source address that the cap looks at.
    pub rate_prefix_v4: u8,
    /// Bits of an IPv6 source address that the cap looks at.
    pub rate_prefix_v6: u8,
    pub _pad: u16,
}

const _: () = assert!(size_of::<Service>() == 36);

/// Bits of [`Service::flags`].
#[derive(Clone, Copy, Debug)]
pub struct ServiceFlags;

impl ServiceFlags {
    /// There are source prefixes to look up for new flows.
    pub const HAS_FILTERS: u16 = 1 << 0;
    /// A source that no prefix holds is denied: there are prefixes that allow.
    pub const DENIES_OTHERS: u16 = 1 << 1;
    /// Gone from the configuration; the entry stays until no flow has its id.
    pub const REMOVED: u16 = 1 << 2;
    /// A backend of it may be full: it has a limit of connections.
    pub const HAS_FULL: u16 = 1 << 3;
}

/// How a new flow gets a backend.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// Keyed hash of the 5-tuple over a Maglev table.
    ConsistentHash = 1,
    /// Keyed hash of the client's address alone over a Maglev table.
    IpHash = 2,
    /// The next of a smooth weighted sequence, on each CPU.
    RoundRobin = 3,
    /// The one with the fewest live flows for its weight.
    LeastConnections = 4,
}

impl Strategy {
    /// The number that stands for this strategy in [`Service::strategy`].
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// Tells whether a strategy looks backends up by their position, not by a hash: a flow that is forgotten may get another.
    #[inline(always)]
    pub const fn is_sequence(number: u8) -> bool {
        number == Self::RoundRobin as u8 || number == Self::LeastConnections as u8
    }
}

/// How packets of a flow reach the backend.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    /// Rewrites the destination; the client's address is kept.
    Nat = 1,
    /// Rewrites the destination and, to an address of this host, the source.
    FullNat = 2,
    /// Rewrites the MAC addresses only.
    Dsr = 3,
    /// Puts the packet into another IP packet.
    IpIp = 4,
    /// Puts the packet into a UDP packet: Generic UDP Encapsulation, variant 1.
    Gue = 5,
    /// Delivers to a process on this host.
    Local = 6,
}

impl Forward {
    /// The number that stands for this forward in [`Service::forward`].
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// Tells whether the backend's replies come back through this host and are translated.
    #[inline(always)]
    pub const fn translates(number: u8) -> bool {
        number == Self::Nat as u8 || number == Self::FullNat as u8
    }

    /// Tells whether the backend's replies are seen, so that a flow has ended when both ends say so.
    #[inline(always)]
    pub const fn sees_replies(number: u8) -> bool {
        Self::translates(number) || number == Self::Local as u8
    }

    /// Tells whether a key of replies leads to the flow. Processes on this host answer over TCP as the VIP itself.
    #[inline(always)]
    pub const fn has_reply_key(number: u8, protocol: u32) -> bool {
        Self::translates(number) || (number == Self::Local as u8 && protocol == UDP as u32)
    }

    /// Tells whether packets travel inside another IP packet.
    #[inline(always)]
    pub const fn encapsulates(number: u8) -> bool {
        number == Self::IpIp as u8 || number == Self::Gue as u8
    }
}
