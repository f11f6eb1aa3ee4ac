//! The kernel's implementation: maps and links that are pinned, so that packets go on without the daemon.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap as Seen},
    fmt, fs, io,
    os::fd::AsFd,
    path::Path,
};

use aya::{
    Ebpf, EbpfLoader, Pod, include_bytes_aligned,
    maps::{
        Array, ArrayOfMaps, HashMap, IterableMap, Map, MapData, MapError, MapType, PerCpuArray, loaded_maps,
        lpm_trie::{self, LpmTrie},
    },
    programs::{
        Program, ProgramError, ProgramInfo, Xdp, XdpMode,
        links::{FdLink, LinkError, PinnedLink},
        xdp::XdpLink,
    },
    util::nr_cpus,
};
use lb_common::abi::{
    ADDRESS_FILTER_WORDS, Address, Backend, BackendCounters, Bucket, ClientLink, Count, FilterKey, FlowKey,
    LiveCount, MAX_CHUNKS, MAX_CLIENT_LINKS, MAX_SOURCE_FILTERS, PerCpu, REASON_COUNT, REASON_ENTRIES,
    SERVICE_BUCKETS, Service, Settings, SettingsFlags, buckets, flows, of_cpu,
};
use nix::time::{ClockId, clock_gettime};
use tracing::warn;
use zerocopy::{FromBytes, Immutable, IntoBytes, transmute};

use super::{
    AttachMode, Contents, Counters, Datapath, DatapathError, Flow, LinkKind, Operation, Pins, Position,
    Sizes,
    barrier::{self, Barrier},
    counters::{self, CountersById, POSSIBLE_CPUS},
    flow_table::{Context, FlowTable, MapOf},
    hooks, local,
    lookup::{AddressFilter, ServiceKeys},
    packet_log,
    pools::Pools,
    syscall,
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

/// Memory of a flow table with room for `flows` flows.
pub const fn flow_table_memory(flows: u32) -> u64 {
    buckets(flows) as u64 * size_of::<Bucket>() as u64
}

/// An interface that the program is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    pub interface: String,
    pub mode: AttachMode,
    /// Why native mode was not obtained, where `auto` had to fall back.
    pub fallback: Option<String>,
}

const COUNT_WORDS: usize = size_of::<Count>() / 8;

/// The maps and the program of one instance.
pub struct KernelDatapath {
    pins: Pins,
    sizes: Sizes,
    /// The number that those of all CPUs are below.
    cpus: u32,
    /// Whether the maps were made just now and nothing was done with them.
    is_new: Cell<bool>,
    /// Holds the program; the maps are taken out of it.
    ebpf: Ebpf,
    settings: Array<MapData, Raw<Settings>>,
    addresses: HashMap<MapData, Raw<Address>, u32>,
    address_filter: AddressFilter,
    service_keys: ServiceKeys,
    services: Array<MapData, Raw<Service>>,
    pools: Pools,
    backends: Array<MapData, Raw<Backend>>,
    source_filters: LpmTrie<MapData, Raw<FilterKey>, u32>,
    flow_table: FlowTable,
    per_cpu: PerCpuArray<MapData, Raw<PerCpu>>,
    /// Of no service, as if of one with the id 0.
    reasons: CountersById<COUNT_WORDS>,
    service_counters: CountersById<COUNT_WORDS>,
    backend_counters: CountersById<{ size_of::<BackendCounters>() / 8 }>,
}

impl fmt::Debug for KernelDatapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelDatapath")
            .field("pins", &self.pins)
            .finish_non_exhaustive()
    }
}

/// What a map must be for the program to run on it.
struct Layout {
    name: &'static str,
    kind: MapType,
    key: usize,
    value: usize,
    entries: u32,
}

/// The key of a source filter as the kernel has it (`struct bpf_lpm_trie_key_u8`).
#[repr(C)]
#[derive(Clone, FromBytes, IntoBytes, Immutable)]
struct FilterEntry {
    length: u32,
    key: FilterKey,
}

