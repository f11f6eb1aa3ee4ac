//! Netlink: links, addresses, neighbours and next hops; no other module speaks it. And raw segments, in [`poke`].
//!
//! A netlink socket belongs to the network namespace of the thread that opened it: whoever is to look into another
//! namespace calls from a thread inside it.

pub mod backend_host;
pub mod close;
pub mod clsact;
pub mod construct;
pub mod links;
pub mod local_addresses;
pub mod next_hops;
pub mod poke;
pub mod source_ports;
pub mod vips;

use std::io;

use rtnetlink::Handle;
use tokio::task::JoinHandle;

pub use clsact::remove_unused_clsact;
pub use links::{Link, links_named, name_of, xdp_programs};
pub use local_addresses::not_local;
pub use next_hops::{NextHopWatcher, Unresolved, release_neighbours};
pub use source_ports::source_ports;
pub use vips::{VipChanges, reconcile_vips, remove_vips};

/// Marks what is ours in the kernel's tables (`IFA_PROTO`, `NDA_PROTOCOL`), so that it is recognised without stored
/// state: the letter x, a number that no entry of `/etc/iproute2/rt_protos` claims.
const OWN_PROTOCOL: u8 = b'x';

/// What the kernel's network tables refused.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// There is no such interface in this network namespace.
    #[error("interface {name} does not exist; there are {present}")]
    MissingInterface {
        name: String,
        /// Names of those that exist, joined by commas.
        present: String,
    },
    /// The caller lacks a capability.
    #[error("{action} is not permitted; run as root or grant CAP_NET_ADMIN")]
    NotPermitted { action: String },
    /// The kernel cannot make veth interfaces.
    #[error("this kernel knows no veth interfaces; load their module: modprobe veth")]
    NoVeth,
    /// The kernel cannot make VLAN devices.
    #[error("this kernel knows no VLAN devices; load their module: modprobe 8021q")]
    NoVlan,
    /// The kernel cannot find TCP connections by their addresses, which ending them takes.
    #[error("this kernel finds no TCP connections of local processes; load the module: modprobe tcp_diag")]
    NoTcpDiag,
    /// Anything else that the kernel answered.
    #[error("{action} failed: {source}")]
    Kernel {
        action: String,
        #[source]
        source: io::Error,
    },
}

impl NetError {
    fn kernel(action: impl Into<String>, error: impl Into<KernelError>) -> Self {
        let action = action.into();
        let source = error.into().0;
        match source.raw_os_error() {
            Some(libc::EPERM) => Self::NotPermitted { action },
            _ => Self::Kernel { action, source },
        }
    }
}

/// Reduces the library's errors to the kernel's answer.
struct KernelError(io::Error);

impl From<io::Error> for KernelError {
    fn from(error: io::Error) -> Self {
        Self(error)
    }
}

impl From<rtnetlink::Error> for KernelError {
    fn from(error: rtnetlink::Error) -> Self {
        match error {
            rtnetlink::Error::NetlinkError(message) => Self(message.to_io()),
            other => Self(io::Error::other(other)),
        }
    }
}

/// A socket for requests to the kernel, and the task that serves it.
struct Netlink {
    handle: Handle,
    task: JoinHandle<()>,
}

impl Netlink {
    /// Opens a socket in the network namespace of the calling thread; wants a tokio runtime with I/O.
    fn open() -> Result<Self, NetError> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|error| NetError::kernel("opening a netlink socket", error))?;
        Ok(Self {
            handle,
            task: tokio::spawn(connection),
        })
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}
