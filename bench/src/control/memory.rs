//! What a process has of the machine's memory.

use std::fs;

use anyhow::{Context, Result};

/// In MiB, as the kernel tells it in `/proc/PID/status`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Memory {
    /// Now, whatever it is of: `VmRSS`.
    pub resident: f64,
    /// The part of it that is no file's: `RssAnon`.
    pub anonymous: f64,
    /// The most that was ever resident: `VmHWM`.
    pub peak: f64,
}

impl Memory {
    /// # Errors
    /// There is no such process.
    pub fn of(process: u32) -> Result<Self> {
        let path = format!("/proc/{process}/status");
        let text = fs::read_to_string(&path).with_context(|| format!("{path} was not read"))?;
        Self::parse(&text).with_context(|| format!("{path} does not tell of memory"))
    }

    fn parse(text: &str) -> Option<Self> {
        let mebibytes = |name: &str| -> Option<f64> {
            let mut lines = text.lines().filter_map(|line| line.split_once(':'));
            let (_, value) = lines.find(|(key, _)| *key == name)?;
            let kibibytes: f64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
            Some(kibibytes / 1024.0)
        };
        Some(Self {
            resident: mebibytes("VmRSS")?,
            anonymous: mebibytes("RssAnon")?,
            peak: mebibytes("VmHWM")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lines_are_understood() {
        let text = "Name:\txlb\nVmHWM:\t    4096 kB\nVmRSS:\t    2048 kB\nRssAnon:\t    1024 kB\n";
        let expected = Memory {
            resident: 2.0,
            anonymous: 1.0,
            peak: 4.0,
        };
        assert_eq!(Memory::parse(text), Some(expected));
        assert_eq!(Memory::parse("Name:\tkthreadd\n"), None);
    }

    #[test]
    fn this_process_has_memory() {
        let memory = Memory::of(std::process::id()).unwrap();
        assert!(
            memory.anonymous > 0.0 && memory.resident <= memory.peak,
            "{memory:?}"
        );
    }
}
