use std::net::SocketAddr;

use super::{
    GENEROUS, SHORT, add_lonely_interface, any_port, any_port_ipv6, failure, in_namespace, try_probe,
};
use crate::{config::Probe, health::ProbeError};

/// The words of the failure with the address, which has no port.
async fn icmp_failure(address: &str, timeout: std::time::Duration) -> String {
    failure(SocketAddr::new(address.parse().unwrap(), 0), Probe::Icmp, timeout).await
}

/// Needs root, as raw sockets do.
#[tokio::test]
async fn a_host_that_answers_echo_requests_is_up() {
    for address in [any_port(), any_port_ipv6()] {
        try_probe(address, Probe::Icmp, GENEROUS).await.unwrap();
    }
}

/// Each of the sockets sees the replies to all.
#[tokio::test]
async fn many_probes_at_once_get_each_its_own_reply() {
    let mut probes = tokio::task::JoinSet::new();
    for number in 0..200 {
        let address = if number % 2 == 0 {
            any_port()
        } else {
            any_port_ipv6()
        };
        probes.spawn(async move { try_probe(address, Probe::Icmp, GENEROUS).await });
    }
    for result in probes.join_all().await {
        result.unwrap();
    }
}

#[test]
fn a_host_that_does_not_answer_times_out() {
    let words = in_namespace(async || {
        for path in ["ipv4/icmp_echo_ignore_all", "ipv6/icmp/echo_ignore_all"] {
            std::fs::write(format!("/proc/sys/net/{path}"), "1").unwrap();
        }
        [
            icmp_failure("127.0.0.1", SHORT).await,
            icmp_failure("::1", SHORT).await,
        ]
    });
    assert_eq!(
        words,
        [
            "ICMP echo to 127.0.0.1: timed out after 300ms",
            "ICMP echo to ::1: timed out after 300ms"
        ]
    );
}

#[test]
fn a_host_that_is_not_there_is_named_before_the_timeout() {
    let words = in_namespace(async || {
        add_lonely_interface();
        let mut words = Vec::new();
        for address in ["192.0.2.2", "2001:db8::2", "198.51.100.1"] {
            words.push(icmp_failure(address, GENEROUS).await);
        }
        words
    });
    assert_eq!(
        words,
        [
            "ICMP echo to 192.0.2.2: no route to host",
            "ICMP echo to 2001:db8::2: no route to host",
            "ICMP echo to 198.51.100.1: network is unreachable"
        ]
    );
}

#[test]
fn without_the_permission_for_raw_sockets_it_is_this_host_that_is_to_blame() {
    let error = in_namespace(async || {
        // SAFETY: the call takes numbers alone; made directly it changes this thread and no other, and with the
        // user its capabilities go.
        let result = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(result, 0);
        try_probe(any_port(), Probe::Icmp, GENEROUS).await.unwrap_err()
    });
    assert!(matches!(error, ProbeError::Socket { .. }), "{error}");
    assert_eq!(
        error.to_string(),
        "open a socket towards 127.0.0.1:0: operation not permitted"
    );
}
