//! Has the ends of a TCP connection send a packet: a segment that belongs to no window is answered with an ACK (RFC 9293
//! section 3.10.7.4), so that a connection that is idle learns at once that it is to end.

use std::{
    collections::VecDeque,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use lb_common::{abi::TCP, logic::checksum};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::warn;

/// How often some are sent, and how many: 10,000 a second.
const TICK: Duration = Duration::from_millis(10);
const SEGMENTS_PER_TICK: usize = 100;
/// Between two segments that both are to be answered: Linux answers one in 500 ms (`net.ipv4.tcp_invalid_ratelimit`).
const APART: Duration = Duration::from_millis(600);
/// Any: it lies in the window of hardly a connection.
const SEQUENCE: u32 = 0x786c_6221;
const TTL: u8 = 64;

/// A bare ACK from one address and port to another of the same family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

/// What provokes the ends of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Poke {
    pub first: Segment,
    pub second: Segment,
    /// Both go to the same end, which does not answer two at once.
    pub apart: bool,
}

/// Hands what is to be sent to a task of its own; never waits.
#[derive(Clone, Debug)]
pub struct Poker(mpsc::UnboundedSender<Vec<Poke>>);

impl Poker {
    /// Starts the task, in a tokio runtime.
    pub fn start() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(run(receiver));
        Self(sender)
    }

    /// Has them sent, at a bounded rate.
    pub fn poke(&self, pokes: Vec<Poke>) {
        // The task goes with the runtime alone.
        drop(self.0.send(pokes));
    }
}

async fn run(mut receiver: mpsc::UnboundedReceiver<Vec<Poke>>) {
    while let Some(pokes) = receiver.recv().await {
        let mut queue = Queue::default();
        queue.firsts.extend(pokes);
        let mut sockets = Sockets::default();
        let mut failure = None;
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !queue.is_empty() {
            ticks.tick().await;
            while let Ok(pokes) = receiver.try_recv() {
                queue.firsts.extend(pokes);
            }
            let now = Instant::now();
            for _ in 0..SEGMENTS_PER_TICK {
                let Some(segment) = queue.next(now) else { break };
                if let Err(error) = sockets.send(&segment) {
                    failure = Some(error);
                }
            }
        }
        if let Some(error) = failure {
            warn!("some connections of a removed backend are reset at their next packet, not now: {error}");
        }
    }
}

/// What is yet to be sent.
#[derive(Debug, Default)]
struct Queue {
    firsts: VecDeque<Poke>,
    /// With when they are due.
    seconds: VecDeque<(Instant, Segment)>,
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.firsts.is_empty() && self.seconds.is_empty()
    }

    fn next(&mut self, now: Instant) -> Option<Segment> {
        if let Some((_, segment)) = self.seconds.pop_front_if(|(due, _)| *due <= now) {
            return Some(segment);
        }
        let Poke { first, second, apart } = self.firsts.pop_front()?;
        let due = if apart { now + APART } else { now };
        self.seconds.push_back((due, second));
        Some(first)
    }
}

/// Raw sockets, opened when they are needed first.
#[derive(Debug, Default)]
struct Sockets {
    v4: Option<OwnedFd>,
    v6: Option<OwnedFd>,
}

impl Sockets {
    fn send(&mut self, segment: &Segment) -> io::Result<()> {
        let packet = packet(segment)?;
        let (family, kept) = match segment.destination {
            SocketAddr::V4(_) => (AddressFamily::Inet, &mut self.v4),
            SocketAddr::V6(_) => (AddressFamily::Inet6, &mut self.v6),
        };
        let fd = match kept {
            Some(fd) => fd,
            // IPPROTO_RAW is for sending alone, with an IP header of our own (raw(7); for IPv6 since Linux 4.5).
            None => kept.insert(socket(
                family,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::Raw,
            )?),
        };
        // A port is no part of where a raw packet goes.
        let to = SockaddrStorage::from(SocketAddr::new(segment.destination.ip(), 0));
        sendto(fd.as_raw_fd(), &packet, &to, MsgFlags::MSG_DONTWAIT)?;
        Ok(())
    }
}

