//! What a packet costs in the program itself: the one that the real daemon has pinned, under `BPF_PROG_TEST_RUN`.

mod floor;
mod frame;
mod harness;
mod pace;
pub mod scenario;
mod template;

use std::path::Path;

use anyhow::{Context, Result, ensure};

use self::{
    floor::Floor,
    harness::{Harness, Program, Ran, Run},
    pace::Pace,
    scenario::{Kind, Scenario},
};
use crate::{
    balancer::{Balancer, names},
    processor::Turn,
    report::{Report, Row},
    statistics::Summary,
};

/// How it is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub rounds: u32,
    /// Packets that are timed in each round, at most.
    pub packets: u32,
    pub flow_table: u32,
    pub cpu: usize,
}

/// Verdicts of XDP.
const DROP: u32 = 1;
const PASS: u32 = 2;
const TX: u32 = 3;
/// Packets before the clock starts where each is of another flow: as many as it takes to have the program in the caches.
const LEAD: u32 = 1000;

/// Measures each scenario on a balancer whose flow table holds nothing else.
///
/// # Errors
/// The balancer or the harness does not start, or packets did not go the way of the scenario.
pub fn measure(plan: &Plan, xlb: &Path, scenarios: &[Scenario]) -> Result<Report> {
    let mut balancer = Balancer::new(xlb, plan.flow_table)?;
    let mut report = Report::new(plan)?;
    for (number, scenario) in (1..).zip(scenarios) {
        let row = row(plan, &mut balancer, scenario).with_context(|| scenario.name.clone())?;
        eprintln!("{number}/{} {}", scenarios.len(), row.line());
        report.rows.push(row);
    }
    Ok(report)
}

fn row(plan: &Plan, balancer: &mut Balancer, scenario: &Scenario) -> Result<Row> {
    balancer.start_afresh()?;
    let floor = Floor::new()?;
    let of_floor = scenario.of_floor();
    let ingress = balancer.ifindex()?;
    let mut floor = Contender::new(plan, &of_floor, floor.program.try_clone()?, ingress)?;
    let mut contender = Contender::new(plan, scenario, harness::pinned(&balancer.program())?, ingress)?;
    // The floor records whatever comes.
    floor.prepare(plan, &mut Pace::unlimited())?;

    let at_first = balancer.counted()?;
    let mut pace = if scenario.kind.is_within_budget() {
        Pace::within_budget()
    } else {
        Pace::unlimited()
    };
    let opened = contender.prepare(plan, &mut pace)?;
    let before = balancer.counted()?;
    if opened > 0 {
        before
            .check(&at_first, scenario.opened(), true, opened)
            .context("before the measurement")?;
    }
    if let Kind::Known { flows } = scenario.kind {
        check_flows(before.flows - at_first.flows, flows.into())?;
    }

    let mut rounds = Rounds::default();
    for _ in 0..plan.rounds {
        if scenario.kind == Kind::New {
            pace.wait();
        }
        let (floor_harness, floor) = floor.round(plan.cpu)?;
        let (harness, xlb) = contender.round(plan.cpu)?;
        pace.burst_ended();
        rounds.harness.push(harness);
        rounds.floor.push(floor - floor_harness);
        rounds.xlb.push(xlb - harness);
    }

    let after = balancer.counted()?;
    let packets = u64::from(plan.rounds) * u64::from(contender.run.total());
    let is_of_service = !matches!(scenario.kind, Kind::Pass { .. });
    after.check(&before, scenario.reasons, is_of_service, packets)?;
    let flows = after.flows - before.flows;
    match scenario.kind {
        Kind::Pass { .. } | Kind::Known { .. } => ensure!(flows == 0, "{flows} flows began meanwhile"),
        Kind::New => check_flows(flows, packets)?,
        // What a balancer records of a flood is its own business.
        Kind::Flood => {}
    }
    Ok(rounds.row(scenario, contender.run.packets))
}

/// Nearly all flows are recorded: a table of buckets may be full in one place before it is in all.
fn check_flows(recorded: u64, sent: u64) -> Result<()> {
    ensure!(
        recorded <= sent && recorded >= sent - sent / 100,
        "{recorded} of {sent} flows were recorded"
    );
    Ok(())
}

/// A program with the packets that it gets.
#[derive(Debug)]
struct Contender {
    scenario: Scenario,
    program: Program,
    ingress: u32,
    harness: Harness,
    run: Run,
}

