//! From what is written to a [`Config`]: what single values cannot show, and the defaults.

mod backends;
mod capacity;
mod filters;
mod forwards;
mod ports;

use std::{cell::OnceCell, collections::HashMap, net::IpAddr, path::PathBuf, time::Duration};

use rustls::pki_types::ServerName;
use toml::Spanned;

use super::{
    diagnostic::{Diagnostic, Span},
    raw::{Field, RawConfig, RawHealth, RawService},
    trust::Trust,
    validated::{
        Backend, Config, FlowTable, Forward, HealthCheck, IPIP_SOURCE, IpipSource, Limits, PortRange, Probe,
        Protocol, Service, Strategy, WhenAllDown,
    },
    values::{self, ProbeType, Size},
};

const TCP_IDLE_TIMEOUT: Duration = Duration::from_secs(60 * 60);
const UDP_IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const SEED_FILE: &str = "/etc/xlb/seed";
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);
const INTERVAL: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(1);
const RISE: u32 = 2;
const FALL: u32 = 3;
const REQUEST_PATH: &str = "/";
const MIN_HEALTHY: u32 = 1;

/// The configuration, unless something in it is wrong; everything that is wrong is added to `found`.
pub(super) fn validate(raw: &RawConfig, found: &mut Vec<Diagnostic>) -> Option<Config> {
    unique_interfaces(raw, found);
    unique_service_names(&raw.services, found);
    ports::each_given_once(&raw.services, found);
    ports::services_apart(&raw.services, found);
    forwards::vips_are_no_backends(&raw.services, found);
    if !capacity::suffices(raw, found) {
        return None;
    }
    let services: Vec<Option<Service>> = {
        let system = SystemTrust::default();
        raw.services
            .iter()
            .map(|raw| service(raw, &system, found))
            .collect()
    };
    Some(Config {
        interfaces: unspanned(raw.interfaces.value()?),
        xdp_mode: raw.xdp_mode.or(Default::default())?,
        flow_table: FlowTable {
            size: raw.flow_table_size.or(Size::Auto)?.entries(),
            tcp_idle_timeout: raw.tcp_idle_timeout.or(TCP_IDLE_TIMEOUT)?,
            udp_idle_timeout: raw.udp_idle_timeout.or(UDP_IDLE_TIMEOUT)?,
        },
        limits: Limits {
            services: raw.services_limit.or(Size::Auto)?.entries(),
            backends: raw.backends_limit.or(Size::Auto)?.entries(),
        },
        seed_file: raw.seed_file.or(PathBuf::from(SEED_FILE))?,
        socket: raw.socket.optional()?,
        ipip_source: IpipSource {
            v4: raw.ipip_source_v4.or(IPIP_SOURCE.v4)?,
            v6: raw.ipip_source_v6.or(IPIP_SOURCE.v6)?,
        },
        services: services.into_iter().collect::<Option<_>>()?,
    })
}

fn service(raw: &RawService, system: &SystemTrust, found: &mut Vec<Diagnostic>) -> Option<Service> {
    forwards::reach_every_backend(raw, found);
    reset_on_removal_is_for_tcp(raw, found);
    let (filters, new_flow_cap) = (filters::sources(raw, found), filters::new_flow_cap(raw, found));
    let backends = backends::all(raw, found);
    let health = match (&raw.health, raw.protocol.value()) {
        (Some(health), _) => health_check(health, system, found),
        (None, Some(protocol)) => Some(default_health_check(protocol)),
        (None, None) => None,
    };
    let mut ports = unspanned(raw.ports.value()?);
    ports.sort_unstable();
    if let (Some(health), Some(backends)) = (&health, &backends) {
        probes_have_a_port(raw, &ports, &health.probe, backends, found);
    }
    let (allow, deny) = filters?;
    Some(Service {
        name: raw.name.value()?,
        vip: raw.vip.value()?,
        ports,
        protocol: raw.protocol.value()?,
        strategy: raw.strategy.or(Strategy::ConsistentHash)?,
        forward: raw.forward.or(Forward::Nat)?,
        drain_timeout: raw.drain_timeout.or(DRAIN_TIMEOUT)?,
        assign_vip: raw.assign_vip.or(false)?,
        allow,
        deny,
        new_flow_cap: new_flow_cap?,
        when_all_down: raw.when_all_down.or(WhenAllDown::Reject)?,
        slow_start: raw.slow_start.or(Duration::ZERO)?,
        min_healthy: raw.min_healthy.or(MIN_HEALTHY)?,
        reset_on_removal: raw.reset_on_removal.or(false)?,
        health: health?,
        backends: backends?,
    })
}

