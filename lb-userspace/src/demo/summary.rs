//! What the demo has shown, and whether it is what xlb promises; pure.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use comfy_table::{Table, presets};
use serde::Serialize;

use super::{
    clients::{Attempt, Cut, Download, KEPT},
    promise,
};

/// A connection that took this long has had a packet sent again: Linux repeats a SYN after a second.
const SLOW: Duration = Duration::from_secs(1);

/// What was seen. Times are counted from the start of the traffic.
#[derive(Clone, Debug, PartialEq)]
pub struct Observations {
    pub names: Vec<String>,
    /// Index of the backend that was killed.
    pub victim: usize,
    pub times: Times,
    pub attempts: Vec<Attempt>,
    pub cuts: Vec<Cut>,
    pub download: Download,
    /// Flows that were put on the victim after the deadline, before it was started again.
    pub late_flows: u64,
    /// Flows that were ever put on the victim, until it was started again.
    pub victim_flows: u64,
    /// Packets by reason.
    pub packets: BTreeMap<String, u64>,
}

/// When things happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    pub killed: Duration,
    /// When the daemon first said that it is down.
    pub down: Option<Duration>,
    pub restarted: Duration,
    /// When the daemon first said that it is up again.
    pub up: Option<Duration>,
    pub ended: Duration,
}

/// The result; in JSON the keys are stable.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    pub ok: bool,
    /// Why it is not ok, in a sentence each.
    pub problems: Vec<String>,
    pub seconds: f64,
    pub killed_backend: String,
    /// New connections.
    pub connections: usize,
    pub succeeded: usize,
    pub failed: usize,
    /// Failures on the killed backend within the promised time.
    pub excused: usize,
    /// Succeeded, but took a second or more: a packet was sent again.
    pub slow: usize,
    pub phases: Vec<Phase>,
    /// From the kill until the daemon said that the backend is down.
    pub detection_seconds: Option<f64>,
    /// From the kill until the last new connection that still went to the dead backend.
    pub last_attempt_on_dead_seconds: f64,
    /// What both have to keep: `fall` × interval + timeout + 0.5 s.
    pub bound_seconds: f64,
    /// From the start of the process until a new connection was answered by it.
    pub return_seconds: Option<f64>,
    pub kept_connections: Kept,
    /// Kept connections that were cut with their backend and are on another one since.
    pub moved_flows: usize,
    pub download: Download,
    pub latency_milliseconds: Latency,
    pub packets: BTreeMap<String, u64>,
}

/// A stretch of the demo.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Phase {
    pub name: &'static str,
    pub begin_seconds: f64,
    pub end_seconds: f64,
    /// New connections that each backend answered.
    pub backends: BTreeMap<String, usize>,
}

/// Connections that stay open and are asked on again and again.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Kept {
    pub connections: usize,
    pub never_cut: usize,
    /// Cut because their backend was killed.
    pub cut_with_backend: usize,
    /// Cut though they should not have been.
    pub cut_otherwise: usize,
}

/// How long a new connection took with its request and answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
}

