//! What balances, or what costs least: routing alone.

use std::{fmt::Write as _, io::Write as _, net::SocketAddr, path::Path, process::Stdio, thread};

use anyhow::{Context, Result, ensure};

use super::{
    network::{BACKENDS, Network, run},
    server::{self, Server},
};
use crate::{balancer::Daemon, isolation};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Candidate {
    /// Nothing balances: the client connects to the backends, and the balancer forwards.
    Routing,
    /// `nat` of xlb.
    Nat,
    /// `dsr` of xlb, whose backends answer the client directly.
    Dsr,
    Nftables,
    Haproxy,
    /// nginx's `stream`.
    Nginx,
    /// `nat` of IPVS (masquerading), where the kernel has it.
    Ipvs,
}

impl Candidate {
    /// All, from the one that the others are compared with.
    pub const ALL: [Self; 7] = [
        Self::Routing,
        Self::Nat,
        Self::Dsr,
        Self::Nftables,
        Self::Ipvs,
        Self::Haproxy,
        Self::Nginx,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Routing => "routing",
            Self::Nat => "xlb nat",
            Self::Dsr => "xlb dsr",
            Self::Nftables => "nftables dnat",
            Self::Ipvs => "ipvs nat",
            Self::Haproxy => "haproxy tcp",
            Self::Nginx => "nginx stream",
        }
    }

    pub fn is_xlb(self) -> bool {
        matches!(self, Self::Nat | Self::Dsr)
    }

    /// Whether this machine has what it takes; the others are installed.
    pub fn is_available(self) -> bool {
        self != Self::Ipvs || Path::new("/proc/net/ip_vs").exists()
    }

    /// Of the VIP and of the backends. Each has its own, since a host that remembers a connection of another candidate
    /// may take the next one with the same addresses and ports for an old packet.
    pub fn port(self) -> u16 {
        8001 + self as u16
    }

    /// Where each process of the load connects to.
    pub fn targets(self, network: &Network) -> Vec<SocketAddr> {
        match self {
            Self::Routing => network.all_backends(self.port()),
            _ => vec![SocketAddr::new(Network::vip(), self.port()); BACKENDS],
        }
    }
}

/// A candidate at work; it ends with the value.
pub struct Running<'a> {
    candidate: Candidate,
    network: &'a Network,
    /// xlb, for the candidates that are.
    daemon: &'a mut Daemon,
    server: Option<Server>,
}

impl<'a> Running<'a> {
    /// # Errors
    /// What is needed is not there or does not start.
    pub fn start(candidate: Candidate, network: &'a Network, daemon: &'a mut Daemon) -> Result<Self> {
        let mut running = Self {
            candidate,
            network,
            daemon,
            server: None,
        };
        let backends = network.all_backends(candidate.port());
        if !candidate.is_xlb() {
            network.receive_without_xlb()?;
        }
        match candidate {
            Candidate::Routing => {}
            Candidate::Nat | Candidate::Dsr => running.start_xlb(&backends)?,
            Candidate::Nftables => running.nft(&nftables(candidate.port(), &backends))?,
            Candidate::Ipvs => running.ipvs(&backends)?,
            Candidate::Haproxy | Candidate::Nginx => running.start_proxy(&backends)?,
        }
        Ok(running)
    }

    /// Checks that so many connections went through the candidate since it was started, where it tells.
    ///
    /// # Errors
    /// They did not.
    pub fn check(&self, connections: u64) -> Result<()> {
        if !self.candidate.is_xlb() {
            return Ok(());
        }
        let status = self.daemon.status(self.network.balancer())?;
        let backends: Vec<u64> = status
            .services
            .iter()
            .flat_map(|service| &service.backends)
            .map(|backend| backend.flows_total)
            .collect();
        let flows: u64 = backends.iter().sum();
        // A port that is used again while its flow is remembered goes on with that flow.
        let ports = connections.min(50_000);
        ensure!(
            flows >= ports * 9 / 10 && backends.iter().all(|of_backend| *of_backend > flows / 4),
            "xlb counted {backends:?} flows of {connections} connections"
        );
        ensure!(status.problems.is_empty(), "xlb says: {:?}", status.problems);
        Ok(())
    }