/// UDP has nothing that would end a flow at its client.
fn reset_on_removal_is_for_tcp(raw: &RawService, found: &mut Vec<Diagnostic>) {
    let (Some(reset), Some(protocol)) = (raw.reset_on_removal.given(), raw.protocol.given()) else {
        return;
    };
    if *reset.get_ref() && *protocol.get_ref() == Protocol::Udp {
        found.push(
            Diagnostic::new(
                reset.span(),
                "`reset-on-removal` is for tcp: a udp flow has no reset",
                "remove it: udp flows of a backend that is removed move to another one at once",
            )
            .with_related(protocol.span(), "the protocol"),
        );
    }
}

/// A probe of a backend that has no port goes to the first of the service's, but "any" has none that is meant.
fn probes_have_a_port(
    raw: &RawService,
    ports: &[PortRange],
    probe: &Probe,
    backends: &[Backend],
    found: &mut Vec<Diagnostic>,
) {
    let needs_port = !matches!(probe, Probe::None | Probe::Icmp) && probe.port().is_none();
    let without_port = backends.iter().any(|backend| backend.port.is_none());
    if let (true, true, [PortRange::ANY], Some(span)) = (needs_port, without_port, ports, raw.ports.span()) {
        found.push(Diagnostic::new(
            span,
            "port \"any\" leaves open which port of a backend is probed",
            "write the port that answers, such as health = { type = \"tcp\", port = 80 }, or health = { type = \
             \"none\" }",
        ));
    }
}

/// The authorities of this system, read once for all services and only when one of them needs them.
#[derive(Default)]
struct SystemTrust(OnceCell<Option<Trust>>);

impl SystemTrust {
    fn get(&self) -> Option<Trust> {
        self.0.get_or_init(Trust::of_system).clone()
    }
}

fn health_check(raw: &RawHealth, system: &SystemTrust, found: &mut Vec<Diagnostic>) -> Option<HealthCheck> {
    timeout_within_interval(raw, found);
    let probe_type = raw.probe_type.value()?;
    keys_of_other_probes(raw, probe_type, found);
    let port = raw.port.optional();
    let probe = match probe_type {
        ProbeType::None => Probe::None,
        ProbeType::Tcp => Probe::Tcp { port: port? },
        ProbeType::Http => Probe::Http {
            port: port?,
            path: raw.path.or(REQUEST_PATH.to_owned())?,
            host: raw.host.optional()?,
        },
        ProbeType::Https => {
            let (trust, server_name) = (trust(raw, system, found), server_name(raw, found));
            Probe::Https {
                port: port?,
                path: raw.path.or(REQUEST_PATH.to_owned())?,
                host: raw.host.optional()?,
                server_name: server_name?,
                trust: trust?,
            }
        }
        ProbeType::Grpc => Probe::Grpc {
            port: port?,
            host: raw.host.optional()?,
            service: raw.service.or(String::new())?,
        },
        ProbeType::Udp => {
            let send = text_or_hex(["send", "send-hex"], [&raw.send, &raw.send_hex], found);
            let expect = text_or_hex(["expect", "expect-hex"], [&raw.expect, &raw.expect_hex], found);
            Probe::Udp {
                port: port?,
                send: send?,
                expect: expect?,
            }
        }
        ProbeType::Icmp => Probe::Icmp,
        ProbeType::Exec => {
            if let (Field::Absent, Some(place)) = (&raw.command, raw.probe_type.span()) {
                found.push(Diagnostic::new(
                    place,
                    "type \"exec\" needs a `command`",
                    format!("write {}", values::COMMAND),
                ));
            }
            Probe::Exec {
                port: port?,
                command: raw.command.value()?,
            }
        }
    };
    let interval = raw.interval.or(INTERVAL)?;
    Some(HealthCheck {
        probe,
        interval,
        timeout: raw.timeout.or(TIMEOUT.min(interval))?,
        rise: raw.rise.or(RISE)?,
        fall: raw.fall.or(FALL)?,
    })
}

