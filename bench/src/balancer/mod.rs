//! The balancer under test: the real daemon in a network namespace of its own, and the program that it has pinned.

pub mod configuration;

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lb_common::abi::Reason;
use xlb::{
    datapath::{Pins, kernel::PROGRAM},
    lab::Namespace,
    observe::status::Status,
};

use crate::isolation;

const INSTANCE: &str = "bench";
/// For a start with the largest table; a usual one takes a second.
const PATIENCE: Duration = Duration::from_secs(120);

/// An instance of xlb. Its namespace, its daemon and its pins go with the process, however it ends.
#[derive(Debug)]
pub struct Balancer {
    xlb: PathBuf,
    namespace: Namespace,
    /// Holds the other end of the wire.
    _outside: Namespace,
    folder: PathBuf,
    daemon: Option<Child>,
}

/// What a balancer has counted since it was started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Packets of services by reason.
    pub of_services: BTreeMap<String, u64>,
    /// The others.
    pub others: BTreeMap<String, u64>,
    /// Flows that began.
    pub flows: u64,
}

impl Balancer {
    /// Makes the network and the configuration; no daemon runs yet. The calling thread is in the balancer's namespace
    /// from now on, for test runs name an interface of the namespace that they are made in.
    ///
    /// # Errors
    /// The namespace cannot be made, or files not written.
    pub fn new(xlb: &Path, flow_table: u32) -> Result<Self> {
        let namespace = Namespace::new("balancer")?;
        let outside = Namespace::new("outside")?;
        Namespace::connect(&namespace, configuration::INTERFACE, &outside, "eth0")?;
        for address in configuration::OWN {
            namespace.add_address(configuration::INTERFACE, address)?;
        }
        for (number, backend) in (1..).zip(configuration::backends()) {
            namespace.add_neighbour(configuration::INTERFACE, backend, [2, 0, 0, 0, 1, number])?;
        }
        let folder = Path::new(isolation::FOLDER).join("xlb-bench");
        fs::create_dir(&folder).with_context(|| format!("{} was not made", folder.display()))?;
        let seed = folder.join("seed");
        // The same in each run, so that flows are spread the same way.
        fs::write(&seed, "000102030405060708090a0b0c0d0e0f")?;
        let text = configuration::text(flow_table, &seed.display().to_string());
        fs::write(folder.join("xlb.toml"), text)?;
        namespace
            .enter()
            .context("the balancer's namespace was not entered")?;
        Ok(Self {
            xlb: xlb.to_owned(),
            namespace,
            _outside: outside,
            folder,
            daemon: None,
        })
    }

    /// Index of the interface that packets come in by.
    pub fn ifindex(&self) -> Result<u32> {
        Ok(self.namespace.ifindex(configuration::INTERFACE)?)
    }

