//! Interfaces of this network namespace, and which tags a frame gets on its way down from a VLAN device.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::TryStreamExt;
use lb_common::abi::Tags;
use nix::net::if_::if_indextoname;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, InfoData, InfoKind, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    LinkXdp,
};

use super::{NetError, Netlink};

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub name: String,
    pub ifindex: u32,
    /// `None` where the interface has no Ethernet address, as tunnels.
    pub mac: Option<[u8; 6]>,
    /// In bytes, without the Ethernet header.
    pub mtu: u32,
    /// What IPv6 makes of it: routers may announce less, and `net.ipv6.conf` may set less.
    pub mtu_v6: u32,
    /// Administratively up.
    pub up: bool,
    /// Has a carrier.
    pub running: bool,
    /// Of a VLAN device alone.
    pub vlan: Option<Vlan>,
}

/// What a VLAN device does to frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vlan {
    /// The interface that it hands them to; `None` when that is in another network namespace.
    pub lower: Option<u32>,
    /// The tag that it gives them, as [`Tags`] has it.
    pub tag: u32,
}

impl Link {
    /// Largest packet of a family that it takes.
    pub(super) fn mtu_of(&self, is_ipv4: bool) -> u32 {
        if is_ipv4 {
            self.mtu
        } else {
            self.mtu.min(self.mtu_v6)
        }
    }
}

/// The name of an interface in the network namespace of the calling thread; none where it is gone.
pub fn name_of(ifindex: u32) -> Option<String> {
    let name = if_indextoname(ifindex).ok()?.into_string().ok()?;
    // nix 0.31 does not see that the C library has found none, and returns what it has not filled in.
    (!name.is_empty()).then_some(name)
}

/// Looks up interfaces by name, in the order of the names.
///
/// # Errors
/// A name that does not exist is an error that lists those that do.
pub async fn links_named(names: &[impl AsRef<str>]) -> Result<Vec<Link>, NetError> {
    let links = Netlink::open()?.links().await?;
    names
        .iter()
        .map(|name| {
            let name = name.as_ref();
            links
                .iter()
                .find(|link| link.name == name)
                .cloned()
                .ok_or_else(|| missing(name, &links))
        })
        .collect()
}

/// The XDP programs on interfaces of this network namespace, by index and id.
///
/// # Errors
/// The kernel does not list the interfaces.
pub async fn xdp_programs() -> Result<BTreeSet<(u32, u32)>, NetError> {
    let messages = Netlink::open()?.link_messages().await?;
    let programs = messages.iter().flat_map(|message| {
        let attributes = message.attributes.iter().flat_map(|attribute| match attribute {
            LinkAttribute::Xdp(attributes) => attributes.as_slice(),
            _ => &[],
        });
        attributes.filter_map(|attribute| match attribute {
            // The last two where there are programs in both modes.
            LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) => {
                Some((message.header.index, *id))
            }
            _ => None,
        })
    });
    Ok(programs.collect())
}

/// The interface that frames sent by `ifindex` leave by in the end, and the VLAN tags that they have there; or why
/// there is none.
pub(super) fn below_vlans(links: &BTreeMap<u32, Link>, ifindex: u32) -> Result<(u32, Tags), String> {
    let mut tags = Tags::default();
    let mut at = ifindex;
    loop {
        let link = links
            .get(&at)
            .ok_or_else(|| format!("interface {at} of its route has gone"))?;
        let Some(vlan) = link.vlan else {
            return Ok((at, tags));
        };
        let name = &link.name;
        if tags.count() == 2 {
            return Err(format!(
                "its route leaves by more than two VLAN devices, the third of them {name}"
            ));
        }
        // Whoever is further below puts its tag in front.
        tags = Tags([vlan.tag, tags.0[0]]);
        at = vlan.lower.ok_or_else(|| {
            format!(
                "its route leaves by the VLAN device {name}, whose lower interface is in another network namespace"
            )
        })?;
    }
}

impl Netlink {
    /// All interfaces.
    pub(super) async fn links(&self) -> Result<Vec<Link>, NetError> {
        Ok(self.link_messages().await?.iter().map(Link::from).collect())
    }

    async fn link_messages(&self) -> Result<Vec<LinkMessage>, NetError> {
        self.handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| NetError::kernel("listing the interfaces", error))
    }

    /// Index of the interface with that name.
    pub(super) async fn ifindex(&self, name: &str) -> Result<u32, NetError> {
        let links = self.links().await?;
        let link = links.iter().find(|link| link.name == name);
        link.map(|link| link.ifindex).ok_or_else(|| missing(name, &links))
    }
}

