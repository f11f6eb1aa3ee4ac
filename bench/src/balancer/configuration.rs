//! The services that are measured, and the network that they are in.

use std::{
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// How a service sends its packets; those of the other forwards cost what one of these does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    Ipip,
    Nat,
    Dsr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// The port of all services.
pub const PORT: u16 = 80;
/// The port of the backend of `nat`.
pub const NAT_PORT: u16 = 8080;
/// The balancer's interface.
pub const INTERFACE: &str = "eth0";
/// Its addresses.
pub const OWN: [&str; 2] = ["10.0.0.1/24", "fd00::1/64"];
/// An IPv4 address of `ipip` whose backends have IPv6 addresses.
pub const VIP_4_IN_6: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 200, 1, 3));

impl Forward {
    pub const ALL: [Self; 3] = [Self::Ipip, Self::Nat, Self::Dsr];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ipip => "ipip",
            Self::Nat => "nat",
            Self::Dsr => "dsr",
        }
    }

    pub fn vip(self, family: Family) -> IpAddr {
        let number = self as u8 + 1;
        match family {
            Family::V4 => Ipv4Addr::new(10, 200, number, 1).into(),
            Family::V6 => Ipv6Addr::new(0xfc00, u16::from(number), 0, 0, 0, 0, 0, 1).into(),
        }
    }

    /// Those of `nat` are one, so that it is known whose replies are to be measured.
    pub fn backends(self, family: Family) -> Vec<IpAddr> {
        let hosts = match self {
            Self::Ipip => 11..=13,
            Self::Nat => 21..=21,
            Self::Dsr => 31..=33,
        };
        let address = |host: u8| match family {
            Family::V4 => Ipv4Addr::new(10, 0, 0, host).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(host)).into(),
        };
        hosts.map(address).collect()
    }
}

impl Family {
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];
}

/// Every backend once.
pub fn backends() -> Vec<IpAddr> {
    let of_forward = |forward: Forward| {
        Family::ALL
            .into_iter()
            .flat_map(move |family| forward.backends(family))
    };
    Forward::ALL.into_iter().flat_map(of_forward).collect()
}

/// The configuration of the balancer.
pub fn text(flow_table: u32, seed_file: &str) -> String {
    // Flows last as long as a measurement may take.
    let mut text = format!(
        "interfaces = [\"{INTERFACE}\"]\n\
         [flow-table]\nsize = {flow_table}\ntcp-idle-timeout = \"12h\"\nudp-idle-timeout = \"12h\"\n\
         [hash]\nseed-file = \"{seed_file}\"\n"
    );
    for family in Family::ALL {
        for forward in Forward::ALL {
            service(&mut text, forward, forward.vip(family), &forward.backends(family));
        }
    }
    service(
        &mut text,
        Forward::Ipip,
        VIP_4_IN_6,
        &Forward::Ipip.backends(Family::V6),
    );
    text
}

/// One service of each protocol.
fn service(text: &mut String, forward: Forward, vip: IpAddr, backends: &[IpAddr]) {
    let port = if forward == Forward::Nat {
        format!(":{NAT_PORT}")
    } else {
        String::new()
    };
    for protocol in ["tcp", "udp"] {
        let name = format!("{}-{protocol}-{vip}", forward.name()).replace(':', ".");
        let forward = forward.name();
        // Writing to a String does not fail.
        let _ = write!(
            text,
            "[[service]]\nname = \"{name}\"\nvip = \"{vip}\"\nport = {PORT}\nprotocol = \"{protocol}\"\n\
             forward = \"{forward}\"\nhealth = {{ type = \"none\" }}\n"
        );
        for backend in backends {
            let address = match backend {
                IpAddr::V6(address) if !port.is_empty() => format!("[{address}]{port}"),
                address => format!("{address}{port}"),
            };
            let _ = writeln!(text, "[[service.backend]]\naddress = \"{address}\"");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_one_that_xlb_takes() {
        let config = xlb::config::parse(&text(65_536, "/run/seed"), "bench.toml");
        let config = config.unwrap_or_else(|error| panic!("{}", error.render(false)));
        assert_eq!(config.services.len(), 14);
    }
}