/// A key that the type has no use for is a misunderstanding: it is told, not ignored.
fn keys_of_other_probes(raw: &RawHealth, probe_type: ProbeType, found: &mut Vec<Diagnostic>) {
    use ProbeType::{Exec, Grpc, Http, Https, Tcp, Udp};
    let keys: [(&str, Option<Span>, &[ProbeType]); 12] = [
        ("path", raw.path.span(), &[Http, Https]),
        ("host", raw.host.span(), &[Http, Https, Grpc]),
        ("server-name", raw.server_name.span(), &[Https]),
        ("ca-file", raw.ca_file.span(), &[Https]),
        ("verify", raw.verify.span(), &[Https]),
        ("service", raw.service.span(), &[Grpc]),
        ("send", raw.send.span(), &[Udp]),
        ("send-hex", raw.send_hex.span(), &[Udp]),
        ("expect", raw.expect.span(), &[Udp]),
        ("expect-hex", raw.expect_hex.span(), &[Udp]),
        ("command", raw.command.span(), &[Exec]),
        ("port", raw.port.span(), &[Tcp, Http, Https, Grpc, Udp, Exec]),
    ];
    for (key, span, types) in keys {
        let Some(span) = span.filter(|_| !types.contains(&probe_type)) else {
            continue;
        };
        let words: Vec<&str> = types.iter().map(|probe_type| probe_type.word()).collect();
        found.push(Diagnostic::new(
            span,
            format!(
                "`{key}` is only for type {}, not for \"{}\"",
                values::alternatives(&words),
                probe_type.word()
            ),
            format!("write type = \"{}\", or remove `{key}`", words[0]),
        ));
    }
}

fn trust(raw: &RawHealth, system: &SystemTrust, found: &mut Vec<Diagnostic>) -> Option<Trust> {
    if raw.verify.or(true)? {
        return match raw.ca_file.optional()? {
            Some(trust) => Some(trust),
            None => system.get().or_else(|| {
                found.push(Diagnostic::new(
                    raw.probe_type.span()?,
                    "this system has no authorities' certificates to verify with",
                    "install the package ca-certificates, or write ca-file = \"/etc/xlb/ca.pem\"",
                ));
                None
            }),
        };
    }
    if let (Some(ca_file), Some(verify)) = (raw.ca_file.span(), raw.verify.span()) {
        found.push(
            Diagnostic::new(
                ca_file,
                "`ca-file` is of no use where nothing is verified",
                "remove `ca-file`, or remove verify = false",
            )
            .with_related(verify, "switched off here"),
        );
    }
    Some(Trust::Anybody)
}

/// Whose certificate it has to be: `server-name`, or else `host` without its port.
fn server_name(raw: &RawHealth, found: &mut Vec<Diagnostic>) -> Option<Option<ServerName<'static>>> {
    if let Some(name) = raw.server_name.optional()? {
        return Some(Some(name));
    }
    let Some(host) = raw.host.given() else {
        return Some(None);
    };
    let written = host.get_ref().as_str();
    let name = match (written.parse::<IpAddr>(), written.strip_prefix('[')) {
        (Ok(_), _) => written,
        (_, Some(rest)) => rest.split(']').next().unwrap_or(rest),
        (_, None) => written.split(':').next().unwrap_or(written),
    };
    match ServerName::try_from(name.to_owned()) {
        Ok(name) => Some(Some(name)),
        Err(_) => {
            found.push(Diagnostic::new(
                host.span(),
                format!("{} cannot be the name in a certificate", values::quoted(name)),
                "write the name that the certificate is for under `server-name`",
            ));
            None
        }
    }
}

