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
        address::{AddressHeaderFlags, AddressMessage},
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
            NeighbourState,
        },
        route::{
            RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteType, RouteVia,
        },
    },
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tracing::{debug, warn};

use super::{Link, NetError, Netlink, OWN_PROTOCOL, links::below_vlans};
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
    unresolved: watch::Receiver<BTreeMap<IpAddr, Unresolved>>,
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
        Ok(Self {
            commands,
            next_hops,
            unresolved,
            task,
        })
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
    pub fn unresolved(&self) -> BTreeMap<IpAddr, Unresolved> {
        self.unresolved.borrow().clone()
    }
}

impl Drop for NextHopWatcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Why packets cannot be sent on to an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unresolved {
    /// Where forward `local` delivers to, and no other does.
    #[error("it is an address of this host")]
    OwnAddress,
    /// Anything else, in words for the operator.
    #[error("{0}")]
    Because(String),
}

impl<T: Into<String>> From<T> for Unresolved {
    fn from(reason: T) -> Self {
        Self::Because(reason.into())
    }
}

/// Takes back what watchers asked of the kernel: removes the neighbours of ours. Tells how many there were.
pub async fn release_neighbours() -> Result<usize, NetError> {
    let netlink = Netlink::open()?;
    let mut released = 0;
    for neighbour in netlink
        .neighbours()
        .await?
        .into_values()
        .filter(|neighbour| neighbour.own)
    {
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
    /// As the route prescribes, or as the kernel chooses among this host's addresses that are usable.
    source: Option<IpAddr>,
    /// Where the route has one of its own, or the kernel has learned one.
    mtu: Option<u32>,
}

/// What routes refer to.
struct Host {
    links: BTreeMap<u32, Link>,
    addresses: Vec<(IpAddr, AddressMessage)>,
}

impl Host {
    /// The way along a route, without the neighbour's MAC address; or why there is none.
    fn way(&self, address: IpAddr, route: &Route) -> Result<Way, Unresolved> {
        let link = self
            .links
            .get(&route.ifindex)
            .ok_or_else(|| format!("interface {} of its route has gone", route.ifindex))?;
        let name = &link.name;
        let source_mac = link
            .mac
            .ok_or_else(|| format!("its route leaves by {name}, which is no Ethernet interface"))?;
        let (ifindex, tags) = below_vlans(&self.links, route.ifindex)?;
        let mtu = link.mtu_of(address.is_ipv4());
        Ok(Way {
            next_hop: NextHop {
                ifindex,
                source: self.source(address, route, name)?,
                source_mac,
                next_hop_mac: None,
                tags,
                mtu: route.mtu.map_or(mtu, |own| own.min(mtu)),
            },
            neighbour: (route.ifindex, route.gateway.unwrap_or(address)),
            interface: name.clone(),
        })
    }

    /// The address to send from to another one.
    ///
    /// While the kernel asks whether another host has an address of the interface (RFC 4862 section 5.4), it does not
    /// answer for that address and chooses another one, which would be wrong in a second: there is none until then.
    fn source(&self, address: IpAddr, route: &Route, interface: &str) -> Result<IpAddr, String> {
        // Routers do not forward what comes from a link-local address (RFC 4291 section 2.5.6).
        let is_fit = |own: IpAddr| match own {
            IpAddr::V4(_) => address.is_ipv4(),
            IpAddr::V6(own) => address.is_ipv6() && !own.is_unicast_link_local(),
        };
        let chosen = route.source.filter(|source| is_fit(*source));
        let on_interface: Vec<(IpAddr, Detection)> = self
            .addresses
            .iter()
            .filter(|(own, message)| message.header.index == route.ifindex && is_fit(*own))
            .map(|(own, message)| (*own, Detection::of(message)))
            .collect();
        let with = |wanted| on_interface.iter().find(|(_, state)| *state == wanted);
        if let Some(source) = chosen
            && on_interface.contains(&(source, Detection::Done))
        {
            return Ok(source);
        }
        if let Some((own, _)) = with(Detection::Asking) {
            return Err(format!(
                "this host's address {own} on {interface} is not usable yet: it asks whether another host has it"
            ));
        }
        match (chosen, with(Detection::Taken)) {
            // Of another interface.
            (Some(source), taken) if taken.is_none_or(|(own, _)| *own != source) => Ok(source),
            (_, Some((own, _))) => Err(format!(
                "this host's address {own} on {interface} is another host's, too"
            )),
            _ => Err("this host has no address to send from on its route".to_owned()),
        }
    }
}

/// How far duplicate address detection has come with an address.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Detection {
    Asking,
    Taken,
    Done,
}

