/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerdictClass {
    /// Given to the host's network stack.
    Passed,
    /// Dropped.
    Dropped,
    /// Sent on, by the interface it came in by or another.
    Forwarded,
    /// An answer of our own was sent in its place.
    Answered,
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
    NotIp, "not-ip", Passed, "Neither IPv4 nor IPv6, or a header that is not whole enough to tell the destination.";
    NotForService, "not-for-service", Passed, "The destination is no service and the packet no reply of one.";
    NextHopUnknown, "next-hop-unknown", Passed, "Rewritten, then left to the host's stack because the next hop of the backend is not resolved.";
    Local, "local", Passed, "For a process on this host: left to the program that delivers to it, which counts it for its service.";
    Delivered, "delivered", Passed, "From a client to the process on this host that is its backend.";
    Refused, "refused", Passed, "No process may get it or listens on its backend's port: left to the host's stack, which refuses it.";
    ReusePort, "reuse-port", Passed, "As `refused`: the process listens with SO_REUSEPORT, to which the kernel delivers from Linux 6.6 on.";
    Forwarded, "forwarded", Forwarded, "Sent from a client to its backend.";
    Returned, "returned", Forwarded, "Sent from a backend back to its client.";
    ErrorForwarded, "error-forwarded", Forwarded, "An ICMP error about a backend's packet, sent to the backend.";
    ErrorReturned, "error-returned", Forwarded, "An ICMP error about a client's packet, sent to the client.";
    EchoAnswered, "echo-answered", Answered, "An ICMP echo request to a VIP.";
    TooBigAnswered, "too-big-answered", Answered, "Does not fit into the path to the backend once encapsulated: the client was told the size that does.";
    Rejected, "rejected", Answered, "No backend may get the flow: the client was told by a TCP reset or an ICMP error.";
    Reset, "reset", Answered, "Belongs to a flow of a backend that was removed: its sender was told by a TCP reset.";
    BadIpVersion, "bad-ip-version", Dropped, "The version in the IP header is not that of the frame.";
    BadIpHeaderLength, "bad-ip-header-length", Dropped, "The IP header length is under 20 bytes or beyond the packet.";
    BadIpLength, "bad-ip-length", Dropped, "The IP total length is shorter than its header or longer than the frame.";
    BadExtensionHeader, "bad-extension-header", Dropped, "An extension header of IPv6 is beyond the packet, one too many, or routes to another destination.";
    BadSourceAddress, "bad-source-address", Dropped, "The source address is not one that a host may use.";
    BadFragment, "bad-fragment", Dropped, "A fragment that lies over the TCP header or beyond the largest packet.";
    FragmentUnknown, "fragment-unknown", Dropped, "A later fragment whose first has not been seen.";
    TtlExceeded, "ttl-exceeded", Dropped, "The time to live is used up.";
    TruncatedTransport, "truncated-transport", Dropped, "The packet ends within its TCP, UDP or ICMP header.";
    BadTcpOffset, "bad-tcp-offset", Dropped, "The TCP data offset is under 20 bytes or beyond the packet.";
    BadTcpFlags, "bad-tcp-flags", Dropped, "A combination of TCP flags that no connection uses.";
    BadUdpLength, "bad-udp-length", Dropped, "The UDP length is under 8 bytes or beyond the packet.";
    ZeroPort, "zero-port", Dropped, "The source or destination port is 0.";
    SourceDenied, "source-denied", Dropped, "The service's source prefixes deny a new flow from there.";
    SourceRate, "source-rate", Dropped, "The source prefix starts more new flows than the service's cap.";
    NoBackend, "no-backend", Dropped, "No backend of the service is up and enabled, and the packet is none to be answered.";
    BackendsFull, "backends-full", Dropped, "Every backend that was tried has as many live flows as it takes.";
    VipOccupied, "vip-occupied", Dropped, "As `refused`, but the stack would give it to another process, which listens on the VIP's port itself.";
    NoFlow, "no-flow", Dropped, "A packet that ends or answers a flow that is not in the flow table.";
    NextHopMissing, "next-hop-missing", Dropped, "The next hop of the backend is not resolved, and the host's stack could not send the packet on.";
    NoSourceAddress, "no-source-address", Dropped, "No route to the backend tells which address of this host to write.";
    NoSourcePort, "no-source-port", Dropped, "No source port towards the backend is free.";
    FlowTableFull, "flow-table-full", Dropped, "The flow table took no new flow.";
    TooBig, "too-big", Dropped, "Does not fit into the path to the backend once encapsulated, and is none to be answered.";
    NoHeadroom, "no-headroom", Dropped, "The driver left too little room before the frame for another header.";
    Internal, "internal", Dropped, "The maps contradict each other; a bug to report.";
}

/// Number of reasons.
pub const REASON_COUNT: u32 = Reason::ALL.len() as u32;

impl Reason {
    /// The reason with an index; an index without one gives [`Self::Internal`].
    #[inline(always)]
    pub const fn from_index(index: u32) -> Self {
        if index >= REASON_COUNT {
            return Self::Internal;
        }
        // SAFETY: the reasons are numbered from 0 without a gap, in a u32, and the index is one of them.
        unsafe { core::mem::transmute::<u32, Self>(index) }
    }
}

#[cfg(test)]
mod tests {
    use core::hash::Hasher;
    use std::collections::BTreeSet;

    use siphasher::sip::SipHasher13;

    use super::*;

    #[test]
    fn reasons_are_numbered_in_their_order() {
        for (number, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(reason.index() as usize, number, "{reason:?}");
            assert_eq!(Reason::from_index(number as u32), *reason);
        }
        assert_eq!(REASON_COUNT as usize, Reason::ALL.len());
        assert_eq!(Reason::from_index(REASON_COUNT), Reason::Internal);
    }

    /// Where they are others, or in another order, counters of a former build have other names: then `LAYOUT_VERSION` is another,
    /// too.
    #[test]
    fn reasons_are_those_of_this_layout() {
        let mut names = SipHasher13::new();
        Reason::ALL
            .iter()
            .for_each(|reason| names.write(reason.name().as_bytes()));
        assert_eq!(
            (crate::abi::LAYOUT_VERSION, REASON_COUNT, names.finish()),
            (5, 41, 0x010f_abcf_af80_8fce)
        );
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
