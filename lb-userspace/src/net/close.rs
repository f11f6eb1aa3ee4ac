//! Ends TCP connections of this host's processes: the process and the client are told by the kernel.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::NetError;

/// `SOCK_DIAG_BY_FAMILY` and `SOCK_DESTROY` (`include/uapi/linux/sock_diag.h`).
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// Which sockets a number does not name by their cookie (`INET_DIAG_NOCOOKIE`).
const NO_COOKIE: u32 = u32::MAX;

/// A connection of a process on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    pub local: SocketAddr,
    pub remote: SocketAddr,
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`; ports and addresses in network byte order.
#[repr(C)]
#[derive(FromZeros, IntoBytes, Immutable)]
struct Request {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port_id: u32,
    family: u8,
    protocol: u8,
    extensions: u8,
    _pad: u8,
    states: u32,
    local_port: u16,
    remote_port: u16,
    local: [u8; 16],
    remote: [u8; 16],
    interface: u32,
    cookie: [u32; 2],
}

/// `struct nlmsghdr` and what `struct nlmsgerr` and the end of a list begin with.
#[repr(C)]
#[derive(FromBytes, Immutable)]
struct Answer {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port_id: u32,
    error: i32,
}

/// Ends connections: the processes get an error (`ECONNABORTED`) and the clients a reset. Those that are gone already are
/// no error.
///
/// # Errors
/// The kernel cannot (`CONFIG_INET_DIAG_DESTROY`, the module `tcp_diag`), or a capability is missing; the others go on
/// then.
pub fn close(connections: &[Connection]) -> Result<(), NetError> {
    close_of(libc::IPPROTO_TCP as u8, connections)
}

fn close_of(protocol: u8, connections: &[Connection]) -> Result<(), NetError> {
    let failed = |error: io::Error| NetError::kernel("ending connections of local processes", error);
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )
    .map_err(|errno| failed(errno.into()))?;
    let mut all_found = true;
    for connection in connections {
        match ask(&netlink, &destroy(protocol, connection)) {
            Ok(()) => {}
            Err(error) if is_missing(&error) => all_found = false,
            Err(error) => return Err(failed(error)),
        }
    }
    if all_found {
        return Ok(());
    }
    // Some are gone, or the kernel finds none of this protocol: its answer is the same.
    match ask(&netlink, &list_none(protocol)) {
        Err(error) if is_missing(&error) => Err(NetError::NoTcpDiag),
        answer => answer.map_err(failed),
    }
}

fn is_missing(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

/// Sends a request that is answered by one message, with an error or with 0.
fn ask(netlink: &OwnedFd, request: &Request) -> io::Result<()> {
    send(netlink.as_raw_fd(), request.as_bytes(), MsgFlags::empty())?;
    let mut answer = [0; 4096];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let Ok((answer, _)) = Answer::read_from_prefix(&answer[..length]) else {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
    };
    match answer.error {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

fn destroy(protocol: u8, connection: &Connection) -> Request {
    let family = match connection.local {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    Request {
        kind: SOCK_DESTROY,
        flags: (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16,
        family: family as u8,
        protocol,
        states: u32::MAX,
        local_port: connection.local.port().to_be(),
        remote_port: connection.remote.port().to_be(),
        local: octets(connection.local.ip()),
        remote: octets(connection.remote.ip()),
        cookie: [NO_COOKIE; 2],
        ..Request::empty()
    }
}

/// Lists sockets of no state: the kernel only says whether it can.
fn list_none(protocol: u8) -> Request {
    Request {
        kind: SOCK_DIAG_BY_FAMILY,
        flags: (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16,
        family: libc::AF_INET as u8,
        protocol,
        ..Request::empty()
    }
}

impl Request {
    fn empty() -> Self {
        Self {
            length: size_of::<Self>() as u32,
            ..Self::new_zeroed()
        }
    }
}

/// An IPv4 address is the first four.
fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(address) => address.octets(),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    use super::*;
    use crate::lab::Namespace;

    #[test]
    fn both_ends_of_a_connection_are_told_and_the_next_one_stays() {
        let host = Namespace::new("host").unwrap();
        let run = || {
            for address in ["127.0.0.1:0", "[::1]:0"] {
                let listener = TcpListener::bind(address).unwrap();
                let local = listener.local_addr().unwrap();
                let mut ends: Vec<(TcpStream, TcpStream)> = Vec::new();
                for _ in 0..2 {
                    let client = TcpStream::connect(local).unwrap();
                    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                    ends.push((client, listener.accept().unwrap().0));
                }
                let remote = ends[0].0.local_addr().unwrap();
                let connection = Connection { local, remote };
                close(&[connection]).unwrap();
                // It is gone: no error.
                close(&[connection]).unwrap();
                let (client, server) = &mut ends[0];
                let told = |end: &mut TcpStream| end.read(&mut [0]).unwrap_err().kind();
                assert_eq!(told(client), io::ErrorKind::ConnectionReset);
                assert_eq!(told(server), io::ErrorKind::ConnectionAborted);
                drop(ends.remove(0));
                let (client, server) = &mut ends[0];
                std::io::Write::write_all(client, b"x").unwrap();
                assert_eq!(server.read(&mut [0]).unwrap(), 1);
            }
        };
        host.run(run).unwrap();
    }

    #[test]
    fn a_kernel_that_finds_no_sockets_of_the_protocol_is_not_taken_for_one_whose_sockets_are_gone() {
        let gone = Connection {
            local: "127.0.0.1:1".parse().unwrap(),
            remote: "127.0.0.1:2".parse().unwrap(),
        };
        close(&[gone]).unwrap();
        // There is no module for this, as there is none for TCP where `tcp_diag` was not loaded.
        let error = close_of(libc::IPPROTO_ICMP as u8, &[gone]).unwrap_err();
        assert!(matches!(error, NetError::NoTcpDiag), "{error}");
    }
}
