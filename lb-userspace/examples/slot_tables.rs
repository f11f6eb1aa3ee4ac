//! Prints what docs/design/slot-tables.md says of the number of slots: the percentage of the others' slots that move when a member
//! leaves, on average and at worst, and how long tables take to make.
//!
//! `cargo run --release -p lb-userspace --example slot_tables`

use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
    time::Instant,
};

use lb_common::abi::{FEW_SLOTS, MANY_SLOTS};
use xlb::compile::maglev::{identity, ranks};

const SIZES: [u32; 5] = [4093, 8191, FEW_SLOTS, 32_749, MANY_SLOTS];
const COUNTS: [u32; 8] = [3, 5, 10, 16, 32, 100, 500, 1000];
/// Where a table takes long to make.
const FEW_SEEDS: u64 = 5;
const MANY_SEEDS: u64 = 20;

fn main() {
    println!(
        "{:>8} {}",
        "members",
        SIZES.map(|slots| format!("{slots:>12}")).join("")
    );
    for count in COUNTS {
        let moved = SIZES.map(|slots| {
            let seeds = if slots < 32_749 { MANY_SEEDS } else { FEW_SEEDS };
            let moved: Vec<f64> = (0..seeds).flat_map(|seed| moved(seed, count, slots)).collect();
            let worst = moved.iter().copied().fold(0.0, f64::max);
            format!(
                "{:>6.2}, {worst:>4.2}",
                moved.iter().sum::<f64>() / moved.len() as f64
            )
        });
        println!("{count:>8} {}", moved.join(""));
    }
    for count in [10, 100, 1000] {
        let members = members(0, count);
        let start = Instant::now();
        let times = 20;
        (0..times).for_each(|_| drop(black_box(ranks(&members, MANY_SLOTS))));
        println!(
            "{MANY_SLOTS} slots for {count} members: {:?}",
            start.elapsed() / times
        );
    }
}

/// Identities and weights of so many servers.
fn members(seed: u64, count: u32) -> Vec<(u64, u32)> {
    let address = |number| IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number));
    (1..=count)
        .map(|number| (identity([seed, !seed], address(number), 8080), 1))
        .collect()
}

/// The percentage of slots that go from one member to another when the first, the middle or the last leaves.
fn moved(seed: u64, count: u32, slots: u32) -> [f64; 3] {
    let all = members(seed, count);
    let before = ranks(&all, slots);
    [0, all.len() / 2, all.len() - 1].map(|left| {
        let mut others = all.clone();
        others.remove(left);
        let after = ranks(&others, slots);
        let stays = before
            .iter()
            .zip(&after)
            .filter(|(before, _)| usize::from(**before) != left);
        let (mut slots, mut moved) = (0_u32, 0_u32);
        for (before, after) in stays {
            let after = usize::from(*after) + usize::from(usize::from(*after) >= left);
            slots += 1;
            moved += u32::from(usize::from(*before) != after);
        }
        f64::from(moved) / f64::from(slots) * 100.0
    })
}
