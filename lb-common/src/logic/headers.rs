//! Decoding of a frame down to the ports: one decoder for the kernel, the tests and the fuzzers.

use core::mem::offset_of;

use network_types::{eth::EthHdr, ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr};

use super::tcp_state::flags_are_sane;
use crate::abi::{Address, FlowKey, Reason, TCP, UDP};

/// A frame whose bounds have to be checked before it is read.
pub trait Frame {
    /// Bytes of a frame that are known to be there.
    type View: View;

    /// Length of the frame in bytes.
    fn len(&self) -> usize;

    /// Tells whether there is not a single byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `N` bytes at an offset, or nothing where the frame ends before.
    fn view<const N: usize>(&self, offset: usize) -> Option<Self::View>;
}

/// Reads at offsets within the bytes that [`Frame::view`] has checked; words come as they lie in memory.
pub trait View {
    fn u8(&self, at: usize) -> u8;
    fn u16(&self, at: usize) -> u16;
    fn u32(&self, at: usize) -> u32;
}

/// `0x0800` in network byte order.
const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
/// In the first byte of a MAC address: multicast or broadcast (IEEE 802, section 8.2.2).
const GROUP_BIT: u8 = 0x01;
/// "More fragments" and the offset (RFC 791 section 3.1), in network byte order.
const FRAGMENT_MASK: u16 = 0x3fff_u16.to_be();

/// A TCP or UDP packet, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub key: FlowKey,
    /// Offset of the IP header in the frame.
    pub ip_offset: usize,
    /// Offset of the TCP or UDP header in the frame.
    pub transport_offset: usize,
    /// TCP flags as in the header; 0 for UDP.
    pub tcp_flags: u8,
    pub ttl: u8,
}

/// Why a frame is no [`Segment`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undecodable {
    /// Nothing for a balancer, whatever its destination.
    NotTransport(Reason),
    /// Malformed: to be dropped with the reason if the destination is a VIP.
    Malformed { destination: Address, reason: Reason },
}

/// Decodes a frame from its Ethernet header down to the ports.
///
/// # Errors
/// What is not IPv4 with TCP or UDP in it, and each way in which such a packet can be malformed.
#[inline(always)]
pub fn decode<F: Frame>(frame: &F) -> Result<Segment, Undecodable> {
    let not_ip = Undecodable::NotTransport(Reason::NotIp);
    let ethernet = frame.view::<{ EthHdr::LEN }>(0).ok_or(not_ip)?;
    if ethernet.u16(offset_of!(EthHdr, ether_type)) != ETHERTYPE_IPV4 {
        return Err(not_ip);
    }
    // A frame for a group reaches every host of the network: were each to balance it, backends would get it several
    // times, and its destination is no address to answer from (RFC 1122 section 3.3.6 has hosts ignore it, too).
    if ethernet.u8(offset_of!(EthHdr, dst_addr)) & GROUP_BIT != 0 {
        return Err(Undecodable::NotTransport(Reason::NotForService));
    }
    decode_ipv4(frame, EthHdr::LEN)
}

#[inline(always)]
fn decode_ipv4<F: Frame>(frame: &F, ip_offset: usize) -> Result<Segment, Undecodable> {
    let Some(ip) = frame.view::<{ Ipv4Hdr::LEN }>(ip_offset) else {
        return Err(Undecodable::NotTransport(Reason::NotIp));
    };
    let destination = Address::from_v4_word(ip.u32(offset_of!(Ipv4Hdr, dst_addr)));
    let malformed = |reason| Undecodable::Malformed { destination, reason };

    let vihl = ip.u8(offset_of!(Ipv4Hdr, vihl));
    if vihl >> 4 != 4 {
        return Err(malformed(Reason::BadIpVersion));
    }
    let header_length = ((vihl & 0x0f) as usize) * 4;
    let total_length = u16::from_be(ip.u16(offset_of!(Ipv4Hdr, tot_len))) as usize;
    if header_length < Ipv4Hdr::LEN || ip_offset + header_length > frame.len() {
        return Err(malformed(Reason::BadIpHeaderLength));
    }
    if total_length < header_length || ip_offset + total_length > frame.len() {
        return Err(malformed(Reason::BadIpLength));
    }
    let protocol = ip.u8(offset_of!(Ipv4Hdr, proto));
    if protocol != TCP && protocol != UDP {
        return Err(Undecodable::NotTransport(Reason::NotForService));
    }
    let source = ip.u32(offset_of!(Ipv4Hdr, src_addr));
    if !may_be_source(source) || source == destination.v4_word() {
        return Err(malformed(Reason::BadSourceAddress));
    }
    if ip.u16(offset_of!(Ipv4Hdr, frags)) & FRAGMENT_MASK != 0 {
        return Err(malformed(Reason::Fragment));
    }

    let transport_offset = ip_offset + header_length;
    let transport_length = total_length - header_length;
    let (ports, tcp_flags) = if protocol == TCP {
        decode_tcp(frame, transport_offset, transport_length).map_err(malformed)?
    } else {
        (
            decode_udp(frame, transport_offset, transport_length).map_err(malformed)?,
            0,
        )
    };
    if ports.0 == 0 || ports.1 == 0 {
        return Err(malformed(Reason::ZeroPort));
    }
    Ok(Segment {
        key: FlowKey {
            source: Address::from_v4_word(source),
            destination,
            source_port: ports.0,
            destination_port: ports.1,
            protocol: protocol as u32,
        },
        ip_offset,
        transport_offset,
        tcp_flags,
        ttl: ip.u8(offset_of!(Ipv4Hdr, ttl)),
    })
}

