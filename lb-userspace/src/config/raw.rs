//! The configuration as it is written: each value by itself is right, and its place is kept.
//!
//! The document is walked by hand, because a derived `Deserialize` stops at the first mistake.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rustls::pki_types::ServerName;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    diagnostic::{Diagnostic, Span},
    trust::Trust,
    validated::{Command, Forward, PortRange, Protocol, Strategy, WhenAllDown, XdpMode},
    values::{self, BackendAddress, Parsed, ProbeType, Size, kind, nearest, quoted},
};

/// A table of the file and the keys that it may have.
#[derive(Debug)]
pub struct TableKeys {
    /// As its header is written; empty for the keys above the first header.
    pub header: &'static str,
    pub keys: &'static [&'static str],
}

/// Every table and key that there is, also those that are not built yet.
pub const KEYS: &[&TableKeys] = &[
    &TOP,
    &FLOW_TABLE,
    &LIMITS,
    &HASH,
    &IPIP,
    &API,
    &SERVICE,
    &HEALTH,
    &BACKEND,
];

const TOP: TableKeys = TableKeys {
    header: "",
    keys: &[
        "interfaces",
        "xdp-mode",
        "flow-table",
        "limits",
        "hash",
        "ipip",
        "api",
        "service",
    ],
};
const FLOW_TABLE: TableKeys = TableKeys {
    header: "[flow-table]",
    keys: &["size", "tcp-idle-timeout", "udp-idle-timeout"],
};
const LIMITS: TableKeys = TableKeys {
    header: "[limits]",
    keys: &["services", "backends"],
};
const HASH: TableKeys = TableKeys {
    header: "[hash]",
    keys: &["seed-file"],
};
const IPIP: TableKeys = TableKeys {
    header: "[ipip]",
    keys: &["source-v4", "source-v6"],
};
const API: TableKeys = TableKeys {
    header: "[api]",
    keys: &["socket", "listen", "token-file"],
};
const SERVICE: TableKeys = TableKeys {
    header: "[[service]]",
    keys: &[
        "name",
        "vip",
        "port",
        "protocol",
        "strategy",
        "forward",
        "drain-timeout",
        "assign-vip",
        "allow",
        "deny",
        "new-flow-rate",
        "new-flow-burst",
        "new-flow-prefix-v4",
        "new-flow-prefix-v6",
        "when-all-down",
        "slow-start",
        "min-healthy",
        "reset-on-removal",
        "health",
        "backend",
    ],
};
const HEALTH: TableKeys = TableKeys {
    header: "[service.health]",
    keys: &[
        "type",
        "path",
        "host",
        "server-name",
        "ca-file",
        "verify",
        "service",
        "send",
        "send-hex",
        "expect",
        "expect-hex",
        "command",
        "port",
        "interval",
        "timeout",
        "rise",
        "fall",
    ],
};
const BACKEND: TableKeys = TableKeys {
    header: "[[service.backend]]",
    keys: &["name", "address", "weight", "max-connections", "backup"],
};

/// Shortest idle timeout: the kernel's coarse clock and the daemon's sweeps see nothing finer.
const SHORTEST_IDLE_TIMEOUT: Duration = Duration::from_millis(100);
/// Shortest interval of probes: a slip of the unit shall not flood a backend.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);
const SHORTEST_TIMEOUT: Duration = Duration::from_millis(1);

/// What a table says under a key.
#[derive(Debug)]
pub(super) enum Field<T> {
    Absent,
    /// Told already.
    Wrong,
    Given(Spanned<T>),
}

impl<T: Clone> Field<T> {
    pub(super) fn span(&self) -> Option<Span> {
        self.given().map(Spanned::span)
    }

    pub(super) fn given(&self) -> Option<&Spanned<T>> {
        match self {
            Self::Given(value) => Some(value),
            Self::Absent | Self::Wrong => None,
        }
    }

    /// The value; `None` if it is missing or wrong.
    pub(super) fn value(&self) -> Option<T> {
        self.given().map(|value| value.get_ref().clone())
    }

    /// The value, `default` if it is missing; `None` if it is wrong.
    pub(super) fn or(&self, default: T) -> Option<T> {
        match self {
            Self::Absent => Some(default),
            Self::Wrong => None,
            Self::Given(value) => Some(value.get_ref().clone()),
        }
    }

