//! The ways to the backends, kept resolved and up to date.
//!
//! The kernel is asked how it would route to each address, and told to keep the neighbour on that way resolved
//! (`NTF_EXT_MANAGED`, kernel 5.16). Neighbours of ours carry `NDA_PROTOCOL`, so that the next daemon, or `xlb detach`,
//! recognises them without stored state; they outlive the daemon, as the data path does.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    time::Duration,
};

use futures_util::{Stream, StreamExt, TryStreamExt};
use rtnetlink::{
    MulticastGroup, RouteMessageBuilder,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
            NeighbourState,
        },
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType, RouteVia},
    },
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tracing::{debug, warn};

use super::{Link, NetError, Netlink, OWN_PROTOCOL};
use crate::model::NextHop;

/// Changes come in swarms: one look for all within this time.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// A look takes at most one part in so many of the time, whatever happens on the network.
const REST: u32 = 10;
/// Against events that were missed.
const FULL_REFRESH: Duration = Duration::from_secs(10);
/// A kernel that answers nothing sensible for so long is asked anew.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Watches the ways to a set of addresses, until it is dropped.
#[derive(Debug)]
pub struct NextHopWatcher {
    commands: mpsc::UnboundedSender<SetAddresses>,
    next_hops: watch::Receiver<BTreeMap<IpAddr, NextHop>>,
    unresolved: watch::Receiver<BTreeMap<IpAddr, String>>,
    task: JoinHandle<()>,
}

impl NextHopWatcher {
    /// Starts to watch in the network namespace of the calling thread; wants a tokio runtime with I/O and time.
    ///
    /// # Errors
    /// When netlink is not to be had.
    pub fn start() -> Result<Self, NetError> {
        let (commands, orders) = mpsc::unbounded_channel();
        let (publish_next_hops, next_hops) = watch::channel(BTreeMap::new());
        let (publish_unresolved, unresolved) = watch::channel(BTreeMap::new());
        let watch = Watch {
            netlink: Netlink::open()?,
            addresses: None,
            ways: BTreeMap::new(),
            next_hops: publish_next_hops,
            unresolved: publish_unresolved,
        };
        let task = tokio::spawn(watch.run(Events::open()?, orders));
        Ok(Self { commands, next_hops, unresolved, task })
    }

    /// Replaces the set of addresses, and returns once the ways that the kernel knows now are published.
    ///
    /// Until this is called for the first time nothing is asked of the kernel, so that what an earlier daemon has
    /// had resolved stays. A neighbour that is not resolved yet follows within the time that it needs to answer.
    pub async fn set_addresses(&self, addresses: BTreeSet<IpAddr>) {
        let (done, published) = oneshot::channel();
        // Both fail only when the task has ended, and with it the runtime.
        if self.commands.send(SetAddresses { addresses, done }).is_ok() {
            let _ = published.await;
        }
    }

    /// The ways by address, and their changes; an address that has no way is absent.
    pub fn next_hops(&self) -> watch::Receiver<BTreeMap<IpAddr, NextHop>> {
        self.next_hops.clone()
    }

    /// Why an address has no way, or a way whose neighbour has not answered, in words for the operator.
    pub fn unresolved(&self) -> BTreeMap<IpAddr, String> {
        self.unresolved.borrow().clone()
    }
}

impl Drop for NextHopWatcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Takes back what watchers asked of the kernel: removes the neighbours of ours. Tells how many there were.
pub async fn release_neighbours() -> Result<usize, NetError> {
    let netlink = Netlink::open()?;
    let mut released = 0;
    for neighbour in netlink.neighbours().await?.into_values().filter(|neighbour| neighbour.own) {
        netlink.remove_neighbour(neighbour.message).await?;
        released += 1;
    }
    Ok(released)
}

/// A neighbour is known by interface and address.
type NeighbourKey = (u32, IpAddr);

struct SetAddresses {
    addresses: BTreeSet<IpAddr>,
    done: oneshot::Sender<()>,
}

/// How to get to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Way {
    next_hop: NextHop,
    neighbour: NeighbourKey,
    interface: String,
}

/// How the kernel would route to an address.
struct Route {
    ifindex: u32,
    gateway: Option<IpAddr>,
    source: IpAddr,
}

struct Watch {
    netlink: Netlink,
    /// `None` until somebody said what to watch.
    addresses: Option<BTreeSet<IpAddr>>,
    ways: BTreeMap<IpAddr, Way>,
    next_hops: watch::Sender<BTreeMap<IpAddr, NextHop>>,
    unresolved: watch::Sender<BTreeMap<IpAddr, String>>,
}

