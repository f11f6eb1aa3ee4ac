//! Addresses and prefixes of either family.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use toml::de::DeValue;

use super::{Parsed, Problem, ports, quoted, text};
use crate::config::validated::PortRange;

/// Address of a backend with the ports that are given with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::config) struct BackendAddress {
    pub(in crate::config) address: IpAddr,
    pub(in crate::config) ports: Option<BackendPorts>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::config) enum BackendPorts {
    One(u16),
    /// One backend for each.
    Each(PortRange),
}

impl BackendPorts {
    pub(in crate::config) fn range(self) -> PortRange {
        match self {
            Self::One(port) => PortRange {
                first: port,
                last: port,
            },
            Self::Each(range) => range,
        }
    }
}

/// Lengths of the prefix that outer IPv4 source addresses come from.
const IPIP_LENGTHS_V4: RangeInclusive<u8> = 8..=32;
/// The same for IPv6: only the last word of the address varies.
const IPIP_LENGTHS_V6: RangeInclusive<u8> = 96..=128;

pub(in crate::config) fn vip(value: &DeValue<'_>) -> Parsed<IpAddr> {
    let text = text(value, "an address", "203.0.113.10")?;
    if let Ok(address) = text.parse() {
        return match of_one_host(address)? {
            address if address.is_loopback() => Err(unusable_address(address, "a loopback address")),
            address => Ok(address),
        };
    }
    let help = if text.parse::<SocketAddr>().is_ok() || address_and_ports(text).is_some() {
        "write the address alone: the port goes under `port`".to_owned()
    } else if text.parse::<IpNet>().is_ok() {
        "write the address without the length of a prefix".to_owned()
    } else if let Some(address) = in_brackets(text) {
        format!("write \"{address}\", without brackets")
    } else if text.contains('%') {
        without_zone()
    } else {
        "write an address such as \"203.0.113.10\" or \"2001:db8::10\"; host names are not looked up"
            .to_owned()
    };
    Err(Problem::new(format!("{} is not an address", quoted(text)), help))
}

/// Address of a server; a loopback address is one, as far as this value alone shows.
pub(in crate::config) fn backend_address(value: &DeValue<'_>) -> Parsed<BackendAddress> {
    let text = text(value, "an address", "10.0.0.11:8080")?;
    if let Ok(address) = text.parse() {
        let address = of_one_host(address)?;
        return Ok(BackendAddress { address, ports: None });
    }
    let Some((address, ports)) = address_and_ports(text) else {
        let help = if let Some(address) = in_brackets(text) {
            format!("write \"{address}\" without brackets, or \"{text}:8080\" with a port")
        } else if text.contains('%') {
            without_zone()
        } else if is_meant_as_v6(text) {
            "write an IPv6 address as \"2001:db8::11\", and with a port in brackets, \"[2001:db8::11]:8080\" or \
             \"[2001:db8::11]:8000-8003\""
                .to_owned()
        } else {
            "write an address such as \"10.0.0.11\", \"10.0.0.11:8080\" or \"10.0.0.11:8000-8003\"; host names are \
             not looked up"
                .to_owned()
        };
        return Err(Problem::new(format!("{} is not an address", quoted(text)), help));
    };
    let address = of_one_host(address)?;
    let host = match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    let help = format!(
        "write one port, \"{host}:8080\", or a range, \"{host}:8000-8003\", with ports from 1 to 65535"
    );
    let range = ports::in_text(ports, &help)?;
    let ports = if ports.contains('-') {
        BackendPorts::Each(range)
    } else {
        BackendPorts::One(range.first)
    };
    Ok(BackendAddress {
        address,
        ports: Some(ports),
    })
}

/// Prefix of the addresses of clients.
pub(in crate::config) fn source_prefix(value: &DeValue<'_>) -> Parsed<IpNet> {
    prefix(value, "192.0.2.0/24")
}

/// Where the outer IPv4 source addresses of `ipip` come from.
pub(in crate::config) fn ipip_source_v4(value: &DeValue<'_>) -> Parsed<Ipv4Net> {
    let example = "172.16.0.0/16";
    match outer_sources(value, example, IPIP_LENGTHS_V4)? {
        IpNet::V4(prefix) => Ok(prefix),
        IpNet::V6(prefix) => Err(other_family(prefix.into(), "IPv4", example)),
    }
}

/// Where the outer IPv6 source addresses of `ipip` come from.
pub(in crate::config) fn ipip_source_v6(value: &DeValue<'_>) -> Parsed<Ipv6Net> {
    let example = "100::/96";
    match outer_sources(value, example, IPIP_LENGTHS_V6)? {
        IpNet::V6(prefix) => Ok(prefix),
        IpNet::V4(prefix) => Err(other_family(prefix.into(), "IPv6", example)),
    }
}

fn other_family(prefix: IpNet, wanted: &str, example: &str) -> Problem {
    Problem::new(
        format!("{prefix} is not a prefix of {wanted} addresses"),
        format!("write a prefix such as \"{example}\""),
    )
}

