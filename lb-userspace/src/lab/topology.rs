//! The network of the demo and of the tests.
//!
//! ```text
//! client eth0 10.1.0.2/24 ──── eth0 10.1.0.1 balancer eth1 10.2.1.1 ──── eth0 10.2.1.2/24 backend 1
//!                                                     eth2 10.2.2.1 ──── eth0 10.2.2.2/24 backend 2 …
//! ```

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use super::{LabError, Namespace};

/// A client, a balancer that routes, and backends that have their default route by it, each in a namespace.
///
/// Interfaces send like network cards, without offloads, and all but the balancer's have a program that passes
/// everything. The balancer's are left to xlb.
#[derive(Debug)]
pub struct Topology {
    pub client: Namespace,
    pub balancer: Namespace,
    pub backends: Vec<Namespace>,
    client_addresses: usize,
}

impl Topology {
    /// The address that the clients connect to; they have a route to it, and to the backends, by the balancer.
    pub const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
    /// The balancer's address on the client's side.
    pub const BALANCER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);

    /// Builds it with so many backends and one client address.
    pub fn routed(backends: usize) -> Result<Self, LabError> {
        Self::with_client_addresses(backends, 1)
    }

    /// Builds it with so many backends and client addresses, up to 250 each, from 10.1.0.2 on.
    pub fn with_client_addresses(backends: usize, client_addresses: usize) -> Result<Self, LabError> {
        const LIMIT: usize = 250;
        for (what, count) in [("backends", backends), ("client addresses", client_addresses)] {
            if count > LIMIT {
                return Err(LabError::TooMany {
                    what,
                    limit: LIMIT,
                    count,
                });
            }
        }
        let mut topology = Self {
            client: Namespace::new("client")?,
            balancer: Namespace::new("balancer")?,
            backends: Vec::with_capacity(backends),
            client_addresses,
        };
        topology.balancer.sysctl("net/ipv4/ip_forward", "1")?;
        topology.join_client()?;
        for index in 0..backends {
            topology.add_backend(index)?;
        }
        Ok(topology)
    }

    /// Addresses of the client, from 10.1.0.2 on.
    pub fn client_addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        (0..self.client_addresses).map(|index| Ipv4Addr::new(10, 1, 0, index as u8 + 2).into())
    }

    /// Address of a backend, counted from 0: 10.2.1.2, 10.2.2.2, …
    pub fn backend_address(&self, index: usize) -> IpAddr {
        backend_network(index, 2).addr().into()
    }

    /// Interfaces of the balancer: `eth0` to the client, `eth1`, `eth2`, … to the backends.
    pub fn balancer_interfaces(&self) -> Vec<String> {
        (0..=self.backends.len())
            .map(|index| format!("eth{index}"))
            .collect()
    }

    /// Joins one more backend, and tells its index.
    pub fn join_backend(&mut self) -> Result<usize, LabError> {
        let index = self.backends.len();
        self.add_backend(index)?;
        Ok(index)
    }

    fn join_client(&self) -> Result<(), LabError> {
        Namespace::connect(&self.client, "eth0", &self.balancer, "eth0")?;
        self.balancer.add_addresses("eth0", &[network(Self::BALANCER)])?;
        let addresses: Vec<IpNet> = self
            .client_addresses()
            .filter_map(|address| IpNet::new(address, 24).ok())
            .collect();
        self.client.add_addresses("eth0", &addresses)?;
        for destination in [&Self::VIP.to_string(), "10.2.0.0/16"] {
            self.client.add_route(destination, &Self::BALANCER.to_string())?;
        }
        for namespace in [&self.client, &self.balancer] {
            namespace.disable_offload("eth0")?;
        }
        self.client.pass_all("eth0")
    }

    fn add_backend(&mut self, index: usize) -> Result<(), LabError> {
        let backend = Namespace::new(&format!("backend{}", index + 1))?;
        let interface = format!("eth{}", index + 1);
        Namespace::connect(&backend, "eth0", &self.balancer, &interface)?;
        let balancer = backend_network(index, 1);
        self.balancer.add_addresses(&interface, &[balancer.into()])?;
        self.balancer.disable_offload(&interface)?;
        backend.add_addresses("eth0", &[backend_network(index, 2).into()])?;
        backend.add_route("0.0.0.0/0", &balancer.addr().to_string())?;
        backend.disable_offload("eth0")?;
        backend.pass_all("eth0")?;
        self.backends.push(backend);
        Ok(())
    }
}

/// The host `last` in the network between the balancer and a backend.
fn backend_network(index: usize, last: u8) -> Ipv4Net {
    // 250 backends at most, so this neither truncates nor overflows.
    let third = (index as u8).wrapping_add(1);
    Ipv4Net::new_assert(Ipv4Addr::new(10, 2, third, last), 24)
}

fn network(address: Ipv4Addr) -> IpNet {
    Ipv4Net::new_assert(address, 24).into()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::lab::{http_backend::HttpBackend, http_client};

    #[test]
    fn the_client_reaches_every_backend_through_the_balancer() {
        let topology = Topology::with_client_addresses(3, 3).unwrap();
        for (index, namespace) in topology.backends.iter().enumerate() {
            let name = format!("backend-{index}");
            let address = (topology.backend_address(index), 8080).into();
            let _backend = HttpBackend::start(namespace, &name, address).unwrap();
            for source in topology.client_addresses() {
                // The backends know the way back to the client's network by the balancer alone.
                let answer = topology
                    .client
                    .run(|| http_client::get(address, "/", Some(source), Duration::from_secs(10)))
                    .unwrap()
                    .unwrap();
                assert_eq!((answer.status, answer.text()), (200, format!("{name}\n")));
            }
        }
    }

    #[test]
    fn a_topology_is_built_in_well_under_a_minute_and_grows() {
        let start = Instant::now();
        let mut topology = Topology::routed(3).unwrap();
        assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
        assert_eq!(topology.join_backend().unwrap(), 3);
        assert_eq!(
            topology.balancer_interfaces(),
            ["eth0", "eth1", "eth2", "eth3", "eth4"]
        );
        for interface in topology.balancer_interfaces() {
            assert!(topology.balancer.link(&interface).unwrap().running);
        }
    }

    #[test]
    fn more_backends_than_addresses_are_refused() {
        let error = Topology::routed(1000).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a topology takes at most 250 backends, not 1000"
        );
    }
}
