//! The balancer under test: the real daemon in a network namespace of its own, and the program that it has pinned.

pub mod configuration;
mod daemon;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use lb_common::abi::Reason;
use xlb::{datapath::kernel::PROGRAM, lab::Namespace};

pub use self::daemon::Daemon;

/// For a start with the largest table; a usual one takes a second.
const PATIENCE: Duration = Duration::from_secs(120);

/// An instance of xlb. Its namespace, its daemon and its pins go with the process, however it ends.
#[derive(Debug)]
pub struct Balancer {
    namespace: Namespace,
    /// Holds the other end of the wire.
    _outside: Namespace,
    daemon: Daemon,
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
        let daemon = Daemon::new(xlb)?;
        daemon.configure(&configuration::text(flow_table, &daemon.seed_file()))?;
        namespace
            .enter()
            .context("the balancer's namespace was not entered")?;
        Ok(Self {
            namespace,
            _outside: outside,
            daemon,
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
        if self.daemon.is_started() && self.counted()?.flows == 0 {
            return Ok(());
        }
        self.daemon.kill();
        self.daemon.detach(&self.namespace)?;
        let start = self.daemon.start(&self.namespace)?;
        self.daemon.await_ready(PATIENCE)?;
        loop {
            let is_ready = self.daemon.status(&self.namespace).is_ok_and(|status| {
                let mut backends = status.services.iter().flat_map(|service| &service.backends);
                backends.all(|backend| backend.next_hop_problem.is_none())
            });
            if is_ready {
                return Ok(());
            }
            self.daemon.check_running()?;
            ensure!(
                start.elapsed() < PATIENCE,
                "the daemon does not know the ways to its backends:\n{}",
                self.daemon.log()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Where the daemon has pinned the program.
    pub fn program(&self) -> PathBuf {
        Daemon::pins().program(PROGRAM)
    }

    /// What the daemon tells of the program's counters.
    ///
    /// # Errors
    /// The daemon does not answer.
    pub fn counted(&self) -> Result<Counted> {
        let status = self.daemon.status(&self.namespace)?;
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
}

impl Counted {
    /// Checks that between `earlier` and now so many packets were counted for these reasons, and no packet of a service for
    /// another; of packets that are for no service, others pass too.
    ///
    /// # Errors
    /// What was counted instead.
    pub fn check(&self, earlier: &Self, reasons: &[Reason], is_of_service: bool, packets: u64) -> Result<()> {
        let since = |now: &BTreeMap<String, u64>, before: &BTreeMap<String, u64>| -> BTreeMap<String, u64> {
            now.iter()
                .map(|(reason, count)| (reason.clone(), count - before.get(reason).unwrap_or(&0)))
                .filter(|(_, count)| *count > 0)
                .collect()
        };
        let of_services = since(&self.of_services, &earlier.of_services);
        let others = since(&self.others, &earlier.others);
        let counted = |counts: &BTreeMap<String, u64>| -> u64 {
            let of = |reason: &Reason| counts.get(reason.name()).copied().unwrap_or(0);
            reasons.iter().map(of).sum()
        };
        let is_right = if is_of_service {
            counted(&of_services) == packets && of_services.values().sum::<u64>() == packets
        } else {
            of_services.is_empty() && counted(&others) >= packets
        };
        ensure!(
            is_right,
            "{packets} packets should be {}, and were: of services {of_services:?}, others {others:?}",
            names(reasons)
        );
        Ok(())
    }
}

/// Reasons by their names, as a report has them.
pub fn names(reasons: &[Reason]) -> String {
    reasons
        .iter()
        .map(|reason| reason.name())
        .collect::<Vec<_>>()
        .join(" or ")
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
        assert!(forwarded.check(&before, &[Reason::Forwarded], true, 100).is_ok());
        assert!(forwarded.check(&before, &[Reason::Forwarded], true, 99).is_err());
        assert!(forwarded.check(&before, &[Reason::NotIp], false, 7).is_err());
        let one_dropped = counted(&[("forwarded", 105), ("no-flow", 1)], &[("not-ip", 2)]);
        assert!(
            one_dropped
                .check(&before, &[Reason::Forwarded], true, 100)
                .is_err()
        );
        let either = [Reason::Forwarded, Reason::NoFlow];
        assert!(one_dropped.check(&before, &either, true, 101).is_ok());
        assert!(one_dropped.check(&before, &either, true, 100).is_err());
    }

    #[test]
    fn packets_of_the_host_itself_may_pass_beside_those_of_a_measurement() {
        let before = counted(&[("forwarded", 5)], &[("not-ip", 2)]);
        let after = counted(&[("forwarded", 5)], &[("not-ip", 103), ("not-for-service", 4)]);
        assert!(after.check(&before, &[Reason::NotIp], false, 100).is_ok());
        assert!(after.check(&before, &[Reason::NotIp], false, 102).is_err());
        assert!(
            after
                .check(&before, &[Reason::NotForService], false, 100)
                .is_err()
        );
    }
}