impl From<&LinkMessage> for Link {
    fn from(message: &LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut link = Self {
            name: String::new(),
            ifindex: message.header.index,
            mac: None,
            mtu: 0,
            mtu_v6: u32::MAX,
            up: flags.contains(LinkFlags::Up),
            running: flags.contains(LinkFlags::LowerUp),
            vlan: None,
        };
        let (mut lower, mut is_elsewhere) = (None, false);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                // The loopback interface has an address of zeros: nothing can be sent to it.
                LinkAttribute::Address(address) => {
                    link.mac = address.as_slice().try_into().ok().filter(|mac| *mac != [0; 6]);
                }
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::AfSpecUnspec(families) => {
                    // Absent where IPv6 is switched off on the interface.
                    link.mtu_v6 = families.iter().find_map(mtu_v6).unwrap_or(u32::MAX);
                }
                LinkAttribute::Link(index) => lower = Some(*index),
                LinkAttribute::LinkNetNsId(_) => is_elsewhere = true,
                LinkAttribute::LinkInfo(infos) => link.vlan = vlan(infos),
                _ => {}
            }
        }
        if let Some(vlan) = &mut link.vlan {
            vlan.lower = lower.filter(|_| !is_elsewhere);
        }
        link
    }
}

fn mtu_v6(family: &AfSpecUnspec) -> Option<u32> {
    let AfSpecUnspec::Inet6(attributes) = family else {
        return None;
    };
    attributes.iter().find_map(|attribute| match attribute {
        AfSpecInet6::DevConf(configuration) => u32::try_from(configuration.mtu6).ok(),
        _ => None,
    })
}

/// Its tag, if it is a VLAN device; which interface is below is told elsewhere in the message.
fn vlan(infos: &[LinkInfo]) -> Option<Vlan> {
    if !infos.contains(&LinkInfo::Kind(InfoKind::Vlan)) {
        return None;
    }
    let (mut ethertype, mut id) = (0x8100, 0);
    for info in infos {
        let LinkInfo::Data(InfoData::Vlan(attributes)) = info else {
            continue;
        };
        for attribute in attributes {
            match attribute {
                InfoVlan::Id(own) => id = *own,
                InfoVlan::Protocol(protocol) => ethertype = (*protocol).into(),
                _ => {}
            }
        }
    }
    Some(Vlan {
        lower: None,
        tag: Tags::tag(ethertype, id),
    })
}

