//! The program that unwraps packets on a backend's host. Nothing is pinned: all of it goes with this process.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::{IpAddr, Ipv4Addr},
};

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{HashMap, LpmTrie, MapData, MapError, PerCpuArray, lpm_trie::Key},
    programs::{Xdp, links::FdLink},
    util::KernelVersion,
};
use ipnet::IpNet;
use lb_common::abi::{Address, Count, DecapReason};

use super::{
    DatapathError,
    kernel::{
        Attachment, Mode, Raw, attach_link, failed, load_despite_signals, named_map, named_program, obtain,
    },
};

/// The object that lb-userspace/build.rs has built.
pub static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf-decap.o"));

/// Name of the XDP program in the object.
pub const PROGRAM: &str = "xlb_decap";

const VIPS: &str = "VIPS";
const OWN_ADDRESSES: &str = "OWN_ADDRESSES";
const SOURCES: &str = "SOURCES";
const COUNTERS: &str = "COUNTERS";

/// Bits of the prefix that IPv4 addresses have in an [`Address`].
const MAPPED_BITS: u32 = 96;

/// The program with its maps, and its links to interfaces.
pub struct Decap {
    ebpf: Ebpf,
    own_addresses: HashMap<MapData, Raw<Address>, u32>,
    counters: PerCpuArray<MapData, Raw<Count>>,
    /// What `own_addresses` holds.
    known: BTreeSet<Address>,
    /// Held, not used: a link that is dropped takes the program off its interface. With the interface's index, by its
    /// name.
    links: BTreeMap<String, (u32, FdLink)>,
}

impl fmt::Debug for Decap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decap")
            .field("links", &self.links.keys())
            .finish_non_exhaustive()
    }
}

impl Decap {
    /// Loads the program for these VIPs. Only packets from outer sources in one of the prefixes are unwrapped, from
    /// any where there is none.
    ///
    /// # Errors
    /// A permission is missing, the kernel is too old or refuses the program, or there are more VIPs or prefixes than
    /// the maps take.
    pub fn load(vips: &BTreeSet<IpAddr>, sources: &[IpNet]) -> Result<Self, DatapathError> {
        if KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(5, 18, 0)) {
            let source = io::Error::new(
                io::ErrorKind::Unsupported,
                "it needs Linux 5.18 or newer, for frames in several buffers",
            );
            return Err(DatapathError::new("load", PROGRAM, source));
        }
        let mut ebpf = EbpfLoader::new()
            .load(OBJECT)
            .map_err(|error| failed("load", "the program's maps", error))?;
        let program = named_program::<Xdp>(&mut ebpf, PROGRAM)?;
        load_despite_signals(|| program.load()).map_err(|error| failed("load", PROGRAM, error))?;

        let mut vip_map: HashMap<MapData, Raw<Address>, u32> = named_map(&mut ebpf, VIPS)?;
        for vip in vips {
            vip_map
                .insert(Raw(Address::from(*vip)), 1, 0)
                .map_err(|error| failed("update", format!("{VIPS}[{vip}]"), error))?;
        }
        let mut source_map: LpmTrie<MapData, Raw<Address>, u32> = named_map(&mut ebpf, SOURCES)?;
        for (bits, address, allowed) in prefixes(sources) {
            source_map
                .insert(&Key::new(bits, Raw(address)), allowed, 0)
                .map_err(|error| failed("update", format!("{SOURCES}[{address}]"), error))?;
        }
        Ok(Self {
            own_addresses: named_map(&mut ebpf, OWN_ADDRESSES)?,
            counters: named_map(&mut ebpf, COUNTERS)?,
            known: BTreeSet::new(),
            links: BTreeMap::new(),
            ebpf,
        })
    }

    /// The object with its loaded program, for test runs.
    pub fn ebpf_mut(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Sets the addresses of this host: only packets to one of them are unwrapped.
    ///
    /// # Errors
    /// The kernel refuses a change; what was changed before stays changed, and the next call goes on from there.
    pub fn set_own_addresses(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<(), DatapathError> {
        let wanted: BTreeSet<Address> = addresses.iter().map(|address| Address::from(*address)).collect();
        for address in wanted.difference(&self.known.clone()) {
            self.own_addresses
                .insert(Raw(*address), 1, 0)
                .map_err(|error| failed("update", format!("{OWN_ADDRESSES}[{address}]"), error))?;
            self.known.insert(*address);
        }
        for address in self.known.clone().difference(&wanted) {
            self.own_addresses
                .remove(&Raw(*address))
                .map_err(|error| failed("delete", format!("{OWN_ADDRESSES}[{address}]"), error))?;
            self.known.remove(address);
        }
        Ok(())
    }

    /// Attaches the program to an interface, unless it is; tells how if it was not.
    ///
    /// # Errors
    /// The interface has another XDP program, or refuses the mode.
    pub fn attach(
        &mut self,
        interface: &str,
        index: u32,
        mode: Mode,
    ) -> Result<Option<Attachment>, DatapathError> {
        if self
            .links
            .get(interface)
            .is_some_and(|(attached, _)| *attached == index)
        {
            return Ok(None);
        }
        let program = named_program(&mut self.ebpf, PROGRAM)?;
        let (attachment, link) = obtain(interface, mode, |mode| {
            attach_link(program, interface, index, mode)
        })?;
        self.links.insert(interface.to_owned(), (index, link));
        Ok(Some(attachment))
    }

    /// Takes the program off all interfaces.
    pub fn detach(&mut self) {
        self.links.clear();
    }

    /// What was counted for each reason.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn counts(&self) -> Result<BTreeMap<DecapReason, Count>, DatapathError> {
        let count = |reason: &DecapReason| Ok((*reason, sum(&self.counters, reason.index())?));
        DecapReason::ALL
            .iter()
            .map(count)
            .collect::<Result<_, MapError>>()
            .map_err(|error| failed("read", COUNTERS, error))
    }
}

/// A counter of all CPUs together.
fn sum(map: &PerCpuArray<MapData, Raw<Count>>, index: u32) -> Result<Count, MapError> {
    let mut total = Count::default();
    for Raw(count) in map.get(&index, 0)?.iter() {
        total.packets += count.packets;
        total.bytes += count.bytes;
    }
    Ok(total)
}

/// Entries of the map of sources: bits, address, and 1 where the prefix is allowed.
fn prefixes(sources: &[IpNet]) -> Vec<(u32, Address, u32)> {
    if sources.is_empty() {
        return vec![(0, Address::default(), 1)];
    }
    // IPv4 is a prefix of IPv6 in the map: a prefix of IPv6 that is around it, such as ::/0, does not mean it.
    let mut prefixes = vec![(MAPPED_BITS, Address::from(Ipv4Addr::UNSPECIFIED), 0)];
    for source in sources {
        let bits = match source {
            IpNet::V4(_) => MAPPED_BITS,
            IpNet::V6(_) => 0,
        };
        prefixes.push((bits + u32::from(source.prefix_len()), source.network().into(), 1));
    }
    prefixes
}
