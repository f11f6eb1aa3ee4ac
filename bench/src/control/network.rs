//! A client, the balancer, and one host that has the addresses of all servers.

use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result};
use ipnet::IpNet;
use xlb::lab::{Namespace, Topology};

use super::configuration;

/// The network, which goes with the value.
#[derive(Debug)]
pub struct Network(Topology);

impl Network {
    /// # Errors
    /// The namespaces cannot be made.
    pub fn new() -> Result<Self> {
        let topology = Topology::routed(1)?;
        let balancer = Topology::BALANCER.to_string();
        topology.client.add_route(configuration::VIPS, &balancer)?;
        let network = Self(topology);
        let servers: Vec<IpNet> = configuration::servers().map(IpNet::from).collect();
        network.backend().add_addresses("lo", &servers)?;
        let gateway = network.backend_address().to_string();
        network.balancer().add_route(configuration::POOL, &gateway)?;
        Ok(network)
    }

    pub fn client(&self) -> &Namespace {
        &self.0.client
    }

    pub fn balancer(&self) -> &Namespace {
        &self.0.balancer
    }

    pub fn backend(&self) -> &Namespace {
        &self.0.backends[0]
    }

    pub fn backend_address(&self) -> IpAddr {
        self.0.backend_address(0)
    }

    /// The balancer's.
    pub fn interfaces(&self) -> Vec<String> {
        self.0.balancer_interfaces()
    }

    /// Connects from the client.
    ///
    /// # Errors
    /// Nobody takes the connection.
    pub fn connect(&self, to: SocketAddr) -> Result<TcpStream> {
        self.client()
            .run(|| TcpStream::connect_timeout(&to, Duration::from_secs(10)))?
            .with_context(|| format!("a client could not connect to {to}"))
    }
}
