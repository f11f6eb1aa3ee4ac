//! Packets through the object under `BPF_PROG_TEST_RUN`: verdict, whole output and every counter.
//!
//! With `--release` the object is the one that is shipped; otherwise it is the same with log records. Root and bpffs
//! are needed. Each test has an instance for itself, so all run at once, and most get one that another test has given
//! back; none leaves a pin behind.

#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]
#![allow(
    clippy::needless_pass_by_value,
    reason = "what is expected is built where it is handed over"
)]

mod decap;
mod dsr;
mod encapsulation;
mod fixture;
mod flood;
mod flows;
mod fragments;
mod frame;
mod full_nat;
mod hairpin;
mod icmp;
mod invariants;
mod ipv6;
mod large;
mod live;
mod local;
mod malformed;
mod maps;
mod nat;
mod next_hop;
mod pass;
mod probe_paths;
mod rejection;
mod source;
mod strategy;
mod tcp_state;
mod udp;
mod vlan;
