//! `local`: hands the packets of clients to processes on this host, whether they come from the network or from the host
//! itself, by loopback; and gives the answers their source.
//!
//! TCP is not changed at all: the kernel is told which listener gets the first segment, and from then on it has a socket
//! of the connection, whose own address is the VIP. UDP servers have no such socket for each client, so datagrams are
//! rewritten, and so are their answers.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_TCP_LISTEN, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_sock, bpf_sock_tuple},
    helpers::generated::{bpf_sk_assign, bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp},
    macros::classifier,
    programs::TcContext,
};
use lb_common::{
    abi::{Address, Backend, FlowKey, Reason, Settings, TCP, UDP, VerdictClass},
    logic::{
        headers::{Fragment, Kind},
        tcp_state::{flags, opens},
    },
};

use crate::{
    flow::{self, Known},
    flow_table::of,
    fragment, maps,
    scratch::{Scratch, scratch},
    service,
    skb::{decoded, readdress},
};

/// On to the next program of the interface, and to the stack.
const NEXT: i32 = TC_ACT_UNSPEC;
/// Index of the loopback interface in every network namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;
/// "The network namespace of the packet's interface".
const OWN_NETNS: u64 = u64::MAX;

/// Packets that come in, from the network or by loopback.
#[classifier]
pub fn xlb_ingress(context: TcContext) -> i32 {
    let context = context.skb.skb;
    let delivered = match (decoded(context), scratch(), maps::settings()) {
        (Some(kind), Some(scratch), Some(settings)) => deliver(context, kind, scratch, settings),
        _ => None,
    };
    let Some((service_id, reason)) = delivered else {
        return NEXT;
    };
    count(context, service_id, reason);
    if matches!(reason.class(), VerdictClass::Dropped) {
        TC_ACT_SHOT as i32
    } else {
        NEXT
    }
}

/// Packets that go out, to the network or by loopback.
#[classifier]
pub fn xlb_egress(context: TcContext) -> i32 {
    let context = context.skb.skb;
    let returned = match (decoded(context), scratch(), maps::settings()) {
        (Some(kind), Some(scratch), Some(settings)) => give_back(context, kind, scratch, settings),
        _ => None,
    };
    if let Some(service_id) = returned {
        count(context, service_id, Reason::Returned);
    }
    NEXT
}

/// Nothing where the packet is for no service of this forward.
#[inline(always)]
fn deliver(
    context: *mut __sk_buff,
    kind: Kind,
    scratch: &mut Scratch,
    settings: &Settings,
) -> Option<(u32, Reason)> {
    if kind == Kind::LaterFragment {
        fragment::follow(scratch)?;
    }
    let service_id = service::find(of::PACKET)?;
    if !service::is_local(settings, service_id) {
        return None;
    }
    if scratch.packet.fragment == Fragment::First as u8 {
        fragment::remember(scratch);
    }
    let reason = if scratch.packet.key.protocol == TCP as u32 {
        over_tcp(context, scratch, service_id)
    } else {
        over_udp(context, scratch, service_id)
    };
    Some((service_id, reason))
}

#[inline(always)]
fn over_tcp(context: *mut __sk_buff, scratch: &mut Scratch, service_id: u32) -> Reason {
    let packet = &scratch.packet;
    // Put together by the stack before it looks for a socket. What opens a connection never comes in fragments.
    if packet.fragment != Fragment::Whole as u8 {
        return Reason::Delivered;
    }
    let tcp_flags = packet.tcp_flags;
    let occupied = match Socket::of(context, &packet.key) {
        Some(socket) if socket.state() == BPF_TCP_LISTEN => true,
        // Also one that has just ended (TIME_WAIT): its answer to a SYN has the client reset it and try again at once.
        Some(_) => {
            if let Ok(known) = Known::from_bits(flow::seen(service_id, of::PACKET), service_id) {
                count_forwarded(context, known.backend_id);
            }
            return Reason::Delivered;
        }
        None => false,
    };
    let known = match Known::from_bits(flow::known_local(service_id), service_id) {
        Ok(known) => known,
        Err(_) if opens(tcp_flags) => {
            match Known::from_bits(flow::begin_local(scratch, service_id), service_id) {
                Ok(known) => known,
                Err(Reason::NoBackend) => return refused(Reason::Refused, occupied),
                Err(reason) => return reason,
            }
        }
        Err(_) if tcp_flags & flags::RST != 0 => return Reason::NoFlow,
        // The socket is gone, which the stack says by a reset.
        Err(_) => return refused(Reason::Refused, occupied),
    };
    let Some(backend) = maps::backend(known.backend_id) else {
        return Reason::Internal;
    };
    scratch.tuple = to_backend(&scratch.packet.key, &known, backend);
    let Some(listener) = Socket::of(context, &scratch.tuple) else {
        return refused(Reason::Refused, occupied);
    };
    if !listener.assign(context) {
        return refused(Reason::ReusePort, occupied);
    }
    count_forwarded(context, known.backend_id);
    Reason::Delivered
}

