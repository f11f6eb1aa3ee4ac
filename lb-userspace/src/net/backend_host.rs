//! What a backend's host has to be for the packets of VIPs: its addresses, and the settings of its stack.

use std::{collections::BTreeSet, fs, net::IpAddr};

use super::{NetError, Netlink};

/// Why a backend's host would not serve a VIP as it should, and the command that mends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub problem: String,
    pub mend: String,
}

/// The addresses of all interfaces of this network namespace, without those of loopback, which no packet from outside
/// may be for.
///
/// # Errors
/// The kernel does not tell.
pub async fn own_addresses() -> Result<BTreeSet<IpAddr>, NetError> {
    let addresses = Netlink::open()?.addresses().await?;
    Ok(addresses
        .into_iter()
        .map(|(address, _)| address)
        .filter(|address| !address.is_loopback())
        .collect())
}

/// A number under `/proc/sys` in this thread's network namespace; `None` where there is no such setting.
pub fn setting(key: &str) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/sys/{key}")).ok()?;
    text.trim().parse().ok()
}

/// Looks for what would keep packets for these VIPs, unwrapped on these interfaces, from the sockets that they are for.
pub fn findings(
    vips: &BTreeSet<IpAddr>,
    own_addresses: &BTreeSet<IpAddr>,
    interfaces: &[String],
    setting: impl Fn(&str) -> Option<u32>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut found = |problem, mend| findings.push(Finding { problem, mend });
    for vip in vips.difference(own_addresses) {
        let bits = if vip.is_ipv4() { 32 } else { 128 };
        found(
            format!("the vip {vip} is no address of this host, which drops packets for it"),
            format!("ip address add {vip}/{bits} dev lo"),
        );
    }
    let of_interface = |family: &str, interface: &str, name: &str| {
        setting(&format!("net/{family}/conf/{interface}/{name}")).unwrap_or(0)
    };
    // As IN_DEV_MAXCONF of the kernel: the larger of the two counts (include/linux/inetdevice.h).
    let effective = |interface: &str, name: &str| {
        of_interface("ipv4", interface, name).max(of_interface("ipv4", "all", name))
    };
    for interface in interfaces {
        // sysctl(8) takes a dot for a slash and a slash for a dot.
        let key = interface.replace('.', "/");
        if vips.iter().any(IpAddr::is_ipv4) && effective(interface, "rp_filter") == 1 {
            found(
                format!(
                    "the reverse path filter of {interface} is strict: packets of clients that are not answered by \
                     {interface} are dropped"
                ),
                format!("sysctl -w net.ipv4.conf.{key}.rp_filter=2"),
            );
        }
        if vips.iter().any(IpAddr::is_ipv6) && of_interface("ipv6", interface, "disable_ipv6") == 1 {
            found(
                format!("{interface} takes no IPv6, and packets for the IPv6 vips are dropped"),
                format!("sysctl -w net.ipv6.conf.{key}.disable_ipv6=0"),
            );
        }
    }
    let answers_arp = |interface: &String| {
        effective(interface, "arp_ignore") == 0 || effective(interface, "arp_announce") < 2
    };
    if vips.intersection(own_addresses).any(IpAddr::is_ipv4) && interfaces.iter().any(answers_arp) {
        found(
            "this host tells others by ARP that it has the vips: on a network that the balancer or its router is in, \
             too, packets may come here past the balancer"
                .to_owned(),
            "sysctl -w net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2".to_owned(),
        );
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(addresses: &[&str]) -> BTreeSet<IpAddr> {
        addresses.iter().map(|address| address.parse().unwrap()).collect()
    }

    /// The commands that mend a host with these settings.
    fn mends(vips: &[&str], own: &[&str], settings: &[(&str, u32)]) -> Vec<String> {
        let read = |key: &str| {
            settings
                .iter()
                .find(|(name, _)| *name == key)
                .map(|(_, value)| *value)
        };
        let interfaces = ["eth0.7".to_owned(), "eth1".to_owned()];
        let found = findings(&set(vips), &set(own), &interfaces, read);
        found.into_iter().map(|finding| finding.mend).collect()
    }

    const QUIET: [(&str, u32); 2] = [
        ("net/ipv4/conf/all/arp_ignore", 1),
        ("net/ipv4/conf/all/arp_announce", 2),
    ];

    #[test]
    fn a_host_that_is_set_up_has_no_findings() {
        let vips = ["203.0.113.10", "2001:db8::10"];
        assert_eq!(mends(&vips, &vips, &QUIET), [""; 0]);
    }

    #[test]
    fn a_vip_that_the_host_has_not_is_told_with_its_command() {
        assert_eq!(
            mends(&["203.0.113.10", "2001:db8::10"], &["203.0.113.11"], &[]),
            [
                "ip address add 203.0.113.10/32 dev lo",
                "ip address add 2001:db8::10/128 dev lo"
            ]
        );
    }

    #[test]
    fn a_strict_reverse_path_filter_is_told_for_each_interface_that_has_it() {
        let vip = ["203.0.113.10"];
        let with = |more: &[(&str, u32)]| mends(&vip, &vip, &[&QUIET[..], more].concat());
        assert_eq!(
            with(&[("net/ipv4/conf/eth0.7/rp_filter", 1)]),
            ["sysctl -w net.ipv4.conf.eth0/7.rp_filter=2"]
        );
        assert_eq!(
            with(&[("net/ipv4/conf/all/rp_filter", 1)]),
            [
                "sysctl -w net.ipv4.conf.eth0/7.rp_filter=2",
                "sysctl -w net.ipv4.conf.eth1.rp_filter=2"
            ]
        );
        // The larger of the two counts, and 2 is loose.
        let loose = [
            ("net/ipv4/conf/all/rp_filter", 1),
            ("net/ipv4/conf/eth0.7/rp_filter", 2),
            ("net/ipv4/conf/eth1/rp_filter", 2),
        ];
        assert_eq!(with(&loose), [""; 0]);
        let v6 = ["2001:db8::10"];
        assert_eq!(mends(&v6, &v6, &[("net/ipv4/conf/all/rp_filter", 1)]), [""; 0]);
    }

    #[test]
    fn an_interface_without_ipv6_is_told_where_a_vip_needs_it() {
        let (v4, v6) = (["203.0.113.10"], ["2001:db8::10"]);
        let off = [("net/ipv6/conf/eth1/disable_ipv6", 1)];
        assert_eq!(
            mends(&v6, &v6, &off),
            ["sysctl -w net.ipv6.conf.eth1.disable_ipv6=0"]
        );
        assert_eq!(mends(&v4, &v4, &[&QUIET[..], &off].concat()), [""; 0]);
    }

    #[test]
    fn a_host_that_answers_arp_for_a_vip_is_told_once() {
        let vip = ["203.0.113.10"];
        let command = "sysctl -w net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2";
        assert_eq!(mends(&vip, &vip, &[]), [command]);
        assert_eq!(mends(&vip, &vip, &QUIET[..1]), [command]);
        assert_eq!(mends(&vip, &vip, &QUIET[1..]), [command]);
    }
}
