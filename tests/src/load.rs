//! Requests in volume, each on a new connection.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use xlb::lab::Namespace;

use crate::http::Connection;

/// Makes `count` requests from one address and source ports of a row, and tells how many each backend has answered.
///
/// With the seed of the hash and the ports the spread is the same in each run.
///
/// # Panics
/// When a request fails.
pub fn requests(
    client: &Namespace,
    source: SocketAddr,
    server: SocketAddr,
    count: usize,
) -> BTreeMap<String, usize> {
    let mut answers = BTreeMap::new();
    let run = || {
        for number in 0..count {
            let mut source = source;
            source.set_port(source.port() + number as u16);
            let answer =
                Connection::dial(server, Some(source)).and_then(|connection| connection.get_last("/"));
            match answer {
                Ok(name) => *answers.entry(name).or_default() += 1,
                Err(error) => panic!("request {number} of {count} from {source} to {server} failed: {error}"),
            }
        }
    };
    client.run(run).expect("a thread in the client's namespace");
    answers
}

/// Requests that are made all the time, until it is stopped.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<std::io::Result<Vec<Request>>>>,
}

/// One of them.
#[derive(Clone, Debug)]
pub struct Request {
    pub at: Instant,
    /// The backend that answered, or why none did.
    pub answer: Result<String, String>,
}

impl Load {
    /// Starts clients that make some hundred requests a second together.
    pub fn start(client: &Namespace, server: SocketAddr) -> Self {
        const CLIENTS: usize = 4;
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..CLIENTS)
            .map(|_| {
                let stop = Arc::clone(&stop);
                let run = move || {
                    let mut requests = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        let at = Instant::now();
                        let answer = Connection::dial(server, None)
                            .and_then(|connection| connection.get_last("/"))
                            .map_err(|error| error.to_string());
                        requests.push(Request { at, answer });
                        thread::sleep(Duration::from_millis(5));
                    }
                    requests
                };
                client.spawn(run).expect("a thread in the client's namespace")
            })
            .collect();
        Self { stop, threads }
    }

    /// Ends it, and tells all requests in the order of their beginning.
    pub fn stop(mut self) -> Vec<Request> {
        self.stop.store(true, Ordering::Relaxed);
        let mut requests: Vec<Request> = self
            .threads
            .drain(..)
            .flat_map(|thread| {
                let requests = thread.join().expect("a client does not panic");
                requests.expect("a thread in the client's namespace")
            })
            .collect();
        requests.sort_by_key(|request| request.at);
        requests
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Those that failed, in words; of many the first.
pub fn failures(requests: &[Request], start: Instant) -> Vec<String> {
    let failed = requests.iter().filter_map(|request| {
        let error = request.answer.as_ref().err()?;
        let after = request.at.saturating_duration_since(start);
        Some(format!("after {after:?}: {error}"))
    });
    failed.take(10).collect()
}

/// Checks that each backend has its share of the answers, within a tenth of it.
///
/// Where the numbers are small (on an emulated machine), within four standard deviations of a fair draw.
///
/// # Panics
/// When one has not.
pub fn assert_shares(answers: &BTreeMap<String, usize>, weights: &[(&str, u32)]) {
    let total: usize = answers.values().sum();
    let sum: u32 = weights.iter().map(|(_, weight)| weight).sum();
    for (name, weight) in weights {
        let share = f64::from(*weight) / f64::from(sum);
        let expected = total as f64 * share;
        let tolerance = if crate::machine::is_emulated() {
            (4.0 * (expected * (1.0 - share)).sqrt()).max(expected * 0.1)
        } else {
            expected * 0.1
        };
        let got = answers.get(*name).copied().unwrap_or(0) as f64;
        assert!(
            (got - expected).abs() <= tolerance,
            "{name} has answered {got} of {total} requests, not {expected} ± {tolerance}: {answers:?}"
        );
    }
    let known = answers
        .keys()
        .all(|name| weights.iter().any(|(known, _)| known == name));
    assert!(known, "somebody else has answered: {answers:?}");
}
