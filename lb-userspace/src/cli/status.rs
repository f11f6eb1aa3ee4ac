//! `xlb status`: services and backends with live rates.

use std::{fmt::Write, path::Path};

use comfy_table::{Table, presets};

use super::{
    block_on, fail,
    output::{OutputFormat, print},
};
use crate::{
    api::client,
    model::Health,
    observe::status::{ServiceStatus, Status, Traffic},
};

/// Shows services and backends with their health and live rates
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How to print the result
    #[arg(short, long, value_enum, default_value_t)]
    output: OutputFormat,
}

pub fn run(socket: &Path, args: &Args) -> u8 {
    let status = match block_on(async { Ok(client::status(socket).await?) }) {
        Ok(status) => status,
        Err(error) => return fail(&error),
    };
    match args.output {
        OutputFormat::Table => print(&table(&status)),
        OutputFormat::Json => match serde_json::to_string_pretty(&status) {
            Ok(json) => print(&json),
            Err(error) => fail(&error.into()),
        },
    }
}

/// The status for people.
pub fn table(status: &Status) -> String {
    let mut text = String::new();
    let interfaces: Vec<String> = status
        .interfaces
        .iter()
        .map(|interface| format!("{} ({})", interface.name, interface.xdp_mode))
        .collect();
    let packets = &status.packets;
    // Writing to a String does not fail.
    let _ = writeln!(
        text,
        "xlb {} instance {} up {} s on {}\nflows {} of {} ({} MB)\nservices {} of {} ({} MB), backends {} of {} ({} \
         MB), slot tables {} MB\npackets: {} received, {} passed, {} dropped, {} \
         transmitted, {} redirected",
        status.version,
        status.instance,
        status.uptime_seconds,
        interfaces.join(", "),
        status.flow_table.flows,
        status.flow_table.size,
        status.flow_table.memory_bytes / 1_000_000,
        status.services.len(),
        status.maps.services,
        status.maps.services_memory_bytes / 1_000_000,
        status
            .services
            .iter()
            .map(|service| service.backends.len())
            .sum::<usize>(),
        status.maps.backends,
        status.maps.backends_memory_bytes / 1_000_000,
        status.maps.slot_tables_memory_bytes / 1_000_000,
        packets.received,
        packets.passed,
        packets.dropped,
        packets.transmitted,
        packets.redirected,
    );
    for service in &status.services {
        let _ = writeln!(text, "\n{}", service_table(service));
    }
    for problem in &status.problems {
        let _ = writeln!(text, "\nproblem: {problem}");
    }
    text
}

