//! What decides: takes in configuration, health, next hops and commands, and has the maps follow.
//!
//! Everything ends in [`Controller::converge`]: compile the model, plan, apply. There is no other way to a map.

mod probe_paths;
mod slow_starts;
mod sweeps;

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::{Instant, SystemTime},
};

use lb_common::abi::{self, LiveCount};
use nix::net::if_::if_nametoindex;
use tracing::{error, info, warn};

use self::{slow_starts::Rising, sweeps::Sweeps};
use crate::{
    api::{Change, Done, Refusal, Refused},
    compile::{self, Directory, SlotTables},
    config::{self, Config, Forward, Service, XdpMode},
    datapath::{
        Datapath, Sizes,
        kernel::{Attachment, KernelDatapath, MapMemory, Mode},
        probes::Probes,
    },
    health::{Driver, Transition},
    instance::Instance,
    model::{Administrative, BackendName, Health, Model, NextHop},
    net::{self, NextHopWatcher, Unresolved, poke::Poker},
    observe::{
        rates::Rates,
        status::{
            BackendStatus, FlowTableStatus, InterfaceStatus, MapsStatus, PacketTotals, ServiceStatus, Status,
            Traffic, by_reason,
        },
    },
    reconcile::Reconciler,
    seed,
};

/// What is tried when it is looked for addresses of this host.
const LOCAL_ADDRESSES: &str = "addresses of local services";

/// The state of a running daemon.
#[expect(missing_debug_implementations, reason = "nobody prints a whole daemon")]
pub struct Controller {
    instance: Instance,
    config_path: PathBuf,
    started: Instant,
    model: Model,
    directory: Directory,
    tables: SlotTables,
    reconciler: Reconciler<KernelDatapath>,
    attachments: Vec<Attachment>,
    driver: Driver,
    /// What has probes travel like packets of clients; `None` where none does.
    probes: Option<Probes>,
    watcher: NextHopWatcher,
    rates: Rates,
    rising: Rising,
    sweeps: Sweeps,
    poker: Poker,
    /// Addresses of `local` services and backends that are not this host's.
    not_local: BTreeSet<IpAddr>,
    /// Problems that the last attempt at something has left, by what was tried.
    problems: BTreeMap<&'static str, String>,
}

/// What a controller starts from.
#[expect(missing_debug_implementations, reason = "nobody prints a whole daemon")]
pub struct Parts {
    pub instance: Instance,
    pub config_path: PathBuf,
    pub config: Config,
    pub datapath: KernelDatapath,
    pub driver: Driver,
    pub watcher: NextHopWatcher,
}

impl Controller {
    /// Takes over what the maps hold, makes them hold what the configuration says, and attaches the program.
    ///
    /// # Errors
    /// The maps cannot be read or written, or an interface refuses the program.
    pub async fn start(parts: Parts) -> anyhow::Result<Self> {
        let Parts {
            instance,
            config_path,
            config,
            datapath,
            driver,
            watcher,
        } = parts;
        let reconciler = Reconciler::new(datapath)?;
        let sizes = reconciler.datapath().sizes();
        let restored = compile::restore(&config, reconciler.actual(), &sizes, SystemTime::now());
        let model = Model {
            sizes,
            seed: seed::load_or_make(&config.seed_file)?,
            source_ports: net::source_ports()?,
            health: restored.health,
            administrative: restored.administrative,
            ramps: BTreeMap::new(),
            next_hops: BTreeMap::new(),
            live_flows: BTreeMap::new(),
            left_services: BTreeSet::new(),
            ages_are_renewed: false,
            config,
        };
        let mut controller = Self {
            instance,
            config_path,
            started: Instant::now(),
            model,
            directory: Directory::default(),
            tables: SlotTables::default(),
            reconciler,
            attachments: Vec::new(),
            driver,
            probes: None,
            watcher,
            rates: Rates::default(),
            rising: Rising::default(),
            sweeps: Sweeps::judging_sources(),
            poker: Poker::start(),
            not_local: BTreeSet::new(),
            problems: BTreeMap::new(),
        };
        controller.follow_configuration().await;
        controller.sweep_what_is_found()?;
        // The maps first: the program finds services from its first packet on.
        controller.converge()?;
        controller.attach()?;
        // Whoever finds the daemon ready finds the flows counted.
        while controller.has_steps() {
            controller.step();
        }
        controller.assign_vips().await;
        Ok(controller)
    }