impl Contender {
    fn new(plan: &Plan, scenario: &Scenario, program: Program, ingress: u32) -> Result<Self> {
        let flows = scenario.kind.flows();
        let (lead, packets) = match scenario.kind {
            // Each flow once, so that caches hold what they can of this program's memory and none of another's.
            Kind::Pass { flows } | Kind::Known { flows } => (flows, plan.packets),
            // Half of the table is left free, and a round is one burst.
            Kind::New => {
                let room = (plan.flow_table / 2 / plan.rounds).min(pace::RECORDED);
                (LEAD, plan.packets.min(room.saturating_sub(LEAD)))
            }
            // What takes longest: a round is to be short of a second.
            Kind::Flood => (plan.packets.min(pace::EXHAUSTING), plan.packets.div_ceil(4)),
        };
        ensure!(
            packets > 0,
            "the flow table has no room for {} rounds of new flows",
            plan.rounds
        );
        Ok(Self {
            scenario: scenario.clone(),
            program,
            ingress,
            harness: Harness::new(&scenario.packet, ingress)?,
            run: Run {
                lead,
                packets,
                flow: 0,
                flows_end: flows,
            },
        })
    }

    /// Has the flow table as the scenario wants it; returns the number of packets that it took.
    fn prepare(&mut self, plan: &Plan, pace: &mut Pace) -> Result<u64> {
        let flows = match self.scenario.kind {
            Kind::Pass { .. } | Kind::New => return Ok(0),
            Kind::Known { flows } => flows.into(),
            // Full in all places.
            Kind::Flood => u64::from(plan.flow_table) * 5 / 4,
        };
        let mut opening = Harness::new(&self.scenario.opener, self.ingress)?;
        let mut flow = 0;
        while flow < flows {
            pace.wait();
            // Short of the end, where flows would begin anew.
            let run = Run {
                lead: 0,
                packets: (flows - flow).min(pace::BURST.into()).try_into()?,
                flow,
                flows_end: u64::MAX,
            };
            let turn = Turn::take(plan.cpu)?;
            flow = opening.run(Some(&self.program), run)?.flow;
            drop(turn);
            pace.burst_ended();
        }
        if self.scenario.kind == Kind::Flood {
            self.run.flow = flow;
        }
        Ok(flows)
    }

    /// Times the harness alone, and with the program: nanoseconds for each packet.
    fn round(&mut self, cpu: usize) -> Result<(f64, f64)> {
        let turn = Turn::take(cpu)?;
        let alone = self.harness.run(None, self.run)?;
        let ran = self.harness.run(Some(&self.program), self.run)?;
        drop(turn);
        self.check(&ran)?;
        self.run.flow = ran.flow;
        Ok((alone.nanoseconds, ran.nanoseconds))
    }

    fn check(&self, ran: &Ran) -> Result<()> {
        if ran.verdict == DROP && self.scenario.may_be_dropped() {
            return Ok(());
        }
        let verdict = if matches!(self.scenario.kind, Kind::Pass { .. }) {
            PASS
        } else {
            TX
        };
        ensure!(
            ran.verdict == verdict,
            "the verdict is {} and not {verdict}",
            ran.verdict
        );
        let grown = ran.output.len() as i64 - self.harness.length() as i64;
        ensure!(
            grown == self.scenario.grows as i64,
            "packets grow by {grown} bytes and not by {}",
            self.scenario.grows
        );
        Ok(())
    }
}

/// Nanoseconds for each packet, round by round.
#[derive(Debug, Default)]
struct Rounds {
    /// The harness alone.
    harness: Vec<f64>,
    floor: Vec<f64>,
    xlb: Vec<f64>,
}

impl Rounds {
    fn row(&self, scenario: &Scenario, packets: u32) -> Row {
        // Within each round, so that what slows the machine down slows both.
        let ratios: Vec<f64> = self
            .xlb
            .iter()
            .zip(&self.floor)
            .map(|(xlb, floor)| xlb / floor)
            .collect();
        Row {
            name: scenario.name.clone(),
            kind: scenario.kind,
            reason: names(scenario.reasons),
            packets,
            xlb_ns: Summary::of(&self.xlb),
            floor_ns: Summary::of(&self.floor),
            harness_ns: Summary::of(&self.harness),
            ratio: Summary::of(&ratios),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_that_of_rounds_side_by_side() {
        let rounds = Rounds {
            harness: vec![10.0; 3],
            floor: vec![10.0, 20.0, 30.0],
            xlb: vec![20.0, 50.0, 60.0],
        };
        let row = rounds.row(&Scenario::all()[0], 1000);
        assert_eq!((row.ratio.min, row.ratio.median, row.ratio.max), (2.0, 2.0, 2.5));
        assert_eq!((row.xlb_ns.median, row.floor_ns.median), (50.0, 20.0));
    }

    #[test]
    fn flows_that_were_not_recorded_are_noticed() {
        assert!(check_flows(1_000_000, 1_000_000).is_ok());
        assert!(check_flows(995_000, 1_000_000).is_ok());
        assert!(check_flows(980_000, 1_000_000).is_err());
        assert!(check_flows(1_000_001, 1_000_000).is_err());
        assert!(check_flows(0, 1).is_err());
    }
}
