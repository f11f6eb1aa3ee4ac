//! The kernel's implementation: maps and links that are pinned, so that packets go on without the daemon.

use std::{collections::BTreeMap, fmt, fs, io, os::fd::AsFd, path::Path};

use aya::{
    Ebpf, EbpfLoader, Pod, include_bytes_aligned,
    maps::{
        Array, ArrayOfMaps, HashMap, IterableMap, Map, MapData, MapError, MapType, PerCpuArray, PerCpuValues,
        lpm_trie::{self, LpmTrie},
    },
    programs::{
        Program, ProgramError, ProgramInfo, Xdp, XdpMode,
        links::{FdLink, LinkError, PinnedLink},
        xdp::XdpLink,
    },
    util::{KernelVersion, nr_cpus},
};
use lb_common::abi::{
    Address, Backend, BackendCounters, Count, FilterKey, Flow, FlowKey, LiveCount, MAX_ADDRESSES,
    MAX_BACKENDS, MAX_SERVICE_KEYS, MAX_SERVICES, MAX_SOURCE_FILTERS, REASON_COUNT, SLOT_COUNT, Service,
    ServiceKey, Settings, Totals,
};
use tracing::warn;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    AttachMode, Contents, Counters, Datapath, DatapathError, LinkKind, Live, Operation, Pins, Position,
    SlotTable,
    barrier::{self, Barrier},
    counters, local, packet_log, reply_key, syscall,
};

/// The object that lb-userspace/build.rs has built.
pub static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf.o"));

/// Name of the XDP program in the object.
pub const PROGRAM: &str = "xlb";

/// Lets aya read and write a type of the shared layouts.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct Raw<T>(pub T);

// SAFETY: zerocopy's traits hold for T: any bytes are a value of it, it has no padding, and it is Copy.
unsafe impl<T: FromBytes + IntoBytes + Immutable + Copy + 'static> Pod for Raw<T> {}

/// Memory of a flow table with room for `flows` flows: keys and values of both maps, and what the kernel adds to
/// each entry of an LRU hash (`struct htab_elem` with its node, and a bucket).
pub const fn flow_table_memory(flows: u32) -> u64 {
    const OVERHEAD: u64 = 48 + 16;
    let flow = (size_of::<FlowKey>() + size_of::<Flow>()) as u64 + OVERHEAD;
    let reply = 2 * size_of::<FlowKey>() as u64 + OVERHEAD;
    (flow + reply) * flows as u64
}

/// An interface that the program is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    pub interface: String,
    pub mode: AttachMode,
    /// Why native mode was not obtained, where `auto` had to fall back.
    pub fallback: Option<String>,
}

/// The maps and the program of one instance.
pub struct KernelDatapath {
    pins: Pins,
    /// Holds the program; the maps are taken out of it.
    ebpf: Ebpf,
    settings: Array<MapData, Raw<Settings>>,
    addresses: HashMap<MapData, Raw<Address>, u32>,
    service_keys: HashMap<MapData, Raw<ServiceKey>, u32>,
    services: Array<MapData, Raw<Service>>,
    slot_tables: ArrayOfMaps<MapData, Array<MapData, u32>>,
    slot_tables_data: MapData,
    backends: Array<MapData, Raw<Backend>>,
    source_filters: LpmTrie<MapData, Raw<FilterKey>, u32>,
    live: Array<MapData, Raw<LiveCount>>,
    live_base: Array<MapData, u64>,
    flows: HashMap<MapData, Raw<FlowKey>, Raw<Flow>>,
    replies: HashMap<MapData, Raw<FlowKey>, Raw<FlowKey>>,
    totals: PerCpuArray<MapData, Raw<Totals>>,
    reasons: PerCpuArray<MapData, Raw<Count>>,
    service_counters: PerCpuArray<MapData, Raw<Count>>,
    backend_counters: PerCpuArray<MapData, Raw<BackendCounters>>,
}

impl fmt::Debug for KernelDatapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelDatapath")
            .field("pins", &self.pins)
            .finish_non_exhaustive()
    }
}

/// What a pinned map must be for the program to run on it.
struct Layout {
    name: &'static str,
    kind: MapType,
    key: usize,
    value: usize,
    /// `None` where the daemon chooses.
    entries: Option<u32>,
}

const fn layout(name: &'static str, kind: MapType, key: usize, value: usize, entries: u32) -> Layout {
    Layout {
        name,
        kind,
        key,
        value,
        entries: Some(entries),
    }
}

const fn flow_layout(name: &'static str, value: usize) -> Layout {
    Layout {
        name,
        kind: MapType::LruHash,
        key: size_of::<FlowKey>(),
        value,
        entries: None,
    }
}

