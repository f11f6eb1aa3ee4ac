//! A client, a balancer that routes, and two backends; every candidate balances in this same network.
//!
//! Interfaces behave like network cards where they receive (NAPI, GRO), and have the sender compute checksums. Each backend
//! has a second wire to the client, for answers that do not come back through the balancer.

use std::{
    net::{IpAddr, SocketAddr},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use xlb::lab::{Namespace, Topology};

/// Backends, and processes of the load.
pub const BACKENDS: usize = 2;
/// What the client's address is in.
const CLIENTS: &str = "10.1.0.0/24";

/// The network, which goes with the value.
#[derive(Debug)]
pub struct Network {
    topology: Topology,
    is_of_cards: bool,
}

impl Network {
    /// `is_of_cards`: each interface has an XDP program that passes everything, unless xlb's is there. What a process sends
    /// over a veth is then copied to a page of its own on arrival, as by a card and its driver; else it stays where it is.
    ///
    /// # Errors
    /// The namespaces cannot be made, or `ethtool` is not there.
    pub fn new(is_of_cards: bool) -> Result<Self> {
        let topology = Topology::routed(BACKENDS)?;
        topology.give_vips_to_backends()?;
        for key in ["all", "default"] {
            topology
                .client
                .sysctl(&format!("net/ipv4/conf/{key}/rp_filter"), "0")?;
        }
        // So many connections one after the other need as many ports.
        topology
            .client
            .sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
        let network = Self {
            topology,
            is_of_cards,
        };
        for (index, backend) in network.backends().iter().enumerate() {
            // They close first, and remember each connection for a minute: beyond the limit, which is by the machine's
            // memory, they would answer late segments with a reset.
            backend.sysctl("net/ipv4/tcp_max_tw_buckets", "262144")?;
            let interface = format!("eth{}", index + 1);
            Namespace::connect(backend, "eth1", network.client(), &interface)?;
            backend.add_address("eth1", &format!("10.3.{index}.2/24"))?;
            network
                .client()
                .add_address(&interface, &format!("{}/24", way_back(index)))?;
            network.client().disable_offload(&interface)?;
            backend.disable_offload("eth1")?;
        }
        if is_of_cards {
            for (index, backend) in network.backends().iter().enumerate() {
                backend.pass_all("eth1")?;
                network.client().pass_all(&format!("eth{}", index + 1))?;
            }
        } else {
            network.client().pass_no_longer();
            network.backends().iter().for_each(Namespace::pass_no_longer);
        }
        let interfaces = |namespace, count| (0..count).map(move |index| (namespace, index));
        let all = interfaces(network.client(), BACKENDS + 1)
            .chain(interfaces(network.balancer(), BACKENDS + 1))
            .chain(
                network
                    .backends()
                    .iter()
                    .flat_map(|backend| interfaces(backend, 2)),
            );
        for (namespace, index) in all {
            let interface = format!("eth{index}");
            run(namespace.command("ethtool").args(["-K", &interface, "gro", "on"]))?;
        }
        Ok(network)
    }

    pub fn client(&self) -> &Namespace {
        &self.topology.client
    }

    pub fn balancer(&self) -> &Namespace {
        &self.topology.balancer
    }

    pub fn backends(&self) -> &[Namespace] {
        &self.topology.backends
    }

    /// Where a backend listens.
    pub fn backend(&self, index: usize, port: u16) -> SocketAddr {
        (self.topology.backend_address(index), port).into()
    }

    /// Where all backends listen.
    pub fn all_backends(&self, port: u16) -> Vec<SocketAddr> {
        (0..BACKENDS).map(|index| self.backend(index, port)).collect()
    }

    /// The balancer's interfaces.
    pub fn interfaces(&self) -> Vec<String> {
        self.topology.balancer_interfaces()
    }

    /// Has the balancer's interfaces receive like those of the others, where xlb does not.
    ///
    /// # Errors
    /// One has another program.
    pub fn receive_without_xlb(&self) -> Result<()> {
        if self.is_of_cards {
            for interface in self.interfaces() {
                self.balancer().pass_all(&interface)?;
            }
        }
        Ok(())
    }

    /// Makes room for another program on the balancer's interfaces.
    pub fn receive_no_longer(&self) {
        self.balancer().pass_no_longer();
    }

    pub fn vip() -> IpAddr {
        Topology::VIP.into()
    }

    /// Has the backends answer the client directly, or through the balancer again.
    ///
    /// # Errors
    /// The kernel refuses the routes.
    pub fn answer_directly(&self, directly: bool) -> Result<()> {
        for (index, backend) in self.backends().iter().enumerate() {
            if directly {
                backend.add_route(CLIENTS, &way_back(index))?;
            } else {
                backend.remove_route(CLIENTS)?;
            }
        }
        Ok(())
    }
}

/// The client's address on the second wire of a backend.
fn way_back(index: usize) -> String {
    format!("10.3.{index}.1")
}

/// Runs a short command to its end.
///
/// # Errors
/// It does not start, or what it says when it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("{name} did not start: `cargo xtask bench --end-to-end` installs it"))?;
    ensure!(
        output.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