    /// A backend's health has changed.
    pub fn transition(&mut self, transition: Transition) {
        let Transition {
            service,
            backend,
            health,
            cause,
        } = transition;
        match health {
            Health::Up => info!(service, backend, cause, "backend is up"),
            Health::Down => warn!(service, backend, cause, "backend is down"),
            Health::Unknown => {}
        }
        // The driver's own word, not that of a transition that may have waited behind a change of the targets.
        self.follow_health_of(&(service.clone(), backend));
        if let Err(error) = self.converge_service(&service) {
            self.problem("converge", &error);
        }
    }

    /// The ways to the backends have changed.
    pub fn next_hops(&mut self, next_hops: BTreeMap<IpAddr, NextHop>) {
        self.model.next_hops = next_hops;
        self.converge_or_retry();
    }

    /// Reads the configuration anew and follows it; a bad one changes nothing. Flows that are over by it end with the
    /// next sweep.
    pub async fn reload(&mut self) -> Result<Done, Refused> {
        let config = config::load(&self.config_path)
            .map_err(|error| refused(Refusal::BadConfiguration, error.render(false)))?;
        let seed = seed::load_or_make(&config.seed_file)
            .map_err(|error| refused(Refusal::BadConfiguration, chain(error)))?;
        let warnings = self.restart_warnings(&config);
        let former = self.model.clone();
        self.model.config = config;
        self.model.seed = seed;
        self.forget_vanished(&former.config);
        self.remember_renamed();
        self.expect_added(&former);
        // What was counted of a backend or service that has gone says nothing of the next with its id.
        self.model.live_flows.retain(|_, flows| *flows > 0);
        self.model.left_services.clear();
        // First, since it is what may be refused: until then probes know nothing of it.
        let mut outcome = self.attach();
        let is_attached = outcome.is_ok();
        if is_attached {
            self.follow_configuration().await;
            outcome = self.converge();
        }
        if let Err(error) = outcome {
            self.model = former;
            if is_attached {
                self.follow_configuration().await;
                self.converge_or_retry();
            }
            if let Err(error) = self.attach() {
                error!("the interfaces of the running configuration: {error:#}");
            }
            return Err(refused(
                Refusal::Failed,
                format!("{error:#}; the running configuration stays"),
            ));
        }
        self.assign_vips().await;
        self.sweep_soon();
        let services = self.model.config.services.len();
        let message = format!("reloaded {}: {services} services", self.config_path.display());
        info!("{message}");
        Ok(Done { message, warnings })
    }

    /// Changes the administrative state of a backend; flows that are over by it end with the next sweep.
    pub fn administer(&mut self, service: &str, backend: &str, change: Change) -> Result<Done, Refused> {
        self.find(service, backend)?;
        let name = (service.to_owned(), backend.to_owned());
        let state = match change {
            Change::Enable => Administrative::Enabled,
            Change::Disable => Administrative::Disabled,
            // A drain that goes on is not begun anew.
            Change::Drain => match self.model.administrative.get(&name) {
                Some(draining @ Administrative::Draining { .. }) => *draining,
                _ => Administrative::Draining {
                    since: SystemTime::now(),
                },
            },
        };
        let former = self.model.administrative.insert(name.clone(), state);
        if let Err(error) = self.converge_service(service) {
            match former {
                Some(former) => self.model.administrative.insert(name, former),
                None => self.model.administrative.remove(&name),
            };
            // Part of it may have been done.
            self.converge_or_retry();
            return Err(refused(Refusal::Failed, format!("{error:#}")));
        }
        self.sweep_soon();
        let message = match change {
            Change::Enable => format!("{service}/{backend} is enabled"),
            Change::Drain => format!("{service}/{backend} is draining: no new flows, existing ones may end"),
            Change::Disable => format!("{service}/{backend} is disabled: its flows have ended"),
        };
        info!("{message}");
        Ok(Done {
            message,
            warnings: Vec::new(),
        })
    }