impl Observations {
    /// Counts, and compares with the promise.
    pub fn judge(self) -> Summary {
        let excused_attempts: Vec<&Attempt> = self
            .attempts
            .iter()
            .filter(|attempt| self.excuses(attempt))
            .collect();
        let answered_by_victim = self
            .attempts
            .iter()
            .filter(|attempt| attempt.outcome == Ok(self.victim) && attempt.began < self.times.restarted)
            .count();
        // A failure on the dead backend is a flow that was put on it; there cannot be more of the former.
        let flows_without_answer = (self.victim_flows as usize).saturating_sub(answered_by_victim);
        let excused = excused_attempts.len().min(flows_without_answer);
        let succeeded = self
            .attempts
            .iter()
            .filter(|attempt| attempt.outcome.is_ok())
            .count();
        let failed = self.attempts.len() - succeeded - excused;
        let last_attempt_on_dead = excused_attempts.iter().map(|attempt| attempt.began).max();
        let phases = self.phases();
        let (with_backend, otherwise): (Vec<&Cut>, Vec<&Cut>) =
            self.cuts.iter().partition(|cut| self.excuses_cut(cut));
        let summary = Summary {
            ok: true,
            problems: Vec::new(),
            seconds: seconds(self.times.ended),
            killed_backend: self.names[self.victim].clone(),
            connections: self.attempts.len(),
            succeeded,
            failed,
            excused,
            slow: self.attempts.iter().filter(|attempt| is_slow(attempt)).count(),
            phases,
            detection_seconds: self
                .times
                .down
                .map(|down| seconds(down.saturating_sub(self.times.killed))),
            last_attempt_on_dead_seconds: last_attempt_on_dead
                .map_or(0.0, |began| seconds(began.saturating_sub(self.times.killed))),
            bound_seconds: seconds(promise::bound()),
            return_seconds: self.return_time().map(seconds),
            kept_connections: Kept {
                connections: KEPT,
                never_cut: KEPT - distinct(self.cuts.iter().map(|cut| cut.kept)),
                cut_with_backend: with_backend.len(),
                cut_otherwise: otherwise.len(),
            },
            moved_flows: distinct(
                with_backend
                    .iter()
                    .filter(|cut| self.moved(cut))
                    .map(|cut| cut.kept),
            ),
            download: self.download.clone(),
            latency_milliseconds: self.latency(),
            packets: self.packets.clone(),
        };
        let problems = self.problems(&summary, flows_without_answer < excused_attempts.len());
        Summary {
            ok: problems.is_empty(),
            problems,
            ..summary
        }
    }

    /// Until when new connections may still go to the dead backend.
    fn deadline(&self) -> Duration {
        self.times.killed + promise::bound()
    }

    /// Tells whether an attempt failed, and as the promise allows: as on a dead process, between kill and deadline.
    fn excuses(&self, attempt: &Attempt) -> bool {
        attempt
            .outcome
            .as_ref()
            .is_err_and(|failure| failure.is_of_a_dead_process)
            && (self.times.killed..=self.deadline()).contains(&attempt.ended)
    }

    /// Tells whether a kept connection was cut because its backend was killed.
    fn excuses_cut(&self, cut: &Cut) -> bool {
        cut.backend == self.victim
            && cut.failure.is_of_a_dead_process
            && cut.opened <= self.times.killed
            && (self.times.killed..self.times.restarted).contains(&cut.noticed)
    }

    /// Tells whether a cut connection was opened again on another backend.
    fn moved(&self, cut: &Cut) -> bool {
        let again = self.attempts.iter().find(|attempt| {
            attempt.keeps == Some(cut.kept) && attempt.began >= cut.noticed && attempt.outcome.is_ok()
        });
        again.is_some_and(|attempt| attempt.outcome != Ok(self.victim))
    }

    fn return_time(&self) -> Option<Duration> {
        self.attempts
            .iter()
            .filter(|attempt| attempt.outcome == Ok(self.victim) && attempt.began >= self.times.restarted)
            .map(|attempt| attempt.ended - self.times.restarted)
            .min()
    }

    fn phases(&self) -> Vec<Phase> {
        let times = self.times;
        let down = times.down.unwrap_or(self.deadline()).min(times.restarted);
        let up = times.up.unwrap_or(times.ended);
        let borders = [
            ("steady", Duration::ZERO, times.killed),
            ("failing", times.killed, down),
            ("without", down, times.restarted),
            ("returning", times.restarted, up),
            ("again", up, times.ended),
        ];
        let phase = |(name, begin, end)| {
            let mut backends: BTreeMap<String, usize> =
                self.names.iter().map(|name| (name.clone(), 0)).collect();
            for attempt in &self.attempts {
                if (begin..end).contains(&attempt.began)
                    && let Ok(backend) = attempt.outcome
                    && let Some(count) = self.names.get(backend).and_then(|name| backends.get_mut(name))
                {
                    *count += 1;
                }
            }
            Phase {
                name,
                begin_seconds: seconds(begin),
                end_seconds: seconds(end),
                backends,
            }
        };
        borders.into_iter().map(phase).collect()
    }

