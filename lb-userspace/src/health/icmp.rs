//! Probe `icmp`: an echo request is answered (RFC 792, RFC 4443 section 4).

use std::{
    hash::{BuildHasher, RandomState},
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU16, Ordering},
};

use lb_common::logic::checksum;
use tokio::net::UdpSocket;

use super::{Attempt, Failure, Limit, ProbeError, SocketOptions, socket};

/// Type, code, checksum, identifier, sequence number.
const HEADER: usize = 8;
/// Room for what comes in: an IPv4 header with options and a reply to us. What is cut off is not ours.
const ROOM: usize = 128;

/// The sequence number of the next request, so that no two of this process are the same for long.
static SEQUENCE: AtomicU16 = AtomicU16::new(0);

/// Sends an echo request to the address, whose port has no meaning, and awaits the reply to it.
pub(super) async fn probe(address: IpAddr, options: SocketOptions, limit: Limit) -> Result<(), ProbeError> {
    let destination = SocketAddr::new(address, 0);
    let socket = socket::icmp(destination, options).map_err(|source| ProbeError::Socket {
        address: destination,
        source,
    })?;
    limit
        .on(exchange(&socket, destination))
        .await
        .map_err(|failure| Attempt::Echo(address).failed(failure))
}

async fn exchange(connection: &UdpSocket, destination: SocketAddr) -> Result<(), Failure> {
    // Connected, so that of all the ICMP of this host it gets what comes from there alone.
    connection.connect(destination).await.map_err(Failure::Io)?;
    let echo = Echo::new();
    let request = echo.request(destination.is_ipv6());
    connection.send(&request).await.map_err(Failure::Io)?;
    loop {
        let packet = socket::receive(connection, ROOM).await.map_err(Failure::Io)?;
        if echo.is_answered_by(&packet, destination.is_ipv6()) {
            return Ok(());
        }
    }
}

/// What a request carries and its reply brings back.
struct Echo {
    identifier: [u8; 2],
    sequence: [u8; 2],
    /// A number that other processes, which may choose the same identifier, do not have.
    payload: [u8; 8],
}

impl Echo {
    fn new() -> Self {
        Self {
            // A part of the process's id, as ping has it.
            identifier: (std::process::id() as u16).to_be_bytes(),
            sequence: SEQUENCE.fetch_add(1, Ordering::Relaxed).to_be_bytes(),
            payload: RandomState::new().hash_one(()).to_be_bytes(),
        }
    }

    fn request(&self, is_ipv6: bool) -> Vec<u8> {
        let kind = if is_ipv6 { 128 } else { 8 };
        let mut request = vec![kind, 0, 0, 0];
        request.extend(self.identifier);
        request.extend(self.sequence);
        request.extend(self.payload);
        // That of ICMPv6 covers the addresses, and the kernel writes it (RFC 3542 section 3.1).
        if !is_ipv6 {
            let checksum = checksum::of_bytes(&request, 0).to_ne_bytes();
            request[2..4].copy_from_slice(&checksum);
        }
        request
    }

    /// Whether `packet`, as a raw socket gives it (IPv4 with its header, IPv6 without), is the reply to this request.
    fn is_answered_by(&self, packet: &[u8], is_ipv6: bool) -> bool {
        let (message, kind) = if is_ipv6 {
            (Some(packet), 129)
        } else {
            let header = packet.first().map_or(0, |first| usize::from(first & 0x0f) * 4);
            (packet.get(header..), 0)
        };
        let Some((header, payload)) = message.and_then(|message| message.split_at_checked(HEADER)) else {
            return false;
        };
        header[..2] == [kind, 0]
            && header[4..6] == self.identifier
            && header[6..] == self.sequence
            && payload == self.payload
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As an IPv4 raw socket would give it; only the length of the header matters.
    fn with_ipv4_header(message: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x46];
        packet.extend([0; 23]);
        packet.extend(message);
        packet
    }

    #[test]
    fn the_checksum_of_a_request_is_right_and_left_to_the_kernel_for_ipv6() {
        let echo = Echo::new();
        assert_eq!(checksum::of_bytes(&echo.request(false), 0), 0);
        assert_eq!(echo.request(true)[..4], [128, 0, 0, 0]);
    }

    #[test]
    fn nothing_but_the_reply_to_the_very_request_is_an_answer() {
        let echo = Echo::new();
        for is_ipv6 in [false, true] {
            let mut reply = echo.request(is_ipv6);
            reply[0] = if is_ipv6 { 129 } else { 0 };
            let packet = |message: &[u8]| {
                if is_ipv6 {
                    message.to_vec()
                } else {
                    with_ipv4_header(message)
                }
            };
            assert!(echo.is_answered_by(&packet(&reply), is_ipv6));
            // Our own request, which loops back on loopback.
            assert!(!echo.is_answered_by(&packet(&echo.request(is_ipv6)), is_ipv6));
            for index in (0..reply.len()).filter(|index| !(2..4).contains(index)) {
                let mut other = reply.clone();
                other[index] ^= 1;
                assert!(!echo.is_answered_by(&packet(&other), is_ipv6), "byte {index}");
            }
            for length in 0..reply.len() {
                assert!(!echo.is_answered_by(&packet(&reply[..length]), is_ipv6));
                assert!(!echo.is_answered_by(&reply[..length], is_ipv6));
            }
            let longer = [&reply[..], &[0]].concat();
            assert!(!echo.is_answered_by(&packet(&longer), is_ipv6));
        }
        assert!(!echo.is_answered_by(&[0x4f; 10], false));
    }

    #[test]
    fn no_two_requests_are_alike() {
        assert_ne!(Echo::new().request(false), Echo::new().request(false));
    }
}