    /// Mends what somebody else has changed in the maps, and what could not be done before.
    pub async fn repair(&mut self) {
        match self.reconciler.refresh() {
            Ok(changes) => {
                self.problems.remove("read the maps");
                if changes > 0 {
                    warn!(changes, "the maps were changed from outside; they are mended");
                }
            }
            Err(error) => self.problem("read the maps", &error.into()),
        }
        self.converge_or_retry();
        // An interface that was made anew under its name has lost the program and the VIPs.
        match self.attach() {
            Ok(()) => drop(self.problems.remove("attach")),
            Err(error) => self.problem("attach", &error),
        }
        self.follow_targets();
        self.assign_vips().await;
    }

    /// Takes a reading of the counters, for rates.
    pub fn sample(&mut self) {
        let backends = self.directory.all_backends();
        if let Ok(counters) = self.reconciler.datapath().counters(&[], &backends) {
            self.rates.add(Instant::now(), &counters);
        }
    }

    /// The state of everything.
    pub fn status(&self) -> Status {
        let services: Vec<u32> = self.directory.services.values().copied().collect();
        let backends = self.directory.all_backends();
        let mut problems: Vec<String> = self.problems.values().cloned().collect();
        let counters = self
            .reconciler
            .datapath()
            .counters(&services, &backends)
            .unwrap_or_else(|error| {
                problems.push(chain(error));
                Default::default()
            });
        let live: BTreeMap<u32, LiveCount> = self
            .reconciler
            .datapath()
            .live_counts(&backends)
            .map(|counts| iter::zip(backends, counts).collect())
            .unwrap_or_else(|error| {
                problems.push(chain(error));
                Default::default()
            });
        let (sizes, memory) = (self.model.sizes, self.map_memory());
        let reports = self.driver.report();
        let unresolved = self.watcher.unresolved();
        let attached: BTreeSet<u32> = (self.attachments.iter())
            .filter_map(|attachment| if_nametoindex(attachment.interface.as_str()).ok())
            .collect();
        let service_status = |service: &Service| {
            let id = self
                .directory
                .services
                .get(&service.name)
                .copied()
                .unwrap_or(u32::MAX);
            let shares = compile::shares(self.reconciler.actual(), id);
            let ids = self.directory.backends_of(service).iter().copied();
            let backend_status = |(backend, id): (&config::Backend, u32)| {
                let name: BackendName = (service.name.clone(), backend.name.clone());
                let counted = counters.of_backend(id);
                let rate = self.rates.of(id);
                BackendStatus {
                    name: backend.name.clone(),
                    address: match backend.port {
                        Some(port) => SocketAddr::new(backend.address, port).to_string(),
                        None => backend.address.to_string(),
                    },
                    weight: backend.weight,
                    max_connections: backend.max_connections,
                    backup: backend.backup,
                    administrative: match self.model.administrative_of(service, &backend.name) {
                        Administrative::Enabled => "enabled",
                        Administrative::Draining { .. } => "draining",
                        Administrative::Disabled => "disabled",
                    }
                    .to_owned(),
                    health: self.model.health_of(service, &backend.name),
                    probe: reports.get(&name).map(|report| report.last_result.clone()),
                    next_hop_problem: if service.forward == config::Forward::Local {
                        let is_missing = self.not_local.contains(&backend.address);
                        is_missing.then(|| BACKEND_NOT_LOCAL.to_owned())
                    } else {
                        next_hop_problem(&self.model, &unresolved, &attached, backend.address)
                    },
                    share: shares.get(&id).copied().unwrap_or(0.0),
                    flows: self.model.live_flows.get(&id).copied().unwrap_or(0),
                    live_flows: live.get(&id).map_or(0, LiveCount::flows),
                    flows_total: counted.flows,
                    forwarded: Traffic::from(counted.forwarded),
                    returned: Traffic::from(counted.returned),
                    packets_per_second: rate.packets_per_second,
                    bytes_per_second: rate.bytes_per_second,
                }
            };
            let healthy_backends = self.model.healthy_backends(service);
            ServiceStatus {
                name: service.name.clone(),
                vip: service.vip.to_string(),
                port: service
                    .ports
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(","),
                protocol: service.protocol.to_string(),
                strategy: service.strategy.to_string(),
                forward: service.forward.to_string(),
                healthy: healthy_backends >= service.min_healthy,
                healthy_backends,
                min_healthy: service.min_healthy,
                reasons: counters
                    .services
                    .get(&id)
                    .map(|counts| by_reason(counts))
                    .unwrap_or_default(),
                backends: service
                    .backends
                    .iter()
                    .zip(ids.chain(iter::repeat(0)))
                    .map(backend_status)
                    .collect(),
            }
        };
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            instance: self.instance.to_string(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            interfaces: self
                .attachments
                .iter()
                .map(|attachment| InterfaceStatus {
                    name: attachment.interface.clone(),
                    xdp_mode: attachment.mode.name().to_owned(),
                    fallback: attachment.fallback.clone(),
                })
                .collect(),
            flow_table: FlowTableStatus {
                size: sizes.flows,
                flows: self.model.live_flows.values().sum(),
                memory_bytes: memory.flow_table,
            },
            maps: MapsStatus {
                services: sizes.services,
                services_memory_bytes: memory.services,
                backends: sizes.backends,
                backends_memory_bytes: memory.backends,
                slot_tables_memory_bytes: memory.slot_tables,
            },
            packets: PacketTotals::of(&counters.totals),
            reasons: by_reason(&counters.reasons),
            services: self.model.config.services.iter().map(service_status).collect(),
            problems,
        }
    }

