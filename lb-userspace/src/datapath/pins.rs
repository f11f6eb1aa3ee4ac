//! Where an instance's maps, program and links are pinned.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use lb_common::abi::LAYOUT_VERSION;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{
    AttachMode, DatapathError,
    hooks::{self, Hook},
    syscall,
};

/// Where bpffs is expected.
const BPFFS: &str = "/sys/fs/bpf";
/// Folder of the pinned links.
const LINKS: &str = "links";
/// Folder of what tells of filters of traffic control, which cannot be pinned.
const FILTERS: &str = "filters";

/// Paths of the pins of one instance; the version of the map layouts is part of them.
#[derive(Clone, Debug)]
pub struct Pins {
    instance: PathBuf,
    version: PathBuf,
}

impl Pins {
    pub fn new(instance: &str) -> Self {
        let instance = Path::new(BPFFS).join("xlb").join(instance);
        let version = instance.join(format!("v{LAYOUT_VERSION}"));
        Self { instance, version }
    }

    /// Path of a pinned map.
    pub fn map(&self, name: &str) -> PathBuf {
        self.version.join("maps").join(name)
    }

    /// Path of a pinned program.
    pub fn program(&self, name: &str) -> PathBuf {
        self.version.join("programs").join(name)
    }

    /// Folder of the pinned links.
    pub fn links(&self) -> PathBuf {
        self.version.join(LINKS)
    }

    /// Path of the pinned link of an interface; the mode that was obtained is part of its name.
    pub fn link(&self, interface: &str, mode: AttachMode) -> PathBuf {
        // bpffs takes no dot in a name, as that of a VLAN has one; no interface's name has a colon.
        let interface = interface.replace('.', ":");
        self.links().join(format!("{}-{interface}", mode.name()))
    }

    /// Path of the pinned link of a program in front of the stack or behind it.
    pub(super) fn hook_link(&self, hook: Hook, interface: &str) -> PathBuf {
        let interface = interface.replace('.', ":");
        self.links().join(format!("{}-{interface}", hook.name()))
    }

    /// Path of what tells that there is a filter of ours on an interface: its program, pinned.
    pub(super) fn filter(&self, hook: Hook, ifindex: u32) -> PathBuf {
        self.version
            .join(FILTERS)
            .join(format!("{}-{ifindex}", hook.name()))
    }

    /// Tells whether an earlier daemon has left maps.
    pub fn exist(&self) -> bool {
        self.map("SETTINGS").exists()
    }

    /// Tells whether there is anything of this instance.
    pub fn has_instance(&self) -> bool {
        self.instance.exists()
    }

    /// Tells whether there is anything of another instance.
    pub fn has_other_instances(&self) -> bool {
        let folder = self.instance.parent().map(fs::read_dir);
        folder.is_some_and(|entries| {
            entries.is_ok_and(|entries| entries.flatten().any(|entry| entry.path() != self.instance))
        })
    }

