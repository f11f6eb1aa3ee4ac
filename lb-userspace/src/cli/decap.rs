//! `xlb decap`: on a backend's host, unwraps packets that a balancer has encapsulated.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::IpAddr,
    time::Duration,
};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use ipnet::IpNet;
use lb_common::abi::{Count, DecapReason, VerdictClass};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, info, warn};

use super::{block_on, fail, output::print, require_root, start_log};
use crate::{
    config,
    datapath::{
        decap::Decap,
        kernel::{Attachment, Mode},
    },
    net::{self, backend_host},
};

/// How often addresses and interfaces of the host are looked at.
const REFRESH_INTERVAL: Duration = Duration::from_secs(2);
/// How often the counts go to the log, at level debug.
const COUNTS_INTERVAL: Duration = Duration::from_secs(60);

/// On a backend's host, unwraps ipip and gue packets for VIPs, in the foreground until SIGTERM or SIGINT
#[derive(Debug, clap::Args)]
pub struct Args {
    /// An interface that encapsulated packets come in by; several may be given
    #[arg(long = "interface", value_name = "NAME", required = true, num_args = 1..)]
    interfaces: Vec<String>,

    /// A VIP, IPv4 or IPv6, that inner packets are for; several may be given
    #[arg(long = "vip", value_name = "ADDR", required = true, num_args = 1.., value_parser = vip)]
    vips: Vec<IpAddr>,

    /// Unwraps only packets whose outer source is in one of these prefixes [default: any]
    #[arg(long = "source", value_name = "PREFIX", num_args = 1.., value_parser = prefix)]
    sources: Vec<IpNet>,

    /// How the program is attached: auto prefers native
    #[arg(long, value_name = "MODE", default_value = "auto", value_parser = mode())]
    xdp_mode: Mode,
}

fn vip(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text
        .parse()
        .map_err(|_| "an address such as 203.0.113.10 is wanted".to_owned())?;
    let address = address.to_canonical();
    match config::unusable(address) {
        None => Ok(address),
        Some(unusable) => Err(format!("this is {unusable}, and no vip")),
    }
}

fn prefix(text: &str) -> Result<IpNet, String> {
    let address = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse()
        .or_else(|_| address())
        .map_err(|_| "a prefix such as 172.16.0.0/16 is wanted".to_owned())
}

fn mode() -> impl TypedValueParser<Value = Mode> {
    PossibleValuesParser::new(["auto", "native", "generic"]).map(|name| match name.as_str() {
        "native" => Mode::Native,
        "generic" => Mode::Generic,
        _ => Mode::Auto,
    })
}

pub fn run(args: &Args) -> u8 {
    if let Err(code) = require_root("attaching a program to an interface") {
        return code;
    }
    start_log();
    match block_on(decap(args)) {
        Ok(summary) => print(&summary),
        Err(error) => fail(&error),
    }
}