/// Every map of the object that is pinned, for such sizes and so many CPUs.
fn maps(sizes: &Sizes, cpus: u32) -> [Layout; 16] {
    use MapType::{Array, ArrayOfMaps, Hash, LpmTrie, PerCpuArray};
    let Sizes {
        flows,
        services,
        backends,
    } = *sizes;
    let layout = |name, kind, key, value, entries| Layout {
        name,
        kind,
        key,
        value,
        entries,
    };
    // Id 0 means "none".
    let backend_entries = backends + 1;
    let filter = 8 * ADDRESS_FILTER_WORDS as usize;
    [
        layout("SETTINGS", Array, 4, size_of::<Settings>(), 1),
        layout(ADDRESSES, Hash, size_of::<Address>(), 4, services + backends),
        layout(ADDRESS_FILTER, Array, 4, filter, 1),
        layout(SERVICE_KEYS, Array, 4, size_of::<Bucket>(), SERVICE_BUCKETS),
        layout(SERVICES, Array, 4, size_of::<Service>(), services),
        layout(POOLS, Array, 4, 8, services),
        layout(POOL_CHUNKS, ArrayOfMaps, 4, 4, MAX_CHUNKS),
        layout(BACKENDS, Array, 4, size_of::<Backend>(), backend_entries),
        layout(
            SOURCE_FILTERS,
            LpmTrie,
            size_of::<FilterEntry>(),
            4,
            MAX_SOURCE_FILTERS,
        ),
        layout(LIVE, Array, 4, size_of::<LiveCount>(), backend_entries),
        layout(FLOWS, Array, 4, size_of::<Bucket>(), buckets(flows)),
        layout(CLIENT_LINKS, Array, 4, size_of::<ClientLink>(), MAX_CLIENT_LINKS),
        layout("PER_CPU", PerCpuArray, 4, size_of::<PerCpu>(), 1),
        layout(
            COUNTERS,
            Array,
            4,
            size_of::<Count>(),
            of_cpu(1, cpus, 0) * REASON_ENTRIES,
        ),
        layout(
            SERVICE_COUNTERS,
            Array,
            4,
            size_of::<Count>(),
            of_cpu(services, cpus, 0) * REASON_ENTRIES,
        ),
        layout(
            BACKEND_COUNTERS,
            Array,
            4,
            size_of::<BackendCounters>(),
            of_cpu(backend_entries, cpus, 0),
        ),
    ]
}

impl Layout {
    /// What the kernel takes for it: values by eight bytes, those of every CPU, and what leads to them.
    fn memory(&self) -> u64 {
        let entries = u64::from(self.entries);
        let value = self.value.next_multiple_of(8) as u64;
        match self.kind {
            MapType::PerCpuArray => entries * (8 + value * nr_cpus().unwrap_or(1) as u64),
            // `struct htab_elem`, and twice as many buckets as the next power of two.
            MapType::Hash => {
                entries * (48 + self.key.next_multiple_of(8) as u64 + value)
                    + 16 * entries.next_power_of_two()
            }
            // It grows with its entries.
            MapType::LpmTrie => 0,
            _ => entries * value,
        }
    }
}

/// Bytes of memory in the kernel, by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapMemory {
    pub flow_table: u64,
    /// With their counters and keys.
    pub services: u64,
    /// With their counters and addresses.
    pub backends: u64,
    /// Pools and slot tables: as much as there was need for.
    pub slot_tables: u64,
}

impl MapMemory {
    pub fn total(&self) -> u64 {
        self.flow_table + self.services + self.backends + self.slot_tables
    }
}

