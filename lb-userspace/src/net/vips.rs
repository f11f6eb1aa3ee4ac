//! VIPs on this host, so that the kernel answers ARP and neighbour discovery for them.
//!
//! Ours carry `IFA_PROTO` (kernel 5.18): what xlb has assigned is read back from the kernel, never remembered, and an
//! address that somebody else assigned is never touched. An older kernel drops that mark; there addresses are only
//! added, and stay until somebody removes them.

use std::{collections::BTreeSet, net::IpAddr};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, CacheInfo,
};

use super::{NetError, Netlink, OWN_PROTOCOL};

/// What [`reconcile_vips`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VipChanges {
    pub added: BTreeSet<IpAddr>,
    pub removed: BTreeSet<IpAddr>,
    /// Desired, but assigned by somebody else: left as they are.
    pub foreign: BTreeSet<IpAddr>,
}

/// Puts `desired` on `interface` as /32 or /128, and removes those of ours that are not desired from all interfaces.
///
/// # Errors
/// A missing interface, a missing capability or the kernel's refusal; what was changed before stays changed, and the
/// next call goes on from there.
pub async fn reconcile_vips(desired: &BTreeSet<IpAddr>, interface: &str) -> Result<VipChanges, NetError> {
    let netlink = Netlink::open()?;
    let ifindex = netlink.ifindex(interface).await?;
    let (own, others): (Vec<_>, Vec<_>) = netlink
        .addresses()
        .await?
        .into_iter()
        .partition(|(_, message)| is_own(message));
    let in_place = |address| {
        own.iter()
            .any(|(vip, message)| *vip == address && message.header.index == ifindex)
    };

    let mut changes = VipChanges::default();
    for &vip in desired {
        if others.iter().any(|(address, _)| *address == vip) {
            changes.foreign.insert(vip);
        } else if !in_place(vip) {
            netlink.add_vip(vip, ifindex, interface).await?;
            changes.added.insert(vip);
        }
    }
    for (address, message) in own {
        if !desired.contains(&address) || message.header.index != ifindex {
            netlink.remove_address(message).await?;
            if !desired.contains(&address) {
                changes.removed.insert(address);
            }
        }
    }
    Ok(changes)
}

/// Removes every VIP of ours from all interfaces, and tells which.
pub async fn remove_vips() -> Result<BTreeSet<IpAddr>, NetError> {
    let netlink = Netlink::open()?;
    let mut removed = BTreeSet::new();
    for (address, message) in netlink.addresses().await? {
        if is_own(&message) {
            netlink.remove_address(message).await?;
            removed.insert(address);
        }
    }
    Ok(removed)
}

impl Netlink {
    /// All addresses of all interfaces; one that several interfaces have comes several times.
    pub(super) async fn addresses(&self) -> Result<Vec<(IpAddr, AddressMessage)>, NetError> {
        let messages: Vec<AddressMessage> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| NetError::kernel("listing the addresses", error))?;
        Ok(messages
            .into_iter()
            .filter_map(|message| Some((local_address(&message)?, message)))
            .collect())
    }

    /// Removes what [`Netlink::addresses`] listed; one that has gone meanwhile is no error.
    pub(super) async fn remove_address(&self, message: AddressMessage) -> Result<(), NetError> {
        let address = local_address(&message);
        match self.handle.address().del(message).execute().await {
            Err(rtnetlink::Error::NetlinkError(answer)) if answer.raw_code() == -libc::EADDRNOTAVAIL => {
                Ok(())
            }
            done => done.map_err(|error| {
                NetError::kernel(
                    address.map_or("removing an address".into(), |a| format!("removing {a}")),
                    error,
                )
            }),
        }
    }

    async fn add_vip(&self, vip: IpAddr, ifindex: u32, interface: &str) -> Result<(), NetError> {
        let prefix_length = if vip.is_ipv4() { 32 } else { 128 };
        let mut request = self.handle.address().add(ifindex, vip, prefix_length);
        // No duplicate address detection: other nodes may well serve the same VIP.
        let flags = AddressFlags::Noprefixroute | AddressFlags::Nodad;
        let attributes = &mut request.message_mut().attributes;
        attributes.push(AddressAttribute::Flags(flags));
        attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(OWN_PROTOCOL)));
        if vip.is_ipv6() {
            // Deprecated, which for ever it may be: as a source it is the last choice (RFC 6724 section 5, rule 3). By
            // its long prefix it would be the first where others are on its network (rule 8).
            let mut lifetimes = CacheInfo::default();
            lifetimes.ifa_valid = u32::MAX;
            attributes.push(AddressAttribute::CacheInfo(lifetimes));
        }
        request
            .execute()
            .await
            .map_err(|error| NetError::kernel(format!("assigning the vip {vip} to {interface}"), error))
    }
}

fn is_own(message: &AddressMessage) -> bool {
    message
        .attributes
        .contains(&AddressAttribute::Protocol(AddressProtocol::Other(OWN_PROTOCOL)))
}