    /// Tells whether there can be pins at all.
    ///
    /// # Errors
    /// bpffs is not mounted where it is expected, or is hidden.
    pub fn require_bpffs() -> Result<(), DatapathError> {
        if statfs(BPFFS).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC) {
            return Ok(());
        }
        let hint = "bpffs is not mounted there: run `mount -t bpf bpf /sys/fs/bpf`; under `ip netns exec`, \
                    which hides it, use `nsenter --net=/run/netns/NAME` instead";
        Err(DatapathError::new(
            "open",
            BPFFS,
            io::Error::new(io::ErrorKind::NotFound, hint),
        ))
    }

    /// Makes the folders.
    ///
    /// # Errors
    /// As [`Self::require_bpffs`], or the folders cannot be made.
    pub fn create(&self) -> Result<(), DatapathError> {
        Self::require_bpffs()?;
        for folder in ["maps", "programs", LINKS].map(|name| self.version.join(name)) {
            create_folder(&folder)?;
        }
        Ok(())
    }

    /// Makes the folder of what tells of filters; from then on there have been some.
    pub(super) fn create_filters(&self) -> Result<(), DatapathError> {
        create_folder(&self.version.join(FILTERS))
    }

    /// The pinned links: interface, mode and path.
    pub fn list_links(&self) -> Vec<(String, AttachMode, PathBuf)> {
        list(&self.links(), AttachMode::from_name)
    }

    /// The pinned links of all layout versions whose interface is still there, in whatever network namespace: its name when
    /// it was attached, its index there, and the program's id.
    pub fn attached(&self) -> Vec<(String, u32, u32)> {
        let links = self
            .layouts()
            .into_iter()
            .flat_map(|layout| list(&layout.join(LINKS), AttachMode::from_name));
        let attached = links.filter_map(|(interface, _, path)| {
            let link = syscall::pinned_link(&path).ok()?;
            (link.ifindex != 0).then_some((interface, link.ifindex, link.program_id))
        });
        attached.collect()
    }

    /// The folders of this and of other layout versions, as far as there are any.
    fn layouts(&self) -> Vec<PathBuf> {
        let folder = fs::read_dir(&self.instance);
        folder.map_or_else(
            |_| Vec::new(),
            |entries| entries.flatten().map(|entry| entry.path()).collect(),
        )
    }

    /// As [`Self::list_links`], of the programs in front of the stack and behind it.
    pub(super) fn list_hook_links(&self) -> Vec<(String, Hook, PathBuf)> {
        list(&self.links(), Hook::from_name)
    }

    /// The filters of ours: index of the interface, which hook, and the path of what tells of it.
    pub(super) fn list_filters(&self) -> Vec<(u32, Hook, PathBuf)> {
        let filters = list(&self.version.join(FILTERS), Hook::from_name);
        filters
            .into_iter()
            .filter_map(|(ifindex, hook, path)| Some((ifindex.parse().ok()?, hook, path)))
            .collect()
    }

    /// Removes a pinned link; the program is off the interface then.
    ///
    /// # Errors
    /// It cannot be detached or its pin not removed.
    pub fn remove_link(path: &Path) -> Result<(), DatapathError> {
        remove_link(path).map_err(|source| DatapathError::new("remove", path.display().to_string(), source))
    }

    /// Removes the pins of other layout versions: their program gives way to that of this one, and their flows end.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn remove_other_layouts(&self) -> Result<(), DatapathError> {
        for path in self.layouts() {
            if path != self.version {
                remove_tree(&path, Filters::Removed)
                    .map_err(|source| DatapathError::new("remove", path.display().to_string(), source))?;
            }
        }
        Ok(())
    }

    /// Removes the pins of this layout version.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn remove_own_layout(&self) -> Result<(), DatapathError> {
        remove_tree(&self.version, Filters::Removed)
            .map_err(|source| DatapathError::new("remove", self.version.display().to_string(), source))?;
        // Stays where another layout is in it.
        let _ = fs::remove_dir(&self.instance);
        Ok(())
    }

    /// Tells whether there have been filters of any layout, whose discipline stays on their interface.
    pub fn have_had_filters(&self) -> bool {
        self.layouts().iter().any(|layout| layout.join(FILTERS).exists())
    }

    /// Removes every pin of the instance, of this and of other layout versions: the program is detached and its
    /// maps are freed. Tells whether there were any.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn remove_all(&self) -> Result<bool, DatapathError> {
        self.remove(Filters::Removed)
    }

    /// As [`Self::remove_all`], where the filters were in a network namespace that is gone: those that are here under the
    /// same indices are another instance's.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn remove_all_but_filters(&self) -> Result<bool, DatapathError> {
        self.remove(Filters::Left)
    }

    fn remove(&self, filters: Filters) -> Result<bool, DatapathError> {
        match remove_tree(&self.instance, filters) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(DatapathError::new(
                "remove",
                self.instance.display().to_string(),
                source,
            )),
        }
    }
}

/// What is pinned in a folder under names that begin with a known word.
fn list<T>(folder: &Path, known: impl Fn(&str) -> Option<T>) -> Vec<(String, T, PathBuf)> {
    let Ok(folder) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let named = |name: OsString| {
        let name = name.to_str()?.to_owned();
        let (word, interface) = name.split_once('-')?;
        Some((interface.replace(':', "."), known(word)?))
    };
    let mut pins: Vec<_> = folder
        .flatten()
        .filter_map(|entry| named(entry.file_name()).map(|(interface, word)| (interface, word, entry.path())))
        .collect();
    pins.sort_by(|a, b| a.0.cmp(&b.0));
    pins
}

/// What becomes of the filters that pins tell of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Filters {
    Removed,
    Left,
}

fn create_folder(path: &Path) -> Result<(), DatapathError> {
    fs::create_dir_all(path)
        .map_err(|source| DatapathError::new("create", path.display().to_string(), source))
}

fn remove_link(path: &Path) -> io::Result<()> {
    syscall::detach_pinned_link(path)?;
    fs::remove_file(path)
}

/// As `fs::remove_dir_all`, which bpffs refuses for its odd file types.
fn remove_tree(path: &Path, filters: Filters) -> io::Result<()> {
    // Links first, so that no program runs while its maps go.
    let mut entries: Vec<_> = fs::read_dir(path)?.collect::<io::Result<_>>()?;
    entries.sort_by_key(|entry| entry.file_name() != LINKS && entry.file_name() != FILTERS);
    for entry in entries {
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path(), filters)?;
        } else if path.ends_with(LINKS) {
            remove_link(&entry.path())?;
        } else {
            if path.ends_with(FILTERS) && filters == Filters::Removed {
                hooks::remove_filter_of(&entry.path())?;
            }
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(path)
}
