//! Keeps packets from the host's stack while an interface has no XDP program, between two modes.
//!
//! The kernel takes no second program in the other mode (`dev_xdp_attach`), so there is a time without one. What comes
//! then the stack would forward, with the backend's address in place of the VIP, or answer itself: with a reset that ends
//! the connection at one end, of which the other never hears. What is dropped instead is sent again.

use std::{thread, time::Duration};

use aya::{
    EbpfLoader, include_bytes_aligned,
    programs::{SchedClassifier, links::FdLink},
};
use nix::time::{ClockId, clock_gettime};

use super::{
    DatapathError, LinkKind, Pins,
    hooks::{self, Hook},
    kernel::{failed, load_despite_signals, named_program},
};

/// The object that lb-userspace/build.rs has built.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf-barrier.o"));

/// The name in the object of the time from which on the program does nothing.
const ENDS: &str = "XLB_BARRIER_ENDS";
/// After which a barrier does nothing any more; drivers make their queues anew in less.
pub(super) const LIMIT: Duration = Duration::from_secs(10);
/// How long a packet may wait between driver and stack (`netif_rx`), which came before the new program did.
const SETTLE: Duration = Duration::from_millis(10);

/// In front of the stack of one interface, from [`Self::raise`] on until it is dropped.
#[derive(Debug)]
pub struct Barrier {
    pins: Pins,
    /// Held, not used; `None` where it is a filter.
    _link: Option<FdLink>,
}

impl Barrier {
    /// Has everything dropped that the stack would get from an interface, for a time; `pins` are to tell of a filter.
    ///
    /// # Errors
    /// The kernel refuses the program.
    pub fn raise(
        kind: LinkKind,
        pins: &Pins,
        interface: &str,
        index: u32,
        limit: Duration,
    ) -> Result<Self, DatapathError> {
        let hook = Hook::Barrier;
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC)
            .map_err(|errno| DatapathError::new("read", "the clock", errno.into()))?;
        let ends = Duration::from(now) + limit;
        let mut ebpf = EbpfLoader::new()
            .override_global(ENDS, &(ends.as_nanos() as u64), true)
            .load(OBJECT)
            .map_err(|error| failed("load", hook.program(), error))?;
        let program: &mut SchedClassifier = named_program(&mut ebpf, hook.program())?;
        load_despite_signals(|| program.load()).map_err(|error| failed("load", hook.program(), error))?;
        let link = match kind {
            LinkKind::Tcx => Some(hooks::attach_link(&mut ebpf, hook, interface)?),
            LinkKind::Clsact => {
                hooks::attach_filter(&mut ebpf, pins, hook, interface, index)?;
                None
            }
        };
        Ok(Self {
            pins: pins.clone(),
            _link: link,
        })
    }
}

impl Drop for Barrier {
    fn drop(&mut self) {
        thread::sleep(SETTLE);
        // What stays does nothing after its time, and the next daemon removes it.
        let _ = remove_left_behind(&self.pins);
    }
}

/// Removes the filters that a process which was killed has left.
///
/// # Errors
/// What the kernel says.
pub fn remove_left_behind(pins: &Pins) -> Result<(), DatapathError> {
    hooks::remove_filters(pins, &[Hook::Barrier], &[])
}