#[inline(always)]
fn over_udp(context: *mut __sk_buff, scratch: &mut Scratch, service_id: u32) -> Reason {
    let known = match Known::from_bits(flow::known_local(service_id), service_id) {
        Ok(known) => Ok(known),
        Err(_) => Known::from_bits(flow::begin_local(scratch, service_id), service_id),
    };
    let known = match known {
        Ok(known) => known,
        Err(Reason::NoBackend) => return refused(Reason::Refused, is_occupied(context, scratch)),
        Err(reason) => return reason,
    };
    let Some(backend) = maps::backend(known.backend_id) else {
        return Reason::Internal;
    };
    scratch.tuple = to_backend(&scratch.packet.key, &known, backend);
    // SAFETY: the context is the one that the kernel called the program with.
    let from_network = unsafe { (*context).ifindex } != LOOPBACK;
    // The stack takes nothing for a loopback address from the network. Said to the client, in place of silence.
    let is_reachable = !(from_network && is_loopback(&backend.address));
    if !is_reachable || Socket::of(context, &scratch.tuple).is_none() {
        return refused(Reason::Refused, is_occupied(context, scratch));
    }
    if readdress(context) != 0 {
        return Reason::Internal;
    }
    count_forwarded(context, known.backend_id);
    Reason::Delivered
}

#[inline(always)]
fn is_occupied(context: *mut __sk_buff, scratch: &Scratch) -> bool {
    Socket::of(context, &scratch.packet.key).is_some()
}

/// Left to the stack, unless it would give the packet to a process that is none of the service's.
#[inline(always)]
fn refused(reason: Reason, occupied: bool) -> Reason {
    if occupied { Reason::VipOccupied } else { reason }
}

/// Nothing where the packet answers no flow of this forward.
#[inline(always)]
fn give_back(context: *mut __sk_buff, kind: Kind, scratch: &mut Scratch, settings: &Settings) -> Option<u32> {
    if kind == Kind::LaterFragment {
        fragment::follow(scratch)?;
    }
    let known = if scratch.packet.key.protocol == TCP as u32 {
        let key = &scratch.packet.key;
        scratch.client = FlowKey {
            source: key.destination.by_words(),
            destination: key.source.by_words(),
            source_port: key.destination_port,
            destination_port: key.source_port,
            protocol: key.protocol,
        };
        let service_id = service::find(of::CLIENT)?;
        if !service::is_local(settings, service_id) {
            return None;
        }
        Known::from_bits(flow::seen(service_id, of::CLIENT), service_id).ok()?
    } else {
        answer(context, scratch, settings)?
    };
    if let Some(counters) = maps::backend_counters(known.backend_id) {
        let (packets, bytes) = size(context);
        counters.returned.packets += packets;
        counters.returned.bytes += bytes;
    }
    Some(known.service_id)
}

/// Has a datagram of a process come from the VIP.
#[inline(always)]
fn answer(context: *mut __sk_buff, scratch: &mut Scratch, settings: &Settings) -> Option<Known> {
    let key = &scratch.packet.key;
    scratch.reply = FlowKey {
        source: key.source.by_words(),
        destination: key.destination.by_words(),
        source_port: key.source_port,
        destination_port: key.destination_port,
        protocol: key.protocol,
    };
    let known = flow::answered(settings, scratch)?;
    let backend = maps::backend(known.backend_id)?;
    let key = &scratch.packet.key;
    // Another process may have the same port of another address.
    if key.source.0 != backend.address.0 && !is_of_any_address(context) {
        return None;
    }
    if scratch.packet.fragment == Fragment::First as u8 {
        fragment::remember(scratch);
    }
    let client = &scratch.client;
    scratch.tuple = FlowKey {
        source: client.destination.by_words(),
        destination: client.source.by_words(),
        source_port: client.destination_port,
        destination_port: client.source_port,
        protocol: client.protocol,
    };
    if readdress(context) != 0 {
        return None;
    }
    Some(known)
}

