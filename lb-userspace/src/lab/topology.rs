//! The network of the demo and of the tests, with both families on every link.
//!
//! ```text
//! client eth0 10.1.0.2/24 ──── eth0 10.1.0.1 balancer eth1 10.2.1.1 ──── eth0 10.2.1.2/24 backend 1
//!        2001:db8:1::2/64           2001:db8:1::1          2001:db8:2:1::1    2001:db8:2:1::2/64
//!                                                     eth2 10.2.2.1 ──── eth0 10.2.2.2/24 backend 2 …
//!                                                          2001:db8:2:2::1    2001:db8:2:2::2/64
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

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

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];
}

impl Topology {
    /// The address that the clients connect to; they have a route to it, and to the backends, by the balancer.
    pub const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
    /// The same of IPv6.
    pub const VIP_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x10, 0, 0, 0, 0, 0x10);
    /// The balancer's address on the client's side.
    pub const BALANCER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);

    /// Builds it with so many backends and one client address of each family.
    pub fn routed(backends: usize) -> Result<Self, LabError> {
        Self::with_client_addresses(backends, 1)
    }

    /// Builds it with so many backends and client addresses of each family, up to 250 each, from 10.1.0.2 and
    /// 2001:db8:1::2 on.
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
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            // Backends that have the VIP answer clients from it, and the balancer has no route to it.
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
        ] {
            topology.balancer.sysctl(&format!("net/{key}"), value)?;
        }
        topology.join_client()?;
        for index in 0..backends {
            topology.add_backend(index)?;
        }
        Ok(topology)
    }

    /// [`Self::VIP`] or [`Self::VIP_V6`].
    pub fn vip(family: Family) -> IpAddr {
        match family {
            Family::V4 => Self::VIP.into(),
            Family::V6 => Self::VIP_V6.into(),
        }
    }

    /// IPv4 addresses of the client, from 10.1.0.2 on.
    pub fn client_addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.client_addresses_of(Family::V4)
    }

    /// Addresses of the client.
    pub fn client_addresses_of(&self, family: Family) -> impl Iterator<Item = IpAddr> + use<> {
        (0..self.client_addresses).map(move |index| client_network(family, index as u8 + 2).addr())
    }

    /// IPv4 address of a backend, counted from 0: 10.2.1.2, 10.2.2.2, …
    pub fn backend_address(&self, index: usize) -> IpAddr {
        self.backend_address_of(index, Family::V4)
    }

    /// Address of a backend, counted from 0.
    pub fn backend_address_of(&self, index: usize, family: Family) -> IpAddr {
        backend_network(family, index, 2).addr()
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

    /// Gives the backends the VIPs on their loopback interface, so that they take packets for them and answer the
    /// clients from them; they do not answer ARP for them.
    pub fn give_vips_to_backends(&self) -> Result<(), LabError> {
        for backend in &self.backends {
            for (key, value) in [("arp_ignore", "1"), ("arp_announce", "2")] {
                backend.sysctl(&format!("net/ipv4/conf/all/{key}"), value)?;
            }
            let vips = Family::ALL.map(|family| Self::vip(family).into());
            backend.add_addresses("lo", &vips)?;
        }
        Ok(())
    }

    /// Sets the MTU between the balancer and the backends, in bytes: what is encapsulated gets longer there.
    pub fn set_backend_mtu(&self, mtu: u32) -> Result<(), LabError> {
        for (index, backend) in self.backends.iter().enumerate() {
            backend.set_mtu("eth0", mtu)?;
            self.balancer.set_mtu(&format!("eth{}", index + 1), mtu)?;
        }
        Ok(())
    }

    fn join_client(&self) -> Result<(), LabError> {
        Namespace::connect(&self.client, "eth0", &self.balancer, "eth0")?;
        for family in Family::ALL {
            let balancer = client_network(family, 1);
            self.balancer.add_addresses("eth0", &[balancer])?;
            let addresses: Vec<IpNet> = self
                .client_addresses_of(family)
                .filter_map(|address| IpNet::new(address, balancer.prefix_len()).ok())
                .collect();
            self.client.add_addresses("eth0", &addresses)?;
            let backends = match family {
                Family::V4 => "10.2.0.0/16",
                Family::V6 => "2001:db8:2::/48",
            };
            for destination in [&Self::vip(family).to_string(), backends] {
                self.client.add_route(destination, &balancer.addr().to_string())?;
            }
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
        for (family, everything) in [(Family::V4, "0.0.0.0/0"), (Family::V6, "::/0")] {
            let balancer = backend_network(family, index, 1);
            self.balancer.add_addresses(&interface, &[balancer])?;
            backend.add_addresses("eth0", &[backend_network(family, index, 2)])?;
            backend.add_route(everything, &balancer.addr().to_string())?;
        }
        self.balancer.disable_offload(&interface)?;
        backend.disable_offload("eth0")?;
        backend.pass_all("eth0")?;
        self.backends.push(backend);
        Ok(())
    }
}

/// The host `last` in the network between the client and the balancer.
fn client_network(family: Family, last: u8) -> IpNet {
    match family {
        Family::V4 => Ipv4Net::new_assert(Ipv4Addr::new(10, 1, 0, last), 24).into(),
        Family::V6 => {
            let address = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, last.into());
            Ipv6Net::new_assert(address, 64).into()
        }
    }
}

/// The host `last` in the network between the balancer and a backend.
fn backend_network(family: Family, index: usize, last: u8) -> IpNet {
    // 250 backends at most, so this neither truncates nor overflows.
    let number = (index as u8).wrapping_add(1);
    match family {
        Family::V4 => Ipv4Net::new_assert(Ipv4Addr::new(10, 2, number, last), 24).into(),
        Family::V6 => {
            let address = Ipv6Addr::new(0x2001, 0xdb8, 2, number.into(), 0, 0, 0, last.into());
            Ipv6Net::new_assert(address, 64).into()
        }
    }
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
            for family in Family::ALL {
                let name = format!("backend-{index}-{family:?}");
                let address = (topology.backend_address_of(index, family), 8080).into();
                let _backend = HttpBackend::start(namespace, &name, address).unwrap();
                for source in topology.client_addresses_of(family) {
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
    }

    #[test]
    fn backends_that_have_the_vips_answer_clients_from_them_through_the_balancer() {
        let topology = Topology::routed(1).unwrap();
        topology.give_vips_to_backends().unwrap();
        topology.set_backend_mtu(1600).unwrap();
        assert_eq!(topology.balancer.link("eth1").unwrap().mtu, 1600);
        for family in Family::ALL {
            // As if a balancer had sent the packets on.
            let backend = topology.backend_address_of(0, family).to_string();
            let vip = Topology::vip(family);
            topology.balancer.add_route(&vip.to_string(), &backend).unwrap();
            let address = (vip, 8080).into();
            let _backend = HttpBackend::start(&topology.backends[0], "backend", address).unwrap();
            let answer = topology
                .client
                .run(|| http_client::get(address, "/", None, Duration::from_secs(10)))
                .unwrap()
                .unwrap();
            assert_eq!((answer.status, answer.text()), (200, "backend\n".to_owned()));
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