/// Ports in network byte order and flags of a TCP header.
#[inline(always)]
fn decode_tcp<F: Frame>(frame: &F, offset: usize, length: usize) -> Result<((u16, u16), u8), Reason> {
    if length < TcpHdr::LEN {
        return Err(Reason::TruncatedTransport);
    }
    let tcp = frame
        .view::<{ TcpHdr::LEN }>(offset)
        .ok_or(Reason::TruncatedTransport)?;
    let data_offset = ((tcp.u8(offset_of!(TcpHdr, _bitfield_1)) >> 4) as usize) * 4;
    if data_offset < TcpHdr::LEN || data_offset > length {
        return Err(Reason::BadTcpOffset);
    }
    let tcp_flags = tcp.u8(offset_of!(TcpHdr, _bitfield_1) + 1);
    if !flags_are_sane(tcp_flags) {
        return Err(Reason::BadTcpFlags);
    }
    Ok((
        (
            tcp.u16(offset_of!(TcpHdr, source)),
            tcp.u16(offset_of!(TcpHdr, dest)),
        ),
        tcp_flags,
    ))
}

/// Ports of a UDP header in network byte order.
#[inline(always)]
fn decode_udp<F: Frame>(frame: &F, offset: usize, length: usize) -> Result<(u16, u16), Reason> {
    if length < UdpHdr::LEN {
        return Err(Reason::TruncatedTransport);
    }
    let udp = frame
        .view::<{ UdpHdr::LEN }>(offset)
        .ok_or(Reason::TruncatedTransport)?;
    let udp_length = u16::from_be(udp.u16(offset_of!(UdpHdr, len))) as usize;
    if udp_length < UdpHdr::LEN || udp_length > length {
        return Err(Reason::BadUdpLength);
    }
    Ok((udp.u16(offset_of!(UdpHdr, src)), udp.u16(offset_of!(UdpHdr, dst))))
}

/// Tells whether a host may use an IPv4 address as its source: not in 0/8, 127/8, 224/4 or 240/4
/// (RFC 1122 section 3.2.1.3). The address is a word in network byte order.
#[inline(always)]
const fn may_be_source(word: u32) -> bool {
    let first = u32::from_be(word) >> 24;
    first != 0 && first != 127 && first < 224
}

impl Frame for &[u8] {
    type View = SliceView;

    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    fn view<const N: usize>(&self, offset: usize) -> Option<SliceView> {
        let mut view = SliceView { bytes: [0; 64] };
        view.bytes[..N].copy_from_slice(self.get(offset..offset.checked_add(N)?)?);
        Some(view)
    }
}

/// A copy of checked bytes, for callers outside the kernel.
#[derive(Clone, Copy, Debug)]
pub struct SliceView {
    bytes: [u8; 64],
}

impl View for SliceView {
    fn u8(&self, at: usize) -> u8 {
        self.bytes[at]
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_ne_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes([
            self.bytes[at],
            self.bytes[at + 1],
            self.bytes[at + 2],
            self.bytes[at + 3],
        ])
    }
}