    fn latency(&self) -> Latency {
        let mut took: Vec<f64> = self
            .attempts
            .iter()
            .filter(|attempt| attempt.outcome.is_ok())
            .map(|attempt| (attempt.ended - attempt.began).as_secs_f64() * 1000.0)
            .collect();
        took.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let index = (took.len() as f64 * part) as usize;
            took.get(index.min(took.len().saturating_sub(1)))
                .copied()
                .unwrap_or(0.0)
        };
        Latency {
            p50: rounded(at(0.5)),
            p99: rounded(at(0.99)),
        }
    }

    fn problems(&self, summary: &Summary, elsewhere: bool) -> Vec<String> {
        let mut problems = Vec::new();
        let victim = &summary.killed_backend;
        if summary.failed > 0 {
            let first = self
                .attempts
                .iter()
                .filter(|attempt| elsewhere || !self.excuses(attempt))
                .find_map(|attempt| Some((attempt.ended, attempt.outcome.as_ref().err()?)));
            let example = first.map_or(String::new(), |(when, failure)| {
                format!(
                    ", the first {:.1} s after the start: {}",
                    seconds(when),
                    failure.text
                )
            });
            problems.push(format!(
                "{} connections failed that should not have{example}",
                summary.failed
            ));
        }
        for cut in self.cuts.iter().filter(|cut| !self.excuses_cut(cut)) {
            problems.push(format!(
                "an open connection through {} was cut {:.1} s after the start: {}",
                self.names[cut.backend],
                seconds(cut.noticed),
                cut.failure.text
            ));
        }
        let download = &summary.download;
        if !download.complete {
            let why = download.error.as_deref().unwrap_or("it ended early");
            problems.push(format!(
                "the download through {} is not whole, {} of {} bytes: {why}",
                download.backend, download.bytes, download.expected
            ));
        }
        for phase in [summary.phases.first(), summary.phases.last()]
            .into_iter()
            .flatten()
        {
            for (name, _) in phase.backends.iter().filter(|(_, count)| **count == 0) {
                problems.push(format!(
                    "{name} got no new connection in the phase {:?}",
                    phase.name
                ));
            }
        }
        if self.late_flows > 0 {
            problems.push(format!(
                "{} new connections were sent to {victim} later than {} s after it was killed",
                self.late_flows, summary.bound_seconds
            ));
        }
        match summary.detection_seconds {
            None => problems.push(format!("the daemon did not notice that {victim} was dead")),
            Some(took) if took > summary.bound_seconds => problems.push(format!(
                "the daemon took {took} s to notice that {victim} was dead; promised are {} s",
                summary.bound_seconds
            )),
            Some(_) => {}
        }
        if self.times.up.is_none() {
            problems.push(format!("{victim} did not come up again"));
        }
        problems
    }
}

impl Summary {
    /// The summary for people.
    pub fn table(&self) -> String {
        let victim = &self.killed_backend;
        let mut rows = Table::new();
        rows.load_style(presets::NOTHING);
        rows.add_row([
            "connections".to_owned(),
            format!(
                "{} new: {} succeeded, {} failed, {} excused (on {victim} when it died), {} slow",
                self.connections, self.succeeded, self.failed, self.excused, self.slow
            ),
        ]);
        let Kept {
            connections,
            never_cut,
            cut_with_backend,
            cut_otherwise,
        } = self.kept_connections;
        rows.add_row([
            "kept open".to_owned(),
            format!(
                "{connections}: {never_cut} never cut, {cut_with_backend} died with {victim} and {} of them moved, \
                 {cut_otherwise} cut otherwise",
                self.moved_flows
            ),
        ]);
        rows.add_row([
            "avoided".to_owned(),
            format!(
                "{victim} down {} after the kill, last connection sent to it after {:.2} s; promised {:.2} s",
                after(self.detection_seconds),
                self.last_attempt_on_dead_seconds,
                self.bound_seconds
            ),
        ]);
        rows.add_row([
            "back".to_owned(),
            format!(
                "first answer of {victim} {} after it was started again",
                after(self.return_seconds)
            ),
        ]);
        let download = &self.download;
        let whole = if download.complete { "whole" } else { "cut" };
        rows.add_row([
            "download".to_owned(),
            format!(
                "{} of {} bytes through {}: {whole}",
                download.bytes, download.expected, download.backend
            ),
        ]);
        rows.add_row([
            "latency".to_owned(),
            format!(
                "p50 {:.1} ms, p99 {:.1} ms with request and answer",
                self.latency_milliseconds.p50, self.latency_milliseconds.p99
            ),
        ]);
        let packets: Vec<String> = self
            .packets
            .iter()
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        rows.add_row(["packets".to_owned(), packets.join(", ")]);

        let tables = format!("{rows}\n\n{}", self.spread());
        let mut text: String = tables
            .lines()
            .map(|line| format!("{}\n", line.trim_end()))
            .collect();
        text.push('\n');
        if self.ok {
            text.push_str("ok: no connection failed that should not have\n");
        }
        for problem in &self.problems {
            // Writing to a String does not fail.
            let _ = writeln!(text, "not ok: {problem}");
        }
        text
    }

