//! The real daemon between real clients and real servers, in network namespaces.
//!
//! The tests share the machine's cores and measure times: run them one after the other, `--test-threads=1`.

#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod administration;
mod ageing;
mod attachment;
mod candidates;
mod command_line;
mod decap;
mod failure;
mod forwarding;
mod fragments;
mod hairpin;
mod local;
mod loops;
mod matrix;
mod next_hops;
mod pmtu;
mod probe_paths;
mod reload;
mod resets;
mod restart;
mod scene;
mod sources;
mod vip;
mod vip_echo;
mod vlan;