    /// The value if there is one; `None` if it is wrong.
    pub(super) fn optional(&self) -> Option<Option<T>> {
        match self {
            Self::Absent => Some(None),
            Self::Wrong => None,
            Self::Given(value) => Some(Some(value.get_ref().clone())),
        }
    }
}

#[derive(Debug)]
pub(super) struct RawConfig {
    pub(super) interfaces: Field<Vec<Spanned<String>>>,
    pub(super) xdp_mode: Field<XdpMode>,
    pub(super) flow_table_size: Field<Size>,
    pub(super) tcp_idle_timeout: Field<Duration>,
    pub(super) udp_idle_timeout: Field<Duration>,
    pub(super) services_limit: Field<Size>,
    pub(super) backends_limit: Field<Size>,
    pub(super) seed_file: Field<PathBuf>,
    pub(super) ipip_source_v4: Field<Ipv4Net>,
    pub(super) ipip_source_v6: Field<Ipv6Net>,
    pub(super) socket: Field<PathBuf>,
    pub(super) services: Vec<RawService>,
}

#[derive(Debug)]
pub(super) struct RawService {
    /// Of the header.
    pub(super) span: Span,
    pub(super) name: Field<String>,
    pub(super) vip: Field<IpAddr>,
    pub(super) ports: Field<Vec<Spanned<PortRange>>>,
    pub(super) protocol: Field<Protocol>,
    pub(super) strategy: Field<Strategy>,
    pub(super) forward: Field<Forward>,
    pub(super) drain_timeout: Field<Duration>,
    pub(super) assign_vip: Field<bool>,
    pub(super) allow: Field<Vec<Spanned<IpNet>>>,
    pub(super) deny: Field<Vec<Spanned<IpNet>>>,
    pub(super) new_flow_rate: Field<u32>,
    pub(super) new_flow_burst: Field<u32>,
    pub(super) new_flow_prefix_v4: Field<u8>,
    pub(super) new_flow_prefix_v6: Field<u8>,
    pub(super) when_all_down: Field<WhenAllDown>,
    pub(super) slow_start: Field<Duration>,
    pub(super) min_healthy: Field<u32>,
    pub(super) reset_on_removal: Field<bool>,
    pub(super) health: Option<RawHealth>,
    pub(super) backends: Vec<RawBackend>,
}

#[derive(Debug)]
pub(super) struct RawHealth {
    pub(super) probe_type: Field<ProbeType>,
    pub(super) path: Field<String>,
    pub(super) host: Field<String>,
    pub(super) server_name: Field<ServerName<'static>>,
    pub(super) ca_file: Field<Trust>,
    pub(super) verify: Field<bool>,
    pub(super) service: Field<String>,
    pub(super) send: Field<Vec<u8>>,
    pub(super) send_hex: Field<Vec<u8>>,
    pub(super) expect: Field<Vec<u8>>,
    pub(super) expect_hex: Field<Vec<u8>>,
    pub(super) command: Field<Command>,
    pub(super) port: Field<u16>,
    pub(super) interval: Field<Duration>,
    pub(super) timeout: Field<Duration>,
    pub(super) rise: Field<u32>,
    pub(super) fall: Field<u32>,
}

#[derive(Debug)]
pub(super) struct RawBackend {
    pub(super) name: Field<String>,
    pub(super) address: Field<BackendAddress>,
    pub(super) weight: Field<u32>,
    pub(super) max_connections: Field<u32>,
    pub(super) backup: Field<bool>,
}

