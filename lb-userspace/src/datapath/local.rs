//! The programs that deliver to processes on this host, in front of its stack and behind it: as pinned links where the
//! kernel has them for traffic control (TCX, Linux 6.6), and before that as filters, which stay by themselves.

use std::{fs, io, path::Path};

use aya::{
    Ebpf,
    programs::{
        Link, LinkOrder, ProgramInfo, SchedClassifier, TcAttachType,
        links::{FdLink, LinkError, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
    },
    util::KernelVersion,
};
use nix::net::if_::if_nametoindex;

use super::{
    DatapathError, Pins,
    kernel::{failed, named_program, pin_program, runs, same_program},
    syscall,
};
use crate::net::name_of;

/// Priority and handle of our filters, by which they are known: "xl" and "xlb".
const PRIORITY: u16 = 0x786c;
const HANDLE: TcHandle = TcHandle::new(0x786c, 0x6200);

/// Where a program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    /// In front of the stack.
    Ingress,
    /// Behind it.
    Egress,
}

impl Hook {
    const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hook| hook.name() == name)
    }

    /// Name of the program in the object.
    const fn program(self) -> &'static str {
        match self {
            Self::Ingress => "xlb_ingress",
            Self::Egress => "xlb_egress",
        }
    }

    const fn attach_type(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }
}

/// See [`KernelDatapath::attach_local`](super::kernel::KernelDatapath::attach_local).
pub(super) fn attach(ebpf: &mut Ebpf, pins: &Pins, interfaces: &[String]) -> Result<(), DatapathError> {
    let has_links = KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0));
    let mut indices = Vec::new();
    for interface in interfaces {
        let index = if_nametoindex(interface.as_str())
            .map_err(|errno| DatapathError::new("attach", interface, io::Error::from(errno)))?;
        indices.push(index);
    }
    if !interfaces.is_empty() {
        for hook in Hook::ALL {
            load(ebpf, pins, hook)?;
            for (interface, index) in interfaces.iter().zip(&indices) {
                if has_links {
                    attach_link(ebpf, pins, hook, interface, *index)?;
                } else {
                    attach_filter(ebpf, pins, hook, interface, *index)?;
                }
            }
        }
    }
    for (interface, _, path) in pins.list_hook_links() {
        if !interfaces.contains(&interface) {
            Pins::remove_link(&path)?;
        }
    }
    for (index, _, path) in pins.list_filters() {
        if !indices.contains(&index) {
            remove_filter_of(&path)
                .and_then(|()| fs::remove_file(&path))
                .map_err(|source| DatapathError::new("remove", path.display().to_string(), source))?;
        }
    }
    Ok(())
}

fn load(ebpf: &mut Ebpf, pins: &Pins, hook: Hook) -> Result<(), DatapathError> {
    let name = hook.program();
    let program: &mut SchedClassifier = named_program(ebpf, name)?;
    if program.fd().is_err() {
        program.load().map_err(|error| failed("load", name, error))?;
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
        if syscall::pinned_link_ifindex(&path).ok() == Some(index) {
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
    let program: &mut SchedClassifier = named_program(ebpf, hook.program())?;
    let options = TcAttachOptions::TcxOrder(LinkOrder::default());
    let object = || format!("{} of {interface}", hook.name());
    let link = program
        .attach_with_options(interface, hook.attach_type(), options)
        .and_then(|id| program.take_link(id))
        .map_err(|error| failed("attach", object(), error))?;
    let link = FdLink::try_from(link).map_err(|error: LinkError| failed("attach", object(), error))?;
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

fn attach_filter(
    ebpf: &mut Ebpf,
    pins: &Pins,
    hook: Hook,
    interface: &str,
    index: u32,
) -> Result<(), DatapathError> {
    let object = format!("{} of {interface}", hook.name());
    if let Err(error) = tc::qdisc_add_clsact(interface) {
        let error = failed("attach", &object, error);
        if error.source.raw_os_error() != Some(libc::EEXIST) {
            return Err(error);
        }
    }
    let path = pins.filter(hook, index);
    let pinned = ProgramInfo::from_pin(&path).ok();
    // First, so that whatever happens next, the filter is known to be ours.
    pin_program(ebpf, hook.program(), &path)?;
    let program: &mut SchedClassifier = named_program(ebpf, hook.program())?;
    let options = TcAttachOptions::Netlink(NlOptions {
        priority: PRIORITY,
        handle: HANDLE,
        classid: None,
    });
    let attached = match program.attach_with_options(interface, hook.attach_type(), options) {
        Ok(id) => program.take_link(id),
        Err(error) => {
            let error = failed("attach", &object, error);
            if error.source.raw_os_error() != Some(libc::EEXIST) {
                return Err(error);
            }
            if let (Some(pinned), Ok(own)) = (pinned, program.info())
                && same_program(&pinned, &own)
            {
                return Ok(());
            }
            program
                .attach_to_link(filter(hook, interface)?)
                .and_then(|id| program.take_link(id))
        }
    };
    // Out of the program's hands, or it would be detached with it.
    std::mem::forget(attached.map_err(|error| failed("attach", object, error))?);
    Ok(())
}

fn filter(hook: Hook, interface: &str) -> Result<SchedClassifierLink, DatapathError> {
    SchedClassifierLink::attached(interface, hook.attach_type(), PRIORITY, HANDLE, None)
        .map_err(|error| DatapathError::new("open", format!("{} of {interface}", hook.name()), error))
}

/// Removes the filter that a pin tells of; one that has gone, with its interface or without, is no error.
///
/// # Errors
/// What the kernel says.
pub(super) fn remove_filter_of(path: &Path) -> io::Result<()> {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let known = name
        .split_once('-')
        .and_then(|(hook, index)| Some((Hook::from_name(hook)?, name_of(index.parse().ok()?)?)));
    let Some((hook, interface)) = known else {
        return Ok(());
    };
    let removed = filter(hook, &interface)
        .and_then(|link| Link::detach(link).map_err(|error| failed("remove", &interface, error)));
    match removed {
        Ok(()) => Ok(()),
        // No filter; no clsact; the interface has gone just now.
        Err(error)
            if matches!(
                error.source.raw_os_error(),
                Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(error.source),
    }
}
