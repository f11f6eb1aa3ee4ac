//! Programs of traffic control, in front of the host's stack and behind it: on links where the kernel has them for those
//! (TCX, Linux 6.6), and before that as filters on `clsact`, which stay by themselves and of which a pin tells.

use std::{fs, io, mem, path::Path};

use aya::{
    Ebpf,
    programs::{
        Link, LinkOrder, ProgramInfo, SchedClassifier, TcAttachType,
        links::{FdLink, LinkError},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
    },
    util::KernelVersion,
};
use nix::{
    errno::Errno,
    net::if_::{if_nameindex, if_nametoindex},
};

use super::{
    DatapathError, Pins,
    kernel::{failed, named_program, pin_program, same_program},
};
use crate::net::name_of;

/// Priority of our filters, by which, with their handles, they are known: "xl".
const PRIORITY: u16 = 0x786c;

/// How programs are attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// By a link (Linux 6.6), which stays if it is pinned, and goes with the process if it is not.
    Tcx,
    /// As a filter of the queueing discipline `clsact`, which stays.
    Clsact,
}

impl LinkKind {
    /// The best that this kernel has.
    pub fn of_this_kernel() -> Self {
        if KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0)) {
            Self::Tcx
        } else {
            Self::Clsact
        }
    }
}

/// A program and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    /// Of `local`, in front of the stack.
    Ingress,
    /// Of `local`, behind it.
    Egress,
    /// Of probes, in front of the stack.
    ProbeIn,
    /// Of probes, behind it.
    ProbeOut,
    /// In front of the stack, in place of an XDP program that changes its mode.
    Barrier,
}

impl Hook {
    const ALL: [Self; 5] = [
        Self::Ingress,
        Self::Egress,
        Self::ProbeIn,
        Self::ProbeOut,
        Self::Barrier,
    ];

    /// Without the character that ends it in the name of a pin.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
            Self::ProbeIn => "probe_in",
            Self::ProbeOut => "probe_out",
            Self::Barrier => "barrier",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hook| hook.name() == name)
    }

    /// Name of the program in its object.
    pub(super) const fn program(self) -> &'static str {
        match self {
            Self::Ingress => "xlb_ingress",
            Self::Egress => "xlb_egress",
            Self::ProbeIn => "xlb_probe_in",
            Self::ProbeOut => "xlb_probe_out",
            Self::Barrier => "xlb_barrier",
        }
    }

    const fn attach_type(self) -> TcAttachType {
        match self {
            Self::Ingress | Self::ProbeIn | Self::Barrier => TcAttachType::Ingress,
            Self::Egress | Self::ProbeOut => TcAttachType::Egress,
        }
    }

    /// Handle of the filter: "xlb", and a number that tells it from the others in the same place.
    const fn handle(self) -> TcHandle {
        match self {
            Self::Ingress | Self::Egress => TcHandle::new(0x786c, 0x6200),
            Self::ProbeIn | Self::ProbeOut => TcHandle::new(0x786c, 0x6201),
            Self::Barrier => TcHandle::new(0x786c, 0x6202),
        }
    }

    /// Among the programs of others: nobody shall take packets before the barrier.
    fn order(self) -> LinkOrder {
        match self {
            Self::Barrier => LinkOrder::first(),
            _ => LinkOrder::default(),
        }
    }

    /// What errors are about.
    pub(super) fn of(self, interface: &str) -> String {
        format!("{} of {interface}", self.name())
    }
}

/// The indices of interfaces, in their order.
///
/// # Errors
/// As [`index_of`].
pub(super) fn indices(interfaces: &[String]) -> Result<Vec<u32>, DatapathError> {
    interfaces.iter().map(|interface| index_of(interface)).collect()
}