/// Reads the whole document; what is wrong with single values is added to `found`.
pub(super) fn read(document: &Spanned<DeTable<'_>>, found: &mut Vec<Diagnostic>) -> RawConfig {
    let mut top = Table::new(&TOP, document.span(), document.get_ref(), found);
    let interfaces = top.required(
        "interfaces",
        "the interfaces, such as interfaces = [\"eth0\"]",
        |top| top.list("interfaces", values::interface),
    );
    let xdp_mode = top.field("xdp-mode", values::xdp_mode);

    let (mut flow_table_size, mut tcp_idle_timeout, mut udp_idle_timeout) =
        (Field::Absent, Field::Absent, Field::Absent);
    if let Some(mut table) = top.table("flow-table", &FLOW_TABLE) {
        flow_table_size = table.field("size", values::flow_table_size);
        tcp_idle_timeout = table.field("tcp-idle-timeout", values::duration(SHORTEST_IDLE_TIMEOUT));
        udp_idle_timeout = table.field("udp-idle-timeout", values::duration(SHORTEST_IDLE_TIMEOUT));
    }
    let (mut services_limit, mut backends_limit) = (Field::Absent, Field::Absent);
    if let Some(mut table) = top.table("limits", &LIMITS) {
        services_limit = table.field("services", values::services_limit);
        backends_limit = table.field("backends", values::backends_limit);
    }
    let mut seed_file = Field::Absent;
    if let Some(mut table) = top.table("hash", &HASH) {
        seed_file = table.field("seed-file", |value| values::file(value, "/etc/xlb/seed"));
    }
    let (mut ipip_source_v4, mut ipip_source_v6) = (Field::Absent, Field::Absent);
    if let Some(mut table) = top.table("ipip", &IPIP) {
        ipip_source_v4 = table.field("source-v4", values::ipip_source_v4);
        ipip_source_v6 = table.field("source-v6", values::ipip_source_v6);
    }
    let mut socket = Field::Absent;
    if let Some(mut table) = top.table("api", &API) {
        socket = table.field("socket", values::socket);
        table.field("listen", values::listen);
        table.field("token-file", values::token_file);
    }
    RawConfig {
        interfaces,
        xdp_mode,
        flow_table_size,
        tcp_idle_timeout,
        udp_idle_timeout,
        services_limit,
        backends_limit,
        seed_file,
        ipip_source_v4,
        ipip_source_v6,
        socket,
        services: top.tables("service", &SERVICE, service),
    }
}

fn service(mut table: Table<'_, '_>) -> RawService {
    let name = table.required("name", "the service's name, such as name = \"web\"", |table| {
        table.field("name", values::name)
    });
    let vip = table.required(
        "vip",
        "the address that clients connect to, such as vip = \"203.0.113.10\"",
        |table| table.field("vip", values::vip),
    );
    let ports = table.required(
        "port",
        "the port that clients connect to, such as port = 80",
        |table| table.one_or_list("port", values::port_range),
    );
    let protocol = table.required("protocol", "protocol = \"tcp\" or protocol = \"udp\"", |table| {
        table.field("protocol", values::protocol)
    });
    if table.has("allow") {
        table.require(
            "allow",
            "the prefixes that may use the service, such as allow = [\"192.0.2.0/24\"], or leave the key out, which \
             allows all",
        );
    }
    RawService {
        span: table.span.clone(),
        name,
        vip,
        ports,
        protocol,
        strategy: table.field("strategy", values::strategy),
        forward: table.field("forward", values::forward),
        drain_timeout: table.field("drain-timeout", values::duration(Duration::ZERO)),
        assign_vip: table.field("assign-vip", values::boolean),
        allow: table.list("allow", values::source_prefix),
        deny: table.list("deny", values::source_prefix),
        new_flow_rate: table.field("new-flow-rate", values::new_flows),
        new_flow_burst: table.field("new-flow-burst", values::new_flows),
        new_flow_prefix_v4: table.field("new-flow-prefix-v4", values::source_length(32)),
        new_flow_prefix_v6: table.field("new-flow-prefix-v6", values::source_length(128)),
        when_all_down: table.field("when-all-down", values::when_all_down),
        slow_start: table.field("slow-start", values::duration(Duration::ZERO)),
        min_healthy: table.field("min-healthy", values::min_healthy),
        reset_on_removal: table.field("reset-on-removal", values::boolean),
        health: table.table("health", &HEALTH).map(health),
        backends: {
            table.require(
                "backend",
                "at least one backend: [[service.backend]] and under it address = \"10.0.0.11:8080\"",
            );
            table.tables("backend", &BACKEND, backend)
        },
    }
}

