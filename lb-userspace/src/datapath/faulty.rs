//! A data path that fails now and then, by plan; for tests of what happens then.

use std::{cell::Cell, io};

use lb_common::{
    abi::{FlowKey, LiveCount},
    logic::hash::siphash13,
};

use super::{Contents, Counters, Datapath, DatapathError, Flow, Operation, Position};

/// Which calls fail, counted from 0 over all methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    Never,
    /// One call alone.
    Call(u64),
    /// One in so many on average, chosen by the seed.
    Random {
        seed: u64,
        one_in: u64,
    },
}

/// Passes calls on to another data path, but for those that fail by the schedule and change nothing.
#[derive(Clone, Debug)]
pub struct FaultyDatapath<D> {
    pub inner: D,
    schedule: Schedule,
    calls: Cell<u64>,
}

impl<D> FaultyDatapath<D> {
    /// Wraps a data path.
    pub fn new(inner: D, schedule: Schedule) -> Self {
        Self {
            inner,
            schedule,
            calls: Cell::new(0),
        }
    }

    /// Replaces the schedule; calls are counted from 0 again.
    pub fn set_schedule(&mut self, schedule: Schedule) {
        self.schedule = schedule;
        self.calls.set(0);
    }

    /// Calls since the schedule was set.
    pub fn calls(&self) -> u64 {
        self.calls.get()
    }

    /// Counts the call and tells whether it goes well.
    fn call(&self, operation: &'static str, object: impl FnOnce() -> String) -> Result<(), DatapathError> {
        let call = self.calls.get();
        self.calls.set(call + 1);
        let fails = match self.schedule {
            Schedule::Never => false,
            Schedule::Call(number) => call == number,
            Schedule::Random { seed, one_in } => siphash13([seed, 0], [call]) % one_in.max(1) == 0,
        };
        if !fails {
            return Ok(());
        }
        let source = io::Error::from_raw_os_error(libc::ENOMEM);
        Err(DatapathError {
            operation,
            object: object(),
            source,
        })
    }
}

impl<D: Datapath> Datapath for FaultyDatapath<D> {
    fn read(&self) -> Result<Contents, DatapathError> {
        self.call("read", || "maps".to_owned())?;
        self.inner.read()
    }

    fn apply(&mut self, operation: &Operation) -> Result<(), DatapathError> {
        self.call("apply", || format!("{operation:?}"))?;
        self.inner.apply(operation)
    }

    fn some_flows(
        &self,
        position: Option<Position>,
        visit: &mut dyn FnMut(&FlowKey, &Flow),
    ) -> Result<Option<Position>, DatapathError> {
        self.call("read", || "flows".to_owned())?;
        self.inner.some_flows(position, visit)
    }

    fn remove_flows(&mut self, keys: &[FlowKey], unless_seen_since: u64) -> Result<u64, DatapathError> {
        self.call("delete", || "flows".to_owned())?;
        self.inner.remove_flows(keys, unless_seen_since)
    }

    fn tidy_flows(&mut self, position: Option<Position>) -> Result<Option<Position>, DatapathError> {
        self.call("delete", || "what flows have left".to_owned())?;
        self.inner.tidy_flows(position)
    }

    fn live_counts(&self, backends: &[u32]) -> Result<Vec<LiveCount>, DatapathError> {
        self.call("read", || "live flows".to_owned())?;
        self.inner.live_counts(backends)
    }

    fn adjust_live(&mut self, backend: u32, by: i64) -> Result<(), DatapathError> {
        self.call("update", || "live flows".to_owned())?;
        self.inner.adjust_live(backend, by)
    }

    fn counters(&self, services: &[u32], backends: &[u32]) -> Result<Counters, DatapathError> {
        self.call("read", || "counters".to_owned())?;
        self.inner.counters(services, backends)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::memory::MemoryDatapath;

    fn failures(schedule: Schedule) -> Vec<usize> {
        let datapath = FaultyDatapath::new(MemoryDatapath::default(), schedule);
        (0..1000).filter(|_| datapath.read().is_err()).collect()
    }

    #[test]
    fn the_named_call_alone_fails() {
        assert_eq!(failures(Schedule::Call(7)), [7]);
        assert_eq!(failures(Schedule::Never), [0_usize; 0]);
    }

    #[test]
    fn random_failures_are_repeatable_and_about_as_frequent_as_asked() {
        let schedule = Schedule::Random { seed: 3, one_in: 10 };
        let first = failures(schedule);
        assert_eq!(first, failures(schedule));
        assert!((50..200).contains(&first.len()), "{}", first.len());
    }
}
