//! Interfaces of this network namespace.

use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

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
    /// Administratively up.
    pub up: bool,
    /// Has a carrier.
    pub running: bool,
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

impl Netlink {
    /// All interfaces.
    pub(super) async fn links(&self) -> Result<Vec<Link>, NetError> {
        let messages: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| NetError::kernel("listing the interfaces", error))?;
        Ok(messages.iter().map(Link::from).collect())
    }

    /// The interface with that index; `None` when it has gone.
    pub(super) async fn link(&self, ifindex: u32) -> Result<Option<Link>, NetError> {
        let found = self
            .handle
            .link()
            .get()
            .match_index(ifindex)
            .execute()
            .try_next()
            .await;
        match found.map_err(|error| NetError::kernel(format!("looking up interface {ifindex}"), error)) {
            Ok(message) => Ok(message.as_ref().map(Link::from)),
            Err(NetError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
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
            up: flags.contains(LinkFlags::Up),
            running: flags.contains(LinkFlags::LowerUp),
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                // The loopback interface has an address of zeros: nothing can be sent to it.
                LinkAttribute::Address(address) => {
                    link.mac = address.as_slice().try_into().ok().filter(|mac| *mac != [0; 6]);
                }
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                _ => {}
            }
        }
        link
    }
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
    fn a_missing_interface_is_named_with_those_that_exist() {
        let namespace = Namespace::new("alone").unwrap();
        let error = namespace
            .run(|| block_on(links_named(&["lo", "eth7"])))
            .unwrap()
            .unwrap_err();
        assert_eq!(error.to_string(), "interface eth7 does not exist; there are lo");
    }
}
