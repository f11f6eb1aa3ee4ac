use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Address;

/// What follows the prefix length in the key of the map of source filters: the service, then the address, so that a
/// prefix of `n` bits of an IPv6 address has length `32 + n`, and one of an IPv4 address `32 + 96 + n`.
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
pub struct FilterKey {
    /// Service id, host byte order: always matched whole.
    pub service: u32,
    pub address: Address,
}

const _: () = assert!(size_of::<FilterKey>() == 20);

/// Value of a source filter: new flows from the prefix are allowed.
pub const FILTER_ALLOW: u32 = 1;
/// Value of a source filter: new flows from the prefix are denied.
pub const FILTER_DENY: u32 = 2;

/// Whose new flows are counted together: a source prefix at a service.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SourceKey {
    pub service: u32,
    /// Bits beyond the prefix are 0.
    pub prefix: Address,
}

const _: () = assert!(size_of::<SourceKey>() == 20);

/// A token bucket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SourceRate {
    /// When it was filled last: nanoseconds of `CLOCK_MONOTONIC_COARSE`.
    pub filled: u64,
    /// Thousandths of a new flow that may start now.
    pub tokens: u64,
}

const _: () = assert!(size_of::<SourceRate>() == 16);