fn missing(name: &str, links: &[Link]) -> NetError {
    let present: Vec<&str> = links.iter().map(|link| link.name.as_str()).collect();
    NetError::MissingInterface {
        name: name.to_owned(),
        present: present.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::{Namespace, block_on};

    #[test]
    fn an_interface_is_found_by_its_name() {
        let (left, right) = (Namespace::new("left").unwrap(), Namespace::new("right").unwrap());
        Namespace::connect(&left, "eth0", &right, "eth1").unwrap();
        left.set_mac("eth0", [2, 0, 0, 0, 0, 7]).unwrap();
        let links = left.run(|| block_on(links_named(&["eth0"]))).unwrap().unwrap();
        let eth0 = &links[0];
        assert_eq!(eth0.mac, Some([2, 0, 0, 0, 0, 7]));
        assert_eq!(eth0.mtu, 1500);
        assert_eq!(eth0.ifindex, left.ifindex("eth0").unwrap());
        assert!(eth0.up && eth0.running);
    }

    #[test]
    fn an_interface_that_is_gone_has_no_name() {
        let (left, right) = (Namespace::new("left").unwrap(), Namespace::new("right").unwrap());
        Namespace::connect(&left, "eth0", &right, "eth1").unwrap();
        let ifindex = left.ifindex("eth0").unwrap();
        assert_eq!(left.run(|| name_of(ifindex)).unwrap().as_deref(), Some("eth0"));
        assert_eq!(left.run(|| name_of(ifindex + 100)).unwrap(), None);
    }

    fn ethernet(ifindex: u32) -> Link {
        Link {
            name: format!("eth{ifindex}"),
            ifindex,
            mac: Some([2, 0, 0, 0, 0, ifindex as u8]),
            mtu: 1500,
            mtu_v6: 1500,
            up: true,
            running: true,
            vlan: None,
        }
    }

    fn vlan_over(lower: Option<u32>, ifindex: u32, ethertype: u16, id: u16) -> Link {
        let tag = Tags::tag(ethertype, id);
        Link {
            name: format!("vlan{id}"),
            vlan: Some(Vlan { lower, tag }),
            ..ethernet(ifindex)
        }
    }

    fn below(links: &[Link], ifindex: u32) -> Result<(u32, Tags), String> {
        let links = links.iter().map(|link| (link.ifindex, link.clone())).collect();
        below_vlans(&links, ifindex)
    }

    #[test]
    fn frames_of_an_interface_that_is_no_vlan_have_no_tags() {
        assert_eq!(below(&[ethernet(2), ethernet(3)], 3), Ok((3, Tags::default())));
    }

    #[test]
    fn a_vlan_device_sends_by_the_interface_below_it_with_its_tag() {
        let links = [ethernet(2), vlan_over(Some(2), 5, 0x8100, 100)];
        assert_eq!(below(&links, 5), Ok((2, Tags([Tags::tag(0x8100, 100), 0]))));
    }

    #[test]
    fn of_stacked_vlan_devices_the_lower_one_has_the_outer_tag() {
        let links = [
            vlan_over(Some(7), 3, 0x8100, 42),
            vlan_over(Some(2), 7, 0x88a8, 4094),
            ethernet(2),
        ];
        let tags = Tags([Tags::tag(0x88a8, 4094), Tags::tag(0x8100, 42)]);
        assert_eq!(below(&links, 3), Ok((2, tags)));
    }

    #[test]
    fn what_has_no_way_down_says_why() {
        let links = [
            ethernet(2),
            vlan_over(Some(2), 3, 0x8100, 1),
            vlan_over(Some(3), 4, 0x8100, 2),
            vlan_over(Some(4), 5, 0x8100, 3),
            vlan_over(None, 6, 0x8100, 6),
            vlan_over(Some(99), 7, 0x8100, 7),
            // No kernel makes a circle of them, but what it tells may be torn.
            vlan_over(Some(8), 8, 0x8100, 8),
        ];
        let reasons = [
            (
                5,
                "its route leaves by more than two VLAN devices, the third of them vlan1",
            ),
            (
                6,
                "its route leaves by the VLAN device vlan6, whose lower interface is in another network namespace",
            ),
            (7, "interface 99 of its route has gone"),
            (
                8,
                "its route leaves by more than two VLAN devices, the third of them vlan8",
            ),
        ];
        for (ifindex, reason) in reasons {
            assert_eq!(below(&links, ifindex), Err(reason.to_owned()));
        }
        assert!(below(&links, 4).is_ok());
    }

    #[test]
    fn what_the_kernel_tells_of_a_vlan_device_is_understood() {
        let mut message = LinkMessage::default();
        message.header.index = 9;
        message.attributes = vec![
            LinkAttribute::IfName("eth0.300".into()),
            LinkAttribute::Link(4),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Vlan),
                LinkInfo::Data(InfoData::Vlan(vec![
                    InfoVlan::Protocol(rtnetlink::packet_route::link::VlanProtocol::Ieee8021Ad),
                    InfoVlan::Id(300),
                ])),
            ]),
        ];
        let tag = Tags::tag(0x88a8, 300);
        assert_eq!(Link::from(&message).vlan, Some(Vlan { lower: Some(4), tag }));
        message.attributes.push(LinkAttribute::LinkNetNsId(0));
        assert_eq!(Link::from(&message).vlan, Some(Vlan { lower: None, tag }));
    }

    #[test]
    fn the_limit_of_ipv6_is_told_apart_from_that_of_the_interface() {
        let (left, right) = (Namespace::new("left").unwrap(), Namespace::new("right").unwrap());
        Namespace::connect(&left, "eth0", &right, "eth1").unwrap();
        left.sysctl("net/ipv6/conf/eth0/mtu", "1400").unwrap();
        let eth0 = left.link("eth0").unwrap();
        assert_eq!((eth0.mtu_of(true), eth0.mtu_of(false)), (1500, 1400));
    }

    #[test]
    fn a_missing_interface_is_named_with_those_that_exist() {
        let namespace = Namespace::new("alone").unwrap();
        let error = namespace
            .run(|| block_on(links_named(&["lo", "eth7"])))
            .unwrap()
            .unwrap_err();
        assert_eq!(error.to_string(), "interface eth7 does not exist; there are lo");
    }
}
