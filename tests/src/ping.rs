//! ICMP echo.

use std::{io, net::SocketAddr, os::fd::AsRawFd, time::Duration};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recvfrom, sendto,
        setsockopt, socket, sockopt::ReceiveTimeout,
    },
    time::TimeVal,
};
use xlb::lab::Namespace;

use crate::machine;

/// Bytes that follow the header of each request.
const PAYLOAD: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuv";

/// Sends ICMP echo requests from a namespace, and counts the answers that come from whom was asked, with the same
/// content; the kernel checks their checksums.
///
/// # Errors
/// When a request cannot be sent.
pub fn ping(namespace: &Namespace, address: std::net::IpAddr, count: u16) -> io::Result<usize> {
    namespace
        .sysctl("net/ipv4/ping_group_range", "0 0")
        .map_err(io::Error::other)?;
    namespace
        .run(|| ping_from_here(address, count))
        .map_err(io::Error::other)?
}

fn ping_from_here(address: std::net::IpAddr, count: u16) -> io::Result<usize> {
    let (family, protocol, request, reply) = if address.is_ipv4() {
        (AddressFamily::Inet, SockProtocol::Icmp, 8, 0)
    } else {
        (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129)
    };
    // The kernel writes the identifier, and gives the socket what has it.
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?;
    let timeout = machine::bound(Duration::from_secs(2));
    setsockopt(
        &socket,
        ReceiveTimeout,
        &TimeVal::new(timeout.as_secs() as i64, 0),
    )?;
    let to = SockaddrStorage::from(SocketAddr::new(address, 0));
    let mut answered = 0;
    for sequence in 0..count {
        let [high, low] = sequence.to_be_bytes();
        let message = [&[request, 0, 0, 0, 0, 0, high, low], PAYLOAD].concat();
        sendto(socket.as_raw_fd(), &message, &to, MsgFlags::empty())?;
        let mut answer = [0; 256];
        let Ok((length, Some(from))) = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut answer) else {
            continue;
        };
        let from = match (from.as_sockaddr_in(), from.as_sockaddr_in6()) {
            (Some(from), _) => std::net::IpAddr::from(from.ip()),
            (_, Some(from)) => from.ip().into(),
            _ => continue,
        };
        let same = answer[0] == reply && answer[6..length] == message[6..];
        answered += usize::from(from == address && same);
    }
    Ok(answered)
}
