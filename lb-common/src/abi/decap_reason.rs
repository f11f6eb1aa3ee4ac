use super::{VerdictClass, reason::reasons};

reasons! {
    /// What became of a packet on a backend's host, and why: the index of its counter.
    DecapReason:
    Ipip, "ipip", Forwarded, "Unwrapped from IPv4 or IPv6 and passed to the host's stack.";
    Gue, "gue", Forwarded, "Unwrapped from UDP with GUE and passed to the host's stack.";
    NotEncapsulated, "not-encapsulated", Passed, "Neither ipip nor gue.";
    NotForThisHost, "not-for-this-host", Passed, "The outer destination is no address of this host, or the frame is for a group.";
    SourceNotAllowed, "source-not-allowed", Passed, "The outer source is in none of the prefixes that were given.";
    OuterFragment, "outer-fragment", Passed, "A fragment of what may be an encapsulated packet.";
    OuterOptions, "outer-options", Passed, "The outer IPv6 header has destination options other than the tunnel encapsulation limit.";
    GueHeader, "gue-header", Passed, "A GUE control message, an optional field or a protocol that is not known.";
    Truncated, "truncated", Passed, "The packet ends before the inner destination.";
    NotForVip, "not-for-vip", Passed, "The inner destination is none of the VIPs.";
    BadOuterLength, "bad-outer-length", Dropped, "The length in the outer IP header is shorter than that header or longer than the frame.";
    BadOuterUdpLength, "bad-outer-udp-length", Dropped, "The UDP length of a GUE packet is under 8 bytes or beyond the packet.";
    BadInnerVersion, "bad-inner-version", Dropped, "The version in the inner IP header is not that of the encapsulation.";
    BadInnerHeaderLength, "bad-inner-header-length", Dropped, "The inner IP header length is under 20 bytes or beyond the packet.";
    BadInnerLength, "bad-inner-length", Dropped, "The inner IP length is shorter than its header or longer than what is around it.";
    CongestionNotCapable, "congestion-not-capable", Dropped, "The outer header says congestion experienced and the inner one that its ends do not know of that (RFC 6040 section 4.2).";
    Internal, "internal", Dropped, "The kernel did not shorten the frame; a bug to report.";
}

/// Number of reasons of [`DecapReason`].
pub const DECAP_REASON_COUNT: u32 = DecapReason::ALL.len() as u32;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_has_its_number_a_name_and_a_sentence_of_its_own() {
        let (mut names, mut texts) = (BTreeSet::new(), BTreeSet::new());
        for (number, reason) in DecapReason::ALL.iter().enumerate() {
            assert_eq!(reason.index() as usize, number, "{reason:?}");
            let name = reason.name();
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{name}");
            assert!(names.insert(name) && texts.insert(reason.help()), "{name}");
            assert!(reason.help().ends_with('.'), "{name}");
        }
        assert_eq!(DECAP_REASON_COUNT as usize, names.len());
    }
}