/// Tells whether the socket that sends a packet is bound to no address: one bound to an IPv6 address has one of IPv4, too
/// (`LOOPBACK4_IPV6`).
#[inline(always)]
fn is_of_any_address(context: *mut __sk_buff) -> bool {
    // SAFETY: the verifier lets a socket be read once it is known to be there.
    unsafe {
        let socket = (*context).__bindgen_anon_2.sk;
        !socket.is_null() && (*socket).src_ip4 == 0
    }
}

/// The 5-tuple by which a backend's socket is found.
#[inline(always)]
fn to_backend(client: &FlowKey, known: &Known, backend: &Backend) -> FlowKey {
    FlowKey {
        source: client.source.by_words(),
        destination: backend.address.by_words(),
        source_port: known.source_port,
        destination_port: flow::backend_port(client, backend),
        protocol: client.protocol,
    }
}

#[inline(always)]
fn is_loopback(address: &Address) -> bool {
    if address.is_v4() {
        return u32::from_be(address.v4_word()) >> 24 == 127;
    }
    let [a, b, c, d] = &address.0;
    *a == 0 && *b == 0 && *c == 0 && *d == 1_u32.to_be()
}

/// A socket that the kernel has counted a reference for, which ends with this value.
struct Socket(*mut bpf_sock);

impl Socket {
    /// That which the stack would find for a packet with a 5-tuple.
    #[inline(always)]
    fn of(context: *mut __sk_buff, key: &FlowKey) -> Option<Self> {
        let ports = [key.source_port, key.destination_port];
        let socket = if key.destination.is_v4() {
            let tuple = TupleV4 {
                addresses: [key.source.v4_word(), key.destination.v4_word()],
                ports,
            };
            lookup(context, &tuple, key.protocol)
        } else {
            let tuple = TupleV6 {
                addresses: [key.source.by_words(), key.destination.by_words()],
                ports,
            };
            lookup(context, &tuple, key.protocol)
        };
        if socket.is_null() {
            None
        } else {
            Some(Self(socket))
        }
    }

    #[inline(always)]
    fn state(&self) -> u32 {
        // SAFETY: the reference holds it, and it is not null.
        unsafe { (*self.0).state }
    }

    /// Has the stack give a packet to it, whatever the packet's destination.
    #[inline(always)]
    fn assign(self, context: *mut __sk_buff) -> bool {
        // SAFETY: as in `state`; the kernel takes a reference of its own.
        unsafe { bpf_sk_assign(context.cast(), self.0.cast(), 0) == 0 }
    }
}

impl Drop for Socket {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the reference is this value's own.
        unsafe { bpf_sk_release(self.0.cast()) };
    }
}

/// `struct bpf_sock_tuple` for each family.
#[repr(C)]
struct TupleV4 {
    addresses: [u32; 2],
    ports: [u16; 2],
}

#[repr(C)]
struct TupleV6 {
    addresses: [Address; 2],
    ports: [u16; 2],
}

#[inline(always)]
fn lookup<T>(context: *mut __sk_buff, tuple: &T, protocol: u32) -> *mut bpf_sock {
    let (tuple, size) = (
        (&raw const *tuple).cast_mut().cast::<bpf_sock_tuple>(),
        size_of::<T>() as u32,
    );
    // SAFETY: the tuple is one of a family, told by its size, and only read.
    unsafe {
        if protocol == UDP as u32 {
            bpf_sk_lookup_udp(context.cast(), tuple, size, OWN_NETNS, 0)
        } else {
            bpf_skc_lookup_tcp(context.cast(), tuple, size, OWN_NETNS, 0)
        }
    }
}

/// Packets and bytes: what the stack handles at once may be several packets of the network.
#[inline(always)]
fn size(context: *mut __sk_buff) -> (u64, u64) {
    // SAFETY: the context is the one that the kernel called the program with.
    let (segments, length) = unsafe { ((*context).gso_segs as u64, (*context).len as u64) };
    (if segments == 0 { 1 } else { segments }, length)
}

#[inline(always)]
fn count(context: *mut __sk_buff, service_id: u32, reason: Reason) {
    if let Some(count) = maps::service_counter(service_id, reason.index()) {
        let (packets, bytes) = size(context);
        count.packets += packets;
        count.bytes += bytes;
    }
}

#[inline(always)]
fn count_forwarded(context: *mut __sk_buff, backend_id: u32) {
    if let Some(counters) = maps::backend_counters(backend_id) {
        let (packets, bytes) = size(context);
        counters.forwarded.packets += packets;
        counters.forwarded.bytes += bytes;
    }
}