    /// Has a daemon run with an empty flow table, whatever that is made of: unless no flow ever began, ends the one that
    /// runs, removes all that it has left, and starts another. Returns once it can send to all backends.
    ///
    /// # Errors
    /// The daemon ends, or is not ready in time; what it logged is in the message.
    pub fn start_afresh(&mut self) -> Result<()> {
        if self.daemon.is_some() && self.counted()?.flows == 0 {
            return Ok(());
        }
        self.stop();
        let detached = self
            .command(&["detach"])
            .output()
            .context("xlb detach did not start")?;
        ensure!(
            detached.status.success(),
            "xlb detach: {}",
            String::from_utf8_lossy(&detached.stderr).trim()
        );
        let log = fs::File::create(self.log())?;
        let config = self.folder.join("xlb.toml").display().to_string();
        let daemon = self
            .command(&["run", "-c", &config])
            .stderr(log)
            .spawn()
            .with_context(|| format!("{} did not start", self.xlb.display()))?;
        self.daemon = Some(daemon);
        let start = Instant::now();
        loop {
            let ended = self.daemon.as_mut().map_or(Ok(None), Child::try_wait)?;
            if ended.is_some() || start.elapsed() > PATIENCE {
                let log = fs::read_to_string(self.log()).unwrap_or_default();
                bail!("the daemon is not ready:\n{}", log.trim());
            }
            let is_ready = self.status().is_ok_and(|status| {
                let mut backends = status.services.iter().flat_map(|service| &service.backends);
                backends.all(|backend| backend.next_hop_problem.is_none())
            });
            if is_ready {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Where the daemon has pinned the program.
    pub fn program(&self) -> PathBuf {
        Pins::new(INSTANCE).program(PROGRAM)
    }

    /// What the daemon tells of the program's counters.
    ///
    /// # Errors
    /// The daemon does not answer.
    pub fn counted(&self) -> Result<Counted> {
        let status = self.status()?;
        let mut counted = Counted::default();
        for (reason, traffic) in status.services.iter().flat_map(|service| &service.reasons) {
            *counted.of_services.entry(reason.clone()).or_default() += traffic.packets;
        }
        for (reason, traffic) in &status.reasons {
            counted.others.insert(reason.clone(), traffic.packets);
        }
        let backends = status.services.iter().flat_map(|service| &service.backends);
        counted.flows = backends.map(|backend| backend.flows_total).sum();
        Ok(counted)
    }

    fn status(&self) -> Result<Status> {
        let output = self
            .command(&["status", "-o", "json"])
            .output()
            .context("xlb status did not start")?;
        ensure!(
            output.status.success(),
            "xlb status: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        serde_json::from_slice(&output.stdout).context("xlb status was not understood")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.namespace.command(&self.xlb);
        command
            .args(arguments)
            .args(["--instance", INSTANCE])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command
    }

    fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    fn stop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            // Both fail only when it has ended by itself.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Counted {
    /// Checks that between `earlier` and now so many packets were counted for this reason, and no packet of a service for
    /// another; of packets that are for no service, others pass too.
    ///
    /// # Errors
    /// What was counted instead.
    pub fn check(&self, earlier: &Self, reason: Reason, is_of_service: bool, packets: u64) -> Result<()> {
        let since = |now: &BTreeMap<String, u64>, before: &BTreeMap<String, u64>| -> BTreeMap<String, u64> {
            now.iter()
                .map(|(reason, count)| (reason.clone(), count - before.get(reason).unwrap_or(&0)))
                .filter(|(_, count)| *count > 0)
                .collect()
        };
        let of_services = since(&self.of_services, &earlier.of_services);
        let others = since(&self.others, &earlier.others);
        let name = reason.name().to_owned();
        let is_right = if is_of_service {
            of_services == BTreeMap::from([(name.clone(), packets)])
        } else {
            of_services.is_empty() && others.get(&name).is_some_and(|count| *count >= packets)
        };
        ensure!(
            is_right,
            "{packets} packets should be {name}, and were: of services {of_services:?}, others {others:?}"
        );
        Ok(())
    }
}

/// The first backend of `nat`, whose replies are measured.
pub fn replying_backend(family: configuration::Family) -> Option<IpAddr> {
    configuration::Forward::Nat.backends(family).first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(of_services: &[(&str, u64)], others: &[(&str, u64)]) -> Counted {
        let map = |counts: &[(&str, u64)]| {
            counts
                .iter()
                .map(|(name, count)| ((*name).to_owned(), *count))
                .collect()
        };
        Counted {
            of_services: map(of_services),
            others: map(others),
            flows: 0,
        }
    }

    #[test]
    fn a_packet_that_got_another_verdict_is_noticed() {
        let before = counted(&[("forwarded", 5)], &[("not-ip", 2)]);
        let forwarded = counted(&[("forwarded", 105)], &[("not-ip", 9)]);
        assert!(forwarded.check(&before, Reason::Forwarded, true, 100).is_ok());
        assert!(forwarded.check(&before, Reason::Forwarded, true, 99).is_err());
        assert!(forwarded.check(&before, Reason::NotIp, false, 7).is_err());
        let one_dropped = counted(&[("forwarded", 105), ("no-flow", 1)], &[("not-ip", 2)]);
        assert!(one_dropped.check(&before, Reason::Forwarded, true, 100).is_err());
    }

    #[test]
    fn packets_of_the_host_itself_may_pass_beside_those_of_a_measurement() {
        let before = counted(&[("forwarded", 5)], &[("not-ip", 2)]);
        let after = counted(&[("forwarded", 5)], &[("not-ip", 103), ("not-for-service", 4)]);
        assert!(after.check(&before, Reason::NotIp, false, 100).is_ok());
        assert!(after.check(&before, Reason::NotIp, false, 102).is_err());
        assert!(after.check(&before, Reason::NotForService, false, 100).is_err());
    }
}
