//! Numbers of ICMP and ICMPv6.

/// Length of the header: type, code, checksum and a word whose meaning depends on the type.
pub const LEN: usize = 8;

/// ICMP (RFC 792).
pub mod v4 {
    pub const ECHO_REPLY: u8 = 0;
    pub const UNREACHABLE: u8 = 3;
    pub const ECHO: u8 = 8;
    pub const TIME_EXCEEDED: u8 = 11;
    pub const PARAMETER_PROBLEM: u8 = 12;
    /// Code of [`UNREACHABLE`]: nobody listens on the port.
    pub const PORT_UNREACHABLE: u8 = 3;
    /// Code of [`UNREACHABLE`]: too big and not to be fragmented; with the size that fits (RFC 1191 section 4).
    pub const FRAGMENTATION_NEEDED: u8 = 4;
}

/// ICMPv6 (RFC 4443).
pub mod v6 {
    pub const UNREACHABLE: u8 = 1;
    pub const TOO_BIG: u8 = 2;
    pub const TIME_EXCEEDED: u8 = 3;
    pub const PARAMETER_PROBLEM: u8 = 4;
    pub const ECHO: u8 = 128;
    pub const ECHO_REPLY: u8 = 129;
    /// Code of [`UNREACHABLE`]: nobody listens on the port.
    pub const PORT_UNREACHABLE: u8 = 4;
}

/// Tells whether a message is an error that quotes a packet.
#[inline(always)]
pub const fn is_error(is_v4: bool, message_type: u8) -> bool {
    if is_v4 {
        message_type == v4::UNREACHABLE
            || message_type == v4::TIME_EXCEEDED
            || message_type == v4::PARAMETER_PROBLEM
    } else {
        message_type >= v6::UNREACHABLE && message_type <= v6::PARAMETER_PROBLEM
    }
}
