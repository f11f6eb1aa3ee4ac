//! Probes every target in its own task and announces changes of health.

use std::{
    collections::BTreeMap,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    mem,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, mpsc},
    task::AbortHandle,
    time::{Instant, Interval, MissedTickBehavior, interval_at, sleep},
};

use tracing::warn;

use super::{Attempt, Outcome, ProbeError, SocketOptions, State, Turn, probe};
use crate::{
    config::{HealthCheck, Probe},
    model::{BackendName, Health},
};

/// Longest interval and timeout: beyond it the clock could not express when the next probe starts.
pub(super) const LONGEST_INTERVAL: Duration = Duration::from_secs(366 * 24 * 60 * 60);
/// Shortest interval: the resolution of the clock.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(1);
/// Between the first probes of targets that begin together: a thousand at once would get in each other's way, on this
/// host, in the tables of neighbours and where servers share a queue, and be late for no fault of the servers.
const PACE: Duration = Duration::from_millis(1);
/// The part of the interval over which the probes of many backends are spread.
const SPREAD: f64 = 0.1;

/// Finds out the health of its targets until it is dropped.
///
/// A backend that dies is `down` at the latest fall × interval + timeout afterwards, for a probe starts at most one
/// interval after the one before.
pub struct Driver {
    shared: Arc<Shared>,
    _announcer: Task,
}

/// A backend to probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub service: String,
    pub backend: String,
    /// Where the probes go.
    pub address: SocketAddr,
    pub check: HealthCheck,
    /// How the sockets of its probes are made.
    pub socket: SocketOptions,
    /// The VIP that the probes' packets are for when they arrive, where that is not `address`.
    pub vip: Option<IpAddr>,
    /// What is known already when the target is new.
    pub initial: Health,
}

/// A backend's health has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transition {
    pub service: String,
    pub backend: String,
    pub health: Health,
    /// The probe that decided it, such as `connect to 10.0.0.11:8080: connection refused (3 in a row)`.
    pub cause: String,
}

/// What is known of a target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReport {
    pub health: Health,
    /// Where the probes go.
    pub address: SocketAddr,
    /// What the last probe did and got; empty before the first has ended.
    pub last_result: String,
    /// When the last probe ended; in JSON as RFC 3339 in UTC.
    #[serde(with = "rfc3339")]
    pub last_probe: Option<SystemTime>,
    /// How many probes in a row had the same outcome as the last one.
    pub consecutive: u32,
}

impl Driver {
    /// Starts without targets; to be called within a tokio runtime.
    ///
    /// Transitions go to `sender`. A receiver that lags behind delays no probe: it misses the changes that have been
    /// undone meanwhile and gets the others when it can take them.
    pub fn new(sender: mpsc::Sender<Transition>) -> Self {
        let shared = Arc::new(Shared::default());
        let announcer = Task::start(Arc::clone(&shared).announce(sender));
        Self {
            shared,
            _announcer: announcer,
        }
    }

    /// Makes `targets` the ones that are probed; to be called within a tokio runtime.
    ///
    /// New ones are probed at once, many of them a millisecond after each other, vanished ones no more, and unchanged
    /// ones go on undisturbed. Where the check has changed, probing begins anew but health stays. Another address is
    /// another server: it starts with its `initial` health. Of two targets of one name the last counts.
    pub fn set_targets(&self, targets: Vec<Target>) {
        let wanted: BTreeMap<BackendName, Target> = targets
            .into_iter()
            .map(|target| ((target.service.clone(), target.backend.clone()), target))
            .collect();
        let mut table = self.shared.lock();
        table.watched.retain(|name, _| wanted.contains_key(name));
        let mut begun = 0;
        for (name, target) in wanted {
            let former = match table.watched.remove(&name) {
                Some(same) if same.is_probed_as(&target) => {
                    table.watched.insert(name, same);
                    continue;
                }
                former => former,
            };
            table.runs += 1;
            let delay = paced(begun, target.check.interval);
            begun += u32::from(target.check.probe != Probe::None);
            let watched = Watched::start(former, name.clone(), target, &self.shared, table.runs, delay);
            table.watched.insert(name, watched);
        }
        drop(table);
        self.shared.changed.notify_one();
    }

    /// The health of every target as of now, vanished ones absent.
    pub fn health(&self) -> BTreeMap<BackendName, Health> {
        let table = self.shared.lock();
        table
            .watched
            .iter()
            .map(|(name, watched)| (name.clone(), watched.state.health()))
            .collect()
    }

