//! The programs that have health checks of `dsr`, `ipip` and `gue` travel like packets of clients. Nothing is pinned:
//! all of it goes with this process.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
};

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, MapData},
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, qdisc_add_clsact, qdisc_detach_program},
    },
    util::KernelVersion,
};
use lb_common::abi::{MAX_PROBE_PATHS, PROBE_MARK, ProbePath};
use nix::net::if_::if_nametoindex;

use super::{
    DatapathError,
    kernel::{Raw, failed, named_map, named_program},
};

/// The object that lb-userspace/build.rs has built.
pub static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf-probe.o"));

/// The programs of the object, and where each is attached.
pub const PROGRAMS: [(&str, TcAttachType); 2] = [
    ("xlb_probe_out", TcAttachType::Egress),
    ("xlb_probe_in", TcAttachType::Ingress),
];

const PATHS: &str = "PATHS";

/// How the programs are attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// By a link that goes with the process (Linux 6.6).
    Tcx,
    /// As a filter of the queueing discipline `clsact`, which a process that is killed leaves behind.
    Clsact,
}

impl LinkKind {
    /// The best that this kernel has.
    pub fn of_this_kernel() -> Self {
        if KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(6, 6, 0)) {
            Self::Clsact
        } else {
            Self::Tcx
        }
    }
}

/// The programs with their maps, and their links to interfaces.
pub struct Probes {
    ebpf: Ebpf,
    kind: LinkKind,
    paths: Array<MapData, Raw<ProbePath>>,
    /// What `paths` holds.
    numbers: BTreeMap<ProbePath, u32>,
    /// Held, not used: a link that is dropped takes its program off. With the interface's index, by its name.
    links: BTreeMap<String, (u32, Vec<SchedClassifierLink>)>,
}

impl fmt::Debug for Probes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Probes")
            .field("kind", &self.kind)
            .field("numbers", &self.numbers)
            .field("links", &self.links.keys())
            .finish_non_exhaustive()
    }
}

impl Probes {
    /// Loads the programs, without paths and interfaces.
    ///
    /// # Errors
    /// A permission is missing, or the kernel refuses the programs.
    pub fn load(kind: LinkKind) -> Result<Self, DatapathError> {
        let mut ebpf = EbpfLoader::new()
            .load(OBJECT)
            .map_err(|error| failed("load", "the maps of probes", error))?;
        for (name, _) in PROGRAMS {
            named_program::<SchedClassifier>(&mut ebpf, name)?
                .load()
                .map_err(|error| failed("load", name, error))?;
        }
        Ok(Self {
            paths: named_map(&mut ebpf, PATHS)?,
            numbers: BTreeMap::new(),
            links: BTreeMap::new(),
            kind,
            ebpf,
        })
    }

    /// The object with its loaded programs, for test runs.
    pub fn ebpf_mut(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Sets the paths that there are. Those that stay keep their marks.
    ///
    /// # Errors
    /// The kernel refuses a change, or there are more than the map takes; the next call goes on from there.
    pub fn set_paths(&mut self, wanted: &BTreeSet<ProbePath>) -> Result<(), DatapathError> {
        self.numbers.retain(|path, _| wanted.contains(path));
        let taken: BTreeSet<u32> = self.numbers.values().copied().collect();
        let mut free = (1..MAX_PROBE_PATHS).filter(|number| !taken.contains(number));
        for path in wanted {
            if self.numbers.contains_key(path) {
                continue;
            }
            let full = || DatapathError::new("update", PATHS, io::Error::other("it is full"));
            let number = free.next().ok_or_else(full)?;
            self.paths
                .set(number, Raw(*path), 0)
                .map_err(|error| failed("update", format!("{PATHS}[{number}]"), error))?;
            self.numbers.insert(*path, number);
        }
        Ok(())
    }

    /// The mark of packets that shall travel a path, if it is one of those that were set.
    pub fn mark(&self, path: &ProbePath) -> Option<u32> {
        self.numbers.get(path).map(|number| PROBE_MARK | number)
    }

    /// Attaches the programs to exactly these interfaces.
    ///
    /// # Errors
    /// An interface is missing or refuses a program; the next call goes on from there.
    pub fn attach(&mut self, interfaces: &[String]) -> Result<(), DatapathError> {
        self.links.retain(|interface, _| interfaces.contains(interface));
        for interface in interfaces {
            let index = if_nametoindex(interface.as_str()).map_err(|errno| {
                DatapathError::new("attach the programs of probes", interface, errno.into())
            })?;
            // Under the name of one that is gone, another may have come.
            if self
                .links
                .get(interface)
                .is_some_and(|(former, _)| *former == index)
            {
                continue;
            }
            self.links.remove(interface);
            let links = self.attach_one(interface)?;
            self.links.insert(interface.clone(), (index, links));
        }
        Ok(())
    }

    fn attach_one(&mut self, interface: &str) -> Result<Vec<SchedClassifierLink>, DatapathError> {
        if self.kind == LinkKind::Clsact {
            remove_left_behind(interface);
            // It may be there already; otherwise attaching tells.
            let _ = qdisc_add_clsact(interface);
        }
        let mut links = Vec::new();
        for (name, place) in PROGRAMS {
            let program: &mut SchedClassifier = named_program(&mut self.ebpf, name)?;
            let options = match self.kind {
                LinkKind::Tcx => TcAttachOptions::TcxOrder(LinkOrder::default()),
                LinkKind::Clsact => TcAttachOptions::Netlink(NlOptions::default()),
            };
            let id = program
                .attach_with_options(interface, place, options)
                .map_err(|error| failed("attach the programs of probes", interface, error))?;
            let link = program.take_link(id);
            links.push(link.map_err(|error| failed("attach the programs of probes", interface, error))?);
        }
        Ok(links)
    }
}

/// Takes programs off that a process which was killed has left on an interface, as filters of `clsact`.
pub fn remove_left_behind(interface: &str) {
    for (name, place) in PROGRAMS {
        // Where there are none, this is an error.
        let _ = qdisc_detach_program(interface, place, name);
    }
}
