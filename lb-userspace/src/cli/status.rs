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
        "xlb {} instance {} up {} s on {}\nflows {} of {} ({} MB)\npackets: {} received, {} passed, {} dropped, {} \
         transmitted, {} redirected",
        status.version,
        status.instance,
        status.uptime_seconds,
        interfaces.join(", "),
        status.flow_table.flows,
        status.flow_table.size,
        status.flow_table.memory_bytes / 1_000_000,
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
            backend.live_flows.to_string(),
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
    let unhealthy = if service.healthy {
        String::new()
    } else {
        format!(
            " unhealthy: {} usable, {} needed",
            service.usable_backends, service.min_healthy
        )
    };
    format!(
        "{} {} {}:{} {} {}{unhealthy}\n{table}{notes}{counted}",
        service.name, service.protocol, service.vip, service.port, service.strategy, service.forward
    )
}
