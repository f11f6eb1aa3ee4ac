//! Which health checks travel like packets of clients, and what becomes of them on the way.

use std::net::IpAddr;

use lb_common::abi::{Address, ProbePath};

use super::forward_in_maps;
use crate::config::{Backend, Config, Forward, Probe, Service};

/// The path of a backend's probes, or nothing where they go straight to its own address.
///
/// That is so where the backend answers by that address anyway (`nat`, `full-nat`, `local`), for `icmp`, which any
/// address of the host answers, for programs, and where VIP and backend are of different families: the probe's socket
/// has the family of the backend.
pub fn probe_path(config: &Config, service: &Service, backend: &Backend) -> Option<ProbePath> {
    let has_path = match service.health.probe {
        Probe::Tcp { .. }
        | Probe::Http { .. }
        | Probe::Https { .. }
        | Probe::Grpc { .. }
        | Probe::Udp { .. } => true,
        Probe::None | Probe::Icmp | Probe::Exec { .. } => false,
    };
    let same_family = service.vip.is_ipv4() == backend.address.is_ipv4();
    if !has_path || !same_family || !service.forward.keeps_destination() {
        return None;
    }
    let (outer_source, outer_varying) = match service.forward {
        Forward::IpIp => ipip_source(config, backend.address),
        _ => Default::default(),
    };
    Some(ProbePath {
        backend: backend.address.into(),
        vip: service.vip.into(),
        outer_source,
        outer_varying,
        forward: forward_in_maps(service.forward).number(),
        _pad: [0; 3],
    })
}

/// The outer source of `ipip` towards an address: the bits that do not vary, and those that do, in its last word.
fn ipip_source(config: &Config, towards: IpAddr) -> (Address, u32) {
    let source = &config.ipip_source;
    match towards {
        IpAddr::V4(_) => (
            IpAddr::V4(source.v4.network()).into(),
            u32::from(source.v4.hostmask()).to_be(),
        ),
        IpAddr::V6(_) => (
            IpAddr::V6(source.v6.network()).into(),
            (u128::from(source.v6.hostmask()) as u32).to_be(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Command,
        model::fixture::{backend, model, service},
    };

    fn path(forward: Forward, probe: Probe, vip: &str, address: &str) -> Option<ProbePath> {
        let mut service = service("web", 10, &[80], vec![backend("a", 11, 80)]);
        service.vip = vip.parse().unwrap();
        service.forward = forward;
        service.health.probe = probe;
        service.backends[0].address = address.parse().unwrap();
        let config = model(vec![service]).config;
        probe_path(&config, &config.services[0], &config.services[0].backends[0])
    }

    const TCP: Probe = Probe::Tcp { port: Some(81) };

    #[test]
    fn probes_travel_where_packets_keep_the_vip() {
        for forward in [Forward::Dsr, Forward::IpIp, Forward::Gue] {
            for (vip, address) in [("203.0.113.10", "10.0.0.11"), ("2001:db8::10", "2001:db8:1::11")] {
                let path = path(forward, TCP, vip, address).unwrap();
                assert_eq!(IpAddr::from(path.vip).to_string(), vip);
                assert_eq!(IpAddr::from(path.backend).to_string(), address);
                assert_eq!(path.forward, forward_in_maps(forward).number());
            }
        }
        for forward in [Forward::Nat, Forward::FullNat, Forward::Local] {
            assert_eq!(path(forward, TCP, "203.0.113.10", "10.0.0.11"), None);
        }
    }

    #[test]
    fn what_has_no_port_or_no_socket_of_ours_does_not() {
        let exec = Probe::Exec {
            port: None,
            command: Command {
                program: "/bin/true".into(),
                arguments: vec![],
            },
        };
        for probe in [Probe::None, Probe::Icmp, exec] {
            assert_eq!(path(Forward::Dsr, probe, "203.0.113.10", "10.0.0.11"), None);
        }
    }

    #[test]
    fn a_backend_of_the_other_family_is_asked_itself() {
        assert_eq!(path(Forward::Gue, TCP, "203.0.113.10", "2001:db8:1::11"), None);
        assert_eq!(path(Forward::IpIp, TCP, "2001:db8::10", "10.0.0.11"), None);
    }

    #[test]
    fn only_ipip_has_an_outer_source_that_varies() {
        let ipip = path(Forward::IpIp, TCP, "203.0.113.10", "10.0.0.11").unwrap();
        assert_eq!(ipip.outer_source.to_string(), "172.16.0.0");
        assert_eq!(ipip.outer_varying.to_ne_bytes(), [0, 0, 0xff, 0xff]);
        let ipip = path(Forward::IpIp, TCP, "2001:db8::10", "2001:db8:1::11").unwrap();
        assert_eq!(ipip.outer_source.to_string(), "100::");
        assert_eq!(ipip.outer_varying, u32::MAX);
        let gue = path(Forward::Gue, TCP, "203.0.113.10", "10.0.0.11").unwrap();
        assert_eq!((gue.outer_source, gue.outer_varying), (Address::default(), 0));
    }
}