/// The key of a source filter as the kernel has it (`struct bpf_lpm_trie_key_u8`).
#[repr(C)]
#[derive(Clone, FromBytes, IntoBytes, Immutable)]
struct FilterEntry {
    length: u32,
    key: FilterKey,
}

/// Every map of the object that is pinned.
const MAPS: &[Layout] = &[
    layout("SETTINGS", MapType::Array, 4, size_of::<Settings>(), 1),
    layout("ADDRESSES", MapType::Hash, size_of::<Address>(), 4, MAX_ADDRESSES),
    layout(
        "SERVICE_KEYS",
        MapType::Hash,
        size_of::<ServiceKey>(),
        4,
        MAX_SERVICE_KEYS,
    ),
    layout("SERVICES", MapType::Array, 4, size_of::<Service>(), MAX_SERVICES),
    layout("SLOT_TABLES", MapType::ArrayOfMaps, 4, 4, MAX_SERVICES),
    layout("BACKENDS", MapType::Array, 4, size_of::<Backend>(), MAX_BACKENDS),
    layout(
        SOURCE_FILTERS,
        MapType::LpmTrie,
        size_of::<FilterEntry>(),
        4,
        MAX_SOURCE_FILTERS,
    ),
    layout("LIVE", MapType::Array, 4, size_of::<LiveCount>(), MAX_BACKENDS),
    layout("LIVE_BASE", MapType::Array, 4, 8, MAX_BACKENDS),
    flow_layout(FLOWS, size_of::<Flow>()),
    flow_layout(REPLIES, size_of::<FlowKey>()),
    layout("TOTALS", MapType::PerCpuArray, 4, size_of::<Totals>(), 1),
    layout(
        "COUNTERS",
        MapType::PerCpuArray,
        4,
        size_of::<Count>(),
        REASON_COUNT,
    ),
    layout(
        "SERVICE_COUNTERS",
        MapType::PerCpuArray,
        4,
        size_of::<Count>(),
        MAX_SERVICES * REASON_COUNT,
    ),
    layout(
        "BACKEND_COUNTERS",
        MapType::PerCpuArray,
        4,
        size_of::<BackendCounters>(),
        MAX_BACKENDS,
    ),
];

const SOURCE_FILTERS: &str = "SOURCE_FILTERS";
const FLOWS: &str = "FLOWS";
const REPLIES: &str = "REPLIES";

impl KernelDatapath {
    /// Loads the program on the maps that an earlier daemon has pinned, or on new ones with room for
    /// `flow_table_size` flows.
    ///
    /// # Errors
    /// bpffs is not mounted, a permission is missing, the kernel refuses the program, or the pinned maps are of
    /// another build.
    pub fn open(pins: Pins, flow_table_size: u32) -> Result<Self, DatapathError> {
        pins.create()?;
        let mut loader = EbpfLoader::new();
        loader
            .map_max_entries(FLOWS, flow_table_size)
            .map_max_entries(REPLIES, flow_table_size);
        for layout in MAPS {
            check_pinned(&pins, layout)?;
            loader.map_pin_path(layout.name, pins.map(layout.name));
        }
        let mut ebpf = loader
            .load(OBJECT)
            .map_err(|error| failed("load", "the program's maps", error))?;
        let program = xdp_program(&mut ebpf)?;
        load_despite_signals(|| program.load()).map_err(|error| failed("load", "the program", error))?;
        pin_program(&mut ebpf, PROGRAM, &pins.program(PROGRAM))?;

        let data =
            |name: &str| MapData::from_pin(pins.map(name)).map_err(|error| failed("open", name, error));
        let converted = |name: &str, error: MapError| failed("open", name, error);
        Ok(Self {
            settings: array(data("SETTINGS")?).map_err(|error| converted("SETTINGS", error))?,
            addresses: hash(data("ADDRESSES")?).map_err(|error| converted("ADDRESSES", error))?,
            service_keys: hash(data("SERVICE_KEYS")?).map_err(|error| converted("SERVICE_KEYS", error))?,
            services: array(data("SERVICES")?).map_err(|error| converted("SERVICES", error))?,
            slot_tables: ArrayOfMaps::try_from(Map::ArrayOfMaps(data("SLOT_TABLES")?))
                .map_err(|error| converted("SLOT_TABLES", error))?,
            slot_tables_data: data("SLOT_TABLES")?,
            backends: array(data("BACKENDS")?).map_err(|error| converted("BACKENDS", error))?,
            source_filters: LpmTrie::try_from(Map::LpmTrie(data(SOURCE_FILTERS)?))
                .map_err(|error| converted(SOURCE_FILTERS, error))?,
            live: array(data("LIVE")?).map_err(|error| converted("LIVE", error))?,
            live_base: array(data("LIVE_BASE")?).map_err(|error| converted("LIVE_BASE", error))?,
            flows: lru_hash(data(FLOWS)?).map_err(|error| converted(FLOWS, error))?,
            replies: lru_hash(data(REPLIES)?).map_err(|error| converted(REPLIES, error))?,
            totals: per_cpu(data("TOTALS")?).map_err(|error| converted("TOTALS", error))?,
            reasons: per_cpu(data("COUNTERS")?).map_err(|error| converted("COUNTERS", error))?,
            service_counters: per_cpu(data("SERVICE_COUNTERS")?)
                .map_err(|error| converted("SERVICE_COUNTERS", error))?,
            backend_counters: per_cpu(data("BACKEND_COUNTERS")?)
                .map_err(|error| converted("BACKEND_COUNTERS", error))?,
            ebpf,
            pins,
        })
    }

