//! The configurations that the daemon is given, and the addresses in them.

use std::{
    fmt::Write,
    net::{IpAddr, Ipv4Addr},
};

use crate::balancer::configuration::PORT;

/// Servers that the services share, each service in ports of its own: the most that have an address each.
pub const SERVERS: u32 = 1000;
/// What the VIPs are in.
pub const VIPS: &str = "10.200.0.0/16";
/// What the servers are in.
pub const POOL: &str = "10.64.0.0/16";
/// Where the servers answer probes.
pub const PROBE_PORT: u16 = 8000;
/// Between two probes of a backend of the watched service.
const INTERVAL: &str = "500ms";

/// So many services with so many backends each; only those of the last one are probed.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub services: u32,
    pub backends: u32,
}

impl Size {
    /// The VIP of a service, counted from 0.
    pub fn vip(service: u32) -> IpAddr {
        (Ipv4Addr::new(10, 200, 0, 0).to_bits() + service + 1)
            .to_be_bytes()
            .into()
    }

    /// The last service: its backends are probed, and packets to it are forwarded only if all that comes before is there.
    pub fn watched(self) -> u32 {
        self.services - 1
    }

    /// The address of a backend of a service, both counted from 0.
    pub fn server(service: u32, backend: u32) -> IpAddr {
        server((service + backend) % SERVERS)
    }

    /// The configuration of so many services.
    pub fn text(self, interfaces: &[String], flow_table: Option<u32>, seed_file: &str) -> String {
        let mut text = head(interfaces, flow_table, seed_file);
        for service in 0..self.services {
            let health = if service == self.watched() {
                // One answer decides.
                format!(
                    "{{ type = \"http\", path = \"/\", interval = \"{INTERVAL}\", timeout = \"{INTERVAL}\", rise = 1, fall = 1 }}"
                )
            } else {
                "{ type = \"none\" }".to_owned()
            };
            let vip = Self::vip(service);
            let _ = write!(
                text,
                "[[service]]\nname = \"service-{service}\"\nvip = \"{vip}\"\nport = {PORT}\nprotocol = \"tcp\"\n\
                 forward = \"nat\"\nhealth = {health}\n"
            );
            // Those that are probed share a port, which a server for all of them listens on.
            let port = if service == self.watched() {
                u32::from(PROBE_PORT)
            } else {
                10_000 + service
            };
            for backend in 0..self.backends {
                let address = Self::server(service, backend);
                let _ = writeln!(text, "[[service.backend]]\naddress = \"{address}:{port}\"");
            }
        }
        text
    }
}

/// Every server's address.
pub fn servers() -> impl Iterator<Item = IpAddr> {
    (0..SERVERS).map(server)
}

fn server(number: u32) -> IpAddr {
    (Ipv4Addr::new(10, 64, 0, 0).to_bits() + number + 1)
        .to_be_bytes()
        .into()
}

/// One service of UDP whose backend is not probed.
pub fn small(
    interfaces: &[String],
    flow_table: Option<u32>,
    seed_file: &str,
    backend: std::net::SocketAddr,
) -> String {
    let (mut text, vip) = (head(interfaces, flow_table, seed_file), Size::vip(0));
    let _ = write!(
        text,
        "[[service]]\nname = \"echo\"\nvip = \"{vip}\"\nport = {PORT}\nprotocol = \"udp\"\nforward = \"nat\"\n\
         health = {{ type = \"none\" }}\n[[service.backend]]\naddress = \"{backend}\"\n"
    );
    text
}

fn head(interfaces: &[String], flow_table: Option<u32>, seed_file: &str) -> String {
    let size = flow_table.map_or("\"auto\"".to_owned(), |size| size.to_string());
    format!("interfaces = {interfaces:?}\n[flow-table]\nsize = {size}\n[hash]\nseed-file = \"{seed_file}\"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configurations_are_ones_that_xlb_takes() {
        let interfaces = ["eth0".to_owned(), "eth1".to_owned()];
        let size = Size {
            services: 3,
            backends: 4,
        };
        let parsed = |text: &str| {
            xlb::config::parse(text, "bench.toml").unwrap_or_else(|error| panic!("{}", error.render(false)))
        };
        let config = parsed(&size.text(&interfaces, Some(4096), "/run/seed"));
        let backends = config.services.iter().map(|service| service.backends.len());
        assert_eq!(backends.collect::<Vec<_>>(), [4, 4, 4]);
        let config = parsed(&small(
            &interfaces,
            None,
            "/run/seed",
            "10.2.1.2:80".parse().unwrap(),
        ));
        assert_eq!(config.services.len(), 1);
    }

    #[test]
    fn addresses_of_vips_and_servers_are_in_their_networks() {
        let (vips, pool): (ipnet::IpNet, ipnet::IpNet) = (VIPS.parse().unwrap(), POOL.parse().unwrap());
        assert!((0..1024).all(|service| vips.contains(&Size::vip(service))));
        assert!(servers().all(|server| pool.contains(&server)));
    }
}