    /// What the maps take.
    pub fn map_memory(&self) -> MapMemory {
        self.reconciler.datapath().memory()
    }

    /// Compiles the model and makes the maps hold the result.
    fn converge(&mut self) -> anyhow::Result<()> {
        self.model.ramps = self.rising.percents(&self.model.config);
        let compiled = compile::compile(&mut self.tables, &self.model, self.reconciler.actual())?;
        self.sweeps.follow(self.reconciler.actual(), &compiled.contents);
        self.reconciler.reconcile(compiled.contents)?;
        self.directory = compiled.directory;
        self.problems.remove("converge");
        Ok(())
    }

    /// As [`Self::converge`], where nothing but health or administrative state of a service's backends has changed: with many
    /// services, most of the work would be to find the others as they are.
    fn converge_service(&mut self, name: &str) -> anyhow::Result<()> {
        let Model { config, ramps, .. } = &mut self.model;
        let named = |service: &&Service| service.name == name;
        if let Some(service) = config.services.iter().find(named) {
            // What others have gained meanwhile they get by the next `ramp`.
            for backend in &service.backends {
                ramps.remove(&(service.name.clone(), backend.name.clone()));
            }
            ramps.extend(self.rising.percents_of(service));
        }
        let is_all_that_changes = !self.problems.contains_key("converge");
        let service = self.model.config.services.iter().find(named);
        let operations = service.filter(|_| is_all_that_changes).and_then(|service| {
            compile::follow_states(
                &mut self.tables,
                &self.model,
                service,
                &self.directory,
                self.reconciler.actual(),
            )
        });
        match operations {
            Some(operations) => {
                self.reconciler.apply(&operations)?;
                Ok(())
            }
            None => self.converge(),
        }
    }

    /// As [`Self::converge`]; what fails is told in the status and tried again by the next [`Self::repair`].
    fn converge_or_retry(&mut self) {
        if let Err(error) = self.converge() {
            self.problem("converge", &error);
        }
    }

    fn problem(&mut self, what: &'static str, problem: &anyhow::Error) {
        error!("{what}: {problem:#}");
        self.problems.insert(what, format!("{problem:#}"));
    }

    fn attach(&mut self) -> anyhow::Result<()> {
        let mode = match self.model.config.xdp_mode {
            XdpMode::Auto => Mode::Auto,
            XdpMode::Native => Mode::Native,
            XdpMode::Generic => Mode::Generic,
        };
        let attachments = self
            .reconciler
            .datapath_mut()
            .attach(&self.model.config.interfaces, mode)?;
        for attachment in &attachments {
            if self.attachments.contains(attachment) {
                continue;
            }
            let Attachment {
                interface,
                mode,
                fallback,
            } = attachment;
            match fallback {
                None => info!(interface, mode = mode.name(), "attached"),
                Some(why) => warn!(
                    interface,
                    mode = mode.name(),
                    "attached in generic mode, which is several times slower: native mode was refused ({why})"
                ),
            }
        }
        self.attachments = attachments;
        let hooked: Vec<String> = if local_services(&self.model.config).next().is_some() {
            // What clients on this host send is seen on loopback alone.
            let network = self.model.config.interfaces.iter().cloned();
            iter::once("lo".to_owned()).chain(network).collect()
        } else {
            Vec::new()
        };
        self.reconciler.datapath_mut().attach_local(&hooked)?;
        Ok(())
    }