impl Watch {
    async fn run(mut self, mut events: Events, mut orders: mpsc::UnboundedReceiver<SetAddresses>) {
        let mut periodic = interval(FULL_REFRESH);
        periodic.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut due: Option<Instant> = None;
        let mut rested = Instant::now();
        loop {
            let mut done = None;
            tokio::select! {
                order = orders.recv() => {
                    let Some(order) = order else { return };
                    self.addresses = Some(order.addresses);
                    done = Some(order.done);
                }
                event = events.next() => {
                    if event.is_none_or(|event| self.is_concerned(&event)) {
                        due = due.or(Some(rested.max(Instant::now() + DEBOUNCE)));
                    }
                    continue;
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                _ = periodic.tick() => events.reopen_if_ended(),
            }
            due = None;
            let start = Instant::now();
            match timeout(ANSWER_TIMEOUT, self.refresh()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => self.failed(&error),
                Err(_) => self.failed(&"the kernel does not answer"),
            }
            rested = Instant::now() + start.elapsed() * REST;
            if let Some(done) = done {
                // Whoever waited may have gone.
                let _ = done.send(());
            }
        }
    }

    /// What was known stays in force; the periodic refresh tries again, over a new socket.
    fn failed(&mut self, error: &dyn std::fmt::Display) {
        warn!("resolving the next hops failed, trying again within {FULL_REFRESH:?}: {error}");
        match Netlink::open() {
            Ok(netlink) => self.netlink = netlink,
            Err(error) => warn!("{error}"),
        }
    }

    /// Whether a message may change a way: those about neighbours are many, and mostly confirm what is known.
    fn is_concerned(&self, event: &NetlinkPayload<RouteNetlinkMessage>) -> bool {
        let neighbour = match event {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message)) => {
                Neighbour::parse(message.clone())
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNeighbour(message)) => {
                return Neighbour::parse(message.clone())
                    .is_some_and(|(key, _)| self.ways.values().any(|way| way.neighbour == key));
            }
            _ => return true,
        };
        neighbour.is_some_and(|(key, neighbour)| {
            self.ways.values().filter(|way| way.neighbour == key).any(|way| {
                neighbour.state == NeighbourState::Failed || neighbour.mac() != way.next_hop.next_hop_mac
            })
        })
    }

    /// Looks at everything anew, and publishes what differs.
    async fn refresh(&mut self) -> Result<(), NetError> {
        let Some(addresses) = &self.addresses else { return Ok(()) };
        let neighbours = self.netlink.neighbours().await?;
        let mut links = BTreeMap::new();
        let mut ways = BTreeMap::new();
        let mut unresolved = BTreeMap::new();
        for &address in addresses {
            match self.netlink.way(address, &mut links).await? {
                Ok(mut way) => {
                    way.next_hop.next_hop_mac = neighbours.get(&way.neighbour).and_then(Neighbour::mac);
                    if way.next_hop.next_hop_mac.is_none() {
                        let (_, neighbour) = way.neighbour;
                        let reason = format!("neighbour {neighbour} on {} does not answer", way.interface);
                        unresolved.insert(address, reason);
                    }
                    ways.insert(address, way);
                }
                Err(reason) => {
                    unresolved.insert(address, reason);
                }
            }
        }

        let wanted: BTreeSet<NeighbourKey> = ways.values().map(|way| way.neighbour).collect();
        self.ways = ways;
        let next_hops = self.ways.iter().map(|(address, way)| (*address, way.next_hop.clone())).collect();
        replace(&self.unresolved, unresolved);
        replace(&self.next_hops, next_hops);
        self.netlink.keep_resolved(&wanted, neighbours).await
    }
}

fn replace<T: PartialEq>(published: &watch::Sender<T>, new: T) {
    published.send_if_modified(|old| {
        let differs = *old != new;
        *old = new;
        differs
    });
}

impl Netlink {
    /// The way to an address without its neighbour's MAC address, or why there is none.
    async fn way(
        &self,
        address: IpAddr,
        links: &mut BTreeMap<u32, Option<Link>>,
    ) -> Result<Result<Way, String>, NetError> {
        let route = match self.route(address).await? {
            Ok(route) => route,
            Err(reason) => return Ok(Err(reason)),
        };
        if let std::collections::btree_map::Entry::Vacant(entry) = links.entry(route.ifindex) {
            entry.insert(self.link(route.ifindex).await?);
        }
        let Some(link) = links.get(&route.ifindex).and_then(Option::as_ref) else {
            return Ok(Err(format!("interface {} of its route has gone", route.ifindex)));
        };
        let Some(source_mac) = link.mac else {
            return Ok(Err(format!("its route leaves by {}, which is no Ethernet interface", link.name)));
        };
        Ok(Ok(Way {
            next_hop: NextHop { ifindex: route.ifindex, source: route.source, source_mac, next_hop_mac: None },
            neighbour: (route.ifindex, route.gateway.unwrap_or(address)),
            interface: link.name.clone(),
        }))
    }

