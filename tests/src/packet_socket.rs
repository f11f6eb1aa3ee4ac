//! Whole Ethernet frames, sent and received by an interface: packet(7).

use std::{
    io::{self, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use nix::sys::{
    socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket, sockopt::ReceiveTimeout},
    time::TimeVal,
};
use xlb::lab::Namespace;

/// A socket on one interface.
#[derive(Debug)]
pub struct PacketSocket(std::fs::File);

impl PacketSocket {
    /// Opens it in a namespace; a read gives up after `timeout`.
    ///
    /// # Panics
    /// Without root, or such an interface.
    pub fn open(namespace: &Namespace, interface: &str, timeout: Duration) -> Self {
        let index = namespace.ifindex(interface).expect("an interface");
        let opened = namespace.run(|| Self::bound(index, timeout));
        opened
            .expect("a thread in the namespace")
            .expect("a packet socket")
    }

    fn bound(index: u32, timeout: Duration) -> io::Result<Self> {
        let socket: OwnedFd = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::EthAll,
        )?;
        setsockopt(
            &socket,
            ReceiveTimeout,
            &TimeVal::new(timeout.as_secs() as i64, i64::from(timeout.subsec_micros())),
        )?;
        // SAFETY: `sockaddr_ll` is plain numbers, for which zeros are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index as i32;
        // SAFETY: the pointer and the length are those of a live `sockaddr_ll`.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        if bound != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(socket.into()))
    }

    /// Sends a frame.
    ///
    /// # Panics
    /// When the interface refuses it, as one that is too long.
    pub fn send(&self, frame: &[u8]) {
        (&self.0).write_all(frame).expect("sending a frame");
    }

    /// Receives a frame, sent or received by the interface, or nothing within the timeout.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 65_536];
        let length = (&self.0).read(&mut frame).ok()?;
        frame.truncate(length);
        Some(frame)
    }
}