#[cfg(test)]
mod tests {
    use core::net::Ipv4Addr;
    use std::vec::Vec;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// A TCP segment with its ACK from 198.51.100.7:5000 to 203.0.113.10:80, checksums left out.
    const ACK: [u8; 54] = [
        2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00, // Ethernet
        0x45, 0, 0, 40, 0x12, 0x34, 0, 0, 64, 6, 0, 0, 198, 51, 100, 7, 203, 0, 113, 10, // IP
        0x13, 0x88, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0, // TCP
    ];
    /// A UDP datagram without payload, in between the same.
    const DATAGRAM: [u8; 42] = [
        2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00, // Ethernet
        0x45, 0, 0, 28, 0x12, 0x34, 0, 0, 64, 17, 0, 0, 198, 51, 100, 7, 203, 0, 113, 10, // IP
        0x13, 0x88, 0, 80, 0, 8, 0, 0, // UDP
    ];

    fn segment(protocol: u8, tcp_flags: u8) -> Segment {
        Segment {
            key: FlowKey {
                source: Ipv4Addr::new(198, 51, 100, 7).into(),
                destination: Ipv4Addr::new(203, 0, 113, 10).into(),
                source_port: 5000_u16.to_be(),
                destination_port: 80_u16.to_be(),
                protocol: u32::from(protocol),
            },
            ip_offset: 14,
            transport_offset: 34,
            tcp_flags,
            ttl: 64,
        }
    }

    fn reason_of(bytes: &[u8]) -> Reason {
        match decode(&bytes) {
            Err(Undecodable::NotTransport(reason) | Undecodable::Malformed { reason, .. }) => reason,
            Ok(segment) => panic!("{segment:?}"),
        }
    }

    fn changed<const N: usize>(frame: [u8; N], changes: &[(usize, u8)]) -> [u8; N] {
        let mut frame = frame;
        for (at, value) in changes {
            frame[*at] = *value;
        }
        frame
    }

    #[test]
    fn a_tcp_segment_is_decoded_whole() {
        assert_eq!(decode(&&ACK[..]), Ok(segment(TCP, 0x10)));
    }

    #[test]
    fn a_udp_datagram_is_decoded_whole() {
        assert_eq!(decode(&&DATAGRAM[..]), Ok(segment(UDP, 0)));
    }

    #[test]
    fn a_frame_for_a_group_of_hosts_is_for_no_service() {
        for group in [[0xff; 6], [0x01, 0, 0x5e, 1, 2, 3], [0x03, 0xbf, 0, 0, 0, 1]] {
            let mut frame = ACK;
            frame[..6].copy_from_slice(&group);
            let expected = Err(Undecodable::NotTransport(Reason::NotForService));
            assert_eq!(decode(&&frame[..]), expected, "{group:?}");
        }
    }

    #[test]
    fn options_move_the_transport_header() {
        let mut frame = ACK[..34].to_vec();
        frame.extend_from_slice(&[1; 40]);
        frame.extend_from_slice(&ACK[34..]);
        frame[14] = 0x4f;
        frame[17] = 80;
        let expected = Segment {
            transport_offset: 74,
            ..segment(TCP, 0x10)
        };
        assert_eq!(decode(&&frame[..]), Ok(expected));
    }

    #[test]
    fn each_way_to_be_malformed_has_its_reason() {
        for (changes, reason) in [
            (&[(14, 0x65)][..], Reason::BadIpVersion),
            (&[(14, 0x44)], Reason::BadIpHeaderLength),
            (&[(14, 0x4f)], Reason::BadIpHeaderLength),
            (&[(17, 19)], Reason::BadIpLength),
            (&[(17, 41)], Reason::BadIpLength),
            (&[(26, 0)], Reason::BadSourceAddress),
            (&[(26, 127)], Reason::BadSourceAddress),
            (&[(26, 224)], Reason::BadSourceAddress),
            (&[(26, 255)], Reason::BadSourceAddress),
            (
                &[(26, 203), (27, 0), (28, 113), (29, 10)],
                Reason::BadSourceAddress,
            ),
            (&[(20, 0x20)], Reason::Fragment),
            (&[(21, 0x01)], Reason::Fragment),
            (&[(17, 39)], Reason::TruncatedTransport),
            (&[(46, 0x40)], Reason::BadTcpOffset),
            (&[(46, 0x60)], Reason::BadTcpOffset),
            (&[(47, 0x00)], Reason::BadTcpFlags),
            (&[(34, 0), (35, 0)], Reason::ZeroPort),
            (&[(37, 0)], Reason::ZeroPort),
        ] {
            let frame = changed(ACK, changes);
            let destination = Ipv4Addr::new(203, 0, 113, 10).into();
            let expected = Undecodable::Malformed { destination, reason };
            assert_eq!(decode(&&frame[..]), Err(expected), "{changes:x?}");
        }
        for (changes, reason) in [
            (&[(17, 27)][..], Reason::TruncatedTransport),
            (&[(39, 7)], Reason::BadUdpLength),
            (&[(39, 9)], Reason::BadUdpLength),
            (&[(38, 0xff)], Reason::BadUdpLength),
        ] {
            assert_eq!(reason_of(&changed(DATAGRAM, changes)), reason, "{changes:x?}");
        }
    }