    /// Health of a target; nothing where it is none any more.
    pub fn health_of(&self, name: &BackendName) -> Option<Health> {
        let table = self.shared.lock();
        table.watched.get(name).map(|watched| watched.state.health())
    }

    /// What is known of every target.
    pub fn report(&self) -> BTreeMap<BackendName, ProbeReport> {
        let table = self.shared.lock();
        table
            .watched
            .iter()
            .map(|(name, watched)| (name.clone(), watched.report()))
            .collect()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.shared.lock().watched.clear();
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("report", &self.report()).finish()
    }
}

#[derive(Default)]
struct Shared {
    table: Mutex<Table>,
    /// A health may have to be announced.
    changed: Notify,
}

#[derive(Default)]
struct Table {
    watched: BTreeMap<BackendName, Watched>,
    /// How many probing tasks have been started: tells a task from those before it.
    runs: u64,
}

/// A target and what its probes said.
struct Watched {
    address: SocketAddr,
    check: HealthCheck,
    socket: SocketOptions,
    vip: Option<IpAddr>,
    /// Passed on from each probing task to the next.
    turn: Turn,
    state: State,
    /// The health that the receiver of transitions knows of.
    announced: Health,
    /// Of the last transition.
    cause: String,
    last_result: String,
    last_probe: Option<SystemTime>,
    /// The last probe could not even be tried, for a reason that lies with this host.
    hindered: bool,
    run: u64,
    /// `None` where nothing is probed.
    _probing: Option<Task>,
}

impl Watched {
    fn start(
        former: Option<Watched>,
        name: BackendName,
        target: Target,
        shared: &Arc<Shared>,
        run: u64,
        delay: Duration,
    ) -> Self {
        let (address, check) = (target.address, target.check.clone());
        let turn = former.as_ref().map(|former| Arc::clone(&former.turn));
        let mut watched = match former.filter(|former| former.is_same_server(address, &check)) {
            Some(mut former) => {
                former.state.set_thresholds(check.rise, check.fall);
                if former.check.probe != check.probe {
                    former.state.forget_outcomes();
                }
                former
            }
            None => Watched {
                address,
                check: check.clone(),
                socket: target.socket,
                vip: target.vip,
                turn: turn.unwrap_or_default(),
                state: State::new(target.initial, check.rise, check.fall),
                announced: target.initial,
                cause: String::new(),
                last_result: String::new(),
                last_probe: None,
                hindered: false,
                run,
                _probing: None,
            },
        };
        watched.address = address;
        watched.check = check.clone();
        watched.socket = target.socket;
        watched.vip = target.vip;
        watched.run = run;
        watched._probing = match check.probe {
            Probe::None => {
                watched.state = State::new(Health::Up, check.rise, check.fall);
                watched.last_result = Attempt::Nothing.to_string();
                watched.last_probe = None;
                watched.cause = watched.last_result.clone();
                None
            }
            _ => {
                let turn = Arc::clone(&watched.turn);
                Some(Task::start(
                    Arc::clone(shared).watch(name, run, target, turn, delay),
                ))
            }
        };
        watched
    }

    fn is_probed_as(&self, target: &Target) -> bool {
        (self.address, self.socket, self.vip) == (target.address, target.socket, target.vip)
            && self.check == target.check
    }

    /// Whether the health found so far is about the server at `address`: it is if only the probe went elsewhere on it.
    fn is_same_server(&self, address: SocketAddr, check: &HealthCheck) -> bool {
        self.address == address || (self.address.ip() == address.ip() && self.check.probe != check.probe)
    }

    fn record(
        &mut self,
        (service, backend): &BackendName,
        result: &Result<(), ProbeError>,
    ) -> Option<Health> {
        self.last_probe = Some(SystemTime::now());
        self.last_result = match result {
            Ok(()) => format!(
                "{}{} succeeded",
                Attempt::of(self.address, &self.check.probe),
                self.purpose()
            ),
            Err(ProbeError::Failed { attempt, failure }) => format!("{attempt}{}: {failure}", self.purpose()),
            Err(error) => error.to_string(),
        };
        let outcome = match result {
            Ok(()) => Some(Outcome::Success),
            // A host that has run out of sockets does not take its backends out of service.
            Err(ProbeError::Socket { .. } | ProbeError::Start { .. }) => None,
            Err(ProbeError::Failed { .. }) => Some(Outcome::Failure),
        };
        let was_hindered = mem::replace(&mut self.hindered, outcome.is_none());
        if self.hindered && !was_hindered {
            // Nothing else tells of it: health stays as it is, and that may be `up`.
            let cause = &self.last_result;
            warn!(
                service,
                backend, cause, "backend cannot be probed, its health stays as it is"
            );
        }
        let transition = self.state.record(outcome?)?;
        self.cause = format!("{} ({} in a row)", self.last_result, self.state.in_a_row());
        Some(transition)
    }

