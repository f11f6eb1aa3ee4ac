//! What was found of connections and requests; in JSON the keys are stable.

use comfy_table::Table;
use serde::{Deserialize, Serialize};

use super::Round;
use crate::{
    report::{self, Machine},
    statistics::Summary,
};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub machine: Machine,
    pub rounds: u32,
    /// Of each kind, in each round and through each candidate.
    pub requests: u32,
    /// Whether every interface copied what it received, as a network card does.
    pub cards: bool,
    /// The most that other processes had of what was used of the processors.
    pub others: f64,
    /// The first is plain routing.
    pub rows: Vec<Row>,
}

/// A candidate's figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub name: String,
    /// Each request on a connection of its own.
    pub connections: Figures,
    /// Requests on connections that are kept.
    pub requests: Figures,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    pub per_second: Summary,
    /// Microseconds of all processors for each: of client, servers and what is between them.
    pub cpu_us: Summary,
    /// Of that to plain routing's, round by round.
    pub to_routing: Summary,
}

impl Row {
    /// `routing`: the same rounds of plain routing.
    pub fn of(name: &str, rounds: &[Round], routing: &[Round]) -> Self {
        let figures = |rate: fn(&Round) -> super::Rate| {
            let rates: Vec<_> = rounds.iter().map(rate).collect();
            let values = |value: fn(&super::Rate) -> f64| rates.iter().map(value).collect::<Vec<f64>>();
            let ratios: Vec<f64> = rates
                .iter()
                .zip(routing.iter().map(rate))
                .map(|(own, routing)| own.microseconds / routing.microseconds)
                .collect();
            Figures {
                per_second: Summary::of(&values(|rate| rate.per_second)),
                cpu_us: Summary::of(&values(|rate| rate.microseconds)),
                to_routing: Summary::of(&ratios),
            }
        };
        Self {
            name: name.to_owned(),
            connections: figures(|round| round.connections),
            requests: figures(|round| round.requests),
        }
    }
}

impl Report {
    /// One line for each candidate, of connections and of requests.
    pub fn draw(&self) -> String {
        let connections = self.table("connection", |row| row.connections);
        let requests = self.table("request", |row| row.requests);
        format!(
            "{}\n{}\n{}, {} rounds of {} requests of each kind; other processes had up to {:.0} % \
             of the processors.\n\
             {} Processor time of the whole machine for each, client and servers included; median and outermost rounds.\n",
            report::lines(&connections),
            report::lines(&requests),
            self.machine,
            self.rounds,
            self.requests,
            self.others * 100.0,
            if self.cards {
                "Interfaces copy what they receive."
            } else {
                "Only xlb's interfaces copy what they receive."
            },
        )
    }

    fn table(&self, what: &str, figures: fn(&Row) -> Figures) -> Table {
        let mut table = report::empty_table(
            1..,
            [
                &format!("each {what}"),
                "CPU µs",
                "spread",
                "to routing",
                "spread",
                "per second",
                "spread",
            ],
        );
        for row in &self.rows {
            let figures = figures(row);
            table.add_row([
                row.name.clone(),
                format!("{:.1}", figures.cpu_us.median),
                report::spread(figures.cpu_us, 1),
                format!("{:.2}", figures.to_routing.median),
                report::spread(figures.to_routing, 2),
                format!("{:.0}", figures.per_second.median),
                report::spread(figures.per_second, 0),
            ]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Rate, *};

    fn example() -> Report {
        let round = |microseconds: f64| Round {
            connections: Rate {
                per_second: 1e6 / microseconds,
                microseconds,
            },
            requests: Rate {
                per_second: 4e6 / microseconds,
                microseconds: microseconds / 4.0,
            },
            others: 0.0,
        };
        let routing = [100.0, 200.0, 400.0].map(round);
        let other = [150.0, 200.0, 800.0].map(round);
        Report {
            machine: report::example().machine,
            rounds: 3,
            requests: 1000,
            cards: false,
            others: 0.04,
            rows: vec![
                Row::of("routing", &routing, &routing),
                Row::of("other", &other, &routing),
            ],
        }
    }

    #[test]
    fn a_candidate_is_compared_with_routing_round_by_round() {
        let report = example();
        let to_routing = report.rows[1].connections.to_routing;
        assert_eq!(
            (to_routing.min, to_routing.median, to_routing.max),
            (1.0, 1.5, 2.0)
        );
        let text = report.draw();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert!(
            lines.contains(&vec![
                "other",
                "200.0",
                "150.0–800.0",
                "1.50",
                "1.00–2.00",
                "5000",
                "1250–6667"
            ]),
            "{text}"
        );
        assert!(text.contains("up to 4 %"), "{text}");
    }

    #[test]
    fn the_keys_of_json_are_those_that_are_documented() {
        let json = serde_json::to_value(example()).unwrap();
        for key in ["machine", "rounds", "requests", "others"] {
            assert!(!json[key].is_null(), "{key}");
        }
        for kind in ["connections", "requests"] {
            for figure in ["per_second", "cpu_us", "to_routing"] {
                assert!(
                    json["rows"][1][kind][figure]["median"].is_f64(),
                    "{kind} {figure}"
                );
            }
        }
        assert_eq!(serde_json::from_value::<Report>(json).unwrap(), example());
    }
}
