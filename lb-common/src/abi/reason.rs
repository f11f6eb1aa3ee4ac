/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerdictClass {
    /// Given to the host's network stack.
    Passed,
    /// Dropped.
    Dropped,
    /// Sent on, by the interface it came in by or another.
    Forwarded,
}

/// Generates the enum, its count, names, classes and help texts from one list, so that they cannot disagree.
macro_rules! reasons {
    ($(#[$doc:meta])* $enum:ident: $($variant:ident, $name:literal, $class:ident, $help:literal;)*) => {
        $(#[$doc])*
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $enum {
            $(#[doc = $help] $variant,)*
        }

        impl $enum {
            /// All reasons in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name that users see, kebab-case.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What becomes of a packet with this reason.
            pub const fn class(self) -> VerdictClass {
                match self { $(Self::$variant => VerdictClass::$class,)* }
            }

            /// One sentence for operators.
            pub const fn help(self) -> &'static str {
                match self { $(Self::$variant => $help,)* }
            }

            /// The index of this reason's counter.
            #[inline(always)]
            pub const fn index(self) -> u32 {
                self as u32
            }
        }
    };
}

pub(super) use reasons;

reasons! {
    /// Why a packet got its verdict: the index of its counter and the value of the label `reason`.
    Reason:
    NotIp, "not-ip", Passed, "Neither IPv4 nor a header that is whole enough to tell the destination.";
    NotForService, "not-for-service", Passed, "The destination is no service and the packet no reply of one.";
    NextHopUnknown, "next-hop-unknown", Passed, "Rewritten, then left to the host's stack because the next hop of the backend is not resolved.";
    Forwarded, "forwarded", Forwarded, "Sent from a client to its backend.";
    Returned, "returned", Forwarded, "Sent from a backend back to its client.";
    BadIpVersion, "bad-ip-version", Dropped, "The version in the IP header is not that of the frame.";
    BadIpHeaderLength, "bad-ip-header-length", Dropped, "The IP header length is under 20 bytes or beyond the packet.";
    BadIpLength, "bad-ip-length", Dropped, "The IP total length is shorter than its header or longer than the frame.";
    BadSourceAddress, "bad-source-address", Dropped, "The source address is not one that a host may use.";
    TtlExceeded, "ttl-exceeded", Dropped, "The time to live is used up.";
    Fragment, "fragment", Dropped, "A fragment: ports are not in it, or its other parts would be lost.";
    TruncatedTransport, "truncated-transport", Dropped, "The packet ends within its TCP or UDP header.";
    BadTcpOffset, "bad-tcp-offset", Dropped, "The TCP data offset is under 20 bytes or beyond the packet.";
    BadTcpFlags, "bad-tcp-flags", Dropped, "A combination of TCP flags that no connection uses.";
    BadUdpLength, "bad-udp-length", Dropped, "The UDP length is under 8 bytes or beyond the packet.";
    ZeroPort, "zero-port", Dropped, "The source or destination port is 0.";
    NoBackend, "no-backend", Dropped, "No backend of the service is up and enabled.";
    NoFlow, "no-flow", Dropped, "A packet that ends or answers a flow that is not in the flow table.";
    NextHopMissing, "next-hop-missing", Dropped, "The next hop of the backend is not resolved, and the host's stack would not take a packet from its own address.";
    NoSourceAddress, "no-source-address", Dropped, "No route to the backend tells which address of this host full-nat shall write.";
    NoSourcePort, "no-source-port", Dropped, "No source port towards the backend is free.";
    FlowTableFull, "flow-table-full", Dropped, "The flow table took no new flow.";
    Internal, "internal", Dropped, "The maps contradict each other; a bug to report.";
}

/// Number of reasons: the stride of the counters of a service.
pub const REASON_COUNT: u32 = Reason::ALL.len() as u32;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn reasons_are_numbered_in_their_order() {
        for (number, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(reason.index() as usize, number, "{reason:?}");
        }
        assert_eq!(REASON_COUNT as usize, Reason::ALL.len());
    }

    #[test]
    fn names_are_kebab_case_and_differ() {
        let names: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        for name in names {
            assert!(name.split('-').all(|part| !part.is_empty()), "{name}");
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{name}");
        }
    }

    #[test]
    fn every_reason_is_explained_in_a_sentence_of_its_own() {
        let texts: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.help()).collect();
        assert_eq!(texts.len(), Reason::ALL.len());
        assert!(texts.iter().all(|text| text.ends_with('.')));
    }
}