/// Bytes that are given as text or in hexadecimal.
fn text_or_hex(
    keys: [&str; 2],
    [text, hex]: [&Field<Vec<u8>>; 2],
    found: &mut Vec<Diagnostic>,
) -> Option<Option<Vec<u8>>> {
    if let (Some(text), Some(hex)) = (text.span(), hex.span()) {
        found.push(
            Diagnostic::new(
                hex,
                format!("`{}` and `{}` say the same in two ways", keys[0], keys[1]),
                format!("remove `{}` or `{}`", keys[0], keys[1]),
            )
            .with_related(text, "the other one"),
        );
    }
    Some(text.optional()?.or(hex.optional()?))
}

/// What holds without a table `[service.health]`: UDP has no answer that would mean "up" for every server.
fn default_health_check(protocol: Protocol) -> HealthCheck {
    HealthCheck {
        probe: match protocol {
            Protocol::Tcp => Probe::Tcp { port: None },
            Protocol::Udp => Probe::None,
        },
        interval: INTERVAL,
        timeout: TIMEOUT,
        rise: RISE,
        fall: FALL,
    }
}

fn timeout_within_interval(raw: &RawHealth, found: &mut Vec<Diagnostic>) {
    let (Some(timeout), Some(interval)) = (raw.timeout.given(), raw.interval.or(INTERVAL)) else {
        return;
    };
    if *timeout.get_ref() <= interval {
        return;
    }
    let diagnostic = Diagnostic::new(
        timeout.span(),
        format!(
            "the timeout {} is longer than the interval {}",
            humantime::format_duration(*timeout.get_ref()),
            humantime::format_duration(interval)
        ),
        format!(
            "write a timeout of at most \"{0}\", or an interval of at least \"{1}\"",
            humantime::format_duration(interval),
            humantime::format_duration(*timeout.get_ref())
        ),
    );
    found.push(match raw.interval.given() {
        Some(given) => diagnostic.with_related(given.span(), "the interval"),
        None => diagnostic,
    });
}

fn unique_interfaces(raw: &RawConfig, found: &mut Vec<Diagnostic>) {
    let mut first: HashMap<&str, Span> = HashMap::new();
    for interface in raw.interfaces.given().into_iter().flat_map(Spanned::get_ref) {
        if let Some(first) = first.get(interface.get_ref().as_str()) {
            found.push(
                Diagnostic::new(
                    interface.span(),
                    format!("the interface \"{}\" is given twice", interface.get_ref()),
                    "write each interface once",
                )
                .with_related(first.clone(), "first given here"),
            );
        } else {
            first.insert(interface.get_ref(), interface.span());
        }
    }
}

fn unique_service_names(services: &[RawService], found: &mut Vec<Diagnostic>) {
    let mut first: HashMap<&str, Span> = HashMap::new();
    for name in services.iter().filter_map(|service| service.name.given()) {
        if let Some(first) = first.get(name.get_ref().as_str()) {
            found.push(
                Diagnostic::new(
                    name.span(),
                    format!("the name \"{}\" is already that of a service", name.get_ref()),
                    "write another name: commands and metrics tell services apart by it",
                )
                .with_related(first.clone(), "first given here"),
            );
        } else {
            first.insert(name.get_ref(), name.span());
        }
    }
}

fn unspanned<T>(values: Vec<Spanned<T>>) -> Vec<T> {
    values.into_iter().map(Spanned::into_inner).collect()
}
