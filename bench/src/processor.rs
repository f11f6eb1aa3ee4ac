//! One processor for this thread alone, for as long as something is timed.

use std::sync::Once;

use anyhow::{Context, Result};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// While it lives, this thread runs on one processor, and before all other work there.
///
/// It is to be short: the kernel stops threads that leave a processor to nobody else for a second.
#[derive(Debug)]
pub struct Turn {
    before: CpuSet,
}

/// The thread that asks.
const SELF: Pid = Pid::from_raw(0);

impl Turn {
    /// # Errors
    /// There is no such processor.
    pub fn take(cpu: usize) -> Result<Self> {
        let failed = || format!("processor {cpu} was not taken");
        let before = sched_getaffinity(SELF).with_context(failed)?;
        let mut only = CpuSet::new();
        only.set(cpu).with_context(failed)?;
        sched_setaffinity(SELF, &only).with_context(failed)?;
        let turn = Self { before };
        if !schedule(libc::SCHED_FIFO, 1) {
            static WARNING: Once = Once::new();
            WARNING.call_once(|| {
                eprintln!("without SCHED_FIFO: other work on processor {cpu} shows in the figures");
            });
        }
        Ok(turn)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // Back to what the thread had, so neither is refused.
        schedule(libc::SCHED_OTHER, 0);
        let _ = sched_setaffinity(SELF, &self.before);
    }
}

fn schedule(policy: libc::c_int, priority: libc::c_int) -> bool {
    let parameters = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: the pointer is to a value that lives through the call.
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_on_its_processor_and_ends() {
        let before = sched_getaffinity(SELF).unwrap();
        let cpu = (0..CpuSet::count())
            .find(|cpu| before.is_set(*cpu).unwrap())
            .unwrap();
        let turn = Turn::take(cpu).unwrap();
        let during = sched_getaffinity(SELF).unwrap();
        let set: Vec<usize> = (0..CpuSet::count())
            .filter(|cpu| during.is_set(*cpu).unwrap())
            .collect();
        assert_eq!(set, [cpu]);
        drop(turn);
        assert_eq!(sched_getaffinity(SELF).unwrap(), before);
    }

    #[test]
    fn a_processor_that_is_not_there_is_named() {
        let error = Turn::take(CpuSet::count() + 1).unwrap_err();
        assert!(
            error.to_string().contains(&(CpuSet::count() + 1).to_string()),
            "{error}"
        );
    }
}
