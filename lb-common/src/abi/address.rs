use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An IPv6 address, or an IPv4 address mapped into one (RFC 4291 section 2.5.5.2), as four words in network
/// byte order.
///
/// One form for both families keeps one key type per map and one path through the program. Words rather than
/// bytes, because copies of byte arrays become byte loops in BPF.
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
pub struct Address(pub [u32; 4]);

const _: () = assert!(size_of::<Address>() == 16);

/// `::ffff` as the third word of a mapped address.
const MAPPED: u32 = 0xffff_u32.to_be();

impl Address {
    /// Maps an IPv4 address given as one word in network byte order.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    /// The IPv4 address as one word in network byte order; meaningless unless [`Self::is_v4`].
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.0[3]
    }

    /// A copy by words: the compiler makes a call of memmove, which BPF does not have, of a plain copy that it
    /// cannot prove free of overlap.
    #[inline(always)]
    pub const fn by_words(&self) -> Self {
        let [a, b, c, d] = &self.0;
        Self([*a, *b, *c, *d])
    }

    /// Tells whether this is a mapped IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        // One branch, not three.
        self.0[0] | self.0[1] | (self.0[2] ^ MAPPED) == 0
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        let octets = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        zerocopy::transmute!(octets)
    }
}

impl From<Ipv4Addr> for Address {
    fn from(address: Ipv4Addr) -> Self {
        IpAddr::V4(address).into()
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        let octets: [u8; 16] = zerocopy::transmute!(address);
        Ipv6Addr::from(octets).to_canonical()
    }
}

impl core::fmt::Display for Address {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::string::ToString;

    use super::*;

    #[test]
    fn an_ipv4_address_is_mapped_in_network_byte_order() {
        let address = Address::from(Ipv4Addr::new(203, 0, 113, 10));
        assert_eq!(
            address.as_bytes(),
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 203, 0, 113, 10]
        );
        assert_eq!(address.v4_word().to_ne_bytes(), [203, 0, 113, 10]);
        assert_eq!(address.to_string(), "203.0.113.10");
    }

    #[test]
    fn an_ipv6_address_is_no_ipv4_address() {
        for text in ["2001:db8::1", "::1", "::", "::ffff:0:1.2.3.4", "1::ffff:1.2.3.4"] {
            let ip: Ipv6Addr = text.parse().unwrap();
            let address = Address::from(IpAddr::V6(ip));
            assert!(!address.is_v4(), "{text}");
            assert_eq!(IpAddr::from(address), IpAddr::V6(ip));
        }
    }

    proptest! {
        #[test]
        fn an_address_comes_back_from_its_words(octets: [u8; 4], words: [u32; 4]) {
            let ip = IpAddr::V4(Ipv4Addr::from(octets));
            prop_assert_eq!(IpAddr::from(Address::from(ip)), ip);
            prop_assert_eq!(Address::from_v4_word(u32::from_ne_bytes(octets)), Address::from(ip));
            let address = Address(words);
            prop_assert_eq!(Address::from(IpAddr::from(address)), address);
            prop_assert_eq!(address.by_words(), address);
        }
    }
}