    /// How the kernel would route to an address, or why not.
    async fn route(&self, address: IpAddr) -> Result<Result<Route, String>, NetError> {
        let action = || format!("looking up the route to {address}");
        let prefix_length = if address.is_ipv4() { 32 } else { 128 };
        let request = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(address, prefix_length)
            .map_err(|error| NetError::kernel(action(), io::Error::other(error)))?
            .build();
        let answer = self.handle.route().get(request).execute().try_next().await;
        match answer {
            Ok(Some(message)) => Ok(parse_route(&message)),
            Ok(None) => Ok(Err("the kernel knows no route".to_owned())),
            // fib_props in net/ipv4/fib_semantics.c: what the types of routes answer.
            Err(rtnetlink::Error::NetlinkError(error)) => match -error.raw_code() {
                libc::ENETUNREACH => Ok(Err("there is no route to it".to_owned())),
                libc::EHOSTUNREACH => Ok(Err("its route says unreachable".to_owned())),
                libc::EACCES => Ok(Err("its route says prohibit".to_owned())),
                libc::EINVAL => Ok(Err("its route says blackhole".to_owned())),
                _ => Err(NetError::kernel(action(), rtnetlink::Error::NetlinkError(error))),
            },
            Err(error) => Err(NetError::kernel(action(), error)),
        }
    }

    /// All neighbours that have an address of IP.
    async fn neighbours(&self) -> Result<BTreeMap<NeighbourKey, Neighbour>, NetError> {
        let messages: Vec<NeighbourMessage> = self
            .handle
            .neighbours()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| NetError::kernel("listing the neighbours", error))?;
        Ok(messages.into_iter().filter_map(Neighbour::parse).collect())
    }

    /// Has the kernel resolve what is wanted, and no longer what was ours and is not.
    async fn keep_resolved(
        &self,
        wanted: &BTreeSet<NeighbourKey>,
        neighbours: BTreeMap<NeighbourKey, Neighbour>,
    ) -> Result<(), NetError> {
        for &(ifindex, address) in wanted {
            if neighbours.get(&(ifindex, address)).is_none_or(Neighbour::wants_asking) {
                // A refusal concerns this neighbour alone, as where its interface is down: the others go on.
                if let Err(error) = self.resolve_neighbour(ifindex, address).await {
                    debug!("{error}");
                }
            }
        }
        for (key, neighbour) in neighbours {
            if neighbour.own && !wanted.contains(&key) {
                self.remove_neighbour(neighbour.message).await?;
            }
        }
        Ok(())
    }

    /// Has the kernel resolve a neighbour now, and, from 5.16 on, from now on.
    async fn resolve_neighbour(&self, ifindex: u32, address: IpAddr) -> Result<(), NetError> {
        // An older kernel ignores the extended flag and obeys NTF_USE, which asks once; the refresh asks again.
        let mut request = self
            .handle
            .neighbours()
            .add(ifindex, address)
            .state(NeighbourState::None)
            .flags(NeighbourFlags::Use)
            .replace();
        let attributes = &mut request.message_mut().attributes;
        attributes.push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
        attributes.push(NeighbourAttribute::Protocol(RouteProtocol::Other(OWN_PROTOCOL)));
        request
            .execute()
            .await
            .map_err(|error| NetError::kernel(format!("resolving neighbour {address} on {ifindex}"), error))
    }

    /// Removes a neighbour; one that has gone meanwhile is no error.
    async fn remove_neighbour(&self, message: NeighbourMessage) -> Result<(), NetError> {
        match self.handle.neighbours().del(message).execute().await {
            Err(rtnetlink::Error::NetlinkError(answer))
                if [-libc::ENOENT, -libc::ENODEV, -libc::ENXIO].contains(&answer.raw_code()) =>
            {
                Ok(())
            }
            done => done.map_err(|error| NetError::kernel("removing a neighbour", error)),
        }
    }
}