    /// The object with its loaded program, for a caller that starts log readers or test runs.
    pub fn ebpf_mut(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Logs what the program says of each packet, where it was built to; to be called within a tokio runtime.
    ///
    /// # Errors
    /// The records cannot be read.
    pub fn start_packet_log(&mut self) -> Result<(), DatapathError> {
        if cfg!(debug_assertions) {
            packet_log::start(&mut self.ebpf)
        } else {
            Ok(())
        }
    }

    /// Flows that the table has room for: that of the pinned one, whatever was asked for.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn flow_table_size(&self) -> Result<u32, DatapathError> {
        let info = self
            .flows
            .map()
            .info()
            .map_err(|error| failed("read", FLOWS, error))?;
        Ok(info.max_entries())
    }

    /// Attaches the program to exactly these interfaces: a pinned link of one of them is kept and given this
    /// program if it ran another, those of other interfaces are removed.
    ///
    /// # Errors
    /// An interface is missing, has another XDP program, or refuses the mode; what was attached before stays.
    pub fn attach(&mut self, interfaces: &[String], mode: Mode) -> Result<Vec<Attachment>, DatapathError> {
        self.pins.remove_other_layouts()?;
        let mut attachments = Vec::new();
        for interface in interfaces {
            attachments.push(self.attach_one(interface, mode)?);
        }
        for (interface, _, path) in self.pins.list_links() {
            if !interfaces.contains(&interface) {
                Pins::remove_link(&path)?;
            }
        }
        barrier::remove_left_behind(&self.pins)?;
        Ok(attachments)
    }

    /// Attaches the programs that deliver to processes on this host to exactly these interfaces, in front of the host's
    /// stack and behind it; where there is none, they are not even loaded.
    ///
    /// # Errors
    /// An interface is missing, or the kernel refuses a program; what was attached before stays.
    pub fn attach_local(&mut self, interfaces: &[String]) -> Result<(), DatapathError> {
        local::attach(&mut self.ebpf, &self.pins, interfaces)
    }

    fn attach_one(&mut self, interface: &str, mode: Mode) -> Result<Attachment, DatapathError> {
        let index = nix::net::if_::if_nametoindex(interface)
            .map_err(|errno| DatapathError::new("attach", interface, io::Error::from(errno)))?;
        let mut former = None;
        // Held until one mode or the other has the packets again.
        let mut barrier = None;
        for (pinned, obtained, path) in self.pins.list_links() {
            // A link outlives its interface, with index 0 in place of the interface's, and goes with it to a new name.
            let is_on_it = syscall::pinned_link_ifindex(&path).ok() == Some(index);
            if is_on_it && mode.admits(obtained) {
                let own = self.pins.link(interface, obtained);
                if path != own {
                    fs::rename(&path, &own)
                        .map_err(|source| DatapathError::new("rename", path.display().to_string(), source))?;
                }
                self.take_over(&own)?;
                return Ok(Attachment {
                    interface: interface.to_owned(),
                    mode: obtained,
                    fallback: None,
                });
            }
            if is_on_it || pinned == interface {
                if is_on_it && barrier.is_none() {
                    barrier = self.raise_barrier(interface, index);
                }
                Pins::remove_link(&path)?;
                former = former.or(is_on_it.then_some(obtained));
            }
        }
        let attached = self.attach_in(interface, index, mode);
        if let (Err(_), Some(former)) = (&attached, former) {
            // Two modes at once the kernel does not allow; what was there before the attempt is to stay after it.
            self.attach_new(interface, index, former)?;
        }
        drop(barrier);
        attached
    }

    /// Where there can be none the mode changes all the same, which is what was asked for.
    fn raise_barrier(&self, interface: &str, index: u32) -> Option<Barrier> {
        let kind = LinkKind::of_this_kernel();
        Barrier::raise(kind, &self.pins, interface, index, barrier::LIMIT)
            .inspect_err(|error| {
                warn!(
                    interface,
                    "packets that come while the mode changes go to this host, and may end their connections: {error}: {}",
                    error.source
                );
            })
            .ok()
    }

