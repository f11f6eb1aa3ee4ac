//! What `ipip` and `gue` put around a packet: how long it is, and what tells flows apart in it.

use crate::abi::{FlowKey, Forward};

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
