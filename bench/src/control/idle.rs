//! What a process takes of a processor while nothing happens.

use std::{fs, thread, time::Duration};

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};

/// Watches a process for so long; gives its share of one processor in percent.
///
/// # Errors
/// It has ended.
pub fn share(process: u32, time: Duration) -> Result<f64> {
    let before = used(process)?;
    thread::sleep(time);
    Ok((used(process)? - before) / time.as_secs_f64() * 100.0)
}

/// Seconds of processors that a process has used.
fn used(process: u32) -> Result<f64> {
    let path = format!("/proc/{process}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("{path} was not read"))?;
    let ticks = ticks(&text).with_context(|| format!("{path} was not understood"))?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("the kernel does not tell its ticks")?;
    Ok(ticks as f64 / per_second as f64)
}

/// Fields 14 and 15, user and system time; the name before may have blanks and brackets.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(number(11)? + number(12)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_system_time_are_added() {
        let stat = "7 (a (b) c) S 1 1 1 0 -1 0 0 0 0 0 30 12 500 600 20";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks("7 (a"), None);
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        assert!(share(u32::MAX, Duration::ZERO).is_err());
    }
}