    /// Attaches where nothing of ours is.
    fn attach_in(&mut self, interface: &str, index: u32, mode: Mode) -> Result<Attachment, DatapathError> {
        let (attachment, ()) = obtain(interface, mode, |mode| self.attach_new(interface, index, mode))?;
        Ok(attachment)
    }

    /// Puts this program on a pinned link.
    fn take_over(&mut self, path: &Path) -> Result<(), DatapathError> {
        let object = path.display().to_string();
        let pinned = PinnedLink::from_pin(path).map_err(|error| failed("open", &object, error))?;
        let link = FdLink::from(pinned);
        let program = xdp_program(&mut self.ebpf)?;
        if program.info().is_ok_and(|own| runs(&link, &own)) {
            return Ok(());
        }
        let link = XdpLink::try_from(link).map_err(|error| failed("open", &object, error))?;
        let id = program
            .attach_to_link(link)
            .map_err(|error| failed("replace the program of", &object, error))?;
        // Out of the program's hands, or it would be detached with it; the pin keeps it.
        let link = program
            .take_link(id)
            .map_err(|error| failed("replace the program of", &object, error))?;
        drop(FdLink::try_from(link).map_err(|error| failed("replace the program of", &object, error))?);
        Ok(())
    }

    fn attach_new(&mut self, interface: &str, index: u32, mode: AttachMode) -> Result<(), DatapathError> {
        let path = self.pins.link(interface, mode);
        let link = attach_link(xdp_program(&mut self.ebpf)?, interface, index, mode)?;
        link.pin(&path)
            .map_err(|error| failed("pin", path.display().to_string(), error))?;
        Ok(())
    }

    fn read_all_but_slots(&self) -> Result<Contents, DatapathError> {
        let mut contents = Contents {
            settings: self
                .settings
                .get(&0, 0)
                .map_err(|error| failed("read", "SETTINGS", error))?
                .0,
            ..Contents::default()
        };
        syscall::for_each(
            self.addresses.map().fd().as_fd(),
            |address: &Address, roles: &u32| {
                contents.addresses.insert(*address, *roles);
            },
        )
        .map_err(|source| DatapathError::new("read", "ADDRESSES", source))?;
        syscall::for_each(
            self.service_keys.map().fd().as_fd(),
            |key: &ServiceKey, id: &u32| {
                contents.service_keys.insert(*key, *id);
            },
        )
        .map_err(|source| DatapathError::new("read", "SERVICE_KEYS", source))?;
        syscall::for_each(self.services.map().fd().as_fd(), |id: &u32, service: &Service| {
            if service.in_use != 0 {
                contents.services.insert(*id, *service);
            }
        })
        .map_err(|source| DatapathError::new("read", "SERVICES", source))?;
        syscall::for_each(self.backends.map().fd().as_fd(), |id: &u32, backend: &Backend| {
            if backend.service_plus_one != 0 {
                contents.backends.insert(*id, *backend);
            }
        })
        .map_err(|source| DatapathError::new("read", "BACKENDS", source))?;
        syscall::for_each(
            self.source_filters.map().fd().as_fd(),
            |entry: &FilterEntry, value: &u32| {
                contents.source_filters.insert((entry.key, entry.length), *value);
            },
        )
        .map_err(|source| DatapathError::new("read", SOURCE_FILTERS, source))?;
        Ok(contents)
    }

    /// Reads the slot tables of services alone: a table that an interrupted change has left under an id without a
    /// service is replaced when the id is given to one.
    fn read_slots(&self, contents: &Contents) -> Result<BTreeMap<u32, SlotTable>, DatapathError> {
        let mut tables = BTreeMap::new();
        for &id in contents.services.keys() {
            let table = match self.slot_tables.get(&id, 0) {
                Ok(table) => table,
                Err(MapError::KeyNotFound) => continue,
                Err(error) => return Err(failed("read", format!("SLOT_TABLES[{id}]"), error)),
            };
            let mut slots = vec![0; SLOT_COUNT as usize];
            syscall::for_each(table.map().fd().as_fd(), |slot: &u32, backend: &u32| {
                if let Some(entry) = slots.get_mut(*slot as usize) {
                    *entry = *backend;
                }
            })
            .map_err(|source| DatapathError::new("read", format!("SLOT_TABLES[{id}]"), source))?;
            tables.insert(id, slots.into());
        }
        Ok(tables)
    }

