//! The programs that have health checks of `dsr`, `ipip` and `gue` travel like packets of clients. They are there for this
//! process alone, so that no link is pinned; filters, which stay, it removes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, MapData},
    programs::{SchedClassifier, links::FdLink},
};
use lb_common::abi::{MAX_PROBE_PATHS, PROBE_MARK, ProbePath};

use super::{
    DatapathError, LinkKind, Pins,
    hooks::{self, Hook},
    kernel::{Raw, failed, load_despite_signals, named_map, named_program},
};

/// The object that lb-userspace/build.rs has built.
pub static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf-probe.o"));

const HOOKS: [Hook; 2] = [Hook::ProbeOut, Hook::ProbeIn];

const PATHS: &str = "PATHS";

/// The programs with their maps, and their links to interfaces.
pub struct Probes {
    ebpf: Ebpf,
    kind: LinkKind,
    pins: Pins,
    paths: Array<MapData, Raw<ProbePath>>,
    /// What `paths` holds.
    numbers: BTreeMap<ProbePath, u32>,
    /// Held, not used: a link that is dropped takes its program off. With the interface's index, by its name.
    links: BTreeMap<String, (u32, [FdLink; 2])>,
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
    /// Loads the programs, without paths and interfaces; `pins` are to tell of filters.
    ///
    /// # Errors
    /// A permission is missing, or the kernel refuses the programs.
    pub fn load(kind: LinkKind, pins: Pins) -> Result<Self, DatapathError> {
        let mut ebpf = EbpfLoader::new()
            .load(OBJECT)
            .map_err(|error| failed("load", "the maps of probes", error))?;
        for hook in HOOKS {
            let program = named_program::<SchedClassifier>(&mut ebpf, hook.program())?;
            load_despite_signals(|| program.load()).map_err(|error| failed("load", hook.program(), error))?;
        }
        Ok(Self {
            paths: named_map(&mut ebpf, PATHS)?,
            numbers: BTreeMap::new(),
            links: BTreeMap::new(),
            kind,
            pins,
            ebpf,
        })
    }

    /// The object with its loaded programs, for test runs.
    pub fn ebpf_mut(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Sets the paths that there are, as many as the map takes; tells how many it does not. Those that stay keep their marks.
    ///
    /// # Errors
    /// The kernel refuses a change; the next call goes on from there.
    pub fn set_paths(&mut self, wanted: &BTreeSet<ProbePath>) -> Result<usize, DatapathError> {
        self.numbers.retain(|path, _| wanted.contains(path));
        let taken: BTreeSet<u32> = self.numbers.values().copied().collect();
        let mut free = (1..MAX_PROBE_PATHS).filter(|number| !taken.contains(number));
        for path in wanted {
            if self.numbers.contains_key(path) {
                continue;
            }
            let Some(number) = free.next() else {
                break;
            };
            self.paths
                .set(number, Raw(*path), 0)
                .map_err(|error| failed("update", format!("{PATHS}[{number}]"), error))?;
            self.numbers.insert(*path, number);
        }
        Ok(wanted.len() - self.numbers.len())
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
        let indices = hooks::indices(interfaces)?;
        self.links.retain(|interface, _| interfaces.contains(interface));
        for (interface, index) in interfaces.iter().zip(&indices) {
            match self.kind {
                LinkKind::Tcx => self.attach_links(interface, *index)?,
                LinkKind::Clsact => {
                    for hook in HOOKS {
                        hooks::attach_filter(&mut self.ebpf, &self.pins, hook, interface, *index)?;
                    }
                }
            }
        }
        hooks::remove_filters(&self.pins, &HOOKS, &indices)
    }

    fn attach_links(&mut self, interface: &str, index: u32) -> Result<(), DatapathError> {
        // Under the name of one that is gone, another may have come.
        if self
            .links
            .get(interface)
            .is_some_and(|(former, _)| *former == index)
        {
            return Ok(());
        }
        self.links.remove(interface);
        let [out, back] = HOOKS.map(|hook| hooks::attach_link(&mut self.ebpf, hook, interface));
        self.links.insert(interface.to_owned(), (index, [out?, back?]));
        Ok(())
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        // What stays does nothing without this process.
        let _ = remove_left_behind(&self.pins);
    }
}

/// Removes the filters that a process which was killed has left.
///
/// # Errors
/// What the kernel says.
pub fn remove_left_behind(pins: &Pins) -> Result<(), DatapathError> {
    hooks::remove_filters(pins, &HOOKS, &[])
}
