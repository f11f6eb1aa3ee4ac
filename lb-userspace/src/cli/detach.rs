//! `xlb detach`: removes what a daemon has left in the kernel.

use anyhow::bail;

use super::{block_on, fail, output::print, require_root};
use crate::{daemon, datapath::Pins, instance::Instance, net};

/// Removes the pinned program, links and maps of a stopped daemon, with all flows, and the VIPs and neighbours that it set
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(instance: &Instance, _args: &Args) -> u8 {
    if let Err(code) = require_root("detaching a program from an interface") {
        return code;
    }
    match block_on(detach(instance)) {
        Ok(true) => print(&format!("detached instance {instance}")),
        Ok(false) => print(&format!("instance {instance} has nothing attached")),
        Err(error) => fail(&error),
    }
}

async fn detach(instance: &Instance) -> anyhow::Result<bool> {
    Pins::require_bpffs()?;
    let pins = Pins::new(instance.name());
    if !pins.has_instance() && pins.has_other_instances() {
        return Ok(false);
    }
    // A running daemon would miss its maps.
    let _lock = daemon::lock(&instance.lock())?;
    let attached = pins.attached();
    let programs = net::xdp_programs().await?;
    let is_here = attached
        .iter()
        .any(|(_, ifindex, program)| programs.contains(&(*ifindex, *program)));
    if let ([(interface, ..), ..], false) = (&attached[..], is_here) {
        bail!(
            "instance {instance} is attached in another network namespace, to its interface {interface}: \
             its VIPs and neighbours are there, too; run this command there, as by \
             `nsenter --net=/run/netns/NAME xlb --instance {instance} detach`"
        );
    }
    // VIPs, neighbours and filters do not tell whose they are: where nothing of this instance is here, they are another's.
    if !is_here && pins.has_other_instances() {
        anstream::eprintln!(
            "xlb: VIPs and neighbours are left alone: instance {instance} is attached to no interface, \
             and those that are here may be another instance's"
        );
        return Ok(pins.remove_all_but_filters()?);
    }
    let had_filters = pins.have_had_filters();
    let vips = net::remove_vips().await?;
    let neighbours = net::release_neighbours().await?;
    // Last, so that a further try finds the instance again.
    let removed = pins.remove_all()?;
    if had_filters {
        net::remove_unused_clsact().await?;
    }
    Ok(removed || !vips.is_empty() || neighbours > 0)
}
