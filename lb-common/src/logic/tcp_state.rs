//! The state of a TCP flow as it is seen from between the two ends (RFC 9293 section 3.3.2, observed, not
//! enforced: sequence numbers are the ends' own business).

use crate::abi::TcpState;

/// The flags of a TCP header as they stand in its fourteenth byte.
pub mod flags {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const PSH: u8 = 0x08;
    pub const ACK: u8 = 0x10;
    pub const URG: u8 = 0x20;
}

use flags::{ACK, FIN, RST, SYN};

/// Which end sent a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    Client,
    Backend,
}

/// Tells whether a segment asks for a new connection: SYN without ACK.
#[inline(always)]
pub const fn opens(tcp_flags: u8) -> bool {
    tcp_flags & (SYN | ACK) == SYN
}

/// Tells whether a combination of flags occurs in a connection; the others are probes or damage.
#[inline(always)]
pub const fn flags_are_sane(tcp_flags: u8) -> bool {
    let relevant = tcp_flags & (SYN | FIN | RST | ACK);
    // SYN goes with ACK at most, and apart from SYN and RST every segment has ACK (RFC 9293 section 3.10.7).
    relevant == SYN
        || relevant == SYN | ACK
        || relevant == RST
        || relevant == RST | ACK
        || relevant == ACK
        || relevant == FIN | ACK
}

/// The state in which the first segment that is seen of a flow leaves it. One that does not open a connection
/// belongs to a flow whose record is elsewhere or lost, which is taken up where it is.
#[inline(always)]
pub const fn first(tcp_flags: u8) -> TcpState {
    if opens(tcp_flags) {
        TcpState::SynSent
    } else if tcp_flags & FIN != 0 {
        TcpState::FinClient
    } else {
        TcpState::Established
    }
}

/// The state after a segment.
#[inline(always)]
pub const fn next(state: TcpState, sender: Sender, tcp_flags: u8) -> TcpState {
    if tcp_flags & RST != 0 {
        return TcpState::Closed;
    }
    match (state, sender) {
        (TcpState::None, _) => TcpState::None,
        (TcpState::Closed, _) => TcpState::Closed,
        (TcpState::FinBackend, Sender::Client) | (TcpState::FinClient, Sender::Backend)
            if tcp_flags & FIN != 0 =>
        {
            TcpState::Closed
        }
        (TcpState::FinClient | TcpState::FinBackend, _) => state,
        (_, Sender::Client) if tcp_flags & FIN != 0 => TcpState::FinClient,
        (_, Sender::Backend) if tcp_flags & FIN != 0 => TcpState::FinBackend,
        (TcpState::SynSent, Sender::Backend) if tcp_flags & (SYN | ACK) == SYN | ACK => TcpState::SynReceived,
        (TcpState::SynReceived, Sender::Client) if tcp_flags & (SYN | ACK) == ACK => TcpState::Established,
        (state, _) => state,
    }
}
