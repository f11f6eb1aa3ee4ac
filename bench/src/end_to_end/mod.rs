//! What connections and requests cost through a balancer, with real clients and servers, beside what else balances.

mod candidate;
mod load;
mod network;
mod processor_time;
pub mod report;
mod server;

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};

use self::{
    candidate::{Candidate, Running},
    load::Kind,
    network::{BACKENDS, Network},
    processor_time::Moment,
    report::{Report, Row},
};
use crate::{balancer::Daemon, report::Machine};

/// How it is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub rounds: u32,
    /// Of each kind, in each round and through each candidate.
    pub requests: u32,
    /// Whether every interface copies what it receives, as a network card does.
    pub is_of_cards: bool,
}

/// For the start of a candidate.
const PATIENCE: Duration = Duration::from_secs(60);
/// The part of the requests that is made before anything is timed.
const WARMING: u32 = 10;
/// The most that other processes may use of the processors while something is timed; beyond, it is tried again.
const OTHERS: f64 = 0.1;
const TRIES: u32 = 5;

/// Measures each candidate once in each round.
///
/// # Errors
/// A program is missing, or an answer was not right.
pub fn measure(plan: &Plan, xlb: &Path) -> Result<Report> {
    let machine = Machine::here(None)?;
    let (candidates, missing): (Vec<Candidate>, Vec<Candidate>) = Candidate::ALL
        .into_iter()
        .partition(|candidate| candidate.is_available());
    for candidate in missing {
        eprintln!("left out: {}, which this kernel has not", candidate.name());
    }
    let network = Network::new(plan.is_of_cards)?;
    let ports: Vec<u16> = candidates.iter().map(|candidate| candidate.port()).collect();
    let _backends = server::backends(&network, &ports)?;
    let mut daemon = Daemon::new(xlb)?;
    let mut rounds: Vec<Vec<Round>> = vec![Vec::new(); candidates.len()];
    let mut others: f64 = 0.0;
    for number in 0..plan.rounds as usize {
        // Each begins a round in its turn.
        for offset in 0..candidates.len() {
            let index = (number + offset) % candidates.len();
            let candidate = candidates[index];
            let round = round(plan, candidate, &network, &mut daemon).with_context(|| candidate.name())?;
            eprintln!(
                "{}/{} {}: {}",
                number + 1,
                plan.rounds,
                candidate.name(),
                round.line()
            );
            others = others.max(round.others);
            rounds[index].push(round);
        }
    }
    let of_routing = rounds[0].clone();
    Ok(Report {
        machine,
        rounds: plan.rounds,
        requests: plan.requests,
        cards: plan.is_of_cards,
        others,
        rows: candidates
            .iter()
            .zip(&rounds)
            .map(|(candidate, rounds)| Row::of(candidate.name(), rounds, &of_routing))
            .collect(),
    })
}

/// What one candidate did in one round.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Round {
    pub connections: Rate,
    pub requests: Rate,
    /// The part of the use of processors that was other processes'.
    pub others: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    pub per_second: f64,
    /// Microseconds of all processors for each.
    pub microseconds: f64,
}

impl Round {
    fn line(&self) -> String {
        format!(
            "{:.0} connections/s, {:.1} µs each; {:.0} requests/s, {:.1} µs each",
            self.connections.per_second,
            self.connections.microseconds,
            self.requests.per_second,
            self.requests.microseconds,
        )
    }
}

fn round(plan: &Plan, candidate: Candidate, network: &Network, daemon: &mut Daemon) -> Result<Round> {
    let targets = candidate.targets(network);
    let running = Running::start(candidate, network, daemon)?;
    load::look(network, &targets)?;
    let each = plan.requests.div_ceil(BACKENDS as u32);
    let mut connections = 0;
    let mut round = Round::default();
    for kind in [Kind::Connections, Kind::KeepAlive] {
        load::run(network, &targets, kind, each.div_ceil(WARMING))?;
        let (rate, others, tries) = timed(|| load::run(network, &targets, kind, each), each)?;
        round.others = round.others.max(others);
        match kind {
            Kind::Connections => {
                round.connections = rate;
                connections = u64::from(tries) * u64::from(each) * BACKENDS as u64;
            }
            Kind::KeepAlive => round.requests = rate,
        }
    }
    running.check(connections)?;
    Ok(round)
}

/// Times a load, until other processes leave it the processors; otherwise the time counts when they did most.
fn timed(mut load: impl FnMut() -> Result<Duration>, each: u32) -> Result<(Rate, f64, u32)> {
    let mut best: Option<(Rate, f64)> = None;
    for tries in 1..=TRIES {
        let before = Moment::now()?;
        let took = load()?;
        let used = before.used_since()?;
        let requests = f64::from(each) * BACKENDS as f64;
        let rate = Rate {
            per_second: requests / took.as_secs_f64(),
            microseconds: used.own.as_secs_f64() * 1e6 / requests,
        };
        if best.is_none_or(|(_, others)| used.others < others) {
            best = Some((rate, used.others));
        }
        if let Some((rate, others)) = best
            && (others <= OTHERS || tries == TRIES)
        {
            return Ok((rate, others, tries));
        }
    }
    anyhow::bail!("nothing was timed")
}
