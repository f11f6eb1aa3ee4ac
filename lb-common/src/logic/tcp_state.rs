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

/// The state after a segment of the client where the backend's are not seen: its answer to SYN shows in the client's
/// next segment.
#[inline(always)]
pub const fn next_of_client_alone(state: TcpState, tcp_flags: u8) -> TcpState {
    match next(state, Sender::Client, tcp_flags) {
        TcpState::SynSent if tcp_flags & (SYN | ACK) == ACK => TcpState::Established,
        state => state,
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

#[cfg(test)]
mod tests {
    use super::{
        Sender::{Backend, Client},
        flags::{PSH, URG},
        *,
    };
    use TcpState::{Closed, Established, FinBackend, FinClient, None, SynReceived, SynSent};

    const SYN_ACK: u8 = SYN | ACK;
    const FIN_ACK: u8 = FIN | ACK;
    const RST_ACK: u8 = RST | ACK;

    /// State, then the state after each kind of segment of the client, then of the backend:
    /// SYN; SYN, ACK; ACK; FIN, ACK; RST; RST, ACK.
    const TRANSITIONS: [(TcpState, [TcpState; 6], [TcpState; 6]); 7] = [
        (
            None,
            [None, None, None, None, Closed, Closed],
            [None, None, None, None, Closed, Closed],
        ),
        (
            SynSent,
            [SynSent, SynSent, SynSent, FinClient, Closed, Closed],
            [SynSent, SynReceived, SynSent, FinBackend, Closed, Closed],
        ),
        (
            SynReceived,
            [SynReceived, SynReceived, Established, FinClient, Closed, Closed],
            [SynReceived, SynReceived, SynReceived, FinBackend, Closed, Closed],
        ),
        (
            Established,
            [Established, Established, Established, FinClient, Closed, Closed],
            [Established, Established, Established, FinBackend, Closed, Closed],
        ),
        (
            FinClient,
            [FinClient, FinClient, FinClient, FinClient, Closed, Closed],
            [FinClient, FinClient, FinClient, Closed, Closed, Closed],
        ),
        (
            FinBackend,
            [FinBackend, FinBackend, FinBackend, Closed, Closed, Closed],
            [FinBackend, FinBackend, FinBackend, FinBackend, Closed, Closed],
        ),
        (
            Closed,
            [Closed, Closed, Closed, Closed, Closed, Closed],
            [Closed, Closed, Closed, Closed, Closed, Closed],
        ),
    ];

    #[test]
    fn every_transition_is_as_in_the_table() {
        let segments = [SYN, SYN_ACK, ACK, FIN_ACK, RST, RST_ACK];
        for (number, (state, after_client, after_backend)) in TRANSITIONS.into_iter().enumerate() {
            assert_eq!(state as usize, number, "the table has every state once");
            for (at, segment) in segments.into_iter().enumerate() {
                // What else is set makes no difference: PSH, URG and the bits of ECN.
                for more in [0, PSH, URG, PSH | URG, 0x40, 0x80, 0xc0] {
                    let what = (state, segment, more);
                    assert_eq!(
                        next(state, Client, segment | more),
                        after_client[at],
                        "client {what:?}"
                    );
                    assert_eq!(
                        next(state, Backend, segment | more),
                        after_backend[at],
                        "backend {what:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_closed_flow_stays_closed_whatever_comes() {
        for tcp_flags in 0..=u8::MAX {
            assert_eq!(next(Closed, Client, tcp_flags), Closed);
            assert_eq!(next(Closed, Backend, tcp_flags), Closed);
        }
    }

    #[test]
    fn the_first_segment_that_is_seen_gives_the_state() {
        assert_eq!(first(SYN), SynSent);
        assert_eq!(first(SYN | PSH), SynSent);
        assert_eq!(first(ACK), Established);
        assert_eq!(first(ACK | PSH), Established);
        assert_eq!(first(FIN_ACK), FinClient);
    }

    #[test]
    fn syn_alone_opens() {
        for tcp_flags in 0..=u8::MAX {
            let expected = tcp_flags & SYN != 0 && tcp_flags & ACK == 0;
            assert_eq!(opens(tcp_flags), expected, "{tcp_flags:#04x}");
        }
    }

    #[test]
    fn six_combinations_of_the_flags_that_matter_are_sane() {
        let sane = [SYN, SYN_ACK, ACK, FIN_ACK, RST, RST_ACK];
        for tcp_flags in 0..=u8::MAX {
            let relevant = tcp_flags & (SYN | ACK | FIN | RST);
            assert_eq!(
                flags_are_sane(tcp_flags),
                sane.contains(&relevant),
                "{tcp_flags:#04x}"
            );
        }
    }

    #[test]
    fn a_state_comes_back_from_its_number() {
        for (state, _, _) in TRANSITIONS {
            assert_eq!(TcpState::from_number(state as u8), state);
        }
        for number in 7..=u8::MAX {
            assert_eq!(TcpState::from_number(number), Closed);
        }
    }
}
