use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Address, Link, Tags};

/// The 5-tuple of a packet: its own for packets from a client, and as seen on the wire for replies.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
pub struct FlowKey {
    pub source: Address,
    pub destination: Address,
    /// Network byte order.
    pub source_port: u16,
    /// Network byte order.
    pub destination_port: u16,
    pub protocol: u32,
}

const _: () = assert!(size_of::<FlowKey>() == 40);

/// What is known of a flow, found by the client's 5-tuple.
///
/// For `nat` and `full-nat` a second map leads from the 5-tuple of the backend's replies to the client's, so that
/// state and age are kept once for both directions.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Flow {
    /// When the last packet of either direction was seen: nanoseconds of `CLOCK_MONOTONIC_COARSE`.
    pub last_seen: u64,
    /// When the flow was recorded, on the same clock.
    pub created: u64,
    pub backend: u32,
    /// [`Backend::generation`](super::Backend::generation) when the flow was recorded.
    pub generation: u32,
    pub service: u32,
    /// Interface that the client's packets arrive on; replies leave by it.
    pub client_ifindex: u32,
    /// From that interface to where the client's packets came from.
    pub client_link: Link,
    /// VLAN tags that the client's packets carry; replies carry the same.
    pub client_tags: Tags,
    /// Source port that the backend sees, network byte order.
    pub source_port: u16,
    /// A [`TcpState`] as its number; 0 for UDP.
    pub tcp_state: u8,
    /// The [`Forward`](super::Forward) of the service when the flow was recorded, as its number.
    pub forward: u8,
}

const _: () = assert!(size_of::<Flow>() == 56);

/// State of a TCP flow as seen from between the two ends.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpState {
    /// Not TCP.
    None = 0,
    /// The client has sent SYN.
    SynSent = 1,
    /// The backend has answered SYN, ACK.
    SynReceived = 2,
    /// The client has acknowledged, or the flow was picked up in its middle.
    Established = 3,
    /// The client has sent FIN.
    FinClient = 4,
    /// The backend has sent FIN.
    FinBackend = 5,
    /// Both have sent FIN, or one RST.
    Closed = 6,
}

impl TcpState {
    /// The state for a number read from [`Flow::tcp_state`]; an unknown number is [`Self::Closed`].
    #[inline(always)]
    pub const fn from_number(number: u8) -> Self {
        match number {
            0 => Self::None,
            1 => Self::SynSent,
            2 => Self::SynReceived,
            3 => Self::Established,
            4 => Self::FinClient,
            5 => Self::FinBackend,
            _ => Self::Closed,
        }
    }
}