    fn put_slots(&mut self, service: u32, slots: &[u32]) -> Result<(), DatapathError> {
        let object = format!("SLOT_TABLES[{service}]");
        let table: Array<MapData, u32> =
            Array::create(SLOT_COUNT, 0).map_err(|error| failed("create", &object, error))?;
        syscall::fill(table.map().fd().as_fd(), slots)
            .map_err(|source| DatapathError::new("fill", &object, source))?;
        self.slot_tables
            .set(service, &table, 0)
            .map_err(|error| failed("update", &object, error))
    }

    /// Tells whether a key of replies is that of the flow that it leads to, which may have gone elsewhere since.
    fn leads_to_flow(&self, reply: &FlowKey, client: &FlowKey) -> bool {
        let Ok(Raw(flow)) = self.flows.get(&Raw(*client), 0) else {
            return false;
        };
        self.backends
            .get(&flow.backend, 0)
            .is_ok_and(|Raw(backend)| reply_key(client, &flow, &backend) == *reply)
    }

    fn clear_service_counters(&mut self, service: u32) -> Result<(), DatapathError> {
        for reason in 0..REASON_COUNT {
            zero(
                &mut self.service_counters,
                service * REASON_COUNT + reason,
                Count::default(),
            )
            .map_err(|error| failed("clear", format!("SERVICE_COUNTERS[{service}]"), error))?;
        }
        Ok(())
    }
}

/// What the configuration asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Auto,
    Native,
    Generic,
}

impl Mode {
    fn admits(self, obtained: AttachMode) -> bool {
        match self {
            Self::Auto => true,
            Self::Native => obtained == AttachMode::Native,
            Self::Generic => obtained == AttachMode::Generic,
        }
    }
}

impl Datapath for KernelDatapath {
    fn read(&self) -> Result<Contents, DatapathError> {
        let mut contents = self.read_all_but_slots()?;
        contents.slots = self.read_slots(&contents)?;
        Ok(contents)
    }