fn parse_route(message: &RouteMessage) -> Result<Route, String> {
    match message.header.kind {
        RouteType::Unicast => {}
        RouteType::Local => return Err("it is an address of this host".to_owned()),
        RouteType::Broadcast | RouteType::Multicast | RouteType::Anycast => {
            return Err("it is not the address of one host".to_owned());
        }
        RouteType::BlackHole => return Err("its route says blackhole".to_owned()),
        RouteType::Unreachable => return Err("its route says unreachable".to_owned()),
        RouteType::Prohibit => return Err("its route says prohibit".to_owned()),
        other => return Err(format!("its route is of the type {other:?}")),
    }
    let (mut ifindex, mut gateway, mut source) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => gateway = Some(IpAddr::V4(*address)),
            RouteAttribute::Gateway(RouteAddress::Inet6(address)) => gateway = Some(IpAddr::V6(*address)),
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some(IpAddr::V4(*address)),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some(IpAddr::V6(*address)),
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some(IpAddr::V4(*address)),
            RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => source = Some(IpAddr::V6(*address)),
            _ => {}
        }
    }
    let ifindex = ifindex.ok_or("its route names no interface")?;
    let source = source.ok_or("this host has no address to send from on its route")?;
    Ok(Route { ifindex, gateway, source })
}

/// An entry of the kernel's table.
#[derive(Debug)]
struct Neighbour {
    state: NeighbourState,
    lladdr: Option<[u8; 6]>,
    managed: bool,
    /// Somebody's control plane keeps it.
    external: bool,
    /// We asked for it.
    own: bool,
    message: NeighbourMessage,
}

impl Neighbour {
    /// `None` for what is no neighbour of IP, as entries of a bridge.
    fn parse(message: NeighbourMessage) -> Option<(NeighbourKey, Self)> {
        let mut address = None;
        let mut neighbour = Self {
            state: message.header.state,
            lladdr: None,
            managed: false,
            external: message.header.flags.contains(NeighbourFlags::ExtLearned),
            own: false,
            message,
        };
        for attribute in &neighbour.message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some(IpAddr::V4(*v4)),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some(IpAddr::V6(*v6)),
                NeighbourAttribute::LinkLayerAddress(bytes) => {
                    neighbour.lladdr = bytes.as_slice().try_into().ok();
                }
                NeighbourAttribute::ExtFlags(flags) => {
                    neighbour.managed = flags.contains(NeighbourExtFlags::Managed);
                }
                NeighbourAttribute::Protocol(protocol) => {
                    neighbour.own = *protocol == RouteProtocol::Other(OWN_PROTOCOL);
                }
                _ => {}
            }
        }
        Some(((neighbour.message.header.ifindex, address?), neighbour))
    }

    /// The MAC address to send to, where it holds (`NUD_VALID`).
    fn mac(&self) -> Option<[u8; 6]> {
        match self.state {
            NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
            | NeighbourState::Noarp => self.lladdr,
            _ => None,
        }
    }

    /// Whether the kernel has to be asked to resolve it: not what an operator or another program keeps, and not what is
    /// being kept for us already, unless the kernel has just given up.
    fn wants_asking(&self) -> bool {
        let kept_by_others = self.external
            || (self.managed && !self.own)
            || matches!(self.state, NeighbourState::Permanent | NeighbourState::Noarp);
        !kept_by_others && (!self.managed || self.state == NeighbourState::Failed)
    }
}

/// The kernel's messages about neighbours, routes, rules, links and addresses.
struct Events {
    messages: Option<Messages>,
    task: JoinHandle<()>,
}

type Messages = std::pin::Pin<Box<dyn Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Send>>;

impl Events {
    fn open() -> Result<Self, NetError> {
        let groups = [
            MulticastGroup::Neigh,
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups)
            .map_err(|error| NetError::kernel("subscribing to the kernel's network events", error))?;
        let messages = messages.map(|(message, _)| message);
        Ok(Self { messages: Some(Box::pin(messages)), task: tokio::spawn(connection) })
    }

    /// The next message; `None` when some were lost, so that anything may have changed.
    async fn next(&mut self) -> Option<NetlinkPayload<RouteNetlinkMessage>> {
        let Some(messages) = &mut self.messages else { return std::future::pending().await };
        match messages.next().await {
            Some(message) => match message.payload {
                NetlinkPayload::Overrun(_) => None,
                payload => Some(payload),
            },
            None => {
                self.messages = None;
                None
            }
        }
    }

    fn reopen_if_ended(&mut self) {
        if self.messages.is_none() {
            match Self::open() {
                Ok(events) => *self = events,
                Err(error) => warn!("{error}; next hops follow changes within {FULL_REFRESH:?}"),
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.task.abort();
    }
}