const ADDRESSES: &str = "ADDRESSES";
const ADDRESS_FILTER: &str = "ADDRESS_FILTER";
const SERVICE_KEYS: &str = "SERVICE_KEYS";
const SERVICES: &str = "SERVICES";
const COUNTERS: &str = "COUNTERS";
const SERVICE_COUNTERS: &str = "SERVICE_COUNTERS";
const ROUND_ROBIN: &str = "ROUND_ROBIN";
const POOLS: &str = "POOLS";
const POOL_CHUNKS: &str = "POOL_CHUNKS";
const BACKENDS: &str = "BACKENDS";
const BACKEND_COUNTERS: &str = "BACKEND_COUNTERS";
const SOURCE_FILTERS: &str = "SOURCE_FILTERS";
const FLOWS: &str = "FLOWS";
const LIVE: &str = "LIVE";
const CLIENT_LINKS: &str = "CLIENT_LINKS";
/// The program's own word for how many entries [`FLOWS`] has.
const FLOW_BUCKETS: &str = "FLOW_BUCKETS";
/// That for how many CPUs have counters.
const CPUS: &str = "CPUS";

impl KernelDatapath {
    /// Loads the program on the maps that an earlier daemon has pinned, or on new ones of such sizes.
    ///
    /// # Errors
    /// bpffs is not mounted, a permission is missing, the kernel refuses the program, or the pinned maps are of
    /// another build.
    pub fn open(pins: Pins, sizes: Sizes) -> Result<Self, DatapathError> {
        pins.create()?;
        let sizes = pinned_sizes(&pins, sizes)?;
        let cpus = counters::cpus().map_err(|source| DatapathError::new("read", POSSIBLE_CPUS, source))?;
        let maps = maps(&sizes, cpus);
        let is_new = maps.iter().all(|layout| !pins.map(layout.name).exists());
        let flow_buckets = buckets(sizes.flows);
        let mut loader = EbpfLoader::new();
        loader
            .override_global(FLOW_BUCKETS, &flow_buckets, true)
            .override_global(CPUS, &cpus, true)
            .map_max_entries(ROUND_ROBIN, sizes.services);
        for layout in &maps {
            check_pinned(&pins, layout)?;
            loader
                .map_max_entries(layout.name, layout.entries)
                .map_pin_path(layout.name, pins.map(layout.name));
        }
        let mut ebpf = loader
            .load(OBJECT)
            .map_err(|error| failed("load", "the program's maps", error))?;
        let program = xdp_program(&mut ebpf)?;
        load_despite_signals(|| program.load()).map_err(|error| failed("load", "the program", error))?;
        pin_program(&mut ebpf, PROGRAM, &pins.program(PROGRAM))?;

        let data = |name: &str| pinned(&pins.map(name), name);
        let converted = |name: &str, error: MapError| failed("open", name, error);
        let addresses: HashMap<MapData, Raw<Address>, u32> =
            hash(data("ADDRESSES")?).map_err(|error| converted("ADDRESSES", error))?;
        let mut present = Vec::new();
        syscall::for_each(addresses.map().fd().as_fd(), |address: &Address, roles: &u32| {
            present.push((*address, *roles));
        })
        .map_err(|source| DatapathError::new("read", "ADDRESSES", source))?;
        Ok(Self {
            address_filter: AddressFilter::new(data(ADDRESS_FILTER)?.fd().as_fd(), present)
                .map_err(unmapped(ADDRESS_FILTER))?,
            addresses,
            settings: array(data("SETTINGS")?).map_err(|error| converted("SETTINGS", error))?,
            service_keys: ServiceKeys::new(data(SERVICE_KEYS)?.fd().as_fd())
                .map_err(unmapped(SERVICE_KEYS))?,
            services: array(data(SERVICES)?).map_err(|error| converted(SERVICES, error))?,
            pools: Pools::open(
                &MapOf(data(POOLS)?.fd().as_fd(), sizes.services),
                ArrayOfMaps::try_from(Map::ArrayOfMaps(data(POOL_CHUNKS)?))
                    .map_err(|error| converted(POOL_CHUNKS, error))?,
                data(POOL_CHUNKS)?,
            )?,
            backends: array(data("BACKENDS")?).map_err(|error| converted("BACKENDS", error))?,
            source_filters: LpmTrie::try_from(Map::LpmTrie(data(SOURCE_FILTERS)?))
                .map_err(|error| converted(SOURCE_FILTERS, error))?,
            flow_table: FlowTable::new(
                &MapOf(data(FLOWS)?.fd().as_fd(), flow_buckets),
                &MapOf(data(LIVE)?.fd().as_fd(), sizes.backends + 1),
                &MapOf(data(CLIENT_LINKS)?.fd().as_fd(), MAX_CLIENT_LINKS),
            )
            .map_err(|source| DatapathError::new("open", FLOWS, source))?,
            per_cpu: per_cpu(data("PER_CPU")?).map_err(|error| converted("PER_CPU", error))?,
            reasons: counters_by_id(&pins, COUNTERS, 1, cpus, REASON_ENTRIES)?,
            service_counters: counters_by_id(&pins, SERVICE_COUNTERS, sizes.services, cpus, REASON_ENTRIES)?,
            backend_counters: counters_by_id(&pins, BACKEND_COUNTERS, sizes.backends + 1, cpus, 1)?,
            ebpf,
            pins,
            sizes,
            cpus,
            is_new: Cell::new(is_new),
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

    /// What the maps are made for: the pinned ones, whatever was asked for.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// What the maps take.
    pub fn memory(&self) -> MapMemory {
        let maps = maps(&self.sizes, self.cpus);
        let of = |names: &[&str]| {
            let named = maps.iter().filter(|layout| names.contains(&layout.name));
            named.map(Layout::memory).sum()
        };
        MapMemory {
            flow_table: of(&[FLOWS]),
            services: of(&[SERVICES, SERVICE_KEYS, SERVICE_COUNTERS]),
            backends: of(&[BACKENDS, BACKEND_COUNTERS, LIVE, ADDRESSES, ADDRESS_FILTER]),
            slot_tables: of(&[POOLS, POOL_CHUNKS]) + self.pools.memory(),
        }
    }

    /// Backend ids by slot of a service's pool, as the program finds them; nothing where it has no pool.
    ///
    /// # Errors
    /// The memory cannot be read.
    pub fn by_slot(&self, service: u32) -> Result<Option<Vec<u32>>, DatapathError> {
        self.pools.by_slot(service)
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
        let index = hooks::index_of(interface)?;
        let mut former = None;
        // Held until one mode or the other has the packets again.
        let mut barrier = None;
        for (pinned, obtained, path) in self.pins.list_links() {
            // A link outlives its interface, with index 0 in place of the interface's, and goes with it to a new name.
            let is_on_it = syscall::pinned_link(&path).is_ok_and(|link| link.ifindex == index);
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

    fn read_all_but_pools(&self) -> Result<Contents, DatapathError> {
        let mut contents = Contents {
            settings: self.read_settings()?,
            ..Contents::default()
        };
        syscall::for_each(
            self.addresses.map().fd().as_fd(),
            |address: &Address, roles: &u32| {
                contents.addresses.insert(*address, *roles);
            },
        )
        .map_err(|source| DatapathError::new("read", "ADDRESSES", source))?;
        contents.service_keys.extend(self.service_keys.iter());
        syscall::for_each(self.services.map().fd().as_fd(), |id: &u32, service: &Service| {
            if service.in_use != 0 {
                contents.services.insert(*id, *service);
            }
        })
        .map_err(|source| DatapathError::new("read", "SERVICES", source))?;
        let mut backends = Vec::new();
        syscall::for_each(self.backends.map().fd().as_fd(), |id: &u32, backend: &Backend| {
            if backend.service_plus_one != 0 {
                backends.push((*id, *backend));
            }
        })
        .map_err(|source| DatapathError::new("read", "BACKENDS", source))?;
        // All at once: a tree that grows at its end is left half empty.
        contents.backends = backends.into_iter().collect();
        syscall::for_each(
            self.source_filters.map().fd().as_fd(),
            |entry: &FilterEntry, value: &u32| {
                contents.source_filters.insert((entry.key, entry.length), *value);
            },
        )
        .map_err(|source| DatapathError::new("read", SOURCE_FILTERS, source))?;
        Ok(contents)
    }

    fn read_settings(&self) -> Result<Settings, DatapathError> {
        let Raw(settings) = (self.settings.get(&0, 0)).map_err(|error| failed("read", "SETTINGS", error))?;
        Ok(settings)
    }

    /// Does something with the flow table and what has to be known to read it.
    fn with_context<T>(
        &self,
        with: impl FnOnce(&FlowTable, &mut Context<'_>) -> T,
    ) -> Result<T, DatapathError> {
        let (mut known, mut problem) = (BTreeMap::new(), None);
        let mut vip = |id: u32| {
            let read = || read_entry(&self.services, id, "SERVICES", &mut problem).vip;
            *known.entry(id).or_insert_with(read)
        };
        let mut context = Context {
            settings: self.read_settings()?,
            now: monotonic_now(),
            vip: &mut vip,
        };
        let result = with(&self.flow_table, &mut context);
        problem.map_or(Ok(result), Err)
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
        if self.is_new.take() {
            return Ok(Contents::default());
        }
        let mut contents = self.read_all_but_pools()?;
        let mut seen = Seen::new();
        // Those of services alone: without one no packet finds a pool, and it is replaced when the id is given to one.
        for id in contents.services.keys() {
            if let Some(pool) = self.pools.get(*id, &mut seen)? {
                contents.pools.insert(*id, pool);
            }
        }
        Ok(contents)
    }

    fn prepare(&mut self, operations: &[Operation]) {
        self.pools
            .prepare(operations.iter().filter_map(|operation| match operation {
                Operation::PutPool(_, pool) => Some(pool),
                _ => None,
            }));
    }

    fn apply(&mut self, operation: &Operation) -> Result<(), DatapathError> {
        self.is_new.set(false);
        match operation {
            Operation::PutSettings(settings) => {
                (self.settings.set(0, Raw(*settings), 0))
                    .map_err(|error| failed("update", "SETTINGS", error))?;
                if settings.flags & SettingsFlags::AGELESS != 0 {
                    // So that no flow is aged by the ticks before and a timeout after, or the other way round.
                    syscall::wait_for_programs();
                }
                Ok(())
            }
            Operation::PutAddress(address, roles) => {
                let before = self.addresses.get(&Raw(*address), 0).unwrap_or(0);
                (self.addresses.insert(Raw(*address), roles, 0))
                    .map_err(|error| failed("update", format!("ADDRESSES[{address}]"), error))?;
                self.address_filter.change(address, before, *roles);
                Ok(())
            }
            Operation::RemoveAddress(address) => {
                let before = self.addresses.get(&Raw(*address), 0).unwrap_or(0);
                (self.addresses.remove(&Raw(*address)))
                    .map_err(|error| failed("delete", format!("ADDRESSES[{address}]"), error))?;
                self.address_filter.change(address, before, 0);
                Ok(())
            }
            Operation::PutBackend(id, backend) => self
                .backends
                .set(*id, Raw(*backend), 0)
                .map_err(|error| failed("update", format!("BACKENDS[{id}]"), error)),
            Operation::RemoveBackend(id) => {
                let object = format!("BACKENDS[{id}]");
                self.backends
                    .set(*id, Raw(Backend::default()), 0)
                    .map_err(|error| failed("delete", &object, error))?;
                self.flow_table.clear_live(*id).map_err(unmapped(LIVE))?;
                (self.backend_counters.clear(*id)).map_err(|source| {
                    DatapathError::new("clear", format!("{BACKEND_COUNTERS}[{id}]"), source)
                })
            }
            Operation::PutPool(service, pool) => self.pools.put(*service, pool),
            Operation::RemovePool(service) => self.pools.remove(*service),
            Operation::PutService(id, service) => self
                .services
                .set(*id, Raw(*service), 0)
                .map_err(|error| failed("update", format!("SERVICES[{id}]"), error)),
            Operation::RemoveService(id) => {
                self.services
                    .set(*id, Raw(Service::default()), 0)
                    .map_err(|error| failed("delete", format!("SERVICES[{id}]"), error))?;
                (self.service_counters.clear(*id)).map_err(|source| {
                    DatapathError::new("clear", format!("{SERVICE_COUNTERS}[{id}]"), source)
                })
            }
            Operation::PutServiceKey(key, id) => self.service_keys.insert(key, *id).map_err(|source| {
                DatapathError::new("update", format!("{SERVICE_KEYS}[{}]", key.vip), source)
            }),
            Operation::RemoveServiceKey(key) => self.service_keys.remove(key).map_err(|source| {
                DatapathError::new("delete", format!("{SERVICE_KEYS}[{}]", key.vip), source)
            }),
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
        self.with_context(|table, context| table.some_flows(context, position, visit))?
            .map_err(unmapped(FLOWS))
    }

    fn remove_flows(&mut self, keys: &[FlowKey], unless_seen_since: u64) -> Result<u64, DatapathError> {
        if keys.is_empty() {
            return Ok(0);
        }
        self.with_context(|table, context| {
            keys.iter()
                .map(|key| table.remove(context, key, unless_seen_since))
                .sum::<io::Result<u64>>()
        })?
        .map_err(unmapped(FLOWS))
    }

    fn tidy_flows(&mut self, position: Option<Position>) -> Result<Option<Position>, DatapathError> {
        let settings = self.read_settings()?;
        let (backends, mut known, mut problem) = (&self.backends, BTreeMap::new(), None);
        let mut backend = |id: u32| {
            *known
                .entry(id)
                .or_insert_with(|| read_entry(backends, id, "BACKENDS", &mut problem))
        };
        let next = (self.flow_table)
            .tidy(&settings, monotonic_now(), &mut backend, position)
            .map_err(unmapped(FLOWS))?;
        problem.map_or(Ok(next), Err)
    }

    fn live_counts(&self, backends: &[u32]) -> Result<Vec<LiveCount>, DatapathError> {
        let live = |id: &u32| {
            let count = self.flow_table.live(*id).map_err(unmapped(LIVE))?;
            count.ok_or_else(|| no_backend("read", *id))
        };
        backends.iter().map(live).collect()
    }

    fn adjust_live(&mut self, backend: u32, by: i64) -> Result<(), DatapathError> {
        if self.flow_table.adjust_live(backend, by).map_err(unmapped(LIVE))? {
            Ok(())
        } else {
            Err(no_backend("update", backend))
        }
    }

    fn counters(&self, services: &[u32], backends: &[u32]) -> Result<Counters, DatapathError> {
        let per_cpu = self
            .per_cpu
            .get(&0, 0)
            .map_err(|error| failed("read", "PER_CPU", error))?;
        let mut result = Counters {
            totals: per_cpu.iter().map(|Raw(per_cpu)| per_cpu.totals).collect(),
            ..Counters::default()
        };
        let by_reason = |entries: &[[u64; COUNT_WORDS]]| -> Vec<Count> {
            let entries = entries.iter().take(REASON_COUNT as usize);
            entries.map(|entry| transmute!(*entry)).collect()
        };
        (self.reasons)
            .read(&[0], |_, entries| result.reasons = by_reason(entries))
            .map_err(unmapped(COUNTERS))?;
        (self.service_counters)
            .read(services, |id, entries| {
                result.services.insert(id, by_reason(entries));
            })
            .map_err(unmapped(SERVICE_COUNTERS))?;
        (self.backend_counters)
            .read(backends, |id, entries| {
                result
                    .backends
                    .extend(entries.iter().map(|entry| (id, transmute!(*entry))));
            })
            .map_err(unmapped(BACKEND_COUNTERS))?;
        Ok(result)
    }
}

/// That the memory of a map cannot be mapped.
pub(super) fn unmapped(map: impl Into<String>) -> impl FnOnce(io::Error) -> DatapathError {
    move |source| DatapathError::new("map the memory of", map, source)
}

fn no_backend(operation: &'static str, id: u32) -> DatapathError {
    DatapathError::new(
        operation,
        format!("{LIVE}[{id}]"),
        io::Error::from_raw_os_error(libc::E2BIG),
    )
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

/// An entry of an array; an unused one beyond its end, and where it cannot be read, which is left as the problem.
fn read_entry<T: Default + Copy>(
    map: &Array<MapData, Raw<T>>,
    id: u32,
    name: &str,
    problem: &mut Option<DatapathError>,
) -> T
where
    Raw<T>: Pod,
{
    match map.get(&id, 0) {
        Ok(Raw(entry)) => return entry,
        Err(MapError::OutOfBounds { .. } | MapError::KeyNotFound) => {}
        Err(error) => *problem = Some(failed("read", format!("{name}[{id}]"), error)),
    }
    T::default()
}

/// Now on the clock of the flow table, in nanoseconds.
pub fn monotonic_now() -> u64 {
    // The clock exists on every Linux; without it no flow would be found idle.
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)
        .map(|now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
        .unwrap_or(0)
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
    let data = pinned(&path, layout.name)?;
    let info = data.info().map_err(|error| failed("read", layout.name, error))?;
    let fits = info.map_type().is_ok_and(|kind| kind == layout.kind)
        && (info.key_size() as usize, info.value_size() as usize) == (layout.key, layout.value)
        && layout.entries == info.max_entries();
    if fits {
        return Ok(());
    }
    let hint = "it was made by another build of xlb: `xlb detach` removes it, with all flows";
    let source = io::Error::new(io::ErrorKind::InvalidData, hint);
    Err(DatapathError::new("open", layout.name, source))
}

/// The sizes of the pinned maps, and where there are none those that are wanted.
fn pinned_sizes(pins: &Pins, wanted: Sizes) -> Result<Sizes, DatapathError> {
    let pinned = |name: &str, wanted: u32| match pins.map(name) {
        path if path.exists() => entries(name, &pinned(&path, name)?),
        _ => Ok(wanted),
    };
    Ok(Sizes {
        flows: flows(pinned(FLOWS, buckets(wanted.flows))?),
        services: pinned(SERVICES, wanted.services)?,
        backends: pinned(BACKENDS, wanted.backends + 1)?.saturating_sub(1),
    })
}

fn pinned(path: &Path, name: &str) -> Result<MapData, DatapathError> {
    MapData::from_pin(path).map_err(|error| failed("open", name, error))
}

fn counters_by_id<const N: usize>(
    pins: &Pins,
    name: &str,
    ids: u32,
    cpus: u32,
    each: u32,
) -> Result<CountersById<N>, DatapathError> {
    let map = pinned(&pins.map(name), name)?;
    CountersById::new(map.fd().as_fd(), ids, cpus, each)
        .map_err(|source| DatapathError::new("open", name, source))
}

fn entries(name: &str, map: &MapData) -> Result<u32, DatapathError> {
    let info = map.info().map_err(|error| failed("read", name, error))?;
    Ok(info.max_entries())
}

fn array<T: Pod>(data: MapData) -> Result<Array<MapData, T>, MapError> {
    Array::try_from(Map::Array(data))
}

fn hash<K: Pod, V: Pod>(data: MapData) -> Result<HashMap<MapData, K, V>, MapError> {
    HashMap::try_from(Map::HashMap(data))
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
///
/// Each has a map of its own for its constants. They are not compared: but for a barrier all that is there are
/// [`FLOW_BUCKETS`] and [`CPUS`], which are the same for the same flow table and counters.
pub(super) fn same_program(one: &ProgramInfo, other: &ProgramInfo) -> bool {
    let constants: Vec<u32> = loaded_maps()
        .flatten()
        .filter(|map| map.name_as_str().is_some_and(|name| name.ends_with(".rodata")))
        .map(|map| map.id())
        .collect();
    let maps = |program: &ProgramInfo| {
        program.map_ids().ok().flatten().map(|mut ids| {
            ids.retain(|id| !constants.contains(id));
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
