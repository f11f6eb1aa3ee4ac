//! What a measurement found; in JSON the keys are stable.

pub mod chart;
pub mod table;

use std::{fmt, fs, ops::RangeBounds};

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

use crate::{
    per_packet::{Plan, scenario::Kind},
    statistics::Summary,
};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub machine: Machine,
    pub rounds: u32,
    /// Flows that the balancer's table has room for.
    pub flow_table: u32,
    pub rows: Vec<Row>,
}

/// What figures depend on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub kernel: String,
    pub processor: String,
    pub processors: usize,
    /// The processor that packets were handled on, where it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<usize>,
}

/// A scenario's figures; nanoseconds are for each packet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub name: String,
    pub kind: Kind,
    /// What became of all packets.
    pub reason: String,
    /// How many were timed in each round.
    pub packets: u32,
    pub xlb_ns: Summary,
    pub floor_ns: Summary,
    /// What was subtracted from the first.
    pub harness_ns: Summary,
    /// Of xlb to the floor, of each round.
    pub ratio: Summary,
}

impl Machine {
    /// # Errors
    /// The kernel does not tell.
    pub fn here(cpu: Option<usize>) -> Result<Self> {
        let cpus = fs::read_to_string("/proc/cpuinfo")?;
        let processor = cpus
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| key.trim() == "model name")
            .map_or("unknown", |(_, name)| name.trim());
        Ok(Self {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            processor: processor.to_owned(),
            processors: std::thread::available_parallelism()?.get(),
            cpu,
        })
    }
}

impl fmt::Display for Machine {
    /// What a report on all of the machine's processors says of it.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{}, {} processors, Linux {}",
            self.processor, self.processors, self.kernel
        )
    }
}

impl Report {
    /// Without rows.
    pub fn new(plan: &Plan) -> Result<Self> {
        Ok(Self {
            machine: Machine::here(Some(plan.cpu))?,
            rounds: plan.rounds,
            flow_table: plan.flow_table,
            rows: Vec::new(),
        })
    }
}

impl Row {
    /// The row in one line, for who waits.
    pub fn line(&self) -> String {
        format!(
            "{}: {:.1} ns, floor {:.1} ns, ratio {:.2}",
            self.name, self.xlb_ns.median, self.floor_ns.median, self.ratio.median
        )
    }

    /// Packets that one processor handles in a second, in millions.
    pub fn mpps(&self) -> f64 {
        1000.0 / self.xlb_ns.median
    }
}

/// A table without rows. Columns of `numbers`, counted from zero, are aligned to the right.
pub fn empty_table<const N: usize>(numbers: impl RangeBounds<usize>, headers: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(headers);
    for (index, column) in table.column_iter_mut().enumerate() {
        if numbers.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// The lines of a table, without what is blank at their ends.
pub fn lines(table: &Table) -> String {
    let lines = table.lines();
    lines.map(|line| format!("{}\n", line.trim_end())).collect()
}

/// The outermost values.
pub fn spread(summary: Summary, digits: usize) -> String {
    format!("{:.digits$}–{:.digits$}", summary.min, summary.max)
}

#[cfg(test)]
pub fn example() -> Report {
    let summary = |median: f64| Summary {
        median,
        min: median * 0.9,
        max: median * 1.25,
    };
    let row = |name: &str, kind, xlb: f64, floor: f64| Row {
        name: name.to_owned(),
        kind,
        reason: "forwarded".to_owned(),
        packets: 1_000_000,
        xlb_ns: summary(xlb),
        floor_ns: summary(floor),
        harness_ns: summary(20.0),
        ratio: summary(xlb / floor),
    };
    Report {
        machine: Machine {
            kernel: "6.12.1".to_owned(),
            processor: "A <fast> & wide one".to_owned(),
            processors: 4,
            cpu: Some(3),
        },
        rounds: 11,
        flow_table: 4_194_304,
        rows: vec![
            row("known nat tcp4 1k", Kind::Known { flows: 1000 }, 100.0, 40.0),
            row("new nat tcp4", Kind::New, 800.0, 200.0),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_of_json_are_those_that_are_documented() {
        let json = serde_json::to_value(example()).unwrap();
        let row = &json["rows"][0];
        assert_eq!(row["kind"]["known"]["flows"], 1000);
        assert_eq!(json["rows"][1]["kind"], "new");
        assert_eq!(row["xlb_ns"]["median"], 100.0);
        for key in ["name", "reason", "packets", "floor_ns", "harness_ns", "ratio"] {
            assert!(!row[key].is_null(), "{key}");
        }
        for key in ["machine", "rounds", "flow_table"] {
            assert!(!json[key].is_null(), "{key}");
        }
        assert_eq!(serde_json::from_value::<Report>(json).unwrap(), example());
    }
}
