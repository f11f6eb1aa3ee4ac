use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Address;

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

impl FlowKey {
    /// A copy by words, see [`Address::by_words`].
    #[inline(always)]
    pub const fn by_words(&self) -> Self {
        Self {
            source: self.source.by_words(),
            destination: self.destination.by_words(),
            source_port: self.source_port,
            destination_port: self.destination_port,
            protocol: self.protocol,
        }
    }
}

/// State of a TCP flow as seen from between the two ends.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TcpState {
    /// Not TCP.
    #[default]
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
    /// The state of a number; an unknown one is [`Self::Closed`].
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