/// A prefix of addresses that packets may come from; its length is checked only in its own family.
fn outer_sources(value: &DeValue<'_>, example: &str, lengths: RangeInclusive<u8>) -> Parsed<IpNet> {
    let prefix = prefix(value, example)?;
    let own_family = lengths.end() == &prefix.max_prefix_len();
    if own_family && !lengths.contains(&prefix.prefix_len()) {
        return Err(Problem::new(
            format!("a prefix of {} bits cannot be used here", prefix.prefix_len()),
            format!(
                "write a length from {} to {}, such as \"{example}\"",
                lengths.start(),
                lengths.end()
            ),
        ));
    }
    // "This network" (RFC 791) is more than its first address.
    let this_network = matches!(prefix, IpNet::V4(v4) if v4.network().octets()[0] == 0);
    let what = if this_network {
        Some("the unspecified address")
    } else {
        unusable(prefix.network())
    };
    match what {
        None => Ok(prefix),
        Some(what) => Err(Problem::new(
            format!("{prefix} begins with {what}, which no packet may come from"),
            format!("write a prefix of addresses that nobody else uses here, such as \"{example}\""),
        )),
    }
}

/// An address with the length of a prefix, and nothing beyond that length.
fn prefix(value: &DeValue<'_>, example: &str) -> Parsed<IpNet> {
    let written = text(value, "a prefix", example)?;
    let Ok(prefix) = written.parse::<IpNet>() else {
        return Err(match written.parse::<IpAddr>() {
            Ok(address) => Problem::new(
                format!("{} has no length", quoted(written)),
                format!("write \"{}\" for this one address", IpNet::from(address)),
            ),
            Err(_) => Problem::new(
                format!("{} is not a prefix", quoted(written)),
                format!("write an address and the length of the prefix, such as \"{example}\""),
            ),
        });
    };
    if let IpNet::V6(v6) = prefix
        && let Some(v4) = v6.addr().to_ipv4_mapped()
        && let Some(length) = v6.prefix_len().checked_sub(96)
    {
        return Err(Problem::new(
            format!("{prefix} is an IPv4 prefix mapped into IPv6"),
            format!("write \"{v4}/{length}\": that is how its packets come"),
        ));
    }
    if prefix.trunc() != prefix {
        return Err(Problem::new(
            format!("{prefix} has bits set beyond its {} bits", prefix.prefix_len()),
            format!(
                "write \"{}\" for the network, or \"{}\" for this one address",
                prefix.trunc(),
                IpNet::from(prefix.addr())
            ),
        ));
    }
    Ok(prefix)
}

/// Splits `10.0.0.11:8080` or `[2001:db8::11]:8080`; the ports may be anything.
fn address_and_ports(text: &str) -> Option<(IpAddr, &str)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (address, ports) = rest.split_once("]:")?;
        return Some((IpAddr::V6(address.parse().ok()?), ports));
    }
    let (address, ports) = text.split_once(':')?;
    Some((IpAddr::V4(address.parse().ok()?), ports))
}

/// The address of `[2001:db8::11]`.
fn in_brackets(text: &str) -> Option<IpAddr> {
    text.strip_prefix('[')?.strip_suffix(']')?.parse().ok()
}

/// Hexadecimal digits and colons, perhaps with ports or brackets in the wrong place.
fn is_meant_as_v6(text: &str) -> bool {
    let right = |character: char| character.is_ascii_hexdigit() || ":[]-".contains(character);
    text.matches(':').count() > 1 && text.chars().all(right)
}

fn without_zone() -> String {
    "write a global or unique local address, without `%` and an interface: one of a single link is not known to others"
        .to_owned()
}

/// An address that one host can have, if only for itself.
fn of_one_host(address: IpAddr) -> Parsed<IpAddr> {
    if let IpAddr::V6(v6) = address
        && let Some(v4) = v6.to_ipv4_mapped()
    {
        return Err(Problem::new(
            format!("{address} is an IPv4 address mapped into IPv6"),
            format!("write \"{v4}\": no packet has the mapped form"),
        ));
    }
    match unusable(address) {
        Some(what) if !address.is_loopback() => Err(unusable_address(address, what)),
        _ => Ok(address),
    }
}

fn unusable_address(address: IpAddr, what: &str) -> Problem {
    let example = if address.is_ipv4() {
        "10.0.0.11"
    } else {
        "2001:db8::11"
    };
    Problem::new(
        format!("{address} is {what}"),
        format!("write an address that belongs to one host on the network, such as \"{example}\""),
    )
}

/// Why no packet on the network comes from an address, or goes to it alone.
pub fn unusable(address: IpAddr) -> Option<&'static str> {
    if address.is_loopback() {
        Some("a loopback address")
    } else if address.is_multicast() {
        Some("a multicast address")
    } else if address.is_unspecified() {
        Some("the unspecified address")
    } else if address == IpAddr::V4(Ipv4Addr::BROADCAST) {
        Some("the broadcast address")
    } else if matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
        Some("a link-local address, which is known on one link alone")
    } else {
        None
    }
}
