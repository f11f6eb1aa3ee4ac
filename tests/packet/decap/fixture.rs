//! The program of `xlb decap` with known VIPs, whose every counter is watched.

use std::{collections::BTreeMap, net::IpAddr};

use aya::programs::{TestRun, TestRunOptions, Xdp};
use lb_common::abi::{Count, DecapReason};
use xlb::datapath::decap::{Decap, PROGRAM};

use crate::fixture::{DROP, PASS};

/// Addresses of the host.
pub(crate) const HOST: [&str; 2] = ["10.0.0.2", "2001:db8::2"];
pub(crate) const VIPS: [&str; 2] = ["203.0.113.10", "2001:db8:1::10"];

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) struct Fixture(Decap);

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::with_sources(&[])
    }

    /// Unwraps packets from these outer prefixes alone.
    pub(crate) fn with_sources(sources: &[&str]) -> Self {
        let sources: Vec<_> = sources.iter().map(|prefix| prefix.parse().unwrap()).collect();
        let mut decap = Decap::load(&VIPS.map(ip).into(), &sources).unwrap();
        decap.set_own_addresses(&HOST.map(ip).into()).unwrap();
        Self(decap)
    }

    pub(crate) fn decap(&mut self) -> &mut Decap {
        &mut self.0
    }

    /// Runs the program on a frame: its verdict and the frame as it leaves.
    pub(crate) fn run(&mut self, input: &[u8]) -> (u32, Vec<u8>) {
        let program: &Xdp = self.0.ebpf_mut().program(PROGRAM).unwrap().try_into().unwrap();
        let mut output = vec![0; input.len()];
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(input),
                data_out: Some(&mut output),
                ..TestRunOptions::default()
            })
            .unwrap();
        output.truncate(result.data_size_out as usize);
        (result.return_value, output)
    }

    /// Runs the program on a frame and compares its verdict, the whole frame that leaves and all counters.
    #[track_caller]
    pub(crate) fn expect(&mut self, what: &str, input: &[u8], expected: (u32, &[u8], DecapReason)) {
        let before = self.0.counts().unwrap();
        let (verdict, output) = self.run(input);
        let moved: BTreeMap<DecapReason, Count> = (self.0.counts().unwrap().into_iter())
            .map(|(reason, now)| {
                let then = before[&reason];
                let count = Count {
                    packets: now.packets - then.packets,
                    bytes: now.bytes - then.bytes,
                };
                (reason, count)
            })
            .filter(|(_, count)| *count != Count::default())
            .collect();
        let count = Count {
            packets: 1,
            bytes: input.len() as u64,
        };
        assert_eq!(verdict, expected.0, "verdict: {what}; counted {moved:?}");
        assert_eq!(output, expected.1, "output: {what}");
        assert_eq!(moved, BTreeMap::from([(expected.2, count)]), "counters: {what}");
    }

    #[track_caller]
    pub(crate) fn expect_passed(&mut self, what: &str, input: &[u8], reason: DecapReason) {
        self.expect(what, input, (PASS, input, reason));
    }

    #[track_caller]
    pub(crate) fn expect_dropped(&mut self, what: &str, input: &[u8], reason: DecapReason) {
        self.expect(what, input, (DROP, input, reason));
    }
}