    #[test]
    fn what_is_not_ipv4_is_told_from_what_is_not_transport() {
        assert_eq!(reason_of(&changed(ACK, &[(12, 0x86), (13, 0xdd)])), Reason::NotIp);
        for length in 0..34 {
            assert_eq!(reason_of(&ACK[..length]), Reason::NotIp, "{length} bytes");
        }
        for protocol in (0..=u8::MAX).filter(|protocol| ![TCP, UDP].contains(protocol)) {
            let frame = changed(ACK, &[(23, protocol)]);
            assert_eq!(
                decode(&&frame[..]),
                Err(Undecodable::NotTransport(Reason::NotForService))
            );
        }
    }

    #[test]
    fn flags_of_ip_that_are_no_fragments_are_let_be() {
        for flags in [0x40, 0x80, 0xc0] {
            assert!(decode(&&changed(ACK, &[(20, flags)])[..]).is_ok(), "{flags:#x}");
        }
    }

    /// Frames near to well-formed ones, cut and lengthened.
    fn frames() -> impl Strategy<Value = Vec<u8>> {
        let near = (
            any::<bool>(),
            vec((12..54usize, any::<u8>()), 0..4),
            0..80usize,
            any::<bool>(),
        )
            .prop_map(|(tcp, changes, length, resized)| {
                let mut frame = if tcp { ACK.to_vec() } else { DATAGRAM.to_vec() };
                for (at, value) in changes {
                    if let Some(byte) = frame.get_mut(at) {
                        *byte = value;
                    }
                }
                if resized {
                    frame.resize(length, 0);
                }
                frame
            });
        prop_oneof![vec(any::<u8>(), 0..120), near]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn no_bytes_make_it_panic_and_what_it_decodes_is_in_the_frame(frame in frames()) {
            let Ok(segment) = decode(&&frame[..]) else { return Ok(()) };
            let header = if segment.key.protocol == u32::from(TCP) { 20 } else { 8 };
            let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
            prop_assert_eq!(segment.ip_offset, 14);
            prop_assert_eq!(segment.transport_offset, 14 + usize::from(frame[14] & 0x0f) * 4);
            prop_assert!(segment.transport_offset + header <= 14 + total && 14 + total <= frame.len());
            let at = segment.transport_offset;
            prop_assert_eq!(segment.key.source_port.to_ne_bytes(), [frame[at], frame[at + 1]]);
            prop_assert_eq!(segment.key.destination_port.to_ne_bytes(), [frame[at + 2], frame[at + 3]]);
            prop_assert_eq!(&segment.key.source.v4_word().to_ne_bytes()[..], &frame[26..30]);
            prop_assert_eq!(&segment.key.destination.v4_word().to_ne_bytes()[..], &frame[30..34]);
            prop_assert!(segment.key.source.is_v4() && segment.key.destination.is_v4());
            prop_assert_eq!(segment.ttl, frame[22]);
            prop_assert_eq!(segment.tcp_flags == 0, header == 8);
            prop_assert!(segment.key.source_port != 0 && segment.key.destination_port != 0);
            prop_assert!(segment.key.source != segment.key.destination);
        }

        #[test]
        fn a_malformed_packet_names_its_destination(frame in frames()) {
            if let Err(Undecodable::Malformed { destination, reason }) = decode(&&frame[..]) {
                prop_assert_eq!(&destination.v4_word().to_ne_bytes()[..], &frame[30..34]);
                prop_assert_eq!(reason.class(), crate::abi::VerdictClass::Dropped);
            }
        }

        #[test]
        fn what_follows_the_packet_in_its_frame_makes_no_difference(frame in frames(), trailer in vec(any::<u8>(), 0..40)) {
            if let Ok(segment) = decode(&&frame[..]) {
                let longer = [&frame[..], &trailer].concat();
                prop_assert_eq!(decode(&&longer[..]), Ok(segment));
            }
        }
    }
}
