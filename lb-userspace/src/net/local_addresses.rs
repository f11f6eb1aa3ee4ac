//! Which addresses are this host's.

use std::{collections::BTreeSet, net::IpAddr};

use rtnetlink::packet_route::route::RouteType;

use super::{NetError, Netlink};

/// Those of some addresses that are not this host's: a packet for one of them reaches no process here.
///
/// The routes are asked, not the interfaces: a route of the type `local` makes a whole prefix the host's own.
///
/// # Errors
/// The kernel does not tell.
pub async fn not_local(addresses: &BTreeSet<IpAddr>) -> Result<BTreeSet<IpAddr>, NetError> {
    let netlink = Netlink::open()?;
    let mut others = BTreeSet::new();
    for &address in addresses {
        // Where there is no route at all, the address is not the host's either.
        let is_local = matches!(
            netlink.route_message(address).await?,
            Ok(Some(message)) if message.header.kind == RouteType::Local
        );
        if !is_local {
            others.insert(address);
        }
    }
    Ok(others)
}

#[cfg(test)]
mod tests {
    use std::{
        thread,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::lab::{Namespace, block_on};

    #[test]
    fn addresses_of_interfaces_and_of_local_routes_are_the_hosts_own() {
        let (host, other) = (Namespace::new("host").unwrap(), Namespace::new("other").unwrap());
        Namespace::connect(&host, "eth0", &other, "eth0").unwrap();
        host.add_address("eth0", "10.1.0.1/24").unwrap();
        host.add_address("lo", "2001:db8::1/128").unwrap();
        let asked = [
            "10.1.0.1",
            "127.0.0.9",
            "::1",
            "2001:db8::1",
            "10.1.0.2",
            "192.0.2.1",
        ];
        let asked = asked.iter().map(|address| address.parse().unwrap()).collect();
        let others = || host.run(|| block_on(not_local(&asked))).unwrap().unwrap();
        // The kernel adds the route of an IPv6 address after the address, by a task of its own.
        let deadline = Instant::now() + Duration::from_secs(10);
        while others().len() > 2 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        let expected: Vec<IpAddr> = ["10.1.0.2", "192.0.2.1"]
            .map(|address| address.parse().unwrap())
            .into();
        assert_eq!(others().into_iter().collect::<Vec<_>>(), expected);
    }
}
