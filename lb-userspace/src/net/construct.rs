//! Making links, addresses, routes and neighbours: what the lab builds its networks from.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd},
};

use ipnet::IpNet;
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVlan, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressFlags},
        link::{InfoData, InfoVeth, VlanProtocol},
        route::{RouteAttribute, RouteMetric, RouteProtocol, RouteScope, RouteType},
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

/// Makes a VLAN device that tags what it sends with `tag` and hands it to `lower`.
pub async fn create_vlan(name: &str, lower: &str, tag: VlanTag) -> Result<(), NetError> {
    let netlink = Netlink::open()?;
    let (id, protocol) = match tag {
        VlanTag::Customer(id) => (id, VlanProtocol::Ieee8021Q),
        VlanTag::Service(id) => (id, VlanProtocol::Ieee8021Ad),
    };
    let message = LinkVlan::new(name, netlink.ifindex(lower).await?, id)
        .protocol(protocol)
        .build();
    netlink
        .handle
        .link()
        .add(message)
        .execute()
        .await
        .map_err(|error| {
            match NetError::kernel(format!("creating the VLAN device {name} on {lower}"), error) {
                NetError::Kernel { source, .. } if source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    NetError::NoVlan
                }
                error => error,
            }
        })
}

/// A VLAN and the kind of its tag.
#[derive(Clone, Copy, Debug)]
pub enum VlanTag {
    /// IEEE 802.1Q.
    Customer(u16),
    /// IEEE 802.1ad, the outer one of two.
    Service(u16),
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

/// Adds addresses with their prefixes to an interface, usable at once: without duplicate address detection, unless
/// that is asked for.
pub async fn add_addresses(name: &str, addresses: &[IpNet], detect_duplicates: bool) -> Result<(), NetError> {
    let netlink = Netlink::open()?;
    let ifindex = netlink.ifindex(name).await?;
    for address in addresses {
        let mut request = netlink
            .handle
            .address()
            .add(ifindex, address.addr(), address.prefix_len());
        if !detect_duplicates {
            let flags = AddressAttribute::Flags(AddressFlags::Nodad);
            request.message_mut().attributes.push(flags);
        }
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

/// Where packets to a prefix go.
#[derive(Clone, Debug)]
pub struct Route {
    pub prefix: IpNet,
    /// `None` for hosts that are on the link of `interface`; without that either, the answer is "unreachable".
    pub gateway: Option<IpAddr>,
    /// What the gateway's address tells, unless it is link-local.
    pub interface: Option<String>,
    /// Largest packet, in bytes, if it is not that of the interface.
    pub mtu: Option<u32>,
    /// This host's address to send from, if the kernel is not to choose it.
    pub source: Option<IpAddr>,
}

impl Route {
    /// By a gateway, and nothing said beyond that.
    pub fn by(prefix: IpNet, gateway: IpAddr) -> Self {
        Self {
            gateway: Some(gateway),
            ..Self::unreachable(prefix)
        }
    }

    /// To nowhere.
    pub fn unreachable(prefix: IpNet) -> Self {
        Self {
            prefix,
            gateway: None,
            interface: None,
            mtu: None,
            source: None,
        }
    }
}

/// Adds a route, in place of one to the same prefix.
pub async fn set_route(route: &Route) -> Result<(), NetError> {
    let netlink = Netlink::open()?;
    let prefix = route.prefix;
    let mut builder = to(prefix)?;
    if let Some(gateway) = route.gateway {
        builder = builder.gateway(gateway).map_err(invalid)?;
    }
    if let Some(source) = route.source {
        builder = builder.pref_source(source).map_err(invalid)?;
    }
    if let Some(interface) = &route.interface {
        builder = builder.output_interface(netlink.ifindex(interface).await?);
        if route.gateway.is_none() {
            builder = builder.scope(RouteScope::Link);
        }
    }
    let mut message = builder.build();
    if route.gateway.is_none() && route.interface.is_none() {
        message.header.kind = RouteType::Unreachable;
    }
    if let Some(mtu) = route.mtu {
        let metrics = vec![RouteMetric::Mtu(mtu)];
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
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
    let mut message = to(prefix)?.build();
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

fn to(prefix: IpNet) -> Result<RouteMessageBuilder<IpAddr>, NetError> {
    RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(prefix.network(), prefix.prefix_len())
        .map_err(invalid)
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> NetError {
    NetError::kernel("building a route", io::Error::other(error))
}
