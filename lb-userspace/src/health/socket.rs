//! The one place where sockets of probes are made.

use std::{
    io,
    net::{self, IpAddr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket,
    sockopt::{Ipv4RecvErr, Ipv4Ttl, Ipv6RecvErr, Ipv6Ttl, Mark, TcpMaxSeg},
};
use tokio::{
    io::Interest,
    net::{TcpSocket, UdpSocket},
};

/// What the sockets of a target's probes are given before they are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketOptions {
    /// `SO_MARK`: the mark of the packets, by which rules and programs of the kernel tell them from others.
    pub mark: Option<u32>,
    /// Hops that the packets may go, as they leave the socket.
    pub hops: Option<u8>,
    /// The largest segment of TCP, in either direction.
    pub max_segment: Option<u32>,
}

/// A TCP socket that resets its connection when it is closed: no probe leaves a TIME_WAIT behind, on either side.
pub(super) fn stream(address: SocketAddr, options: SocketOptions) -> io::Result<TcpSocket> {
    let socket = open(address.ip(), SockType::Stream, SockProtocol::Tcp, options)?;
    if let Some(bytes) = options.max_segment {
        setsockopt(&socket, TcpMaxSeg, &bytes)?;
    }
    let socket = TcpSocket::from_std_stream(net::TcpStream::from(socket));
    socket.set_zero_linger()?;
    Ok(socket)
}

/// A UDP socket, which hears of ICMP errors.
pub(super) fn datagram(address: SocketAddr, options: SocketOptions) -> io::Result<UdpSocket> {
    connectionless(address, SockType::Datagram, SockProtocol::Udp, options)
}

/// A raw socket for ICMP of the address's family. Ping sockets will not do: `net.ipv4.ping_group_range` forbids
/// them in a fresh network namespace, to root as well.
pub(super) fn icmp(address: SocketAddr, options: SocketOptions) -> io::Result<UdpSocket> {
    let protocol = match address {
        SocketAddr::V4(_) => SockProtocol::Icmp,
        SocketAddr::V6(_) => SockProtocol::IcmpV6,
    };
    connectionless(address, SockType::Raw, protocol, options)
}

/// The type of tokio's socket says UDP, but what it does (connect, send, receive) is the same for a raw socket.
fn connectionless(
    address: SocketAddr,
    kind: SockType,
    protocol: SockProtocol,
    options: SocketOptions,
) -> io::Result<UdpSocket> {
    let socket = open(address.ip(), kind, protocol, options)?;
    // Without it only some ICMP errors reach the socket: "port unreachable", but not "host unreachable".
    match address {
        SocketAddr::V4(_) => setsockopt(&socket, Ipv4RecvErr, &true)?,
        SocketAddr::V6(_) => setsockopt(&socket, Ipv6RecvErr, &true)?,
    }
    UdpSocket::from_std(net::UdpSocket::from(socket))
}

/// The next datagram, up to `room` bytes of it, or the ICMP error that came back.
///
/// Not tokio's own: that waits until there is something to read, and an error is nothing to read. Room is taken when
/// a datagram is there, for most of the time probes only wait.
pub(super) async fn receive(socket: &UdpSocket, room: usize) -> io::Result<Vec<u8>> {
    let receive = || {
        let mut datagram = vec![0; room];
        let length = recv(socket.as_raw_fd(), &mut datagram, MsgFlags::empty())?;
        datagram.truncate(length);
        Ok(datagram)
    };
    socket
        .async_io(Interest::READABLE | Interest::ERROR, receive)
        .await
}

fn open(
    address: IpAddr,
    kind: SockType,
    protocol: SockProtocol,
    options: SocketOptions,
) -> io::Result<OwnedFd> {
    let family = match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(family, kind, flags, protocol)?;
    if let Some(mark) = options.mark {
        setsockopt(&socket, Mark, &mark)?;
    }
    match (options.hops, address) {
        (Some(hops), IpAddr::V4(_)) => setsockopt(&socket, Ipv4Ttl, &hops.into())?,
        (Some(hops), IpAddr::V6(_)) => setsockopt(&socket, Ipv6Ttl, &hops.into())?,
        (None, _) => {}
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::getsockopt;

    use super::*;

    /// Needs root.
    #[tokio::test]
    async fn every_socket_has_its_options_before_it_is_used() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let address: SocketAddr = address.parse().unwrap();
            for mark in [None, Some(0x786c_6200)] {
                let options = SocketOptions {
                    mark,
                    hops: mark.map(|_| 2),
                    max_segment: mark.map(|_| 1172),
                };
                let stream = stream(address, options).unwrap();
                let datagram = datagram(address, options).unwrap();
                let icmp = icmp(address, options).unwrap();
                let marks = [
                    getsockopt(&stream, Mark).unwrap(),
                    getsockopt(&datagram, Mark).unwrap(),
                    getsockopt(&icmp, Mark).unwrap(),
                ];
                assert_eq!(marks, [mark.unwrap_or(0); 3]);
                let hops = if address.is_ipv4() {
                    [
                        getsockopt(&stream, Ipv4Ttl).unwrap(),
                        getsockopt(&datagram, Ipv4Ttl).unwrap(),
                    ]
                } else {
                    [
                        getsockopt(&stream, Ipv6Ttl).unwrap(),
                        getsockopt(&datagram, Ipv6Ttl).unwrap(),
                    ]
                };
                assert_eq!(hops.map(|hops| hops == 2), [mark.is_some(); 2]);
                let segment = getsockopt(&stream, TcpMaxSeg).unwrap();
                assert_eq!(segment == 1172, mark.is_some(), "{segment}");
            }
        }
    }
}