fn health(mut table: Table<'_, '_>) -> RawHealth {
    let probe_type = table.required(
        "type",
        "type = \"tcp\", type = \"http\" or another of the types, or type = \"none\"",
        |table| table.field("type", values::probe_type),
    );
    RawHealth {
        probe_type,
        path: table.field("path", values::request_path),
        host: table.field("host", values::host),
        server_name: table.field("server-name", values::server_name),
        ca_file: table.field("ca-file", values::ca_file),
        verify: table.field("verify", values::boolean),
        service: table.field("service", values::grpc_service),
        send: table.field("send", values::payload),
        send_hex: table.field("send-hex", values::payload_in_hex),
        expect: table.field("expect", values::expected),
        expect_hex: table.field("expect-hex", values::expected_in_hex),
        command: table.field("command", values::command),
        port: table.field("port", values::port),
        interval: table.field("interval", values::duration(SHORTEST_INTERVAL)),
        timeout: table.field("timeout", values::duration(SHORTEST_TIMEOUT)),
        rise: table.field("rise", values::consecutive),
        fall: table.field("fall", values::consecutive),
    }
}

fn backend(mut table: Table<'_, '_>) -> RawBackend {
    let address = table.required(
        "address",
        "the server's address, such as address = \"10.0.0.11:8080\"",
        |table| table.field("address", values::backend_address),
    );
    RawBackend {
        name: table.field("name", values::name),
        address,
        weight: table.field("weight", values::weight),
        max_connections: table.field("max-connections", values::max_connections),
        backup: table.field("backup", values::boolean),
    }
}

/// One table while it is read.
struct Table<'a, 'f> {
    keys: &'static TableKeys,
    /// Of the header.
    span: Span,
    entries: &'a DeTable<'a>,
    found: &'f mut Vec<Diagnostic>,
}

impl<'a, 'f> Table<'a, 'f> {
    /// Begins to read a table; its unknown keys are told at once.
    fn new(
        keys: &'static TableKeys,
        span: Span,
        entries: &'a DeTable<'a>,
        found: &'f mut Vec<Diagnostic>,
    ) -> Self {
        for (key, value) in entries {
            if !keys.keys.contains(&key.get_ref().as_ref()) {
                let is_value = !matches!(value.get_ref(), DeValue::Table(_) | DeValue::Array(_));
                found.push(unknown_key(keys, key.get_ref(), is_value, key.span()));
            }
        }
        Self {
            keys,
            span,
            entries,
            found,
        }
    }

    fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    fn field<T>(&mut self, key: &str, parse: impl FnOnce(&DeValue<'_>) -> Parsed<T>) -> Field<T> {
        let Some(value) = self.entries.get(key) else {
            return Field::Absent;
        };
        match self.parsed(value, parse) {
            Some(parsed) => Field::Given(Spanned::new(value.span(), parsed)),
            None => Field::Wrong,
        }
    }

    fn list<T>(&mut self, key: &str, parse: impl Fn(&DeValue<'_>) -> Parsed<T>) -> Field<Vec<Spanned<T>>> {
        match self.entries.get(key) {
            Some(value) if !value.get_ref().is_array() => {
                self.found.push(Diagnostic::new(
                    value.span(),
                    format!("expected a list, found {}", kind(value.get_ref())),
                    "write the items in [ ], with commas between them, such as [\"…\", \"…\"]",
                ));
                Field::Wrong
            }
            _ => self.one_or_list(key, parse),
        }
    }

    fn one_or_list<T>(
        &mut self,
        key: &str,
        parse: impl Fn(&DeValue<'_>) -> Parsed<T>,
    ) -> Field<Vec<Spanned<T>>> {
        let Some(value) = self.entries.get(key) else {
            return Field::Absent;
        };
        let items: Vec<&Spanned<DeValue<'_>>> = match value.get_ref() {
            DeValue::Array(items) => items.iter().collect(),
            _ => vec![value],
        };
        // A wrong item is told and left out, so that the others can still be compared.
        let parsed = items
            .into_iter()
            .filter_map(|item| Some(Spanned::new(item.span(), self.parsed(item, &parse)?)))
            .collect();
        Field::Given(Spanned::new(value.span(), parsed))
    }

    /// A table under this one.
    fn table(&mut self, key: &str, keys: &'static TableKeys) -> Option<Table<'a, '_>> {
        let value = self.entries.get(key)?;
        let DeValue::Table(entries) = value.get_ref() else {
            let message = match value.get_ref() {
                DeValue::Array(_) => format!("`{key}` can be given only once"),
                other => format!("expected a table, found {}", kind(other)),
            };
            let help = format!(
                "write {} on a line of its own, and its keys below it",
                keys.header
            );
            self.found.push(Diagnostic::new(value.span(), message, help));
            return None;
        };
        Some(Table::new(keys, value.span(), entries, self.found))
    }

    /// The tables under this one that are written in double brackets.
    fn tables<T>(
        &mut self,
        key: &str,
        keys: &'static TableKeys,
        read: impl Fn(Table<'_, '_>) -> T,
    ) -> Vec<T> {
        let Some(value) = self.entries.get(key) else {
            return Vec::new();
        };
        let help = format!("write {}, in double brackets, and its keys below it", keys.header);
        let DeValue::Array(items) = value.get_ref() else {
            let message = match value.get_ref() {
                DeValue::Table(_) => format!("`{key}` is one of several and needs double brackets"),
                other => format!("expected tables, found {}", kind(other)),
            };
            self.found.push(Diagnostic::new(value.span(), message, help));
            return Vec::new();
        };
        let mut tables = Vec::new();
        for item in items.iter() {
            match item.get_ref() {
                DeValue::Table(entries) => {
                    tables.push(read(Table::new(keys, item.span(), entries, self.found)));
                }
                other => self.found.push(Diagnostic::new(
                    item.span(),
                    format!("expected a table, found {}", kind(other)),
                    help.clone(),
                )),
            }
        }
        tables
    }

    /// Reads a key and tells if it is missing.
    fn required<T>(&mut self, key: &str, help: &str, read: impl FnOnce(&mut Self) -> T) -> T {
        self.require(key, help);
        read(self)
    }

    fn require(&mut self, key: &str, help: &str) {
        let (span, what) = match self.entries.get(key) {
            None => (self.span.clone(), "missing"),
            Some(value) if value.get_ref().as_array().is_some_and(|items| items.is_empty()) => {
                (value.span(), "empty")
            }
            Some(_) => return,
        };
        let place = match self.keys.header {
            "" => String::new(),
            header => format!(" in {header}"),
        };
        self.found.push(Diagnostic::new(
            span,
            format!("`{key}` is {what}{place}"),
            format!("write {help}"),
        ));
    }

    fn parsed<T>(
        &mut self,
        value: &Spanned<DeValue<'_>>,
        parse: impl FnOnce(&DeValue<'_>) -> Parsed<T>,
    ) -> Option<T> {
        parse(value.get_ref())
            .map_err(|problem| {
                self.found
                    .push(Diagnostic::new(value.span(), problem.message, problem.help));
            })
            .ok()
    }
}

fn unknown_key(table: &TableKeys, key: &str, is_value: bool, span: Span) -> Diagnostic {
    let place = match table.header {
        "" => "at the top of the file".to_owned(),
        header => format!("in {header}"),
    };
    let elsewhere = KEYS.iter().find(|other| other.keys.contains(&key));
    let help = match (elsewhere, nearest(key, table.keys.iter().copied())) {
        _ if table.header == BACKEND.header && key == "port" => {
            "write the port with the address, such as address = \"10.0.0.11:8080\"".to_owned()
        }
        (Some(_), _) if header_of(key).is_some() => format!("write {}", as_written(key)),
        // `[services]` is no limit.
        (Some(_), Some(known)) if !is_value && header_of(known).is_some() => {
            format!("write {}", as_written(known))
        }
        (Some(other), _) if other.header.is_empty() => {
            format!("write `{key}` at the top of the file, above the first line in brackets")
        }
        (Some(other), _) => format!("write `{key}` below {}, where it belongs", other.header),
        (None, Some(known)) => format!("write {}", as_written(known)),
        (None, None) => format!("remove it; the keys here are {}", table.keys.join(", ")),
    };
    Diagnostic::new(span, format!("unknown key {} {place}", quoted(key)), help)
}

/// How a key is written: a table as its header.
fn as_written(key: &str) -> String {
    header_of(key).map_or_else(|| format!("`{key}`"), str::to_owned)
}

/// The header of the table with this name.
fn header_of(key: &str) -> Option<&'static str> {
    KEYS.iter()
        .map(|table| table.header)
        .find(|header| header.trim_matches(['[', ']']).rsplit('.').next() == Some(key) && !key.is_empty())
}
