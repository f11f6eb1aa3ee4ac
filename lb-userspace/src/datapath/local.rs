//! The programs that deliver to processes on this host, in front of its stack and behind it: as pinned links where the
//! kernel has them for traffic control, and before that as filters.

use std::{fs, path::Path};

use aya::{
    Ebpf,
    programs::{
        SchedClassifier,
        links::{FdLink, LinkError, PinnedLink},
        tc::SchedClassifierLink,
    },
};

use super::{
    DatapathError, Pins,
    hooks::{self, Hook, LinkKind},
    kernel::{failed, load_despite_signals, named_program, pin_program, runs},
    syscall,
};

const HOOKS: [Hook; 2] = [Hook::Ingress, Hook::Egress];

/// See [`KernelDatapath::attach_local`](super::kernel::KernelDatapath::attach_local).
pub(super) fn attach(ebpf: &mut Ebpf, pins: &Pins, interfaces: &[String]) -> Result<(), DatapathError> {
    let indices = hooks::indices(interfaces)?;
    if !interfaces.is_empty() {
        for hook in HOOKS {
            load(ebpf, pins, hook)?;
            for (interface, index) in interfaces.iter().zip(&indices) {
                match LinkKind::of_this_kernel() {
                    LinkKind::Tcx => attach_link(ebpf, pins, hook, interface, *index)?,
                    LinkKind::Clsact => hooks::attach_filter(ebpf, pins, hook, interface, *index)?,
                }
            }
        }
    }
    for (interface, _, path) in pins.list_hook_links() {
        if !interfaces.contains(&interface) {
            Pins::remove_link(&path)?;
        }
    }
    hooks::remove_filters(pins, &HOOKS, &indices)
}

fn load(ebpf: &mut Ebpf, pins: &Pins, hook: Hook) -> Result<(), DatapathError> {
    let name = hook.program();
    let program: &mut SchedClassifier = named_program(ebpf, name)?;
    if program.fd().is_err() {
        load_despite_signals(|| program.load()).map_err(|error| failed("load", name, error))?;
    }
    pin_program(ebpf, name, &pins.program(name))
}

fn attach_link(
    ebpf: &mut Ebpf,
    pins: &Pins,
    hook: Hook,
    interface: &str,
    index: u32,
) -> Result<(), DatapathError> {
    let own = pins.hook_link(hook, interface);
    for (pinned, of_hook, path) in pins.list_hook_links() {
        if of_hook != hook {
            continue;
        }
        // As for XDP: a link outlives its interface, and goes with it to a new name.
        if syscall::pinned_link(&path).is_ok_and(|link| link.ifindex == index) {
            if path != own {
                fs::rename(&path, &own)
                    .map_err(|source| DatapathError::new("rename", path.display().to_string(), source))?;
            }
            return take_over(ebpf, hook, &own);
        }
        if pinned == interface {
            Pins::remove_link(&path)?;
        }
    }
    let link = hooks::attach_link(ebpf, hook, interface)?;
    link.pin(&own)
        .map_err(|error| failed("pin", own.display().to_string(), error))?;
    Ok(())
}

/// Puts the program on a pinned link.
fn take_over(ebpf: &mut Ebpf, hook: Hook, path: &Path) -> Result<(), DatapathError> {
    let object = path.display().to_string();
    let link = FdLink::from(PinnedLink::from_pin(path).map_err(|error| failed("open", &object, error))?);
    let program: &mut SchedClassifier = named_program(ebpf, hook.program())?;
    if program.info().is_ok_and(|own| runs(&link, &own)) {
        return Ok(());
    }
    let link = SchedClassifierLink::try_from(link).map_err(|error| failed("open", &object, error))?;
    let link = program
        .attach_to_link(link)
        .and_then(|id| program.take_link(id))
        .map_err(|error| failed("replace the program of", &object, error))?;
    // Out of the program's hands, or it would be detached with it; the pin keeps it.
    let link = FdLink::try_from(link);
    drop(link.map_err(|error: LinkError| failed("replace the program of", &object, error))?);
    Ok(())
}