    /// What else there is to say of an attempt: a server that answers by its own address may lack the VIP.
    fn purpose(&self) -> String {
        self.vip.map_or_else(String::new, |vip| format!(" for {vip}"))
    }

    fn report(&self) -> ProbeReport {
        ProbeReport {
            health: self.state.health(),
            address: self.address,
            last_result: self.last_result.clone(),
            last_probe: self.last_probe,
            consecutive: self.state.in_a_row(),
        }
    }
}

impl Shared {
    /// Nothing that holds the lock panics halfway through a change.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Probes one target for ever, from `delay` on.
    async fn watch(
        self: Arc<Self>,
        name: BackendName,
        run: u64,
        target: Target,
        turn: Turn,
        delay: Duration,
    ) {
        sleep(delay).await;
        let mut starts = starts(&name, target.check.interval);
        loop {
            let result = probe(&target, &turn).await;
            self.record(&name, run, &result);
            starts.tick().await;
        }
    }

    fn record(&self, name: &BackendName, run: u64, result: &Result<(), ProbeError>) {
        let mut table = self.lock();
        // A task that was replaced a moment ago may still come up with a result.
        let watched = table.watched.get_mut(name).filter(|watched| watched.run == run);
        if watched.and_then(|watched| watched.record(name, result)).is_some() {
            self.changed.notify_one();
        }
    }

    /// Sends the transitions, until nobody receives them any more.
    async fn announce(self: Arc<Self>, sender: mpsc::Sender<Transition>) {
        loop {
            self.changed.notified().await;
            for name in self.unannounced() {
                let Ok(permit) = sender.reserve().await else {
                    return;
                };
                if let Some(transition) = self.next_transition(&name) {
                    permit.send(transition);
                }
            }
        }
    }