/// Unwraps until a signal comes; tells what was counted.
async fn decap(args: &Args) -> anyhow::Result<String> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let vips: BTreeSet<IpAddr> = args.vips.iter().copied().collect();
    // A mistyped name is told before the kernel is bothered.
    net::links_named(&args.interfaces).await?;
    let mut decap = Decap::load(&vips, &args.sources)?;
    follow_host(&mut decap, args).await?;
    let own_addresses = backend_host::own_addresses().await?;
    for finding in backend_host::findings(&vips, &own_addresses, &args.interfaces, backend_host::setting) {
        warn!("{}: `{}` mends it", finding.problem, finding.mend);
    }
    info!("ready");

    let ticks = |period| {
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.reset();
        ticks
    };
    let mut refreshes = ticks(REFRESH_INTERVAL);
    let mut counts = ticks(COUNTS_INTERVAL);
    let mut problem = String::new();
    loop {
        tokio::select! {
            _ = refreshes.tick() => {
                let told = match follow_host(&mut decap, args).await {
                    Ok(()) => String::new(),
                    Err(error) => format!("{error:#}"),
                };
                // Once, and not with each try.
                if told != problem && !told.is_empty() {
                    warn!("{told}");
                }
                problem = told;
            }
            _ = counts.tick() => debug!("{}", summary(&decap.counts()?).replace('\n', "; ")),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    decap.detach();
    info!("detached");
    Ok(summary(&decap.counts()?))
}

/// Takes over what has changed of the host: its addresses, and interfaces that were made anew.
async fn follow_host(decap: &mut Decap, args: &Args) -> anyhow::Result<()> {
    decap.set_own_addresses(&backend_host::own_addresses().await?)?;
    for interface in &args.interfaces {
        let index = net::links_named(&[interface]).await?[0].ifindex;
        match decap.attach(interface, index, args.xdp_mode)? {
            None => {}
            Some(Attachment {
                mode, fallback: None, ..
            }) => info!(interface, mode = mode.name(), "attached"),
            Some(Attachment {
                mode,
                fallback: Some(why),
                ..
            }) => warn!(
                interface,
                mode = mode.name(),
                "attached in generic mode, which is several times slower: native mode was refused ({why})"
            ),
        }
    }
    Ok(())
}

/// A line for each verdict: how many packets, and how many for each reason.
fn summary(counts: &BTreeMap<DecapReason, Count>) -> String {
    let mut text = String::new();
    for (word, class) in [
        ("unwrapped", VerdictClass::Forwarded),
        ("passed", VerdictClass::Passed),
        ("dropped", VerdictClass::Dropped),
    ] {
        let of_class: Vec<_> = counts
            .iter()
            .filter(|(reason, _)| reason.class() == class)
            .collect();
        let packets: u64 = of_class.iter().map(|(_, count)| count.packets).sum();
        let bytes: u64 = of_class.iter().map(|(_, count)| count.bytes).sum();
        let _ = write!(text, "{word} {packets} packets, {bytes} bytes");
        let mut separator = ": ";
        for (reason, count) in of_class.iter().filter(|(_, count)| count.packets > 0) {
            let _ = write!(text, "{separator}{} {}", reason.name(), count.packets);
            separator = ", ";
        }
        text.push('\n');
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_has_each_verdict_and_the_reasons_that_were_counted() {
        let mut counts: BTreeMap<_, _> = DecapReason::ALL
            .iter()
            .map(|reason| (*reason, Count::default()))
            .collect();
        counts.insert(
            DecapReason::Ipip,
            Count {
                packets: 3,
                bytes: 300,
            },
        );
        counts.insert(
            DecapReason::Gue,
            Count {
                packets: 2,
                bytes: 100,
            },
        );
        counts.insert(
            DecapReason::BadInnerLength,
            Count {
                packets: 1,
                bytes: 60,
            },
        );
        assert_eq!(
            summary(&counts),
            "unwrapped 5 packets, 400 bytes: ipip 3, gue 2\n\
             passed 0 packets, 0 bytes\n\
             dropped 1 packets, 60 bytes: bad-inner-length 1"
        );
    }

    #[test]
    fn every_reason_is_documented_as_it_is() {
        let page = include_str!("../../../docs/backends.md");
        for reason in DecapReason::ALL {
            let word = match reason.class() {
                VerdictClass::Forwarded | VerdictClass::Answered => "unwrapped",
                VerdictClass::Passed => "passed",
                VerdictClass::Dropped => "dropped",
            };
            let line = format!("| `{}` | {word} | {} |\n", reason.name(), reason.help());
            assert!(page.contains(&line), "docs/backends.md lacks {line}");
        }
    }

    #[test]
    fn a_vip_is_an_address_that_a_host_can_have() {
        assert_eq!(vip("203.0.113.10"), Ok("203.0.113.10".parse().unwrap()));
        assert_eq!(vip("2001:db8::10"), Ok("2001:db8::10".parse().unwrap()));
        assert_eq!(vip("::ffff:203.0.113.10"), Ok("203.0.113.10".parse().unwrap()));
        for text in [
            "203.0.113.10/32",
            "web",
            "224.0.0.1",
            "0.0.0.0",
            "::1",
            "ff02::1",
            "255.255.255.255",
        ] {
            vip(text).unwrap_err();
        }
    }

    #[test]
    fn a_source_is_a_prefix_or_an_address() {
        assert_eq!(prefix("172.16.0.0/16"), Ok("172.16.0.0/16".parse().unwrap()));
        assert_eq!(prefix("10.0.0.1"), Ok("10.0.0.1/32".parse().unwrap()));
        assert_eq!(prefix("0100::/64"), Ok("100::/64".parse().unwrap()));
        prefix("10.0.0.0/33").unwrap_err();
    }
}