    fn start_xlb(&mut self, backends: &[SocketAddr]) -> Result<()> {
        let forward = if self.candidate == Candidate::Dsr {
            "dsr"
        } else {
            "nat"
        };
        let mut text = format!(
            "interfaces = {:?}\n[hash]\nseed-file = \"{}\"\n[[service]]\nname = \"web\"\nvip = \"{}\"\nport = {}\n\
             protocol = \"tcp\"\nforward = \"{forward}\"\n",
            self.network.interfaces(),
            self.daemon.seed_file(),
            Network::vip(),
            self.candidate.port(),
        );
        for backend in backends {
            // Writing to a String does not fail.
            let _ = writeln!(text, "[[service.backend]]\naddress = \"{backend}\"");
        }
        self.daemon.configure(&text)?;
        if self.candidate == Candidate::Dsr {
            self.network.answer_directly(true)?;
        }
        self.daemon.start(self.network.balancer())?;
        self.daemon.await_ready(super::PATIENCE)?;
        let start = std::time::Instant::now();
        loop {
            let status = self.daemon.status(self.network.balancer())?;
            if status
                .services
                .iter()
                .all(|service| service.healthy_backends == BACKENDS as u32)
            {
                return Ok(());
            }
            ensure!(
                start.elapsed() < super::PATIENCE,
                "xlb does not find its backends up:\n{}",
                self.daemon.log()
            );
            thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    fn start_proxy(&mut self, backends: &[SocketAddr]) -> Result<()> {
        let balancer = self.network.balancer();
        let vip = SocketAddr::new(Network::vip(), self.candidate.port());
        balancer.add_address("lo", &vip.ip().to_string())?;
        let processors = thread::available_parallelism()?.get();
        let folder = isolation::folder("proxy")?;
        let mut server = if self.candidate == Candidate::Haproxy {
            Server::haproxy(balancer, &folder, &haproxy(vip, backends))
        } else {
            Server::nginx(balancer, &folder, &nginx(vip, backends, processors))
        }?;
        server.await_listening(balancer, vip, &folder)?;
        self.server = Some(server);
        Ok(())
    }

    fn nft(&self, rules: &str) -> Result<()> {
        let mut nft = self
            .network
            .balancer()
            .command("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("nft did not start: `cargo xtask bench --end-to-end` installs it")?;
        nft.stdin
            .take()
            .context("nft has no input")?
            .write_all(rules.as_bytes())?;
        let output = nft.wait_with_output()?;
        ensure!(
            output.status.success(),
            "nft: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }

    fn ipvs(&self, backends: &[SocketAddr]) -> Result<()> {
        let vip = SocketAddr::new(Network::vip(), self.candidate.port()).to_string();
        let ipvsadm = |arguments: &[&str]| run(self.network.balancer().command("ipvsadm").args(arguments));
        // IPVS takes packets that are for this host.
        self.network
            .balancer()
            .add_address("lo", &Network::vip().to_string())?;
        // Without the flag all connections of an address go to one backend.
        ipvsadm(&["-A", "-t", &vip, "-s", "mh", "-b", "mh-port"])?;
        for backend in backends {
            ipvsadm(&["-a", "-t", &vip, "-r", &backend.to_string(), "-m"])?;
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        self.server = None;
        self.network.receive_no_longer();
        let balancer = self.network.balancer();
        match self.candidate {
            Candidate::Routing => {}
            Candidate::Nat | Candidate::Dsr => {
                self.daemon.kill();
                self.daemon.detach(balancer)?;
                if self.candidate == Candidate::Dsr {
                    self.network.answer_directly(false)?;
                }
            }
            Candidate::Nftables => self.nft("delete table ip bench\n")?,
            Candidate::Ipvs => {
                run(balancer.command("ipvsadm").arg("-C"))?;
                balancer.remove_address(Network::vip())?;
            }
            Candidate::Haproxy | Candidate::Nginx => balancer.remove_address(Network::vip())?,
        }
        Ok(())
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // After an error there may be nothing to take away; where something stays, the next candidate is refused.
        if let Err(error) = self.stop() {
            eprintln!("{} was not taken away: {error:#}", self.candidate.name());
        }
    }
}

fn nftables(port: u16, backends: &[SocketAddr]) -> String {
    let choices: Vec<String> = backends
        .iter()
        .enumerate()
        .map(|(index, backend)| format!("{index} : {}", backend.ip()))
        .collect();
    format!(
        "table ip bench {{\nchain balance {{\ntype nat hook prerouting priority dstnat;\n\
         ip daddr {} tcp dport {port} dnat to numgen inc mod {} map {{ {} }}\n}}\n}}\n",
        Network::vip(),
        backends.len(),
        choices.join(", ")
    )
}

fn haproxy(vip: SocketAddr, backends: &[SocketAddr]) -> String {
    let servers: String = backends
        .iter()
        .enumerate()
        .map(|(index, backend)| format!("    server backend{index} {backend} check\n"))
        .collect();
    format!(
        "global\n    maxconn 4000\ndefaults\n    mode tcp\n    timeout connect 5s\n    timeout client 60s\n    \
         timeout server 60s\nlisten web\n    bind {vip}\n    balance roundrobin\n{servers}"
    )
}

fn nginx(vip: SocketAddr, backends: &[SocketAddr], workers: usize) -> String {
    let servers: String = backends
        .iter()
        .map(|backend| format!("server {backend};\n"))
        .collect();
    format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n{}stream {{\nupstream web {{\n{servers}}}\n\
         server {{\nlisten {vip} reuseport;\nproxy_pass web;\n}}\n}}\n",
        server::nginx_head(workers)
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_candidate_has_a_port_and_a_name_of_its_own() {
        let ports: BTreeSet<u16> = Candidate::ALL.into_iter().map(Candidate::port).collect();
        let names: BTreeSet<&str> = Candidate::ALL.into_iter().map(Candidate::name).collect();
        assert_eq!((ports.len(), names.len()), (7, 7));
    }

    #[test]
    fn nftables_chooses_among_all_backends() {
        let backends = ["10.2.1.2:8003", "10.2.2.2:8003"].map(|address| address.parse().unwrap());
        let rules = nftables(8003, &backends);
        assert!(
            rules.contains("tcp dport 8003 dnat to numgen inc mod 2 map { 0 : 10.2.1.2, 1 : 10.2.2.2 }"),
            "{rules}"
        );
    }
}