    fn refresh(&self, known: &Contents) -> Result<Contents, DatapathError> {
        // Before 6.8 the kernel waits for a grace period of RCU, some 20 ms, with each look into a map of maps
        // (`maybe_wait_bpf_programs`): too long to do for every service time and again.
        if KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 8, 0)) {
            return self.read();
        }
        let mut contents = self.read_all_but_slots()?;
        contents.slots = known.slots.clone();
        contents.slots.retain(|id, _| contents.services.contains_key(id));
        Ok(contents)
    }

    fn apply(&mut self, operation: &Operation) -> Result<(), DatapathError> {
        match operation {
            Operation::PutSettings(settings) => self
                .settings
                .set(0, Raw(*settings), 0)
                .map_err(|error| failed("update", "SETTINGS", error)),
            Operation::PutAddress(address, roles) => self
                .addresses
                .insert(Raw(*address), roles, 0)
                .map_err(|error| failed("update", format!("ADDRESSES[{address}]"), error)),
            Operation::RemoveAddress(address) => self
                .addresses
                .remove(&Raw(*address))
                .map_err(|error| failed("delete", format!("ADDRESSES[{address}]"), error)),
            Operation::PutBackend(id, backend) => self
                .backends
                .set(*id, Raw(*backend), 0)
                .map_err(|error| failed("update", format!("BACKENDS[{id}]"), error)),
            Operation::RemoveBackend(id) => {
                let object = format!("BACKENDS[{id}]");
                self.backends
                    .set(*id, Raw(Backend::default()), 0)
                    .map_err(|error| failed("delete", &object, error))?;
                zero(&mut self.backend_counters, *id, BackendCounters::default())
                    .map_err(|error| failed("clear", &object, error))
            }
            Operation::PutSlots(service, slots) => self.put_slots(*service, slots),
            Operation::RemoveSlots(service) => syscall::delete(self.slot_tables_data.fd().as_fd(), *service)
                .map_err(|source| DatapathError::new("delete", format!("SLOT_TABLES[{service}]"), source)),
            Operation::PutService(id, service) => self
                .services
                .set(*id, Raw(*service), 0)
                .map_err(|error| failed("update", format!("SERVICES[{id}]"), error)),
            Operation::RemoveService(id) => {
                self.services
                    .set(*id, Raw(Service::default()), 0)
                    .map_err(|error| failed("delete", format!("SERVICES[{id}]"), error))?;
                self.clear_service_counters(*id)
            }
            Operation::PutServiceKey(key, id) => self
                .service_keys
                .insert(Raw(*key), id, 0)
                .map_err(|error| failed("update", format!("SERVICE_KEYS[{}]", key.vip), error)),
            Operation::RemoveServiceKey(key) => self
                .service_keys
                .remove(&Raw(*key))
                .map_err(|error| failed("delete", format!("SERVICE_KEYS[{}]", key.vip), error)),
            Operation::PutFilter(key, length, value) => self
                .source_filters
                .insert(&lpm_trie::Key::new(*length, Raw(*key)), value, 0)
                .map_err(|error| failed("update", format!("{SOURCE_FILTERS}[{}]", key.address), error)),
            Operation::RemoveFilter(key, length) => self
                .source_filters
                .remove(&lpm_trie::Key::new(*length, Raw(*key)))
                .map_err(|error| failed("delete", format!("{SOURCE_FILTERS}[{}]", key.address), error)),
        }
    }

    fn some_flows(
        &self,
        position: Option<Position>,
        visit: &mut dyn FnMut(&FlowKey, &Flow),
    ) -> Result<Option<Position>, DatapathError> {
        let position = position.map(|Position(position)| position);
        syscall::some(self.flows.map().fd().as_fd(), position, |key, flow| {
            visit(key, flow);
        })
        .map(|next| next.map(Position))
        .map_err(|source| DatapathError::new("read", FLOWS, source))
    }

    fn remove_flows(&mut self, keys: &[FlowKey], unless_seen_since: u64) -> Result<u64, DatapathError> {
        let mut removed = 0;
        for key in keys {
            let flow = match self.flows.get(&Raw(*key), 0) {
                Ok(Raw(flow)) => flow,
                Err(MapError::KeyNotFound) => continue,
                Err(error) => return Err(failed("read", FLOWS, error)),
            };
            if flow.last_seen >= unless_seen_since {
                continue;
            }
            let backend = self
                .backends
                .get(&flow.backend, 0)
                .map_err(|error| failed("read", "BACKENDS", error))?
                .0;
            remove_present(&mut self.flows, key, FLOWS)?;
            removed += 1;
            // Where the backend is gone, what its replies lead to nowhere is found by `remove_some_orphan_replies`.
            let reply = reply_key(key, &flow, &backend);
            if let Ok(Raw(client)) = self.replies.get(&Raw(reply), 0)
                && client == *key
            {
                remove_present(&mut self.replies, &reply, REPLIES)?;
            }
        }
        Ok(removed)
    }

    fn remove_some_orphan_replies(
        &mut self,
        position: Option<Position>,
    ) -> Result<(u64, Option<Position>), DatapathError> {
        let mut suspects = Vec::new();
        let next = syscall::some(
            self.replies.map().fd().as_fd(),
            position.map(|Position(position)| position),
            |reply: &FlowKey, client: &FlowKey| {
                if !self.leads_to_flow(reply, client) {
                    suspects.push(*reply);
                }
            },
        )
        .map_err(|source| DatapathError::new("read", REPLIES, source))?;
        let mut removed = 0;
        for reply in suspects {
            // The program writes the reply's key just before the flow, and may have given it to another: look once
            // more.
            if let Ok(Raw(client)) = self.replies.get(&Raw(reply), 0)
                && !self.leads_to_flow(&reply, &client)
            {
                remove_present(&mut self.replies, &reply, REPLIES)?;
                removed += 1;
            }
        }
        Ok((removed, next.map(Position)))
    }

    fn live_counts(&self, backends: &[u32]) -> Result<BTreeMap<u32, Live>, DatapathError> {
        let mut counts = BTreeMap::new();
        for id in backends {
            let Raw(count) =
                (self.live.get(id, 0)).map_err(|error| failed("read", format!("LIVE[{id}]"), error))?;
            let base = (self.live_base.get(id, 0))
                .map_err(|error| failed("read", format!("LIVE_BASE[{id}]"), error))?;
            counts.insert(*id, Live { count, base });
        }
        Ok(counts)
    }

    fn set_live_base(&mut self, backend: u32, base: u64) -> Result<(), DatapathError> {
        self.live_base
            .set(backend, base, 0)
            .map_err(|error| failed("update", format!("LIVE_BASE[{backend}]"), error))
    }

    fn counters(&self, services: &[u32], backends: &[u32]) -> Result<Counters, DatapathError> {
        let totals = self
            .totals
            .get(&0, 0)
            .map_err(|error| failed("read", "TOTALS", error))?;
        let mut result = Counters {
            totals: totals.iter().map(|Raw(totals)| *totals).collect(),
            ..Counters::default()
        };
        result.reasons =
            by_reason(&self.reasons, 0).map_err(|error| DatapathError::new("read", "COUNTERS", error))?;
        for service in services {
            let counts = by_reason(&self.service_counters, service * REASON_COUNT)
                .map_err(|error| DatapathError::new("read", format!("SERVICE_COUNTERS[{service}]"), error))?;
            result.services.insert(*service, counts);
        }
        for backend in backends {
            let cpus = self
                .backend_counters
                .get(backend, 0)
                .map_err(|error| failed("read", format!("BACKEND_COUNTERS[{backend}]"), error))?;
            let mut total = BackendCounters::default();
            for Raw(cpu) in cpus.iter() {
                counters::add(&mut total.forwarded, &cpu.forwarded);
                counters::add(&mut total.returned, &cpu.returned);
                total.flows += cpu.flows;
            }
            result.backends.insert(*backend, total);
        }
        Ok(result)
    }
}

