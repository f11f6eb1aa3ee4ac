//! What `reset-on-removal` does to connections on which nothing is sent.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread::JoinHandle,
    time::Duration,
};

use tests::{machine, services::Service};
use xlb::lab::{Family, Namespace};

use crate::{
    matrix::{self, Forward, Group},
    scene::{balance, configure, topology_of},
};

/// A server of one connection: it greets, sends back what it gets, and tells how the connection ended.
fn serve_one(host: &Namespace, listen: SocketAddr) -> JoinHandle<io::Result<io::Result<()>>> {
    let listener = host.run(|| TcpListener::bind(listen)).unwrap().unwrap();
    let serve = move || {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(patience()))?;
        let mut word = [0; 4];
        loop {
            stream.write_all(b"word")?;
            if stream.read(&mut word)? == 0 {
                return Ok(());
            }
        }
    };
    host.spawn(serve).unwrap()
}

/// For how long an end waits to hear of the other.
fn patience() -> Duration {
    machine::bound(Duration::from_secs(20))
}

fn greeting(stream: &mut TcpStream) -> io::Result<()> {
    let mut word = [0; 4];
    stream.read_exact(&mut word)?;
    assert_eq!(&word, b"word");
    Ok(())
}

/// Connects to the one backend that gets flows, removes it, and gives both ends to `then`.
fn remove_backend_of_an_idle_connection(
    group: Group,
    resets: bool,
    then: impl FnOnce(TcpStream, JoinHandle<io::Result<io::Result<()>>>),
) {
    let topology = topology_of(2);
    let _decaps = matrix::prepare(&topology, group);
    let server = serve_one(&topology.backends[0], matrix::listen_address(group, 0));
    let service = matrix::of_group(Service::tcp("web"), group, &["a", "b"]).with("reset-on-removal", resets);
    let daemon = balance(&topology, std::slice::from_ref(&service));
    daemon.done(&["drain", "web", "b"]);
    let connect = || TcpStream::connect_timeout(&group.server(), machine::bound(Duration::from_secs(5)));
    let mut stream = topology.client.run(connect).unwrap().unwrap();
    stream.set_read_timeout(Some(patience())).unwrap();
    greeting(&mut stream).unwrap();

    daemon.done(&["enable", "web", "b"]);
    configure(&daemon, &topology, &[service.without("a")]);
    daemon.done(&["reload"]);
    then(stream, server);
}

fn are_reset(forward: Forward) {
    for family in Family::ALL {
        let group = Group {
            forward,
            vip: family,
            backends: family,
        };
        remove_backend_of_an_idle_connection(group, true, |mut stream, server| {
            let client_end = greeting(&mut stream).map_err(|error| error.kind());
            assert_eq!(client_end, Err(ErrorKind::ConnectionReset), "{group:?}, client");
            let server_end = server.join().unwrap().unwrap().map_err(|error| error.kind());
            assert_eq!(server_end, Err(ErrorKind::ConnectionReset), "{group:?}, server");
        });
    }
}

#[test]
fn an_idle_connection_by_nat_to_a_removed_backend_is_reset_at_both_ends() {
    are_reset(Forward::Nat);
}

#[test]
fn an_idle_connection_by_full_nat_to_a_removed_backend_is_reset_at_both_ends() {
    are_reset(Forward::FullNat);
}

#[test]
fn an_idle_connection_by_dsr_to_a_removed_backend_is_reset_at_both_ends() {
    are_reset(Forward::Dsr);
}

#[test]
fn an_idle_connection_by_ipip_to_a_removed_backend_is_reset_at_both_ends() {
    are_reset(Forward::IpIp);
}

#[test]
fn an_idle_connection_to_a_removed_backend_goes_on_without_reset_on_removal() {
    for forward in [Forward::Nat, Forward::FullNat, Forward::Dsr, Forward::Gue] {
        let group = Group {
            forward,
            vip: Family::V4,
            backends: Family::V4,
        };
        remove_backend_of_an_idle_connection(group, false, |mut stream, server| {
            // Longer than a sweep takes to come by.
            let quiet = machine::bound(Duration::from_secs(7));
            stream.set_read_timeout(Some(quiet)).unwrap();
            let heard = stream.read(&mut [0; 4]).map_err(|error| error.kind());
            assert_eq!(heard, Err(ErrorKind::WouldBlock), "{group:?}");
            stream.set_read_timeout(Some(patience())).unwrap();
            stream.write_all(b"echo").unwrap();
            greeting(&mut stream).unwrap();
            drop(stream);
            server.join().unwrap().unwrap().unwrap();
        });
    }
}