    /// How new connections were spread in each phase.
    fn spread(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        let names = self.phases.first().map(|phase| phase.backends.keys().cloned());
        let header = ["PHASE", "SECONDS", "CONNECTIONS"].map(str::to_owned);
        table.set_header(header.into_iter().chain(names.into_iter().flatten()));
        for phase in &self.phases {
            let total: usize = phase.backends.values().sum();
            let lead = [
                phase.name.to_owned(),
                format!("{:.1} to {:.1}", phase.begin_seconds, phase.end_seconds),
                total.to_string(),
            ];
            let shares = phase.backends.values().map(|count| match total {
                0 => "-".to_owned(),
                _ => format!("{:.0} %", *count as f64 * 100.0 / total as f64),
            });
            table.add_row(lead.into_iter().chain(shares));
        }
        table
    }
}

fn is_slow(attempt: &Attempt) -> bool {
    attempt.outcome.is_ok() && attempt.ended - attempt.began >= SLOW
}

fn distinct(numbers: impl Iterator<Item = usize>) -> usize {
    numbers.collect::<std::collections::BTreeSet<_>>().len()
}

fn after(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "never".to_owned(), |seconds| format!("{seconds:.2} s"))
}

/// Seconds to the millisecond.
fn seconds(duration: Duration) -> f64 {
    rounded(duration.as_secs_f64())
}

fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::clients::Failure;

    const KILLED: u64 = 5000;

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn attempt(began: u64, outcome: Result<usize, Failure>) -> Attempt {
        Attempt {
            began: at(began),
            ended: at(began + 2),
            outcome,
            keeps: None,
        }
    }

    fn refused() -> Failure {
        std::io::Error::from(std::io::ErrorKind::ConnectionRefused).into()
    }

    fn cut(backend: usize, noticed: u64) -> Cut {
        Cut {
            opened: at(100),
            noticed: at(noticed),
            kept: 3,
            backend,
            failure: refused(),
        }
    }

    /// Killed after 5 s, two refused connections, back after 12 s, each backend in turn.
    fn good() -> Observations {
        let times = Times {
            killed: at(KILLED),
            down: Some(at(5600)),
            restarted: at(12_000),
            up: Some(at(13_000)),
            ended: at(20_000),
        };
        let is_dead = |began| (times.killed..times.up.unwrap()).contains(&at(began));
        let mut attempts: Vec<Attempt> = (0..200)
            .map(|index| (index * 100, index as usize % 3))
            .map(|(began, backend)| {
                attempt(
                    began,
                    Ok(if is_dead(began) && backend == 1 {
                        2
                    } else {
                        backend
                    }),
                )
            })
            .collect();
        attempts.push(attempt(KILLED + 100, Err(refused())));
        attempts.push(attempt(KILLED + 400, Err(refused())));
        let answered = attempts
            .iter()
            .filter(|attempt| attempt.outcome == Ok(1) && attempt.began < at(KILLED));
        Observations {
            names: ["a", "b", "c"].map(str::to_owned).into(),
            victim: 1,
            times,
            victim_flows: answered.count() as u64 + 2,
            attempts,
            cuts: vec![cut(1, KILLED + 300)],
            download: Download {
                bytes: 1000,
                expected: 1000,
                complete: true,
                backend: "a".to_owned(),
                error: None,
            },
            late_flows: 0,
            packets: BTreeMap::from([("forwarded".to_owned(), 1000)]),
        }
    }

    /// The only problem of what was seen.
    fn problem(seen: Observations) -> String {
        let summary = seen.judge();
        assert!(!summary.ok);
        let [problem] = &summary.problems[..] else {
            panic!("{:?}", summary.problems);
        };
        problem.clone()
    }

    #[test]
    fn failures_on_the_dead_backend_within_the_promise_are_excused() {
        let mut seen = good();
        seen.attempts.push(Attempt {
            keeps: Some(3),
            ..attempt(KILLED + 301, Ok(0))
        });
        let summary = seen.judge();
        assert_eq!(summary.problems, Vec::<String>::new());
        assert!(summary.ok);
        assert_eq!((summary.connections, summary.succeeded), (203, 201));
        assert_eq!((summary.failed, summary.excused, summary.slow), (0, 2, 0));
        assert_eq!(summary.detection_seconds, Some(0.6));
        assert_eq!(summary.last_attempt_on_dead_seconds, 0.4);
        assert_eq!(
            (summary.kept_connections.never_cut, summary.moved_flows),
            (KEPT - 1, 1)
        );
        assert_eq!(summary.return_seconds, Some(1.002));
    }

    #[test]
    fn a_failure_before_the_kill_or_after_the_deadline_is_a_failure() {
        let bound = promise::bound().as_millis() as u64;
        for began in [100, KILLED - 3, KILLED + bound, KILLED + bound + 1, 15_000] {
            let mut seen = good();
            seen.attempts.push(attempt(began, Err(refused())));
            seen.victim_flows += 1;
            let problem = problem(seen);
            assert!(problem.starts_with("1 connections failed"), "{began}: {problem}");
        }
    }

    #[test]
    fn a_failure_within_the_promise_that_no_dead_process_makes_is_a_failure() {
        let mut seen = good();
        let timed_out = std::io::Error::from(std::io::ErrorKind::TimedOut);
        seen.attempts.push(attempt(KILLED + 100, Err(timed_out.into())));
        seen.victim_flows += 1;
        assert!(problem(seen).contains("1 connections failed"));
    }

    #[test]
    fn a_refusal_within_the_promise_that_was_no_flow_of_the_dead_backend_is_a_failure() {
        let mut seen = good();
        seen.attempts.push(attempt(KILLED + 100, Err(refused())));
        let summary = seen.judge();
        assert_eq!((summary.failed, summary.excused, summary.ok), (1, 2, false));
    }

    #[test]
    fn an_open_connection_may_be_cut_with_its_backend_alone() {
        for (backend, noticed) in [(0, KILLED + 100), (1, KILLED - 1), (1, 12_000)] {
            let mut seen = good();
            seen.cuts = vec![cut(backend, noticed)];
            assert!(
                problem(seen).starts_with("an open connection"),
                "{backend} {noticed}"
            );
        }
    }

    #[test]
    fn a_cut_download_is_a_problem() {
        let mut seen = good();
        seen.download.complete = false;
        seen.download.bytes = 999;
        assert!(problem(seen).contains("999 of 1000 bytes"));
    }

    #[test]
    fn a_backend_without_its_share_is_a_problem() {
        let mut seen = good();
        seen.attempts
            .retain(|attempt| attempt.outcome != Ok(1) || attempt.began < at(13_000));
        assert_eq!(problem(seen), "b got no new connection in the phase \"again\"");
    }

    #[test]
    fn a_flow_on_the_dead_backend_after_the_deadline_is_a_problem() {
        let mut seen = good();
        seen.late_flows = 1;
        assert!(problem(seen).contains("were sent to b later than 1.8 s"));
    }

    #[test]
    fn a_death_that_is_noticed_late_or_never_is_a_problem() {
        let mut seen = good();
        seen.times.down = Some(at(KILLED + 1801));
        assert!(problem(seen.clone()).contains("took 1.801 s to notice"));
        seen.times.down = None;
        assert!(problem(seen).contains("did not notice"));
    }

    #[test]
    fn a_backend_that_stays_away_is_a_problem() {
        let mut seen = good();
        seen.times.up = None;
        seen.attempts
            .retain(|attempt| attempt.outcome != Ok(1) || attempt.began < at(KILLED));
        let problems = seen.judge().problems;
        assert!(
            problems
                .iter()
                .any(|problem| problem == "b did not come up again"),
            "{problems:?}"
        );
    }

    #[test]
    fn a_connection_that_took_a_retransmission_is_slow() {
        let mut seen = good();
        seen.attempts.push(Attempt {
            ended: at(2100),
            ..attempt(1000, Ok(0))
        });
        assert_eq!(seen.judge().slow, 1);
    }
}