/// Loads a program. The kernel gives up on it when a signal comes, as that of a probe's process which has ended, and
/// says EAGAIN (`bpf_check`).
pub(super) fn load_despite_signals(
    mut load: impl FnMut() -> Result<(), ProgramError>,
) -> Result<(), ProgramError> {
    const TRIES: u32 = 20;
    for _ in 1..TRIES {
        match load() {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.raw_os_error() == Some(libc::EAGAIN) => {}
            outcome => return outcome,
        }
    }
    load()
}

/// Removes an entry that the data path may have removed meanwhile.
fn remove_present<V: Pod>(
    map: &mut HashMap<MapData, Raw<FlowKey>, V>,
    key: &FlowKey,
    name: &str,
) -> Result<(), DatapathError> {
    match map.remove(&Raw(*key)) {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Err(error) => Err(failed("delete", name, error)),
    }
}

/// The counters of all reasons from an index on, those of all CPUs together.
fn by_reason(map: &PerCpuArray<MapData, Raw<Count>>, first: u32) -> io::Result<Vec<Count>> {
    let cpus = nr_cpus().map_err(|(_, error)| error)?;
    let counts: Vec<Count> =
        syscall::some_per_cpu(map.map().fd().as_fd(), first, REASON_COUNT as usize, cpus)?;
    Ok((counts.chunks(cpus))
        .map(|of_cpus| {
            let mut total = Count::default();
            of_cpus.iter().for_each(|count| counters::add(&mut total, count));
            total
        })
        .collect())
}

/// A counter of all CPUs together.
pub(super) fn sum(map: &PerCpuArray<MapData, Raw<Count>>, index: u32) -> Result<Count, MapError> {
    let mut total = Count::default();
    for Raw(count) in map.get(&index, 0)?.iter() {
        counters::add(&mut total, count);
    }
    Ok(total)
}

fn zero<T>(map: &mut PerCpuArray<MapData, Raw<T>>, index: u32, value: T) -> Result<(), MapError>
where
    Raw<T>: Pod,
    T: Copy,
{
    let cpus = nr_cpus().map_err(|(_, error)| MapError::IoError(error))?;
    map.set(index, PerCpuValues::try_from(vec![Raw(value); cpus])?, 0)
}

/// Attaches in the mode that is asked for: for `auto` in native mode, and in generic mode where that is refused.
pub(super) fn obtain<T>(
    interface: &str,
    mode: Mode,
    mut attach: impl FnMut(AttachMode) -> Result<T, DatapathError>,
) -> Result<(Attachment, T), DatapathError> {
    let (mode, fallback, attached) = match mode {
        Mode::Native => (AttachMode::Native, None, attach(AttachMode::Native)?),
        Mode::Generic => (AttachMode::Generic, None, attach(AttachMode::Generic)?),
        Mode::Auto => match attach(AttachMode::Native) {
            Ok(attached) => (AttachMode::Native, None, attached),
            Err(error) if error.source.kind() == io::ErrorKind::ResourceBusy => return Err(error),
            Err(error) => {
                let attached = attach(AttachMode::Generic)?;
                (AttachMode::Generic, Some(error.source.to_string()), attached)
            }
        },
    };
    let attachment = Attachment {
        interface: interface.to_owned(),
        mode,
        fallback,
    };
    Ok((attachment, attached))
}

/// Attaches a program to an interface that has none; the program is off it again when the link is dropped, unless
/// it is pinned.
pub(super) fn attach_link(
    program: &mut Xdp,
    interface: &str,
    index: u32,
    mode: AttachMode,
) -> Result<FdLink, DatapathError> {
    let (flags, operation) = match mode {
        AttachMode::Native => (XdpMode::Driver, "attach in native mode"),
        AttachMode::Generic => (XdpMode::Skb, "attach in generic mode"),
    };
    let id = program.attach_to_if_index(index, flags).map_err(|error| {
        let error = failed(operation, interface, error);
        match error.source.raw_os_error() {
            // The second where the other program is attached in the other mode.
            Some(libc::EBUSY | libc::EEXIST) => DatapathError::new(
                operation,
                interface,
                io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    format!(
                        "it has another XDP program: `ip link set dev {interface} xdp off` removes it, \
                         or `xlb detach` if it is that of another instance; that of `xlb decap` goes with its process"
                    ),
                ),
            ),
            _ => error,
        }
    })?;
    let link = program
        .take_link(id)
        .map_err(|error| failed(operation, interface, error))?;
    FdLink::try_from(link).map_err(|error: LinkError| failed(operation, interface, error))
}