/// The index of an interface.
///
/// # Errors
/// There is none of that name: the error lists those that there are.
pub(super) fn index_of(interface: &str) -> Result<u32, DatapathError> {
    if_nametoindex(interface).map_err(|errno| {
        let present = match errno {
            Errno::ENODEV => names().unwrap_or_default(),
            _ => String::new(),
        };
        let source = if present.is_empty() {
            io::Error::from(errno)
        } else {
            let hint = format!("{}; this network namespace has {present}", errno.desc());
            io::Error::new(io::ErrorKind::NotFound, hint)
        };
        DatapathError::new("attach", interface, source)
    })
}

/// The interfaces of this network namespace, as far as that can be read at a glance.
fn names() -> nix::Result<String> {
    const SHOWN: usize = 20;
    let found = if_nameindex()?;
    let mut names: Vec<_> = found.iter().map(|one| one.name().to_string_lossy()).collect();
    if names.len() > SHOWN {
        names.truncate(SHOWN);
        names.push("others".into());
    }
    Ok(names.join(", "))
}

/// Attaches a program by a link, behind those that are there or before them ([`Hook::order`]); it goes with the link,
/// unless that is pinned.
///
/// # Errors
/// What the kernel says.
pub(super) fn attach_link(ebpf: &mut Ebpf, hook: Hook, interface: &str) -> Result<FdLink, DatapathError> {
    let program: &mut SchedClassifier = named_program(ebpf, hook.program())?;
    let options = TcAttachOptions::TcxOrder(hook.order());
    let link = program
        .attach_with_options(interface, hook.attach_type(), options)
        .and_then(|id| program.take_link(id))
        .map_err(|error| failed("attach", hook.of(interface), error))?;
    FdLink::try_from(link).map_err(|error: LinkError| failed("attach", hook.of(interface), error))
}

/// Attaches a program as a filter, in the place of one that an earlier process has left.
///
/// # Errors
/// What the kernel says.
pub(super) fn attach_filter(
    ebpf: &mut Ebpf,
    pins: &Pins,
    hook: Hook,
    interface: &str,
    index: u32,
) -> Result<(), DatapathError> {
    let object = hook.of(interface);
    if let Err(error) = tc::qdisc_add_clsact(interface) {
        let error = failed("attach", &object, error);
        if error.source.raw_os_error() != Some(libc::EEXIST) {
            return Err(error);
        }
    }
    pins.create_filters()?;
    let path = pins.filter(hook, index);
    let pinned = ProgramInfo::from_pin(&path).ok();
    // First, so that whatever happens next, the filter is known to be ours.
    pin_program(ebpf, hook.program(), &path)?;
    let program: &mut SchedClassifier = named_program(ebpf, hook.program())?;
    let options = TcAttachOptions::Netlink(NlOptions {
        priority: PRIORITY,
        handle: hook.handle(),
        classid: None,
    });
    let attached = match program.attach_with_options(interface, hook.attach_type(), options) {
        Ok(id) => program.take_link(id),
        Err(error) => {
            let error = failed("attach", &object, error);
            if error.source.raw_os_error() != Some(libc::EEXIST) {
                return Err(error);
            }
            // A barrier has its end among its constants.
            if hook != Hook::Barrier
                && let (Some(pinned), Ok(own)) = (pinned, program.info())
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
    mem::forget(attached.map_err(|error| failed("attach", object, error))?);
    Ok(())
}

fn filter(hook: Hook, interface: &str) -> Result<SchedClassifierLink, DatapathError> {
    SchedClassifierLink::attached(interface, hook.attach_type(), PRIORITY, hook.handle(), None)
        .map_err(|error| DatapathError::new("open", hook.of(interface), error))
}

/// Removes the filters of these programs from all interfaces but those of these indices.
///
/// # Errors
/// What the kernel says.
pub(super) fn remove_filters(pins: &Pins, hooks: &[Hook], but: &[u32]) -> Result<(), DatapathError> {
    for (index, hook, path) in pins.list_filters() {
        if hooks.contains(&hook) && !but.contains(&index) {
            remove_filter_of(&path)
                .and_then(|()| fs::remove_file(&path))
                .map_err(|source| DatapathError::new("remove", path.display().to_string(), source))?;
        }
    }
    Ok(())
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
