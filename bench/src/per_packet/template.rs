//! From a frame to what the harness makes the frames of all flows from.

use anyhow::{Result, ensure};
use lb_common::{
    abi::{BenchTemplate, TCP, TEMPLATE_WORDS, UDP},
    logic::checksum,
};

use super::frame::{Direction, Ip, Packet, Transport};

const IP: usize = 14;
/// Bytes that are always restored, and those of all words.
const SHORT: usize = 64;
const LONG: usize = TEMPLATE_WORDS * size_of::<u64>();

/// The frame that a run begins with, and its template. A frame that is shorter than what is restored is padded.
pub fn of(packet: &Packet) -> Result<(Vec<u8>, BenchTemplate)> {
    let mut frame = packet.frame(0)?;
    let restores_all = matches!(packet, Packet::Ip(ip) if ip.server.is_ipv6());
    frame.resize(frame.len().max(if restores_all { LONG } else { SHORT }), 0);
    let mut template = BenchTemplate {
        length: frame.len().try_into()?,
        restores_all: restores_all.into(),
        ..BenchTemplate::default()
    };
    for (word, bytes) in template.words.iter_mut().zip(frame.chunks_exact(8)) {
        *word = bytes
            .iter()
            .rev()
            .fold(0, |word, byte| word << 8 | u64::from(*byte));
    }
    if let Packet::Ip(ip) = packet {
        vary(&mut template, ip, &frame)?;
    }
    Ok((frame, template))
}

/// Says where the client is in the frame, and the sums of what is not the client.
fn vary(template: &mut BenchTemplate, ip: &Ip, frame: &[u8]) -> Result<()> {
    let is_v6 = ip.server.is_ipv6();
    // Of an IPv6 address the last word varies.
    let (header_length, addresses, last_word) = if is_v6 { (40, 8..40, 12) } else { (20, 12..20, 0) };
    let transport = IP + header_length;
    let (address_length, port) = (addresses.len() / 2, transport);
    let address = IP + addresses.start + last_word;
    let (address, port) = match ip.direction {
        Direction::ToServer => (address, port),
        Direction::ToClient => (address + address_length, port + 2),
    };
    let (number, checksum_at) = match ip.transport {
        Transport::Syn | Transport::Ack => (TCP, transport + 16),
        Transport::Udp => (UDP, transport + 6),
    };
    let length = match ip.transport {
        Transport::Syn | Transport::Ack => 20 + ip.payload,
        Transport::Udp => 8 + ip.payload,
    };
    ensure!(frame.len() >= transport + length, "the frame is too short");

    let mut constant = frame.to_vec();
    for (at, size) in [(address, 4), (port, 2), (checksum_at, 2)] {
        constant[at..at + size].fill(0);
    }
    if !is_v6 {
        constant[IP + 10..IP + 12].fill(0);
        template.ip_sum = sum(&constant[IP..transport], 0);
    }
    // RFC 9293 section 3.1, RFC 8200 section 8.1: addresses, protocol and length.
    let pseudo = sum(&constant[IP + addresses.start..IP + addresses.end], 0)
        + u32::from(u16::from(number).to_be())
        + u32::from(u16::try_from(length)?.to_be());
    template.sum = sum(&constant[transport..transport + length], pseudo);
    template.varies = 1;
    template.is_v6 = is_v6.into();
    template.address_at = address.try_into()?;
    template.port_at = port.try_into()?;
    template.checksum_at = checksum_at.try_into()?;
    Ok(())
}

/// The sum that a checksum is the complement of.
fn sum(bytes: &[u8], start: u32) -> u32 {
    u32::from(!checksum::of_bytes(bytes, start))
}

#[cfg(test)]
mod tests {
    use lb_common::logic::bench_flow;

    use super::*;
    use crate::per_packet::scenario::Scenario;

    /// What the harness does with a template, on the host.
    fn set_up(template: &BenchTemplate, frame: &[u8], flow: u32) -> Vec<u8> {
        let mut frame = frame.to_vec();
        let restored = if template.restores_all == 0 { SHORT } else { LONG };
        frame[..restored].fill(0xee);
        for (bytes, word) in frame[..restored].chunks_exact_mut(8).zip(template.words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        if template.varies != 0 {
            let (address, port) = bench_flow::client(flow, template.is_v6 != 0);
            let mut put = |at: u32, bytes: &[u8]| frame[at as usize..][..bytes.len()].copy_from_slice(bytes);
            put(template.address_at, &address.to_ne_bytes());
            put(template.port_at, &port.to_ne_bytes());
            if template.is_v6 == 0 {
                put(
                    24,
                    &bench_flow::checksum(template.ip_sum, address, 0).to_ne_bytes(),
                );
            }
            put(
                template.checksum_at,
                &bench_flow::checksum(template.sum, address, port).to_ne_bytes(),
            );
        }
        frame
    }

    #[test]
    fn the_frames_of_all_flows_are_those_that_another_library_builds() {
        let packets: Vec<Packet> = Scenario::all().iter().flat_map(Scenario::packets).collect();
        assert!(packets.len() > 100);
        for packet in packets {
            let (frame, template) = of(&packet).unwrap();
            for flow in [0, 1, 2, 77_777, 1_000_000, 16_777_216, u32::MAX] {
                let mut expected = packet.frame(flow).unwrap();
                expected.resize(frame.len(), 0);
                assert_eq!(
                    set_up(&template, &frame, flow),
                    expected,
                    "{packet:?}, flow {flow}"
                );
            }
        }
    }
}
