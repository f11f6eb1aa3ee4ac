//! What the data path has counted, summed over the CPUs unless said otherwise.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::Ordering,
};

use lb_common::abi::{BackendCounters, Count, Totals, of_cpu};

use super::{flow_table::Mapped, syscall};

/// A reading of the counters.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Packets by verdict, for each CPU.
    pub totals: Vec<Totals>,
    /// By reason index: packets that belong to no service.
    pub reasons: Vec<Count>,
    /// By service id and reason index.
    pub services: BTreeMap<u32, Vec<Count>>,
    /// With the backend's id, in the order of the ids.
    pub backends: Vec<(u32, BackendCounters)>,
}

impl Counters {
    /// The counters of a backend; zero where they were not read.
    pub fn of_backend(&self, id: u32) -> BackendCounters {
        by_id(&self.backends, id).unwrap_or_default()
    }
}

/// What goes with an id in a list in the order of the ids.
pub fn by_id<T: Copy>(list: &[(u32, T)], id: u32) -> Option<T> {
    let found = list.binary_search_by_key(&id, |(id, _)| *id);
    found.ok().map(|index| list[index].1)
}

/// The counters of services or backends in an array map, entries of `N` words; see [`of_cpu`].
pub(super) struct CountersById<const N: usize> {
    map: OwnedFd,
    /// Ids that there is room for.
    ids: u32,
    cpus: u32,
    /// Entries that a CPU has of an id.
    each: u32,
}

impl<const N: usize> CountersById<N> {
    /// The counters in a map with room for so many ids, of which each CPU has `each` entries.
    ///
    /// # Errors
    /// There is no file descriptor left.
    pub(super) fn new(map: BorrowedFd<'_>, ids: u32, cpus: u32, each: u32) -> io::Result<Self> {
        Ok(Self {
            map: map.try_clone_to_owned()?,
            ids,
            cpus,
            each,
        })
    }

    /// Visits the entries of ids in the order of the ids, those of all CPUs together; ids beyond the end have none. The memory
    /// is mapped meanwhile, as far as it is needed: it would count as the daemon's.
    ///
    /// # Errors
    /// The memory cannot be mapped.
    pub(super) fn read(&self, ids: &[u32], mut visit: impl FnMut(u32, &[[u64; N]])) -> io::Result<()> {
        let mut ids: Vec<u32> = ids.iter().copied().filter(|id| *id < self.ids).collect();
        ids.sort_unstable();
        let Some(last) = ids.last() else {
            return Ok(());
        };
        let mapped = Mapped::<N>::new(self.map.as_fd(), self.first(last + 1))?;
        let mut sums = vec![[0_u64; N]; self.each as usize];
        for id in ids {
            sums.fill([0; N]);
            let entries = &mapped[self.first(id) as usize..self.first(id + 1) as usize];
            for of_cpu in entries.chunks(sums.len()) {
                for (sum, word) in sums.as_flattened_mut().iter_mut().zip(of_cpu.as_flattened()) {
                    *sum = sum.wrapping_add(word.load(Ordering::Relaxed));
                }
            }
            visit(id, &sums);
        }
        Ok(())
    }

    /// Sets the counters of an id to zero.
    ///
    /// # Errors
    /// What the kernel says; there is no such id.
    pub(super) fn clear(&self, id: u32) -> io::Result<()> {
        let zeros = vec![[0_u64; N]; (self.cpus * self.each) as usize];
        syscall::put_some(self.map.as_fd(), self.first(id), &zeros)
    }

    /// Index of an id's first entry.
    fn first(&self, id: u32) -> u32 {
        of_cpu(id, self.cpus, 0) * self.each
    }
}

/// The number that all CPUs that there may ever be are below.
///
/// # Errors
/// The kernel's list of them cannot be read, or is none.
pub(super) fn cpus() -> io::Result<u32> {
    let list = fs::read_to_string(POSSIBLE_CPUS)?;
    after_the_last(&list).ok_or_else(|| io::Error::other(format!("{:?} is no list of CPUs", list.trim())))
}

/// Ranges in ascending order, such as `0-3` or `0,2,4-5`: numbers may be left out.
pub(super) const POSSIBLE_CPUS: &str = "/sys/devices/system/cpu/possible";

fn after_the_last(list: &str) -> Option<u32> {
    let last = list.trim().rsplit([',', '-']).next()?;
    last.parse::<u32>().ok()?.checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_the_cpu_with_the_highest_number() {
        let lists = [
            "0\n",
            "0-7\n",
            "0,2,4\n",
            "0-1,4-5,8-9,12-13\n",
            "0-3,17\n",
            "",
            "all",
        ];
        let expected = [Some(1), Some(8), Some(5), Some(14), Some(18), None, None];
        assert_eq!(lists.map(after_the_last), expected);
        assert!(cpus().unwrap() >= 1);
    }
}
