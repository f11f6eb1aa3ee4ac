//! How long a table by consistent hash takes to build.

use std::{hint::black_box, net::Ipv4Addr, time::Instant};

use lb_common::abi::MANY_SLOTS;
use xlb::compile::maglev::{identity, ranks};

/// Builds the table of so many backends; milliseconds of each round.
pub fn rounds(backends: u32, rounds: u32) -> Vec<f64> {
    let members: Vec<(u64, u32)> = (1..=backends)
        .map(|id| {
            let identity = identity([1, 2], Ipv4Addr::from_bits(0x0a40_0000 + id).into(), 80);
            (identity, 1)
        })
        .collect();
    (0..rounds)
        .map(|_| {
            let start = Instant::now();
            black_box(ranks(black_box(&members), MANY_SLOTS));
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect()
}