    /// Has probes and next hops follow the configuration, and takes in what is known of both already.
    async fn follow_configuration(&mut self) {
        self.follow_targets();
        self.follow_health();
        let services = self.model.config.services.iter();
        let configured = services
            // There is no way to a process on this host, only a port.
            .filter(|service| service.forward != Forward::Local)
            .flat_map(|service| &service.backends)
            .map(|backend| backend.address);
        // Those that have left may still have flows: what the maps hold is watched until the next configuration.
        let actual = self.reconciler.actual();
        let is_local = |backend: &abi::Backend| {
            let service = backend.service_plus_one.checked_sub(1);
            let service = service.and_then(|id| actual.services.get(&id));
            service.is_some_and(|service| service.forward == abi::Forward::Local.number())
        };
        let held = actual.backends.values().filter(|backend| !is_local(backend));
        let addresses = configured.chain(held.map(|backend| backend.address.into()));
        self.watcher.set_addresses(addresses.collect()).await;
        self.model.next_hops = self.watcher.next_hops().borrow().clone();
    }

    async fn assign_vips(&mut self) {
        let Some(interface) = self.model.config.interfaces.first() else {
            return;
        };
        let services = self.model.config.services.iter();
        let desired: BTreeSet<IpAddr> = services
            .filter(|service| service.assign_vip)
            .map(|service| service.vip)
            .collect();
        match net::reconcile_vips(&desired, interface).await {
            Ok(changes) => {
                self.problems.remove("assign VIPs");
                for vip in changes.added {
                    info!(%vip, interface, "assigned VIP");
                }
                for vip in changes.removed {
                    info!(%vip, "removed VIP");
                }
            }
            Err(error) => self.problem("assign VIPs", &error.into()),
        }
        self.look_for_local_addresses().await;
    }

    /// Finds out which addresses of `local` services are not this host's, which has no process get their packets.
    async fn look_for_local_addresses(&mut self) {
        let addresses = local_services(&self.model.config).flat_map(addresses_of);
        match net::not_local(&addresses.collect()).await {
            Ok(not_local) => self.not_local = not_local,
            Err(error) => return self.problem(LOCAL_ADDRESSES, &error.into()),
        }
        let missing =
            local_services(&self.model.config).filter(|service| self.not_local.contains(&service.vip));
        let problems: Vec<String> = missing.map(vip_not_local).collect();
        if problems.is_empty() {
            self.problems.remove(LOCAL_ADDRESSES);
        } else if self.problems.get(LOCAL_ADDRESSES) != Some(&problems.join("; ")) {
            self.problem(LOCAL_ADDRESSES, &anyhow::anyhow!(problems.join("; ")));
        }
    }

    /// Drops what is known of backends that a configuration no longer has: one of the same name with another
    /// address is another server.
    fn forget_vanished(&mut self, former: &Config) {
        let former = servers(former);
        let present = servers(&self.model.config);
        let stays = |name: &BackendName| present.contains_key(name) && present.get(name) == former.get(name);
        self.model.health.retain(|name, _| stays(name));
        self.model.administrative.retain(|name, _| stays(name));
    }

    /// Takes over what is known of servers that only have another name now, or whose service has: without it they
    /// would get no new flows until their first probe has ended.
    fn remember_renamed(&mut self) {
        let restored = compile::restore(
            &self.model.config,
            self.reconciler.actual(),
            &self.model.sizes,
            SystemTime::now(),
        );
        for (name, health) in restored.health {
            self.model.health.entry(name).or_insert(health);
        }
        for (name, state) in restored.administrative {
            self.model.administrative.entry(name).or_insert(state);
        }
    }

