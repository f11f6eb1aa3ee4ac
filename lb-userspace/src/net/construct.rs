//! Making links, addresses, routes and neighbours: what the lab builds its networks from.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd},
};

use ipnet::IpNet;
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressFlags},
        link::{InfoData, InfoVeth},
        route::{RouteMessage, RouteProtocol, RouteScope, RouteType},
    },
};

use super::{NetError, Netlink};

/// Makes a pair of veth interfaces, each at once in its network namespace.
pub async fn create_veth_pair(
    (name, namespace): (&str, BorrowedFd<'_>),
    (peer_name, peer_namespace): (&str, BorrowedFd<'_>),
) -> Result<(), NetError> {
    let peer = LinkUnspec::new_with_name(peer_name)
        .setns_by_fd(peer_namespace.as_raw_fd())
        .build();
    let message = LinkVeth::new(name, peer_name)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .setns_by_fd(namespace.as_raw_fd())
        .build();
    let netlink = Netlink::open()?;
    netlink
        .handle
        .link()
        .add(message)
        .execute()
        .await
        .map_err(|error| {
            match NetError::kernel(format!("creating the veth pair {name} and {peer_name}"), error) {
                NetError::Kernel { source, .. } if source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    NetError::NoVeth
                }
                error => error,
            }
        })
}

/// Sets an interface up or down.
pub async fn set_up(name: &str, up: bool) -> Result<(), NetError> {
    let word = if up { "up" } else { "down" };
    change(name, word, |link| if up { link.up() } else { link.down() }).await
}

/// Gives an interface a MAC address.
pub async fn set_mac(name: &str, mac: [u8; 6]) -> Result<(), NetError> {
    change(name, "address", |link| link.address(mac.to_vec())).await
}

/// Sets the MTU of an interface, in bytes.
pub async fn set_mtu(name: &str, mtu: u32) -> Result<(), NetError> {
    change(name, "mtu", |link| link.mtu(mtu)).await
}

/// Adds addresses with their prefixes to an interface, usable at once: without duplicate address detection.
pub async fn add_addresses(name: &str, addresses: &[IpNet]) -> Result<(), NetError> {
    let netlink = Netlink::open()?;
    let ifindex = netlink.ifindex(name).await?;
    for address in addresses {
        let mut request = netlink
            .handle
            .address()
            .add(ifindex, address.addr(), address.prefix_len());
        request
            .message_mut()
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
        request
            .execute()
            .await
            .map_err(|error| NetError::kernel(format!("adding {address} to {name}"), error))?;
    }
    Ok(())
}

/// Removes an address from whatever interface has it.
pub async fn remove_address(address: IpAddr) -> Result<(), NetError> {
    let netlink = Netlink::open()?;
    for (found, message) in netlink.addresses().await? {
        if found == address {
            netlink.remove_address(message).await?;
        }
    }
    Ok(())
}

/// Adds a route, in place of one to the same prefix; without a gateway, one that answers "unreachable".
pub async fn set_route(prefix: IpNet, gateway: Option<IpAddr>) -> Result<(), NetError> {
    let mut message = route(prefix, gateway)?;
    if gateway.is_none() {
        message.header.kind = RouteType::Unreachable;
    }
    let netlink = Netlink::open()?;
    netlink
        .handle
        .route()
        .add(message)
        .replace()
        .execute()
        .await
        .map_err(|error| NetError::kernel(format!("adding the route to {prefix}"), error))
}

/// Removes the route to a prefix.
pub async fn remove_route(prefix: IpNet) -> Result<(), NetError> {
    let mut message = route(prefix, None)?;
    message.header.kind = RouteType::Unspec;
    message.header.scope = RouteScope::NoWhere;
    message.header.protocol = RouteProtocol::Unspec;
    let netlink = Netlink::open()?;
    netlink
        .handle
        .route()
        .del(message)
        .execute()
        .await
        .map_err(|error| NetError::kernel(format!("removing the route to {prefix}"), error))
}

/// Adds a permanent neighbour, in place of what is known of that address.
pub async fn set_neighbour(name: &str, address: IpAddr, mac: [u8; 6]) -> Result<(), NetError> {
    let netlink = Netlink::open()?;
    let ifindex = netlink.ifindex(name).await?;
    netlink
        .handle
        .neighbours()
        .add(ifindex, address)
        .link_layer_address(&mac)
        .replace()
        .execute()
        .await
        .map_err(|error| NetError::kernel(format!("adding the neighbour {address} on {name}"), error))
}

async fn change(
    name: &str,
    what: &str,
    edit: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
) -> Result<(), NetError> {
    let netlink = Netlink::open()?;
    let ifindex = netlink.ifindex(name).await?;
    let message = edit(LinkUnspec::new_with_index(ifindex)).build();
    netlink
        .handle
        .link()
        .change(message)
        .execute()
        .await
        .map_err(|error| NetError::kernel(format!("setting {name} {what}"), error))
}

fn route(prefix: IpNet, gateway: Option<IpAddr>) -> Result<RouteMessage, NetError> {
    fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> NetError {
        NetError::kernel("building a route", io::Error::other(error))
    }
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(prefix.network(), prefix.prefix_len())
        .map_err(invalid)?;
    if let Some(gateway) = gateway {
        builder = builder.gateway(gateway).map_err(invalid)?;
    }
    Ok(builder.build())
}
