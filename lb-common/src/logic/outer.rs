//! What `ipip` and `gue` put around a packet: the headers, how long they are, and what tells flows apart in them.

use super::{
    checksum::fold,
    headers::{DONT_FRAGMENT, Packet},
};
use crate::abi::{Address, FlowKey, Forward, GUE_PORT, IPV4_IN_IP, IPV6_IN_IP, UDP as UDP_PROTOCOL};

const IPV4: u32 = 20;
const IPV6: u32 = 40;
const UDP: u32 = 8;

/// Bytes of the outer headers.
#[inline(always)]
pub const fn overhead(forward: u8, outer_is_v4: bool) -> u32 {
    let ip = if outer_is_v4 { IPV4 } else { IPV6 };
    if forward == Forward::Gue as u8 {
        ip + UDP
    } else if forward == Forward::IpIp as u8 {
        ip
    } else {
        0
    }
}

/// Bits that differ from flow to flow and stay for one, for the outer source port or address, so that the queues of
/// the receiving host share the load. It is no secret: the finalizer of MurmurHash3
/// at a tenth of the cost of a keyed hash.
#[inline(always)]
pub const fn entropy(key: &FlowKey) -> u32 {
    let [a, b, c, d] = &key.source.0;
    let ports = (key.source_port as u32) << 16 | key.destination_port as u32;
    let mixed = (*a ^ *b).rotate_left(7) ^ *c ^ (*d).rotate_left(13) ^ ports ^ key.protocol;
    let mixed = (mixed ^ mixed >> 16).wrapping_mul(0x85eb_ca6b);
    let mixed = (mixed ^ mixed >> 13).wrapping_mul(0xc2b2_ae35);
    mixed ^ mixed >> 16
}

/// Hops that an outer packet may go (RFC 1700: the default of IP).
const TTL: u8 = 64;

/// The headers around one packet, as words that lie in the frame one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Outer<'a> {
    /// The packet, decoded.
    pub inner: &'a Packet,
    pub is_gue: bool,
    pub source: Address,
    pub destination: Address,
    /// Of [`entropy`].
    pub entropy: u32,
}

impl Outer<'_> {
    /// Bytes from the inner IP header to the packet's end.
    #[inline(always)]
    const fn inner_length(&self) -> u32 {
        self.inner.end - self.inner.ip_offset
    }

    #[inline(always)]
    const fn protocol(&self) -> u8 {
        if self.is_gue {
            UDP_PROTOCOL
        } else if self.inner.is_v6 != 0 {
            IPV6_IN_IP
        } else {
            IPV4_IN_IP
        }
    }

    /// An IPv4 header with its checksum.
    ///
    /// RFC 2003 section 3.1: what may not be fragmented inside may not outside; what may keeps its identification, so
    /// that its parts are not mixed up. DSCP and ECN are copied (RFC 6040 section 4.1).
    #[inline(always)]
    pub const fn ipv4(&self) -> [u32; 5] {
        let length = self.inner_length() + IPV4 + if self.is_gue { UDP } else { 0 };
        let (identification, fragment) = if self.inner.dont_fragment != 0 {
            (0, u16::from_be(DONT_FRAGMENT))
        } else {
            (u16::from_be(self.inner.identification as u16), 0)
        };
        let words = [
            (0x45 << 24 | (self.inner.traffic_class as u32) << 16 | length & 0xffff).to_be(),
            ((identification as u32) << 16 | fragment as u32).to_be(),
            ((TTL as u32) << 24 | (self.protocol() as u32) << 16).to_be(),
            self.source.v4_word(),
            self.destination.v4_word(),
        ];
        let [a, b, c, d, e] = words;
        let sum = halves(a) + halves(b) + halves(c) + halves(d) + halves(e);
        let checksum = u16::from_be(!fold(sum)) as u32;
        [a, b, c | checksum.to_be(), d, e]
    }

    /// An IPv6 header; the flow label carries the entropy too (RFC 6438).
    #[inline(always)]
    pub const fn ipv6(&self) -> [u32; 10] {
        let length = self.inner_length() + if self.is_gue { UDP } else { 0 };
        let first = 6 << 28 | (self.inner.traffic_class as u32) << 20 | self.entropy & 0xf_ffff;
        let second = length << 16 | (self.protocol() as u32) << 8 | TTL as u32;
        let ([a, b, c, d], [e, f, g, h]) = (&self.source.0, &self.destination.0);
        [first.to_be(), second.to_be(), *a, *b, *c, *d, *e, *f, *g, *h]
    }

    /// The UDP header of `gue`: a source port of the dynamic range (RFC 6335 section 6); no checksum, which RFC 6935
    /// allows tunnels over IPv6, too.
    #[inline(always)]
    pub const fn udp(&self) -> [u32; 2] {
        let port = 0xc000 | self.entropy & 0x3fff;
        [
            (port << 16 | GUE_PORT as u32).to_be(),
            ((self.inner_length() + UDP) << 16).to_be(),
        ]
    }
}

/// The sum of both halves of a word, in whatever byte order (RFC 1071 section 2).
#[inline(always)]
const fn halves(word: u32) -> u32 {
    (word & 0xffff) + (word >> 16)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn flows_of_one_client_have_different_entropy() {
        let flows = |port: u16| FlowKey {
            source_port: port.to_be(),
            protocol: 6,
            ..FlowKey::default()
        };
        let low: BTreeSet<u32> = (0..10_000).map(|port| entropy(&flows(port)) & 0x3fff).collect();
        // As many as chance would give: 16,384 * (1 - e^(-10,000 / 16,384)).
        assert!(low.len() > 6_800, "{}", low.len());
    }

    #[test]
    fn clients_have_different_entropy() {
        let client = |host: u32| FlowKey {
            source: crate::abi::Address::from_v4_word((0x0a00_0000 + host).to_be()),
            ..FlowKey::default()
        };
        let low: BTreeSet<u32> = (0..10_000).map(|host| entropy(&client(host)) & 0xffff).collect();
        assert!(low.len() > 8_500, "{}", low.len());
    }

    #[test]
    fn only_what_encapsulates_has_outer_headers() {
        let overheads = [Forward::IpIp, Forward::Gue, Forward::Dsr].map(|forward| {
            (
                overhead(forward.number(), true),
                overhead(forward.number(), false),
            )
        });
        assert_eq!(overheads, [(20, 40), (28, 48), (0, 0)]);
    }
}