/// The address that the host has: `IFA_ADDRESS` is the peer's on a point-to-point link.
fn local_address(message: &AddressMessage) -> Option<IpAddr> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, time::Duration};

    use super::*;
    use crate::lab::{Namespace, block_on};

    fn set(addresses: &[&str]) -> BTreeSet<IpAddr> {
        addresses.iter().map(|address| address.parse().unwrap()).collect()
    }

    fn pair() -> (Namespace, Namespace) {
        let (host, other) = (Namespace::new("host").unwrap(), Namespace::new("other").unwrap());
        Namespace::connect(&host, "eth0", &other, "eth0").unwrap();
        Namespace::connect(&host, "eth1", &other, "eth1").unwrap();
        (host, other)
    }

    fn reconcile(host: &Namespace, desired: &BTreeSet<IpAddr>, interface: &str) -> VipChanges {
        host.run(|| block_on(reconcile_vips(desired, interface)))
            .unwrap()
            .unwrap()
    }

    /// Addresses with their interface's index and prefix length, but for those that the kernel gives an interface when
    /// its other end comes up.
    fn present(host: &Namespace) -> BTreeSet<(IpAddr, u32, u8)> {
        host.run(|| {
            block_on(async {
                let listed = Netlink::open().unwrap().addresses().await.unwrap();
                listed
                    .iter()
                    .filter(|(a, _)| !matches!(a, IpAddr::V6(v6) if v6.is_unicast_link_local()))
                    .map(|(a, m)| (*a, m.header.index, m.header.prefix_len))
                    .collect()
            })
        })
        .unwrap()
    }

    #[test]
    fn vips_are_assigned_once_and_removed_when_no_longer_desired() {
        let (host, _other) = pair();
        let eth0 = host.ifindex("eth0").unwrap();
        let before = present(&host);
        let both = set(&["203.0.113.10", "2001:db8::10"]);
        assert_eq!(reconcile(&host, &both, "eth0").added, both);
        assert!(present(&host).contains(&("203.0.113.10".parse().unwrap(), eth0, 32)));
        assert!(present(&host).contains(&("2001:db8::10".parse().unwrap(), eth0, 128)));
        assert_eq!(reconcile(&host, &both, "eth0"), VipChanges::default());
        assert_eq!(
            reconcile(&host, &set(&["203.0.113.10"]), "eth0").removed,
            set(&["2001:db8::10"])
        );
        assert_eq!(
            host.run(|| block_on(remove_vips())).unwrap().unwrap(),
            set(&["203.0.113.10"])
        );
        assert_eq!(present(&host), before);
    }

    #[test]
    fn a_vip_is_usable_at_once_where_others_wait_for_duplicate_address_detection() {
        let (host, other) = pair();
        for scope in ["all", "eth0"] {
            host.sysctl(&format!("net/ipv6/conf/{scope}/accept_dad"), "1")
                .unwrap();
        }
        reconcile(&host, &set(&["2001:db8::10"]), "eth0");
        other.add_address("eth0", "2001:db8::2/64").unwrap();
        host.add_address("eth0", "2001:db8::1/64").unwrap();
        // The kernel refuses to bind to an address that is not usable yet.
        let bound = host.run(|| UdpSocket::bind("[2001:db8::10]:53")).unwrap();
        let vip = bound.unwrap();
        let asked = other.run(|| UdpSocket::bind("[2001:db8::2]:0")).unwrap().unwrap();
        asked.send_to(b"question", "[2001:db8::10]:53").unwrap();
        let timeout = Some(Duration::from_secs(10));
        vip.set_read_timeout(timeout).unwrap();
        let (length, from) = vip.recv_from(&mut [0; 16]).unwrap();
        assert_eq!((length, from), (8, asked.local_addr().unwrap()));
    }

    #[test]
    fn the_host_sends_from_its_own_address_and_not_from_a_vip_on_the_same_network() {
        let (host, other) = pair();
        host.add_address("eth0", "2001:db8::1/64").unwrap();
        other.add_address("eth0", "2001:db8::12/64").unwrap();
        // Has more bits in common with the other's address than the host's own.
        reconcile(&host, &set(&["2001:db8::10"]), "eth0");
        let source = || {
            let socket = UdpSocket::bind("[::]:0").unwrap();
            socket.connect("[2001:db8::12]:53").unwrap();
            socket.local_addr().unwrap().ip()
        };
        assert_eq!(
            host.run(source).unwrap(),
            "2001:db8::1".parse::<IpAddr>().unwrap()
        );
    }

    #[test]
    fn a_vip_moves_to_the_interface_that_is_configured_first() {
        let (host, _other) = pair();
        let vip = set(&["203.0.113.10"]);
        reconcile(&host, &vip, "eth0");
        assert_eq!(reconcile(&host, &vip, "eth1").added, vip);
        let eth1 = host.ifindex("eth1").unwrap();
        let at: Vec<_> = present(&host)
            .into_iter()
            .filter(|(address, ..)| vip.contains(address))
            .collect();
        assert_eq!(at, [("203.0.113.10".parse().unwrap(), eth1, 32)]);
    }

    #[test]
    fn an_address_of_somebody_else_is_neither_claimed_nor_removed() {
        let (host, _other) = pair();
        host.add_address("eth1", "203.0.113.10/24").unwrap();
        let before = present(&host);
        let vip = set(&["203.0.113.10"]);
        let changes = reconcile(&host, &vip, "eth0");
        assert_eq!(
            changes,
            VipChanges {
                foreign: vip,
                ..VipChanges::default()
            }
        );
        reconcile(&host, &set(&[]), "eth0");
        host.run(|| block_on(remove_vips())).unwrap().unwrap();
        assert_eq!(present(&host), before);
    }

    #[test]
    fn a_vip_on_a_missing_interface_is_refused() {
        let (host, _other) = pair();
        let error = host
            .run(|| block_on(reconcile_vips(&set(&["203.0.113.10"]), "eth9")))
            .unwrap()
            .unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("interface eth9 does not exist; there are lo, "),
            "{error}"
        );
    }
}