    fn unannounced(&self) -> Vec<BackendName> {
        let table = self.lock();
        table
            .watched
            .iter()
            .filter(|(_, watched)| watched.announced != watched.state.health())
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// The transition to announce of a target, if it still is there and has not returned to what was announced.
    fn next_transition(&self, name: &BackendName) -> Option<Transition> {
        let mut table = self.lock();
        let watched = table.watched.get_mut(name)?;
        let health = watched.state.health();
        if watched.announced == health {
            return None;
        }
        watched.announced = health;
        Some(Transition {
            service: name.0.clone(),
            backend: name.1.clone(),
            health,
            cause: watched.cause.clone(),
        })
    }
}

/// A task that ends with its owner.
struct Task(AbortHandle);

impl Task {
    fn start(work: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(work).abort_handle())
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How long after they begin together the first probe of a target starts that has `before` others before it.
fn paced(before: u32, interval: Duration) -> Duration {
    PACE.saturating_mul(before).min(interval)
}

/// When the probes that follow the first one start, which starts now.
///
/// The second comes up to a tenth of the interval early, each backend by its own share, so that probes which began
/// together do not stay together; it is never late, which the promise of [`Driver`] builds upon. From then on the
/// interval lies between two starts. A probe that outlasts it delays the next one and no more than that.
fn starts(name: &BackendName, interval: Duration) -> Interval {
    let interval = interval.clamp(SHORTEST_INTERVAL, LONGEST_INTERVAL);
    let early = interval.mul_f64(SPREAD * share(name));
    let mut starts = interval_at(Instant::now() + interval - early, interval);
    starts.set_missed_tick_behavior(MissedTickBehavior::Skip);
    starts
}

/// A number from 0 to 1 that belongs to the name.
fn share(name: &BackendName) -> f64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish() as f64 / u64::MAX as f64
}

/// A moment as text; milliseconds are enough.
mod rfc3339 {
    use std::time::SystemTime;

    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(
        moment: &Option<SystemTime>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        moment
            .map(|moment| humantime::format_rfc3339_millis(moment).to_string())
            .serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<SystemTime>, D::Error> {
        Option::<String>::deserialize(deserializer)?
            .map(|text| humantime::parse_rfc3339(&text).map_err(D::Error::custom))
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::health::Failure;

    /// The clock rounds up to milliseconds.
    const RESOLUTION: Duration = Duration::from_millis(2);

    fn with_paused_clock<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap()
            .block_on(work)
    }

    fn name(number: u32) -> BackendName {
        ("web".into(), number.to_string())
    }

    /// When probes start that take `durations`.
    async fn start_times(number: u32, interval: Duration, durations: &[Duration]) -> Vec<Duration> {
        let begin = Instant::now();
        let mut ticks = starts(&name(number), interval);
        let mut times = Vec::new();
        for &duration in durations {
            times.push(begin.elapsed());
            sleep(duration).await;
            ticks.tick().await;
        }
        times
    }

    proptest! {
        #[test]
        fn a_probe_starts_at_most_one_interval_after_the_one_before_and_never_within_it(
            number: u32, interval in 10u64..5_000, shares in prop::collection::vec(0.0f64..=1.0, 2..20),
        ) {
            let interval = Duration::from_millis(interval);
            let durations: Vec<_> = shares.iter().map(|&share| interval.mul_f64(share)).collect();
            let times = with_paused_clock(start_times(number, interval, &durations));
            prop_assert_eq!(times[0], Duration::ZERO);
            for (index, pair) in times.windows(2).enumerate() {
                let gap = pair[1] - pair[0];
                prop_assert!(gap <= interval + RESOLUTION, "{:?} in {:?}", gap, times);
                prop_assert!(gap >= durations[index], "{:?} in {:?}", gap, times);
            }
            // On average it is the interval: nothing drifts but the one early start.
            let regular = interval * (times.len() as u32 - 1);
            let last = times[times.len() - 1];
            prop_assert!(last + interval.mul_f64(SPREAD) + RESOLUTION >= regular, "{:?}", times);
        }

        #[test]
        fn a_dead_backend_is_down_within_fall_intervals_and_a_timeout(
            number: u32,
            interval in 20u64..5_000,
            timeout_share in 0.1f64..=1.0,
            fall in 1u32..6,
            // In intervals.
            death in prop_oneof![0.0f64..0.2, 0.0f64..8.0],
            // Parts of the timeout that a probe of the living and of the dead backend takes.
            shares in prop::collection::vec((0.0f64..0.2, prop_oneof![Just(1.0), 0.0f64..=1.0]), 20),
        ) {
            let interval = Duration::from_millis(interval);
            let timeout = interval.mul_f64(timeout_share);
            let death = interval.mul_f64(death);
            let down = with_paused_clock(async {
                let begin = Instant::now();
                let mut ticks = starts(&name(number), interval);
                let mut state = State::new(Health::Up, 1, fall);
                for (alive, dead) in shares {
                    // A probe that the backend is still alive to answer succeeds.
                    let answer = timeout.mul_f64(alive);
                    let outcome = if begin.elapsed() + answer <= death {
                        sleep(answer).await;
                        Outcome::Success
                    } else {
                        sleep(timeout.mul_f64(dead)).await;
                        Outcome::Failure
                    };
                    if state.record(outcome).is_some() {
                        return Some(begin.elapsed());
                    }
                    ticks.tick().await;
                }
                None
            });
            let down = down.unwrap();
            let promise = interval * fall + timeout + RESOLUTION;
            prop_assert!(down <= death + promise, "died {:?}, down {:?}, promised {:?}", death, down, promise);
        }
    }

    #[test]
    fn probes_of_many_backends_spread_over_a_tenth_of_the_interval() {
        let interval = Duration::from_secs(10);
        let seconds: Vec<_> = (0..1000)
            .map(|number| with_paused_clock(start_times(number, interval, &[Duration::ZERO; 2]))[1])
            .collect();
        assert!(
            seconds
                .iter()
                .all(|at| (9_000..=10_002).contains(&at.as_millis()))
        );
        // About 100 in each of ten equal parts.
        let mut parts = [0; 10];
        for at in &seconds {
            parts[((at.as_millis() - 9_000) / 100).min(9) as usize] += 1;
        }
        assert!(parts.iter().all(|&part| part > 50), "{parts:?}");
    }

    #[test]
    fn the_first_probe_starts_at_once_and_those_of_many_targets_one_after_another_within_an_interval() {
        let interval = Duration::from_secs(2);
        assert_eq!(paced(0, interval), Duration::ZERO);
        let times: Vec<_> = (0..1000).map(|before| paced(before, interval)).collect();
        assert!(times.windows(2).all(|pair| pair[1] - pair[0] == PACE));
        assert_eq!(paced(16_383, interval), interval);
        assert_eq!(paced(u32::MAX, Duration::MAX), PACE * u32::MAX);
    }

    #[test]
    fn each_backend_always_has_the_same_share() {
        let times = || with_paused_clock(start_times(7, Duration::from_secs(10), &[Duration::ZERO; 5]));
        assert_eq!(times(), times());
    }

    #[test]
    fn the_turn_is_passed_on_whatever_changes_of_a_backend() {
        with_paused_clock(async {
            let driver = Driver::new(mpsc::channel(1).0);
            let mut target = Target {
                service: "web".into(),
                backend: "a".into(),
                address: ([10, 0, 0, 11], 8080).into(),
                check: HealthCheck {
                    probe: Probe::None,
                    interval: Duration::from_secs(1),
                    timeout: Duration::from_secs(1),
                    rise: 1,
                    fall: 1,
                },
                socket: SocketOptions::default(),
                vip: None,
                initial: Health::Up,
            };
            let turn_with = |target: &Target| {
                driver.set_targets(vec![target.clone()]);
                let table = driver.shared.lock();
                table
                    .watched
                    .values()
                    .map(|watched| Arc::clone(&watched.turn))
                    .next()
            };
            let first = turn_with(&target).unwrap();
            target.check.fall = 2;
            assert!(Arc::ptr_eq(&first, &turn_with(&target).unwrap()));
            target.address.set_ip([10, 0, 0, 12].into());
            assert!(Arc::ptr_eq(&first, &turn_with(&target).unwrap()));
        });
    }

    #[test]
    fn intervals_beyond_the_clock_are_no_panic() {
        with_paused_clock(async {
            starts(&name(0), Duration::ZERO).tick().await;
            starts(&name(0), Duration::MAX).tick().await;
        });
    }

    fn watched() -> Watched {
        let check = HealthCheck {
            probe: Probe::Tcp { port: None },
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            rise: 1,
            fall: 1,
        };
        Watched {
            address: ([10, 0, 0, 11], 8080).into(),
            state: State::new(Health::Up, check.rise, check.fall),
            check,
            socket: SocketOptions::default(),
            vip: None,
            turn: Turn::default(),
            announced: Health::Up,
            cause: String::new(),
            last_result: String::new(),
            last_probe: None,
            hindered: false,
            run: 0,
            _probing: None,
        }
    }

    #[test]
    fn a_lack_of_sockets_on_this_host_is_reported_but_no_verdict() {
        let mut watched = watched();
        let address = watched.address;
        let source = std::io::Error::from_raw_os_error(nix::libc::EMFILE);
        assert_eq!(
            watched.record(&name(0), &Err(ProbeError::Socket { address, source })),
            None
        );
        assert_eq!(
            watched.last_result,
            "open a socket towards 10.0.0.11:8080: too many open files"
        );
        assert_eq!(
            (watched.state.health(), watched.state.in_a_row()),
            (Health::Up, 0)
        );
    }

    #[test]
    fn what_a_probe_by_the_path_of_clients_says_names_the_vip() {
        let mut watched = watched();
        watched.vip = Some([203, 0, 113, 10].into());
        let failed = ProbeError::Failed {
            attempt: Attempt::Connect(watched.address),
            failure: Failure::TimedOut(Duration::from_secs(1)),
        };
        assert_eq!(watched.record(&name(0), &Err(failed)), Some(Health::Down));
        let words = "connect to 10.0.0.11:8080 for 203.0.113.10: timed out after 1s";
        assert_eq!(watched.last_result, words);
        assert_eq!(watched.cause, format!("{words} (1 in a row)"));
        watched.record(&name(0), &Ok(()));
        assert_eq!(
            watched.last_result,
            "connect to 10.0.0.11:8080 for 203.0.113.10 succeeded"
        );
    }

    #[test]
    fn probing_begins_anew_by_another_path_and_keeps_the_health() {
        with_paused_clock(async {
            let driver = Driver::new(mpsc::channel(1).0);
            let mut target = Target {
                service: "web".into(),
                backend: "a".into(),
                address: ([10, 0, 0, 11], 8080).into(),
                check: watched().check,
                socket: SocketOptions::default(),
                vip: None,
                initial: Health::Up,
            };
            let run = |target: &Target| {
                driver.set_targets(vec![target.clone()]);
                let table = driver.shared.lock();
                let watched = table.watched.values().next();
                watched.map(|watched| (watched.run, watched.state.health()))
            };
            assert_eq!(run(&target), Some((1, Health::Up)));
            target.socket.mark = Some(0x786c_0001);
            target.initial = Health::Unknown;
            assert_eq!(run(&target), Some((2, Health::Up)));
            target.vip = Some([203, 0, 113, 10].into());
            assert_eq!(run(&target), Some((3, Health::Up)));
            assert_eq!(run(&target), Some((3, Health::Up)));
        });
    }
}
