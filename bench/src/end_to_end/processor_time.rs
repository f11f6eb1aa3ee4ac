//! Processor time of the whole machine: what interrupts take for packets belongs to no process.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// A moment, with what all processors have done until then.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    at: Instant,
    /// Of all processors: idle, waiting for disks, or taken by the host of a virtual machine.
    unused: Duration,
    /// Of processes that are not the measurement's.
    others: Duration,
}

/// What was used between two moments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Used {
    /// By the measurement and by interrupts.
    pub own: Duration,
    /// The part of all use that other processes had.
    pub others: f64,
}

impl Moment {
    /// # Errors
    /// `/proc` does not tell.
    pub fn now() -> Result<Self> {
        let others = others()?;
        let text = fs::read_to_string("/proc/stat")?;
        Ok(Self {
            at: Instant::now(),
            unused: unused(&text).context("/proc/stat was not understood")?,
            others,
        })
    }

    /// Idle time is exact, while the others are often counted by the ticks that hit them: so what is used is all time but
    /// that.
    ///
    /// # Errors
    /// `/proc` does not tell.
    pub fn used_since(self) -> Result<Used> {
        let text = fs::read_to_string("/proc/stat")?;
        let passed = self.at.elapsed() * processors(&text);
        let unused = unused(&text).context("/proc/stat was not understood")? - self.unused;
        let others = others()?.saturating_sub(self.others);
        let used = passed.saturating_sub(unused);
        Ok(Used {
            own: used.saturating_sub(others),
            others: others.as_secs_f64() / used.as_secs_f64().max(f64::MIN_POSITIVE),
        })
    }
}

/// Fields 4, 5 and 8 of the first line: idle, iowait, steal.
fn unused(stat: &str) -> Option<Duration> {
    let fields: Vec<u64> = stat
        .lines()
        .next()?
        .strip_prefix("cpu ")?
        .split_whitespace()
        .map(|field| field.parse().ok())
        .collect::<Option<_>>()?;
    Some(ticks(fields.get(3)? + fields.get(4)? + fields.get(7)?))
}

/// Those that are there, whatever this process may run on.
fn processors(stat: &str) -> u32 {
    let lines = stat.lines().filter_map(|line| line.strip_prefix("cpu"));
    lines
        .filter(|line| line.starts_with(|first: char| first.is_ascii_digit()))
        .count() as u32
}

/// Of `/proc`, where a second has a hundred whatever the kernel's own.
fn ticks(count: u64) -> Duration {
    Duration::from_millis(10 * count)
}

/// What processes have used that are neither this one, nor started by it, nor the kernel's; with their children that
/// have ended.
fn others() -> Result<Duration> {
    let mut processes = BTreeMap::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(id) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // It may have ended meanwhile.
        if let Some(process) = fs::read_to_string(entry.path().join("stat"))
            .ok()
            .and_then(|text| Process::parse(&text))
        {
            processes.insert(id, process);
        }
    }
    Ok(of_others(&processes, std::process::id()))
}

/// What a process has used, and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    parent: u32,
    is_kernels: bool,
    used: Duration,
}

impl Process {
    /// Of `/proc/PID/stat`: fields 4 (parent), 9 (flags), 14 to 17 (user and system time, own and of children that
    /// have ended).
    fn parse(text: &str) -> Option<Self> {
        const KERNEL_THREAD: u64 = 0x0020_0000;
        // The name before may have blanks and brackets.
        let (_, rest) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
        Some(Self {
            parent: number(1)? as u32,
            is_kernels: number(6)? & KERNEL_THREAD != 0,
            used: ticks(number(11)? + number(12)? + number(13)? + number(14)?),
        })
    }
}

fn of_others(processes: &BTreeMap<u32, Process>, own: u32) -> Duration {
    let is_own = |mut id: u32| {
        let mut seen = BTreeSet::new();
        while id != own {
            match processes.get(&id) {
                Some(process) if seen.insert(id) => id = process.parent,
                _ => return false,
            }
        }
        true
    };
    processes
        .iter()
        .filter(|(id, process)| !process.is_kernels && !is_own(**id))
        .map(|(_, process)| process.used)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_processors_do_not_use_is_read_from_the_first_line() {
        let stat = "cpu  10 20 30 400 50 6 7 8 9 0\ncpu0 1 1 1 1 1 1 1 1 1 0\ncpu1 1 1 1 1 1 1 1 1 1 0\n";
        assert_eq!(processors(stat), 2);
        assert_eq!(unused(stat), Some(Duration::from_millis(4580)));
        assert_eq!(unused("intr 5\n"), None);
    }

    #[test]
    fn time_of_others_is_neither_the_kernels_nor_that_of_what_was_started() {
        let stat = |parent: u32, flags: u32, used: u32| {
            Process::parse(&format!(
                "1 (a (b) c) S {parent} 1 1 0 -1 {flags} 0 0 0 0 {used} 0 0 0 20"
            ))
            .unwrap()
        };
        let processes = BTreeMap::from([
            (1, stat(0, 0, 100)),
            (2, stat(0, 0x0020_8040, 1000)),
            (10, stat(1, 0, 3)),
            (20, stat(1, 0, 10_000)),
            (21, stat(20, 0, 20_000)),
            (22, stat(21, 0, 30_000)),
        ]);
        assert_eq!(of_others(&processes, 20), ticks(103));
    }

    #[test]
    fn a_busy_thread_shows() {
        let before = Moment::now().unwrap();
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(200) {
            std::hint::spin_loop();
        }
        let used = before.used_since().unwrap();
        assert!(used.own > Duration::ZERO, "{used:?}");
    }
}