impl Detection {
    fn of(message: &AddressMessage) -> Self {
        // The header has room for the first eight flags alone, but these are among them.
        let flags = message.header.flags;
        if flags.contains(AddressHeaderFlags::Dadfailed) {
            Self::Taken
        } else if flags.contains(AddressHeaderFlags::Tentative)
            && !flags.contains(AddressHeaderFlags::Optimistic)
        {
            Self::Asking
        } else {
            Self::Done
        }
    }
}

struct Watch {
    netlink: Netlink,
    /// `None` until somebody said what to watch.
    addresses: Option<BTreeSet<IpAddr>>,
    ways: BTreeMap<IpAddr, Way>,
    next_hops: watch::Sender<BTreeMap<IpAddr, NextHop>>,
    unresolved: watch::Sender<BTreeMap<IpAddr, Unresolved>>,
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
        let Some(addresses) = &self.addresses else {
            return Ok(());
        };
        let neighbours = self.netlink.neighbours().await?;
        let host = Host {
            links: (self.netlink.links().await?.into_iter())
                .map(|link| (link.ifindex, link))
                .collect(),
            addresses: self.netlink.addresses().await?,
        };
        let mut ways = BTreeMap::new();
        let mut unresolved = BTreeMap::new();
        for &address in addresses {
            match self.netlink.way(address, &host).await? {
                Ok(mut way) => {
                    way.next_hop.next_hop_mac = neighbours.get(&way.neighbour).and_then(Neighbour::mac);
                    if way.next_hop.next_hop_mac.is_none() {
                        let (_, neighbour) = way.neighbour;
                        let reason = format!("neighbour {neighbour} on {} does not answer", way.interface);
                        unresolved.insert(address, reason.into());
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
        let next_hops = self
            .ways
            .iter()
            .map(|(address, way)| (*address, way.next_hop.clone()))
            .collect();
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
    async fn way(&self, address: IpAddr, host: &Host) -> Result<Result<Way, Unresolved>, NetError> {
        if let IpAddr::V6(address) = address
            && address.is_unicast_link_local()
        {
            return Ok(Err("a link-local address does not tell on which link".into()));
        }
        let route = self.route(address).await?;
        Ok(route.and_then(|route| host.way(address, &route)))
    }

    /// How the kernel would route to an address, or why not.
    async fn route(&self, address: IpAddr) -> Result<Result<Route, Unresolved>, NetError> {
        let action = || format!("looking up the route to {address}");
        match self.route_message(address).await? {
            Ok(Some(message)) => Ok(parse_route(&message)),
            Ok(None) => Ok(Err("the kernel knows no route".into())),
            // fib_props in net/ipv4/fib_semantics.c: what the types of routes answer.
            Err(rtnetlink::Error::NetlinkError(error)) => match -error.raw_code() {
                libc::ENETUNREACH => Ok(Err("there is no route to it".into())),
                libc::EHOSTUNREACH => Ok(Err("its route says unreachable".into())),
                libc::EACCES => Ok(Err("its route says prohibit".into())),
                libc::EINVAL => Ok(Err("its route says blackhole".into())),
                _ => Err(NetError::kernel(action(), rtnetlink::Error::NetlinkError(error))),
            },
            Err(error) => Err(NetError::kernel(action(), error)),
        }
    }

    /// What the kernel answers when it is asked for the route to an address.
    pub(super) async fn route_message(
        &self,
        address: IpAddr,
    ) -> Result<Result<Option<RouteMessage>, rtnetlink::Error>, NetError> {
        let prefix_length = if address.is_ipv4() { 32 } else { 128 };
        let request = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(address, prefix_length)
            .map_err(|error| {
                NetError::kernel(
                    format!("asking for a route to {address}"),
                    io::Error::other(error),
                )
            })?
            .build();
        Ok(self.handle.route().get(request).execute().try_next().await)
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
            if neighbours
                .get(&(ifindex, address))
                .is_none_or(Neighbour::wants_asking)
            {
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

fn parse_route(message: &RouteMessage) -> Result<Route, Unresolved> {
    match message.header.kind {
        RouteType::Unicast => {}
        RouteType::Local => return Err(Unresolved::OwnAddress),
        RouteType::Broadcast | RouteType::Multicast | RouteType::Anycast => {
            return Err("it is not the address of one host".into());
        }
        RouteType::BlackHole => return Err("its route says blackhole".into()),
        RouteType::Unreachable => return Err("its route says unreachable".into()),
        RouteType::Prohibit => return Err("its route says prohibit".into()),
        other => return Err(format!("its route is of the type {other:?}").into()),
    }
    let (mut ifindex, mut gateway, mut source, mut mtu) = (None, None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => gateway = Some(IpAddr::V4(*address)),
            RouteAttribute::Gateway(RouteAddress::Inet6(address)) => gateway = Some(IpAddr::V6(*address)),
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some(IpAddr::V4(*address)),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some(IpAddr::V6(*address)),
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some(IpAddr::V4(*address)),
            RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => source = Some(IpAddr::V6(*address)),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Ok(Route {
        ifindex: ifindex.ok_or("its route names no interface")?,
        gateway,
        source,
        mtu,
    })
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
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                    address = Some(IpAddr::V4(*v4));
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                    address = Some(IpAddr::V6(*v6));
                }
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
            MulticastGroup::Ipv6Ifinfo,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups)
            .map_err(|error| NetError::kernel("subscribing to the kernel's network events", error))?;
        let messages = messages.map(|(message, _)| message);
        Ok(Self {
            messages: Some(Box::pin(messages)),
            task: tokio::spawn(connection),
        })
    }

    /// The next message; `None` when some were lost, so that anything may have changed.
    async fn next(&mut self) -> Option<NetlinkPayload<RouteNetlinkMessage>> {
        let Some(messages) = &mut self.messages else {
            return std::future::pending().await;
        };
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

#[cfg(test)]
mod tests {
    use lb_common::abi::Tags;

    use super::*;
    use crate::lab::{Namespace, Route, block_on};

    const FIRST: [u8; 6] = [2, 0, 0, 0, 0, 0x11];
    const SECOND: [u8; 6] = [2, 0, 0, 0, 0, 0x12];

    /// A host with eth0 (10.0.1.1, 2001:db8:1::1) to the first peer (…2, MAC `FIRST`), and eth1 (10.0.2.1,
    /// 2001:db8:2::1) to the second (…2, MAC `SECOND`).
    struct Net {
        host: Namespace,
        first: Namespace,
        second: Namespace,
    }

    impl Net {
        fn new() -> Self {
            let host = Namespace::new("host").unwrap();
            let peer = |number: u8, mac| {
                let peer = Namespace::new("peer").unwrap();
                let interface = format!("eth{}", number - 1);
                Namespace::connect(&host, &interface, &peer, "eth0").unwrap();
                peer.set_mac("eth0", mac).unwrap();
                for (namespace, interface, last) in [(&host, interface.as_str(), 1), (&peer, "eth0", 2)] {
                    namespace
                        .add_address(interface, &format!("10.0.{number}.{last}/24"))
                        .unwrap();
                    namespace
                        .add_address(interface, &format!("2001:db8:{number}::{last}/64"))
                        .unwrap();
                }
                peer
            };
            let (first, second) = (peer(1, FIRST), peer(2, SECOND));
            Self { host, first, second }
        }

        /// Runs a test inside the host.
        fn host(&self, test: impl AsyncFnOnce(NextHopWatcher) + Send) {
            self.host
                .run(|| block_on(async { test(NextHopWatcher::start().unwrap()).await }))
                .unwrap();
        }

        fn next_hop(&self, interface: &str, source: &str, next_hop_mac: Option<[u8; 6]>) -> NextHop {
            let link = self.host.link(interface).unwrap();
            NextHop {
                ifindex: link.ifindex,
                source: ip(source),
                source_mac: link.mac.unwrap(),
                next_hop_mac,
                tags: Tags::default(),
                mtu: 1500,
            }
        }
    }

    /// The addresses of a test in one of the families.
    #[derive(Clone, Copy)]
    struct Family {
        /// As in the paths below `/proc/sys/net`.
        name: &'static str,
        /// Has a peer announce itself when its address changes.
        notify: &'static str,
        /// This host's on eth0 and on eth1.
        host: [&'static str; 2],
        peer: [&'static str; 2],
        length: u8,
        /// A host behind the peers, and prefixes that it is in, the shorter one last.
        far: &'static str,
        prefixes: [&'static str; 2],
    }

    const FAMILIES: [Family; 2] = [
        Family {
            name: "ipv4",
            notify: "arp_notify",
            host: ["10.0.1.1", "10.0.2.1"],
            peer: ["10.0.1.2", "10.0.2.2"],
            length: 24,
            far: "192.0.2.1",
            prefixes: ["192.0.2.0/24", "192.0.0.0/16"],
        },
        Family {
            name: "ipv6",
            notify: "ndisc_notify",
            host: ["2001:db8:1::1", "2001:db8:2::1"],
            peer: ["2001:db8:1::2", "2001:db8:2::2"],
            length: 64,
            far: "2001:db8:9::1",
            prefixes: ["2001:db8:9::/48", "2001:db8:8::/45"],
        },
    ];

    /// Runs a test in both families, each in a network of its own.
    fn in_both_families(test: impl Fn(Net, Family)) {
        for family in FAMILIES {
            test(Net::new(), family);
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn set(addresses: &[&str]) -> BTreeSet<IpAddr> {
        addresses.iter().map(|address| ip(address)).collect()
    }

    /// Waits until the way to an address is this one.
    async fn becomes(watcher: &NextHopWatcher, address: &str, expected: Option<&NextHop>) {
        let (mut published, address) = (watcher.next_hops(), ip(address));
        let reached = timeout(
            Duration::from_secs(20),
            published.wait_for(|next_hops| next_hops.get(&address) == expected),
        );
        if reached.await.is_err() {
            let last = watcher.next_hops().borrow().get(&address).cloned();
            panic!(
                "{address}: expected {expected:?}, last {last:?}, {:?}",
                watcher.unresolved()
            );
        }
    }

    async fn neighbour(interface: u32, address: &str) -> Option<Neighbour> {
        let netlink = Netlink::open().unwrap();
        netlink
            .neighbours()
            .await
            .unwrap()
            .remove(&(interface, ip(address)))
    }

    #[test]
    fn neighbours_on_the_link_are_resolved_in_both_families() {
        let net = Net::new();
        let v4 = net.next_hop("eth0", "10.0.1.1", Some(FIRST));
        let v6 = net.next_hop("eth1", "2001:db8:2::1", Some(SECOND));
        net.host(async |watcher| {
            watcher.set_addresses(set(&["10.0.1.2", "2001:db8:2::2"])).await;
            becomes(&watcher, "10.0.1.2", Some(&v4)).await;
            becomes(&watcher, "2001:db8:2::2", Some(&v6)).await;
            assert_eq!(watcher.unresolved(), BTreeMap::new());
        });
    }

    #[test]
    fn the_way_behind_a_gateway_follows_the_route() {
        in_both_families(|net, family| {
            let by_first = net.next_hop("eth0", family.host[0], Some(FIRST));
            let bysecond = net.next_hop("eth1", family.host[1], Some(SECOND));
            let [prefix, shorter] = family.prefixes;
            net.host.add_route(prefix, family.peer[0]).unwrap();
            net.host(async |watcher| {
                watcher.set_addresses(set(&[family.far])).await;
                becomes(&watcher, family.far, Some(&by_first)).await;
                net.host.add_route(prefix, family.peer[1]).unwrap();
                becomes(&watcher, family.far, Some(&bysecond)).await;
                net.host.remove_route(prefix).unwrap();
                becomes(&watcher, family.far, None).await;
                net.host.add_route(shorter, family.peer[0]).unwrap();
                becomes(&watcher, family.far, Some(&by_first)).await;
            });
        });
    }

    #[test]
    fn a_link_local_gateway_is_resolved_on_the_interface_of_the_route() {
        let net = Net::new();
        // Both peers have the same one.
        net.first.add_address("eth0", "fe80::2/64").unwrap();
        net.second.add_address("eth0", "fe80::2/64").unwrap();
        let far = FAMILIES[1].far;
        for (interface, source, mac) in [
            ("eth0", "2001:db8:1::1", FIRST),
            ("eth1", "2001:db8:2::1", SECOND),
        ] {
            let way = net.next_hop(interface, source, Some(mac));
            let route = Route {
                interface: Some(interface.to_owned()),
                ..Route::by("2001:db8:9::/48".parse().unwrap(), ip("fe80::2"))
            };
            net.host.set_route(&route).unwrap();
            net.host(async |watcher| {
                watcher.set_addresses(set(&[far])).await;
                becomes(&watcher, far, Some(&way)).await;
            });
        }
    }

    #[test]
    fn the_source_that_a_route_prescribes_is_taken() {
        in_both_families(|net, family| {
            // The address of the other interface.
            let way = net.next_hop("eth0", family.host[1], Some(FIRST));
            let route = Route {
                source: Some(ip(family.host[1])),
                ..Route::by(family.prefixes[0].parse().unwrap(), ip(family.peer[0]))
            };
            net.host.set_route(&route).unwrap();
            net.host(async |watcher| {
                watcher.set_addresses(set(&[family.far])).await;
                becomes(&watcher, family.far, Some(&way)).await;
            });
        });
    }

    #[test]
    fn the_mtu_is_that_of_the_route_or_else_of_the_interface_and_followed() {
        in_both_families(|net, family| {
            let way = |mtu| NextHop {
                mtu,
                ..net.next_hop("eth0", family.host[0], Some(FIRST))
            };
            let by = |mtu| Route {
                mtu: Some(mtu),
                ..Route::by(family.prefixes[0].parse().unwrap(), ip(family.peer[0]))
            };
            net.host.set_route(&by(1400)).unwrap();
            net.host(async |watcher| {
                watcher.set_addresses(set(&[family.far, family.peer[0]])).await;
                becomes(&watcher, family.far, Some(&way(1400))).await;
                becomes(&watcher, family.peer[0], Some(&way(1500))).await;
                net.host.set_route(&by(1390)).unwrap();
                becomes(&watcher, family.far, Some(&way(1390))).await;
                net.host.set_mtu("eth0", 1380).unwrap();
                becomes(&watcher, family.peer[0], Some(&way(1380))).await;
                // A route cannot make the interface larger.
                net.host.set_route(&by(9000)).unwrap();
                becomes(&watcher, family.far, Some(&way(1380))).await;
                net.host.set_mtu("eth0", 1500).unwrap();
                becomes(&watcher, family.peer[0], Some(&way(1500))).await;
            });
        });
    }

    #[test]
    fn an_address_is_no_source_before_duplicate_address_detection_is_done() {
        let net = Net::new();
        net.host.remove_address(ip("2001:db8:1::1")).unwrap();
        net.first.add_address("eth0", "2001:db8:7::2/64").unwrap();
        for (key, value) in [("accept_dad", "1"), ("dad_transmits", "3")] {
            net.host
                .sysctl(&format!("net/ipv6/conf/eth0/{key}"), value)
                .unwrap();
        }
        net.host
            .add_address_to_be_checked("eth0", "2001:db8:7::1/64")
            .unwrap();
        let way = net.next_hop("eth0", "2001:db8:7::1", Some(FIRST));
        net.host(async |watcher| {
            let mut published = watcher.next_hops();
            watcher.set_addresses(set(&["2001:db8:7::2"])).await;
            assert_eq!(
                watcher.unresolved()[&ip("2001:db8:7::2")].to_string(),
                "this host's address 2001:db8:7::1 on eth0 is not usable yet: it asks whether another host has it"
            );
            // The address of eth1, which the kernel would choose until then, is never published.
            let first = published.wait_for(|next_hops| !next_hops.is_empty());
            let first = timeout(Duration::from_secs(20), first).await.unwrap().unwrap()[&ip("2001:db8:7::2")].clone();
            assert_eq!(first.source, way.source);
            becomes(&watcher, "2001:db8:7::2", Some(&way)).await;
        });
    }

    #[test]
    fn an_address_that_another_host_has_is_no_source() {
        let net = Net::new();
        net.host.remove_address(ip("2001:db8:1::1")).unwrap();
        net.host.remove_address(ip("2001:db8:2::1")).unwrap();
        net.host.sysctl("net/ipv6/conf/eth0/accept_dad", "1").unwrap();
        for address in ["2001:db8:7::1/64", "2001:db8:7::2/64"] {
            net.first.add_address("eth0", address).unwrap();
        }
        net.host
            .add_address_to_be_checked("eth0", "2001:db8:7::1/64")
            .unwrap();
        net.host(async |watcher| {
            let reason = || Some(watcher.unresolved().get(&ip("2001:db8:7::2"))?.to_string());
            watcher.set_addresses(set(&["2001:db8:7::2"])).await;
            let expected = "this host's address 2001:db8:7::1 on eth0 is another host's, too";
            let deadline = Instant::now() + Duration::from_secs(20);
            while reason().as_deref() != Some(expected) {
                assert!(Instant::now() < deadline, "{:?}", reason());
                tokio::time::sleep(DEBOUNCE).await;
            }
            assert_eq!(*watcher.next_hops().borrow(), BTreeMap::new());
        });
    }

    #[test]
    fn a_neighbour_that_announces_another_mac_is_followed() {
        in_both_families(|net, family| {
            let mut way = net.next_hop("eth0", family.host[0], Some(FIRST));
            // It announces itself with each change of the address, as a virtual machine does when it has moved.
            let key = format!("net/{}/conf/eth0/{}", family.name, family.notify);
            net.first.sysctl(&key, "1").unwrap();
            net.host(async |watcher| {
                watcher.set_addresses(set(&[family.peer[0]])).await;
                becomes(&watcher, family.peer[0], Some(&way)).await;
                way.next_hop_mac = Some([2, 0, 0, 0, 0, 0x77]);
                net.first.set_mac("eth0", [2, 0, 0, 0, 0, 0x77]).unwrap();
                becomes(&watcher, family.peer[0], Some(&way)).await;
            });
        });
    }

    #[test]
    fn the_own_interface_s_mac_is_followed() {
        in_both_families(|net, family| {
            net.host(async |watcher| {
                watcher.set_addresses(set(&[family.peer[0]])).await;
                net.host.set_mac("eth0", [2, 0, 0, 0, 0, 0x99]).unwrap();
                let way = net.next_hop("eth0", family.host[0], Some(FIRST));
                assert_eq!(way.source_mac, [2, 0, 0, 0, 0, 0x99]);
                becomes(&watcher, family.peer[0], Some(&way)).await;
            });
        });
    }

    #[test]
    fn a_neighbour_that_stops_answering_loses_its_mac_and_gets_it_back() {
        in_both_families(|net, family| {
            let there = net.next_hop("eth0", family.host[0], Some(FIRST));
            let gone = NextHop {
                next_hop_mac: None,
                ..there
            };
            // So that the kernel doubts a neighbour within seconds instead of half a minute.
            for (key, value) in [
                ("base_reachable_time_ms", "500"),
                ("delay_first_probe_time", "1"),
                ("retrans_time_ms", "100"),
                ("interval_probe_time_ms", "500"),
            ] {
                let key = format!("net/{}/neigh/eth0/{key}", family.name);
                net.host.sysctl(&key, value).unwrap();
            }
            let peer = family.peer[0];
            net.host(async |watcher| {
                watcher.set_addresses(set(&[peer])).await;
                becomes(&watcher, peer, Some(&there)).await;
                net.first.remove_address(ip(peer)).unwrap();
                becomes(&watcher, peer, Some(&gone)).await;
                assert_eq!(
                    watcher.unresolved()[&ip(peer)].to_string(),
                    format!("neighbour {peer} on eth0 does not answer")
                );
                let address = format!("{peer}/{}", family.length);
                net.first.add_address("eth0", &address).unwrap();
                becomes(&watcher, peer, Some(&there)).await;
            });
        });
    }

    #[test]
    fn a_link_that_goes_down_and_comes_up_is_followed() {
        in_both_families(|net, family| {
            for namespace in [&net.host, &net.first] {
                // As IPv4 does anyway.
                namespace
                    .sysctl("net/ipv6/conf/all/keep_addr_on_down", "1")
                    .unwrap();
            }
            let way = net.next_hop("eth0", family.host[0], Some(FIRST));
            let silent = NextHop {
                next_hop_mac: None,
                ..way
            };
            let peer = family.peer[0];
            net.host(async |watcher| {
                watcher.set_addresses(set(&[peer])).await;
                becomes(&watcher, peer, Some(&way)).await;
                net.host.set_down("eth0").unwrap();
                becomes(&watcher, peer, None).await;
                assert_eq!(
                    watcher.unresolved()[&ip(peer)].to_string(),
                    "there is no route to it"
                );
                net.host.set_up("eth0").unwrap();
                becomes(&watcher, peer, Some(&way)).await;
                // The peer's end down takes the carrier away.
                net.first.set_down("eth0").unwrap();
                becomes(&watcher, peer, Some(&silent)).await;
                net.first.set_up("eth0").unwrap();
                becomes(&watcher, peer, Some(&way)).await;
            });
        });
    }

    #[test]
    fn what_cannot_be_forwarded_to_has_a_reason() {
        let net = Net::new();
        net.host.add_unreachable_route("198.51.100.0/24").unwrap();
        net.host.add_unreachable_route("2001:db8:5::/48").unwrap();
        let reasons = [
            ("10.0.1.1", "it is an address of this host"),
            ("127.0.0.1", "it is an address of this host"),
            ("2001:db8:1::1", "it is an address of this host"),
            ("10.0.1.255", "it is not the address of one host"),
            ("198.51.100.1", "its route says unreachable"),
            ("2001:db8:5::1", "its route says unreachable"),
            ("192.0.2.1", "there is no route to it"),
            ("2001:db8:9::1", "there is no route to it"),
            ("fe80::2", "a link-local address does not tell on which link"),
            ("ff02::1", "it is not the address of one host"),
        ];
        net.host(async |watcher| {
            watcher
                .set_addresses(reasons.iter().map(|(address, _)| ip(address)).collect())
                .await;
            let unresolved = watcher.unresolved();
            assert_eq!(unresolved.len(), reasons.len());
            for (address, reason) in reasons {
                assert_eq!(unresolved[&ip(address)].to_string(), reason, "{address}");
            }
            assert_eq!(unresolved[&ip("127.0.0.1")], Unresolved::OwnAddress);
            assert_eq!(*watcher.next_hops().borrow(), BTreeMap::new());
        });
    }

    #[test]
    fn nothing_is_published_when_nothing_has_changed() {
        let net = Net::new();
        let way = net.next_hop("eth0", "10.0.1.1", Some(FIRST));
        net.host(async |watcher| {
            watcher.set_addresses(set(&["10.0.1.2"])).await;
            becomes(&watcher, "10.0.1.2", Some(&way)).await;
            let mut published = watcher.next_hops();
            published.mark_unchanged();
            watcher.set_addresses(set(&["10.0.1.2"])).await;
            net.host.add_route("192.0.2.0/24", "10.0.1.2").unwrap();
            tokio::time::sleep(DEBOUNCE * 10).await;
            assert!(!published.has_changed().unwrap());
        });
    }

    #[test]
    fn the_kernel_keeps_what_is_watched_resolved_and_only_that() {
        in_both_families(|net, family| {
            let way = net.next_hop("eth0", family.host[0], Some(FIRST));
            let eth0 = way.ifindex;
            let there = family.peer[0];
            let nobody = &format!("{}3", there.trim_end_matches('2'));
            net.host(async |watcher| {
                watcher.set_addresses(set(&[there, nobody])).await;
                becomes(&watcher, there, Some(&way)).await;
                for address in [there, nobody] {
                    let entry = neighbour(eth0, address).await.unwrap();
                    assert!(entry.own && entry.managed, "{entry:?}");
                }
                watcher.set_addresses(set(&[there])).await;
                assert!(neighbour(eth0, nobody).await.is_none());
                // It outlives its daemon, until it is released.
                drop(watcher);
                assert!(neighbour(eth0, there).await.unwrap().own);
                assert_eq!(release_neighbours().await.unwrap(), 1);
                assert!(neighbour(eth0, there).await.is_none_or(|entry| !entry.own));
            });
        });
    }

    #[test]
    fn a_daemon_that_restarts_finds_its_neighbours_resolved() {
        in_both_families(|net, family| {
            let way = net.next_hop("eth0", family.host[0], Some(FIRST));
            let peer = family.peer[0];
            net.host(async |watcher| {
                watcher.set_addresses(set(&[peer])).await;
                becomes(&watcher, peer, Some(&way)).await;
                drop(watcher);
                let successor = NextHopWatcher::start().unwrap();
                successor.set_addresses(set(&[peer])).await;
                assert_eq!(successor.next_hops().borrow().get(&ip(peer)), Some(&way));
            });
        });
    }

    #[test]
    fn a_permanent_neighbour_is_used_and_left_alone() {
        in_both_families(|net, family| {
            let mac = [2, 0, 0, 0, 0, 0x55];
            let way = net.next_hop("eth0", family.host[0], Some(mac));
            let address = &format!("{}9", family.peer[0].trim_end_matches('2'));
            net.host.add_neighbour("eth0", ip(address), mac).unwrap();
            net.host(async |watcher| {
                watcher.set_addresses(set(&[address])).await;
                becomes(&watcher, address, Some(&way)).await;
                watcher.set_addresses(set(&[])).await;
                assert_eq!(release_neighbours().await.unwrap(), 0);
                let entry = neighbour(way.ifindex, address).await.unwrap();
                assert_eq!(
                    (entry.state, entry.own, entry.managed),
                    (NeighbourState::Permanent, false, false)
                );
            });
        });
    }
}
