use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Address;

/// What the fragments of one packet have in common (RFC 791 section 3.2, RFC 8200 section 4.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FragmentKey {
    pub source: Address,
    pub destination: Address,
    /// As it lies in the header: two bytes of IPv4, four of IPv6.
    pub identification: u32,
    pub protocol: u32,
}

const _: () = assert!(size_of::<FragmentKey>() == 40);

/// What only the first fragment of a packet tells: its ports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FragmentPorts {
    /// When the first fragment was seen: nanoseconds of `CLOCK_MONOTONIC_COARSE`.
    pub seen: u64,
    /// Network byte order.
    pub source_port: u16,
    /// Network byte order.
    pub destination_port: u16,
    pub _pad: u32,
}

const _: () = assert!(size_of::<FragmentPorts>() == 16);
