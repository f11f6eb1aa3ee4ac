//! What was found of the control plane; in JSON the keys are stable.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

use crate::{
    report::{self, Machine},
    statistics::Summary,
};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub machine: Machine,
    pub rounds: u32,
    /// Of the large configuration, and backends of each.
    pub services: u32,
    pub backends: u32,
    pub figures: Vec<Figure>,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    pub name: String,
    pub unit: Unit,
    /// `None` where it could not be measured.
    pub value: Option<Summary>,
    /// What the median is to be below; `None` where nothing was promised.
    pub target: Option<f64>,
    /// Why it could not be measured.
    pub problem: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    #[serde(rename = "ms")]
    Milliseconds,
    #[serde(rename = "MiB")]
    Mebibytes,
    #[serde(rename = "%")]
    Percent,
}

impl Figure {
    pub fn new(name: impl Into<String>, unit: Unit, values: &[f64], target: Option<f64>) -> Self {
        Self {
            name: name.into(),
            unit,
            value: Some(Summary::of(values)),
            target,
            problem: None,
        }
    }

    /// One that could not be measured.
    pub fn missing(
        name: impl Into<String>,
        unit: Unit,
        target: Option<f64>,
        problem: &anyhow::Error,
    ) -> Self {
        Self {
            name: name.into(),
            unit,
            value: None,
            target,
            problem: Some(format!("{problem:#}")),
        }
    }

    /// Whether the target is met; `None` where there is none.
    pub fn is_met(&self) -> Option<bool> {
        let target = self.target?;
        Some(self.value.is_some_and(|value| value.median < target))
    }

    /// The figure in one line, for who waits.
    pub fn line(&self) -> String {
        let value = self.value.map_or_else(
            || "not measured".to_owned(),
            |value| format!("{:.1} {}", value.median, self.unit),
        );
        format!("{}: {value}", self.name)
    }
}

impl fmt::Display for Unit {
    /// By the name that it has in JSON.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(formatter)
    }
}

impl Report {
    /// One line for each figure, and what could not be measured.
    pub fn draw(&self) -> String {
        let mut table = report::empty_table(1..=2, ["figure", "median", "spread", "unit", "target", ""]);
        for figure in &self.figures {
            let verdict = match figure.is_met() {
                None => "",
                Some(true) => "met",
                Some(false) if figure.value.is_none() => "MISSED: not measured",
                Some(false) => "MISSED",
            };
            table.add_row([
                figure.name.clone(),
                figure
                    .value
                    .map_or("-".to_owned(), |value| format!("{:.1}", value.median)),
                figure
                    .value
                    .map_or("-".to_owned(), |value| report::spread(value, 1)),
                figure.unit.to_string(),
                figure
                    .target
                    .map_or(String::new(), |target| format!("< {target:.0}")),
                verdict.to_owned(),
            ]);
        }
        // One failure may leave several figures without a value.
        let problems: BTreeSet<&str> = self
            .figures
            .iter()
            .filter_map(|figure| figure.problem.as_deref())
            .collect();
        let problems: String = problems
            .iter()
            .map(|problem| format!("\nnot measured: {problem}\n"))
            .collect();
        format!(
            "{}{problems}\n{}, {} rounds; {} services of {} backends each.\n\
             Median and outermost rounds; a target is for the median.\n",
            report::lines(&table),
            self.machine,
            self.rounds,
            self.services,
            self.backends,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Report {
        Report {
            machine: report::example().machine,
            rounds: 3,
            services: 10,
            backends: 20,
            figures: vec![
                Figure::new("fast", Unit::Milliseconds, &[1.0, 2.0, 30.0], Some(3.0)),
                Figure::new("large", Unit::Mebibytes, &[64.0], Some(64.0)),
                Figure::new("told", Unit::Milliseconds, &[5.0], None),
                Figure::missing(
                    "refused",
                    Unit::Milliseconds,
                    Some(1.0),
                    &anyhow::anyhow!("no room"),
                ),
            ],
        }
    }

    #[test]
    fn what_is_over_its_target_or_not_measured_is_said() {
        let text = example().draw();
        let line = |name: &str| text.lines().find(|line| line.contains(name)).unwrap();
        assert!(line("fast").ends_with("met"), "{text}");
        assert!(line("large").ends_with("MISSED"), "{text}");
        assert!(line("told").trim_end().ends_with("ms"), "{text}");
        assert!(line("refused").ends_with("MISSED: not measured"), "{text}");
        assert!(text.contains("\nnot measured: no room\n"), "{text}");
        assert!(
            text.contains(" one, 4 processors, Linux 6.12.1, 3 rounds;"),
            "{text}"
        );
    }

    #[test]
    fn the_keys_of_json_are_those_that_are_documented() {
        let json = serde_json::to_value(example()).unwrap();
        for key in ["machine", "rounds", "services", "backends"] {
            assert!(!json[key].is_null(), "{key}");
        }
        assert_eq!(json["figures"][0]["value"]["median"], 2.0);
        assert_eq!(json["figures"][1]["unit"], "MiB");
        assert_eq!(json["figures"][3]["problem"], "no room");
        assert_eq!(serde_json::from_value::<Report>(json).unwrap(), example());
    }
}