fn service_table(service: &ServiceStatus) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "BACKEND",
        "ADDRESS",
        "HEALTH",
        "STATE",
        "WEIGHT",
        "SHARE",
        "FLOWS",
        "LIVE",
        "PACKETS/S",
        "BYTES/S",
    ]);
    let mut notes = String::new();
    for backend in &service.backends {
        let health = match backend.health {
            Health::Up => "up",
            Health::Down => "down",
            Health::Unknown => "unknown",
        };
        table.add_row([
            backend.name.clone(),
            backend.address.clone(),
            health.to_owned(),
            if backend.backup {
                format!("{}, backup", backend.administrative)
            } else {
                backend.administrative.clone()
            },
            backend.weight.to_string(),
            format!("{:.1} %", backend.share * 100.0),
            backend.flows.to_string(),
            match backend.max_connections {
                Some(most) => format!("{} of {most}", backend.live_flows),
                None => backend.live_flows.to_string(),
            },
            format!("{:.0}", backend.packets_per_second),
            format!("{:.0}", backend.bytes_per_second),
        ]);
        if backend.health != Health::Up
            && let Some(probe) = backend.probe.as_ref().filter(|probe| !probe.is_empty())
        {
            let _ = write!(notes, "\n  {}: {probe}", backend.name);
        }
        if let Some(problem) = &backend.next_hop_problem {
            let _ = write!(notes, "\n  {}: next hop {problem}", backend.name);
        }
    }
    let reasons: Vec<String> = service
        .reasons
        .iter()
        .map(|(reason, Traffic { packets, .. })| format!("{reason} {packets}"))
        .collect();
    let counted = if reasons.is_empty() {
        String::new()
    } else {
        format!("\n  packets: {}", reasons.join(", "))
    };
    let vip = if service.vip.contains(':') {
        format!("[{}]", service.vip)
    } else {
        service.vip.clone()
    };
    let healthy = if service.healthy {
        "healthy".to_owned()
    } else {
        format!(
            "not healthy ({} of at least {} backends)",
            service.healthy_backends, service.min_healthy
        )
    };
    format!(
        "{} {} {vip}:{} {} {} {healthy}\n{table}{notes}{counted}",
        service.name, service.protocol, service.port, service.strategy, service.forward
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lb_common::abi::{Reason, VerdictClass};

    use super::*;
    use crate::observe::status::BackendStatus;

    fn backend(name: &str, health: Health) -> BackendStatus {
        BackendStatus {
            name: name.to_owned(),
            address: "[2001:db8::11]:8080".to_owned(),
            weight: 100,
            max_connections: None,
            backup: false,
            administrative: "enabled".to_owned(),
            health,
            probe: Some("connection refused".to_owned()),
            next_hop_problem: None,
            share: 0.5,
            flows: 7,
            live_flows: 6,
            flows_total: 9,
            forwarded: Traffic::default(),
            returned: Traffic::default(),
            packets_per_second: 0.0,
            bytes_per_second: 0.0,
        }
    }

    fn service() -> ServiceStatus {
        ServiceStatus {
            name: "web".to_owned(),
            vip: "203.0.113.10".to_owned(),
            port: "80,443".to_owned(),
            protocol: "tcp".to_owned(),
            strategy: "round-robin".to_owned(),
            forward: "gue".to_owned(),
            healthy: true,
            healthy_backends: 2,
            min_healthy: 2,
            reasons: BTreeMap::new(),
            backends: vec![
                backend("a", Health::Up),
                BackendStatus {
                    backup: true,
                    max_connections: Some(15),
                    ..backend("b", Health::Down)
                },
            ],
        }
    }

    #[test]
    fn every_reason_is_documented_as_it_is() {
        let page = include_str!("../../../docs/data-path.md");
        for reason in Reason::ALL {
            let word = match reason.class() {
                VerdictClass::Forwarded => "sent on",
                VerdictClass::Answered => "answered",
                VerdictClass::Passed => "passed",
                VerdictClass::Dropped => "dropped",
            };
            let line = format!("| `{}` | {word} | {} |\n", reason.name(), reason.help());
            assert!(page.contains(&line), "docs/data-path.md lacks {line}");
        }
    }

    #[test]
    fn a_service_is_told_with_its_health_and_the_limits_and_roles_of_its_backends() {
        let text = service_table(&service());
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines[0], "web tcp 203.0.113.10:80,443 round-robin gue healthy");
        let cells = |line: &str| -> Vec<String> {
            line.split("  ")
                .filter(|cell| !cell.is_empty())
                .map(|cell| cell.trim().to_owned())
                .collect()
        };
        assert_eq!(
            cells(lines[2]),
            [
                "a",
                "[2001:db8::11]:8080",
                "up",
                "enabled",
                "100",
                "50.0 %",
                "7",
                "6",
                "0",
                "0"
            ]
        );
        assert_eq!(
            cells(lines[3]),
            [
                "b",
                "[2001:db8::11]:8080",
                "down",
                "enabled, backup",
                "100",
                "50.0 %",
                "7",
                "6 of 15",
                "0",
                "0"
            ]
        );
        assert_eq!(lines[4], "b: connection refused");
    }

    #[test]
    fn a_service_with_too_few_backends_says_how_many_it_has_and_needs() {
        let service = ServiceStatus {
            vip: "2001:db8::10".to_owned(),
            port: "any".to_owned(),
            healthy: false,
            healthy_backends: 1,
            ..service()
        };
        assert!(service_table(&service).starts_with(
            "web tcp [2001:db8::10]:any round-robin gue not healthy (1 of at least 2 backends)\n"
        ));
    }

    #[test]
    fn programs_see_the_limits_the_roles_and_the_health_of_the_service() {
        let json = serde_json::to_value(service()).unwrap();
        assert_eq!(json["healthy"], true);
        assert_eq!(json["healthy_backends"], 2);
        assert_eq!(json["min_healthy"], 2);
        assert_eq!(json["backends"][0]["max_connections"], serde_json::Value::Null);
        assert_eq!(json["backends"][1]["max_connections"], 15);
        assert_eq!(json["backends"][1]["backup"], true);
    }
}
