//! What became of a packet: turned into an XDP action and counters in one place.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX},
    programs::XdpContext,
};
use lb_common::abi::{Count, Reason, Totals};

use crate::maps;

/// "No service" in [`Verdict::service_id`].
const NO_SERVICE: u32 = u32::MAX;

/// An XDP action, its reason, and the service that it is counted for.
#[derive(Clone, Copy)]
pub struct Verdict {
    action: u32,
    reason: Reason,
    service_id: u32,
}

impl Verdict {
    /// To the host's stack; for no service.
    #[inline(always)]
    pub fn pass(reason: Reason) -> Self {
        Self {
            action: XDP_PASS,
            reason,
            service_id: NO_SERVICE,
        }
    }

    /// Dropped; for no service that can be told.
    #[inline(always)]
    pub fn drop(reason: Reason) -> Self {
        Self {
            action: XDP_DROP,
            reason,
            service_id: NO_SERVICE,
        }
    }

    /// The start of a verdict on a packet of a service.
    #[inline(always)]
    pub fn of_service(service_id: u32) -> Self {
        Self {
            action: XDP_DROP,
            reason: Reason::Internal,
            service_id,
        }
    }

    #[inline(always)]
    pub fn dropped(self, reason: Reason) -> Self {
        Self {
            action: XDP_DROP,
            reason,
            ..self
        }
    }

    #[inline(always)]
    pub fn passed(self, reason: Reason) -> Self {
        Self {
            action: XDP_PASS,
            reason,
            ..self
        }
    }

    #[inline(always)]
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// Sent with an action of `XDP_TX` or `XDP_REDIRECT`.
    #[inline(always)]
    pub fn sent(self, action: u32, reason: Reason) -> Self {
        Self {
            action,
            reason,
            ..self
        }
    }
}

impl Verdict {
    /// As one number: a function of the kernel's own returns no more than a register.
    #[inline(always)]
    pub fn into_bits(self) -> u64 {
        (self.action as u64) << 56 | (self.reason.index() as u64) << 32 | self.service_id as u64
    }

    /// What [`Self::into_bits`] made a number of.
    #[inline(always)]
    pub fn from_bits(bits: u64) -> Self {
        Self {
            action: (bits >> 56) as u32,
            reason: Reason::from_index((bits >> 32) as u32 & 0xffff),
            service_id: bits as u32,
        }
    }
}

/// Counts a verdict on a packet of so many bytes and gives the action for the kernel.
#[inline(always)]
pub fn conclude(_context: &XdpContext, totals: &mut Totals, bytes: u64, verdict: Verdict) -> u32 {
    let reason = verdict.reason.index();
    let counter = if verdict.service_id == NO_SERVICE {
        maps::counter(reason)
    } else {
        maps::service_counter(verdict.service_id, reason)
    };
    if let Some(counter) = counter {
        add(counter, bytes);
    }
    totals.received += 1;
    match verdict.action {
        XDP_TX => totals.transmitted += 1,
        XDP_REDIRECT => totals.redirected += 1,
        XDP_DROP => totals.dropped += 1,
        _ => totals.passed += 1,
    }
    #[cfg(feature = "log")]
    aya_log_ebpf::debug!(
        _context,
        "reason {} action {} bytes {}",
        reason,
        verdict.action,
        bytes
    );
    verdict.action
}

/// Counts one packet.
#[inline(always)]
pub fn add(count: &mut Count, bytes: u64) {
    count.packets += 1;
    count.bytes += bytes;
}