/// The IP packet with the segment.
///
/// # Errors
/// The two are not of one family.
fn packet(Segment { source, destination }: &Segment) -> io::Result<Vec<u8>> {
    let mut tcp = Vec::new();
    tcp.extend(source.port().to_be_bytes());
    tcp.extend(destination.port().to_be_bytes());
    tcp.extend(SEQUENCE.to_be_bytes());
    tcp.extend([0; 4]);
    const WORDS: u8 = 5;
    const ACK: u8 = 0x10;
    tcp.extend([WORDS << 4, ACK, 0xff, 0xff, 0, 0, 0, 0]);
    let (mut packet, addresses) = match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            // Total length, identification and checksum are filled in by the kernel (raw(7)).
            let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, TTL, TCP, 0, 0];
            let addresses = [from.octets(), to.octets()].concat();
            packet.extend(&addresses);
            (packet, addresses)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut packet = vec![0x60, 0, 0, 0, 0, tcp.len() as u8, TCP, TTL];
            let addresses = [from.octets(), to.octets()].concat();
            packet.extend(&addresses);
            (packet, addresses)
        }
        _ => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
    };
    // The pseudo-header (RFC 9293 section 3.1), whose length and protocol add up the same for both families.
    let mut summed = addresses;
    summed.extend([0, TCP, 0, tcp.len() as u8]);
    summed.extend(&tcp);
    let sum = checksum::of_bytes(&summed, 0);
    tcp[16..18].copy_from_slice(&sum.to_ne_bytes());
    packet.extend(tcp);
    Ok(packet)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{Shutdown, TcpListener, TcpStream},
        os::fd::AsFd,
        time::Instant as StdInstant,
    };

    use etherparse::SlicedPacket;
    use nix::sys::{
        socket::{recv, setsockopt, sockopt::ReceiveTimeout},
        time::TimeVal,
    };

    use super::*;
    use crate::lab::Namespace;

    fn segment(source: &str, destination: &str) -> Segment {
        Segment {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
        }
    }

    #[test]
    fn a_packet_is_a_bare_ack_with_a_checksum_that_holds() {
        for segment in [
            segment("203.0.113.10:80", "192.0.2.7:40000"),
            segment("[2001:db8::10]:80", "[2001:db8::7]:40000"),
        ] {
            let packet = packet(&segment).unwrap();
            // The kernel fills in the length of an IPv4 packet.
            let mut whole = packet.clone();
            if segment.source.is_ipv4() {
                whole[3] = packet.len() as u8;
            }
            let sliced = SlicedPacket::from_ip(&whole).unwrap();
            let Some(etherparse::TransportSlice::Tcp(tcp)) = sliced.transport else {
                panic!("no TCP in {packet:?}")
            };
            assert_eq!(tcp.source_port(), segment.source.port());
            assert_eq!(tcp.destination_port(), segment.destination.port());
            assert!(tcp.ack() && !tcp.syn() && !tcp.rst() && !tcp.fin() && !tcp.psh());
            let expected = match sliced.net.unwrap() {
                etherparse::NetSlice::Ipv4(ip) => {
                    assert_eq!(IpAddr::V4(ip.header().source_addr()), segment.source.ip());
                    tcp.to_header().calc_checksum_ipv4(&ip.header().to_header(), &[])
                }
                etherparse::NetSlice::Ipv6(ip) => {
                    assert_eq!(IpAddr::V6(ip.header().source_addr()), segment.source.ip());
                    tcp.to_header().calc_checksum_ipv6(&ip.header().to_header(), &[])
                }
                etherparse::NetSlice::Arp(_) => panic!("no IP"),
            };
            assert_eq!(tcp.checksum(), expected.unwrap());
        }
    }

    #[test]
    fn ends_of_two_families_are_refused() {
        assert!(packet(&segment("203.0.113.10:80", "[2001:db8::7]:40000")).is_err());
    }

    #[test]
    fn the_second_segment_waits_where_both_go_to_the_same_end() {
        let (one, other) = (
            segment("10.0.0.1:1", "10.0.0.2:2"),
            segment("10.0.0.3:3", "10.0.0.4:4"),
        );
        let mut queue = Queue::default();
        let (first, second) = (one, other);
        queue
            .firsts
            .extend([true, false].map(|apart| Poke { first, second, apart }));
        let start = Instant::now();
        assert_eq!(queue.next(start), Some(first));
        assert_eq!(queue.next(start), Some(first));
        assert_eq!(queue.next(start + APART / 2), None);
        assert!(!queue.is_empty());
        assert_eq!(queue.next(start + APART), Some(second));
        assert_eq!(queue.next(start + APART), Some(second));
        assert!(queue.is_empty());
    }

    /// Real ends, on the loopback interface of a namespace of their own.
    #[test]
    fn an_idle_connection_answers_with_an_ack() {
        let namespace = Namespace::new("poke").unwrap();
        namespace
            .run(|| {
                for (address, family) in [("127.0.0.1", AddressFamily::Inet), ("::1", AddressFamily::Inet6)] {
                    answers(address.parse().unwrap(), family);
                }
            })
            .unwrap();
    }

    fn answers(address: IpAddr, family: AddressFamily) {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let poked = Segment {
            source: server.local_addr().unwrap(),
            destination: client.local_addr().unwrap(),
        };
        let seen = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp).unwrap();
        setsockopt(&seen.as_fd(), ReceiveTimeout, &TimeVal::new(0, 100_000)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let poker = Poker::start();
            poker.poke(vec![Poke {
                first: poked,
                second: poked,
                apart: true,
            }]);
            tokio::time::sleep(APART * 2).await;
        });
        let mut answers = 0;
        let deadline = StdInstant::now() + Duration::from_secs(20);
        let mut buffer = [0; 2048];
        while answers < 2 && StdInstant::now() < deadline {
            let Ok(length) = recv(seen.as_raw_fd(), &mut buffer, MsgFlags::empty()) else {
                continue;
            };
            // With its IP header for IPv4 alone.
            let tcp = if address.is_ipv4() {
                &buffer[20..length]
            } else {
                &buffer[..length]
            };
            let ports = [tcp[0], tcp[1], tcp[2], tcp[3]];
            let expected = [
                poked.destination.port().to_be_bytes(),
                poked.source.port().to_be_bytes(),
            ]
            .concat();
            if ports[..] == expected {
                assert_eq!(tcp[13], 0x10, "an ACK and nothing else");
                answers += 1;
            }
        }
        assert_eq!(answers, 2, "of {address}");

        // And nothing has happened to the connection.
        server.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client.read(&mut buffer).unwrap(), 0);
    }
}
