//! Which client a flow of `cargo xtask bench` comes from, and the checksums of its packets.

use super::checksum::fold;

/// First of the ports that flows come from.
const FIRST_PORT: u32 = 1024;

/// The client of a flow: its IPv4 address in 48.0.0.0/8, or the last word of an IPv6 address, and its port, both in
/// network byte order. Up to 2^32 flows, no two have the same.
#[inline(always)]
pub const fn client(flow: u32, is_v6: bool) -> (u32, u16) {
    // An odd factor makes a permutation of all numbers, which flows that follow each other are far apart in.
    let spread = flow.wrapping_mul(0x9E37_79B1);
    let address = if is_v6 {
        spread
    } else {
        0x3000_0000 | (spread & 0x00ff_ffff)
    };
    let port = FIRST_PORT + (spread >> 24 | (spread & 0x7f) << 8);
    (address.to_be(), (port as u16).to_be())
}

/// A checksum from the sum of what is the same in all flows, the client's address, and its port or 0.
///
/// It is never 0, which for UDP would mean that there is none (RFC 768); where it might be, all ones say the same.
#[inline(always)]
pub const fn checksum(sum: u32, address: u32, port: u16) -> u16 {
    match !fold(sum + (address & 0xffff) + (address >> 16) + port as u32) {
        0 => 0xffff,
        checksum => checksum,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn two_flows_never_have_the_same_client(a: u32, b: u32, is_v6: bool) {
            prop_assert_eq!(a == b, client(a, is_v6) == client(b, is_v6));
        }

        #[test]
        fn clients_have_addresses_and_ports_that_hosts_use(flow: u32) {
            let (address, port) = client(flow, false);
            prop_assert_eq!(address.to_ne_bytes()[0], 48);
            prop_assert!((1024..1024 + 32_768).contains(&u16::from_be(port)));
            prop_assert_eq!(client(flow, true).1, port);
        }
    }

    #[test]
    fn neighbouring_flows_fill_the_ports() {
        let ports: std::collections::BTreeSet<u16> = (0..100_000).map(|flow| client(flow, false).1).collect();
        assert!(ports.len() > 20_000, "{}", ports.len());
    }
}
