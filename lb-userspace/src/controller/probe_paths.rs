//! What is probed, where, and the path that probes take to a backend.

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::Context;

use super::Controller;
use crate::{
    compile::probe_path,
    config::{Backend, Probe, Service},
    datapath::{
        DatapathError, LinkKind, Pins,
        probes::{self, Probes},
    },
    health::{SocketOptions, Target},
};

/// What a problem with the paths is listed under.
const PATHS: &str = "probe paths";
/// Hops that a probe may go from where it is for the VIP: to a container on the backend's host, but not by way of a
/// balancer, which has none left to take, to another backend that would answer for one without the VIP.
const HOPS: u8 = 2;
/// Largest segment of probes, in bytes: with all headers of `gue` and options of TCP it fits into the smallest MTU of
/// IPv6, 1280, whatever that of the way to the backend is.
const MAX_SEGMENT: u32 = 1280 - 48 - 40 - 20;

impl Controller {
    /// Has probes follow the configuration, each by the path of its service's packets. Where the kernel refuses that they
    /// ask the backend's own address; the status tells, and the next [`Controller::repair`] tries again.
    pub(super) fn follow_targets(&mut self) {
        match self.follow_paths() {
            Ok(()) => drop(self.problems.remove(PATHS)),
            Err(error) => self.problem(PATHS, &error),
        }
        self.driver.set_targets(self.targets());
    }

    fn follow_paths(&mut self) -> anyhow::Result<()> {
        let config = &self.model.config;
        let paths: BTreeSet<_> = (config.services.iter())
            .flat_map(|service| {
                let backends = service.backends.iter();
                backends.filter_map(move |backend| probe_path(config, service, backend))
            })
            .collect();
        let pins = Pins::new(self.instance.name());
        if paths.is_empty() {
            self.probes = None;
            return Ok(probes::remove_left_behind(&pins)?);
        }
        let former = self.probes.take();
        let follow = || {
            let mut probes = former.map_or_else(|| Probes::load(LinkKind::of_this_kernel(), pins), Ok)?;
            let left_out = probes.set_paths(&paths)?;
            probes.attach(&config.interfaces)?;
            Ok((probes, left_out))
        };
        let followed: Result<_, DatapathError> = follow();
        let (probes, left_out) = followed.context(
            "health checks of dsr, ipip and gue ask the backends' own addresses and do not find out whether the \
             backends have the VIPs",
        )?;
        self.probes = Some(probes);
        anyhow::ensure!(
            left_out == 0,
            "health checks of {left_out} backends of dsr, ipip and gue ask the backends' own addresses, since only {} have \
             marks: divide the services among instances",
            paths.len() - left_out,
        );
        Ok(())
    }

    fn targets(&self) -> Vec<Target> {
        let services = self.model.config.services.iter();
        services
            .filter(|service| service.health.probe != Probe::None)
            .flat_map(|service| {
                let backends = service.backends.iter();
                backends.map(|backend| self.target(service, backend))
            })
            .collect()
    }

    fn target(&self, service: &Service, backend: &Backend) -> Target {
        let client_port = service.ports.first().map_or(0, |range| range.first);
        let port = service
            .health
            .probe
            .port()
            .or(backend.port)
            .unwrap_or(client_port);
        let path = probe_path(&self.model.config, service, backend);
        let mark = path.and_then(|path| self.probes.as_ref()?.mark(&path));
        Target {
            service: service.name.clone(),
            backend: backend.name.clone(),
            address: SocketAddr::new(backend.address, port),
            check: service.health.clone(),
            socket: SocketOptions {
                mark,
                hops: mark.map(|_| HOPS),
                max_segment: mark.map(|_| MAX_SEGMENT),
            },
            vip: mark.map(|_| service.vip),
            initial: self.model.health_of(service, &backend.name),
        }
    }
}