    /// What of a new configuration does not take effect now.
    fn restart_warnings(&self, config: &Config) -> Vec<String> {
        let mut warnings = Vec::new();
        if config.socket != self.model.config.socket {
            warnings
                .push("the control socket stays where it is until the daemon is started again".to_owned());
        }
        let Sizes {
            flows,
            services,
            backends,
        } = self.model.sizes;
        if config
            .flow_table
            .size
            .is_some_and(|wanted| abi::buckets(wanted) != abi::buckets(flows))
        {
            warnings.push(format!(
                "the flow table keeps its {flows} entries: another size takes effect after `xlb detach`, which ends \
                 all flows"
            ));
        }
        let limits = [
            ("services", config.limits.services, services),
            ("backends", config.limits.backends, backends),
        ];
        for (objects, wanted, limit) in limits {
            if wanted.is_some_and(|wanted| wanted != limit) {
                warnings.push(format!(
                    "the maps keep their room for {limit} {objects}: another limit takes effect after `xlb detach`, which \
                     ends all flows"
                ));
            }
        }
        warnings
    }

    fn find(&self, service: &str, backend: &str) -> Result<(), Refused> {
        let services = &self.model.config.services;
        let Some(found) = services.iter().find(|candidate| candidate.name == service) else {
            let names: Vec<&str> = services.iter().map(|service| service.name.as_str()).collect();
            let message = format!("there is no service {service:?}; there are: {}", names.join(", "));
            return Err(refused(Refusal::NotFound, message));
        };
        if found.backends.iter().any(|candidate| candidate.name == backend) {
            return Ok(());
        }
        let names: Vec<&str> = found
            .backends
            .iter()
            .map(|backend| backend.name.as_str())
            .collect();
        let message = format!(
            "service {service:?} has no backend {backend:?}; it has: {}",
            names.join(", ")
        );
        Err(refused(Refusal::NotFound, message))
    }
}

/// Services that are delivered to processes on this host.
pub fn local_services(config: &Config) -> impl Iterator<Item = &Service> {
    let services = config.services.iter();
    services.filter(|service| service.forward == Forward::Local)
}

/// Those of a service: its VIP and its backends'.
pub fn addresses_of(service: &Service) -> impl Iterator<Item = IpAddr> + '_ {
    let backends = service.backends.iter().map(|backend| backend.address);
    iter::once(service.vip).chain(backends)
}

/// What is wrong where the backend of a `local` service is not this host's.
pub const BACKEND_NOT_LOCAL: &str = "it is no address of this host, to which forward \"local\" delivers";

/// What is wrong where the VIP of a `local` service is not this host's, and what mends it.
pub fn vip_not_local(service: &Service) -> String {
    let Service { name, vip, .. } = service;
    let bits = if vip.is_ipv4() { 32 } else { 128 };
    format!(
        "the vip {vip} of {name:?} is no address of this host, so that no process gets its packets: set \
         `assign-vip = true`, or `ip address add {vip}/{bits} dev lo`"
    )
}

/// Address and port of each backend.
fn servers(config: &Config) -> BTreeMap<BackendName, (IpAddr, Option<u16>)> {
    let named = |service: &Service, backend: &config::Backend| {
        (
            (service.name.clone(), backend.name.clone()),
            (backend.address, backend.port),
        )
    };
    let services = config.services.iter();
    services
        .flat_map(|service| {
            service
                .backends
                .iter()
                .map(move |backend| named(service, backend))
        })
        .collect()
}

/// An error with its causes, in one line.
fn chain(error: impl Into<anyhow::Error>) -> String {
    format!("{:#}", error.into())
}

fn next_hop_problem(
    model: &Model,
    unresolved: &BTreeMap<IpAddr, Unresolved>,
    attached: &BTreeSet<u32>,
    address: IpAddr,
) -> Option<String> {
    if let Some(next_hop) = model.next_hops.get(&address)
        && next_hop.next_hop_mac.is_some()
    {
        // Replies that come in there are not seen, and its driver may not send what others redirect to it.
        let missing = !attached.contains(&next_hop.ifindex);
        return missing.then(|| {
            format!(
                "is behind interface {}, which is not in `interfaces`",
                interface_name(next_hop.ifindex)
            )
        });
    }
    Some(
        unresolved
            .get(&address)
            .map_or_else(|| "not resolved yet".to_owned(), ToString::to_string),
    )
}

/// The name of an interface, or its number where it is gone.
fn interface_name(ifindex: u32) -> String {
    net::name_of(ifindex).unwrap_or_else(|| ifindex.to_string())
}

fn refused(reason: Refusal, message: String) -> Refused {
    Refused { reason, message }
}