fn xdp_program(ebpf: &mut Ebpf) -> Result<&mut Xdp, DatapathError> {
    named_program(ebpf, PROGRAM)
}

/// Takes the map of that name out of an object.
pub(super) fn named_map<T>(ebpf: &mut Ebpf, name: &str) -> Result<T, DatapathError>
where
    T: TryFrom<Map, Error = MapError>,
{
    let missing = || DatapathError::new("open", name, io::Error::other("the object does not hold it"));
    let map = ebpf.take_map(name).ok_or_else(missing)?;
    T::try_from(map).map_err(|error| failed("open", name, error))
}

/// The program of that name and type in an object.
pub(super) fn named_program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, DatapathError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or_else(missing_program)?
        .try_into()
        .map_err(|_| missing_program())
}

fn missing_program() -> DatapathError {
    DatapathError::new(
        "load",
        "the program",
        io::Error::other("the object does not hold it"),
    )
}

/// Refuses a pinned map that is not what the program expects, which neither aya nor, in all cases, the verifier does.
fn check_pinned(pins: &Pins, layout: &Layout) -> Result<(), DatapathError> {
    let path = pins.map(layout.name);
    if !path.exists() {
        return Ok(());
    }
    let data = MapData::from_pin(path).map_err(|error| failed("open", layout.name, error))?;
    let info = data.info().map_err(|error| failed("read", layout.name, error))?;
    let fits = info.map_type().is_ok_and(|kind| kind == layout.kind)
        && (info.key_size() as usize, info.value_size() as usize) == (layout.key, layout.value)
        && layout.entries.is_none_or(|entries| entries == info.max_entries());
    if fits {
        return Ok(());
    }
    let hint = "it was made by another build of xlb: `xlb detach` removes it, with all flows";
    let source = io::Error::new(io::ErrorKind::InvalidData, hint);
    Err(DatapathError::new("open", layout.name, source))
}

fn array<T: Pod>(data: MapData) -> Result<Array<MapData, T>, MapError> {
    Array::try_from(Map::Array(data))
}

fn hash<K: Pod, V: Pod>(data: MapData) -> Result<HashMap<MapData, K, V>, MapError> {
    HashMap::try_from(Map::HashMap(data))
}

fn lru_hash<K: Pod, V: Pod>(data: MapData) -> Result<HashMap<MapData, K, V>, MapError> {
    HashMap::try_from(Map::LruHashMap(data))
}

fn per_cpu<T: Pod>(data: MapData) -> Result<PerCpuArray<MapData, T>, MapError> {
    PerCpuArray::try_from(Map::PerCpuArray(data))
}

/// Pins a program where users and their tools find it, unless the same one is pinned there already.
pub(super) fn pin_program(ebpf: &mut Ebpf, name: &str, path: &Path) -> Result<(), DatapathError> {
    let object = path.display().to_string();
    let program = ebpf.program_mut(name).ok_or_else(missing_program)?;
    if path.exists() {
        let same = match (ProgramInfo::from_pin(path), program.info()) {
            (Ok(pinned), Ok(own)) => same_program(&pinned, &own),
            _ => false,
        };
        if same {
            return Ok(());
        }
        fs::remove_file(path).map_err(|source| DatapathError::new("remove", &object, source))?;
    }
    program.pin(path).map_err(|error| failed("pin", object, error))
}

/// Tells whether a link runs a program, or one that it need not replace.
pub(super) fn runs(link: &FdLink, own: &ProgramInfo) -> bool {
    let Ok(running) = link.info().map(|info| info.program_id()) else {
        return false;
    };
    aya::programs::loaded_programs()
        .flatten()
        .any(|info| info.id() == running && same_program(&info, own))
}

/// Tells whether two programs have the same instructions on the same maps, so that one need not replace the other.
pub(super) fn same_program(one: &ProgramInfo, other: &ProgramInfo) -> bool {
    let maps = |program: &ProgramInfo| {
        program.map_ids().ok().flatten().map(|mut ids| {
            ids.sort_unstable();
            ids
        })
    };
    one.tag() == other.tag() && maps(one).is_some() && maps(one) == maps(other)
}

/// Turns an error of aya into ours; the number of the system error is kept where there is one, for callers that
/// act on it.
pub(super) fn failed(
    operation: &'static str,
    object: impl Into<String>,
    error: impl std::error::Error + Send + Sync + 'static,
) -> DatapathError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(found) = current.downcast_ref::<io::Error>()
            && let Some(number) = found.raw_os_error()
        {
            return DatapathError::new(operation, object, io::Error::from_raw_os_error(number));
        }
        cause = current.source();
    }
    DatapathError::new(operation, object, io::Error::other(error))
}
