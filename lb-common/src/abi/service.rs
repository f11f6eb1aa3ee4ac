use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Address;

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
    /// A [`Strategy`] as its number.
    pub strategy: u8,
    /// A [`Forward`] as its number.
    pub forward: u8,
    pub _pad: u16,
    /// Non-zero while the entry is in use, so that ids survive a restart of the daemon.
    pub in_use: u32,
}

const _: () = assert!(size_of::<Service>() == 8);

/// How a new flow gets a backend.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// Keyed hash of the 5-tuple over a Maglev table.
    ConsistentHash = 1,
    /// Keyed hash of the client's address alone over a Maglev table.
    IpHash = 2,
}

impl Strategy {
    /// The number that stands for this strategy in [`Service::strategy`].
    pub const fn number(self) -> u8 {
        self as u8
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
}

impl Forward {
    /// The number that stands for this forward in [`Service::forward`].
    pub const fn number(self) -> u8 {
        self as u8
    }
}
