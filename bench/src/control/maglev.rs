//! How long a table by consistent hash takes to build.

use std::{hint::black_box, net::Ipv4Addr, time::Instant};

use xlb::compile::{
    Candidate,
    maglev::{identity, table},
};

/// Builds the table of so many backends; milliseconds of each round.
pub fn rounds(backends: u32, rounds: u32) -> Vec<f64> {
    let candidates: Vec<Candidate> = (1..=backends)
        .map(|id| Candidate {
            id,
            identity: identity([1, 2], Ipv4Addr::from_bits(0x0a40_0000 + id).into(), 80),
            weight: 100,
        })
        .collect();
    (0..rounds)
        .map(|_| {
            let start = Instant::now();
            black_box(table(black_box(&candidates)));
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect()
}
