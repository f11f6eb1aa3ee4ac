//! One kind of value per function: what is written to what it means, each value for itself.

pub(super) mod addresses;
mod ports;

use std::{ops::RangeInclusive, path::PathBuf, time::Duration};

use lb_common::abi::{MAX_BACKENDS, MAX_SERVICES};
use rustls::pki_types::ServerName;
use toml::de::DeValue;

pub(super) use self::{
    addresses::{
        BackendAddress, BackendPorts, backend_address, ipip_source_v4, ipip_source_v6, source_prefix, vip,
    },
    ports::{port, port_range},
};
use super::{
    trust::Trust,
    validated::{Command, Forward, Protocol, Strategy, WhenAllDown, XdpMode},
};

/// What a value means, or what is wrong with it.
pub(super) type Parsed<T> = Result<T, Problem>;

/// What is wrong with a value, and what to write instead.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) message: String,
    pub(super) help: String,
}

impl Problem {
    fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            help: help.into(),
        }
    }

    fn not_built(what: &str, help: impl Into<String>) -> Self {
        Self::new(format!("{what} is not built yet"), help)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProbeType {
    None,
    Tcp,
    Http,
    Https,
    Grpc,
    Udp,
    Icmp,
    Exec,
}

impl ProbeType {
    /// Every type, under the word that is written.
    const WORDS: [(&'static str, Self); 8] = [
        ("tcp", Self::Tcp),
        ("http", Self::Http),
        ("https", Self::Https),
        ("grpc", Self::Grpc),
        ("udp", Self::Udp),
        ("icmp", Self::Icmp),
        ("exec", Self::Exec),
        ("none", Self::None),
    ];

    pub(super) fn word(self) -> &'static str {
        Self::WORDS
            .iter()
            .find(|(_, probe_type)| *probe_type == self)
            .map_or("", |(word, _)| word)
    }
}

/// The size of something in the kernel's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    Auto,
    Entries(u32),
}

impl Size {
    /// `None` for what is left to us.
    pub(super) fn entries(self) -> Option<u32> {
        match self {
            Self::Auto => None,
            Self::Entries(entries) => Some(entries),
        }
    }
}

/// Longest duration that is accepted anywhere: no idle timeout or interval is longer for a purpose.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// Characters of a name: it becomes a label of metrics and an argument of commands.
const LONGEST_NAME: usize = 63;
/// Bytes of an interface's name (IFNAMSIZ without the final NUL).
const LONGEST_INTERFACE: usize = 15;
/// New flows that a source prefix may be allowed: more than any one machine starts.
const MOST_NEW_FLOWS: u32 = 1_000_000;
/// Bytes of a unix socket's path (`sun_path` without the final NUL).
const LONGEST_SOCKET: usize = 107;
/// Bytes that probe `udp` sends or expects: with its headers a datagram fits into the smallest MTU of IPv6, 1280.
const LONGEST_PAYLOAD: usize = 1200;
/// Bytes of the name of a gRPC service.
const LONGEST_GRPC_SERVICE: usize = 255;
/// What a command looks like.
pub(super) const COMMAND: &str =
    "the program and its arguments as a list, such as command = [\"/usr/lib/xlb/check\", \"--fast\"]";
/// Bytes of one argument of a program.
const LONGEST_ARGUMENT: usize = 4096;

pub(super) fn interface(value: &DeValue<'_>) -> Parsed<String> {
    let name = text(value, "the name of an interface", "eth0")?;
    // As the kernel's dev_valid_name() has it.
    let wrong = |character: char| character == '/' || character == ':' || character.is_whitespace();
    if name.is_empty()
        || name.len() > LONGEST_INTERFACE
        || name == "."
        || name == ".."
        || name.contains(wrong)
        || name.contains(char::is_control)
    {
        return Err(Problem::new(
            format!("{} cannot be the name of an interface", quoted(name)),
            format!(
                "write a name that `ip link` shows: 1 to {LONGEST_INTERFACE} characters without `/`, `:` and spaces"
            ),
        ));
    }
    Ok(name.to_owned())
}

pub(super) fn xdp_mode(value: &DeValue<'_>) -> Parsed<XdpMode> {
    let modes = [
        ("auto", XdpMode::Auto),
        ("native", XdpMode::Native),
        ("generic", XdpMode::Generic),
    ];
    choice(value, "xdp-mode", &modes)
}

pub(super) fn flow_table_size(value: &DeValue<'_>) -> Parsed<Size> {
    size(value, "entries", "the size of the flow table", 1024..=16_777_216)
}

pub(super) fn services_limit(value: &DeValue<'_>) -> Parsed<Size> {
    size(value, "services", "the limit of services", 1..=MAX_SERVICES)
}

pub(super) fn backends_limit(value: &DeValue<'_>) -> Parsed<Size> {
    size(value, "backends", "the limit of backends", 1..=MAX_BACKENDS)
}

fn size(value: &DeValue<'_>, objects: &str, what: &str, range: RangeInclusive<u32>) -> Parsed<Size> {
    match value {
        DeValue::String(text) if text == "auto" => Ok(Size::Auto),
        DeValue::Integer(_) => Ok(Size::Entries(number(value, what, range)?)),
        other => Err(Problem::new(
            format!(
                "expected a number of {objects} or \"auto\", found {}",
                shown(other)
            ),
            format!(
                "write \"auto\" or a number from {} to {}, without quotes",
                range.start(),
                range.end()
            ),
        )),
    }
}

pub(super) fn socket(value: &DeValue<'_>) -> Parsed<PathBuf> {
    let path = file(value, "/run/xlb/xlb.sock")?;
    if path.as_os_str().len() > LONGEST_SOCKET {
        return Err(Problem::new(
            format!("the path of the socket is {} bytes long", path.as_os_str().len()),
            format!("write a path of at most {LONGEST_SOCKET} bytes: unix sockets have no longer ones"),
        ));
    }
    Ok(path)
}

/// Absolute path of a file.
pub(super) fn file(value: &DeValue<'_>, example: &str) -> Parsed<PathBuf> {
    let path = text(value, "the path of a file", example)?;
    if !path.starts_with('/') || path.ends_with('/') || path.contains('\0') {
        return Err(Problem::new(
            format!("{} is not the absolute path of a file", quoted(path)),
            format!("write the whole path from `/` on, such as \"{example}\""),
        ));
    }
    Ok(PathBuf::from(path))
}

pub(super) fn listen(value: &DeValue<'_>) -> Parsed<()> {
    text(value, "an address and a port", "127.0.0.1:9870")?;
    Err(Problem::not_built(
        "`listen`",
        "leave the key out; the daemon is reached through `socket` alone",
    ))
}

pub(super) fn token_file(value: &DeValue<'_>) -> Parsed<()> {
    file(value, "/etc/xlb/token")?;
    Err(Problem::not_built(
        "`token-file`",
        "leave the key out; the daemon is reached through `socket` alone, which only root and its group may open",
    ))
}

/// Name of a service or backend.
pub(super) fn name(value: &DeValue<'_>) -> Parsed<String> {
    let name = text(value, "a name", "web")?;
    let right = |character: char| character.is_ascii_alphanumeric() || "._-".contains(character);
    if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(right) {
        return Err(Problem::new(
            format!("{} cannot be a name", quoted(name)),
            format!(
                "write 1 to {LONGEST_NAME} characters of A-Z, a-z, 0-9, `.`, `_` and `-`, such as \"web-1\""
            ),
        ));
    }
    Ok(name.to_owned())
}

/// Name of one of the backends that share an entry, `name` and its port.
pub(super) fn name_with_port(name: &str, port: u16) -> Parsed<String> {
    let whole = format!("{name}-{port}");
    if whole.len() > LONGEST_NAME {
        return Err(Problem::new(
            format!("{} is too long for a name", quoted(&whole)),
            format!(
                "write a name of at most {} characters: each port of the range is added to it",
                LONGEST_NAME - "-65535".len()
            ),
        ));
    }
    Ok(whole)
}

pub(super) fn protocol(value: &DeValue<'_>) -> Parsed<Protocol> {
    choice(
        value,
        "protocol",
        &[("tcp", Protocol::Tcp), ("udp", Protocol::Udp)],
    )
}

pub(super) fn strategy(value: &DeValue<'_>) -> Parsed<Strategy> {
    let strategies = [
        ("consistent-hash", Strategy::ConsistentHash),
        ("ip-hash", Strategy::IpHash),
        ("round-robin", Strategy::RoundRobin),
        ("least-connections", Strategy::LeastConnections),
    ];
    choice(value, "strategy", &strategies)
}

pub(super) fn forward(value: &DeValue<'_>) -> Parsed<Forward> {
    let forwards = [
        ("nat", Forward::Nat),
        ("full-nat", Forward::FullNat),
        ("dsr", Forward::Dsr),
        ("ipip", Forward::IpIp),
        ("gue", Forward::Gue),
        ("local", Forward::Local),
    ];
    choice(value, "forward", &forwards)
}

pub(super) fn probe_type(value: &DeValue<'_>) -> Parsed<ProbeType> {
    choice(value, "health type", &ProbeType::WORDS)
}

/// A duration of at least `shortest`.
pub(super) fn duration(shortest: Duration) -> impl Fn(&DeValue<'_>) -> Parsed<Duration> {
    move |value| {
        let example = "write a number with its unit in quotes, such as \"500ms\", \"10s\", \"5m\" or \"1h\"";
        let written = match value {
            DeValue::String(text) => text,
            DeValue::Integer(number) => {
                let seconds = number.as_str();
                return Err(if seconds.starts_with('-') {
                    Problem::new(format!("the duration {} is negative", shown(value)), example)
                } else {
                    Problem::new(
                        format!("the duration {} has no unit", shown(value)),
                        if seconds.len() < 10 {
                            format!("write \"{seconds}s\" for seconds, or another unit: ms, m, h")
                        } else {
                            example.to_owned()
                        },
                    )
                });
            }
            other => return Err(mismatch("a duration", other, example)),
        };
        if written.trim_start().starts_with('-') {
            return Err(Problem::new(
                format!("the duration {} is negative", quoted(written)),
                example,
            ));
        }
        let duration = humantime::parse_duration(written).map_err(|error| {
            Problem::new(format!("{} is not a duration: {error}", quoted(written)), example)
        })?;
        if duration < shortest || duration > LONGEST {
            let which = if duration < shortest { "short" } else { "long" };
            return Err(Problem::new(
                format!("{} is too {which}", quoted(written)),
                format!(
                    "write a duration from \"{}\" to \"365d\"",
                    humantime::format_duration(shortest)
                ),
            ));
        }
        Ok(duration)
    }
}

/// Successes or failures in a row.
pub(super) fn consecutive(value: &DeValue<'_>) -> Parsed<u32> {
    number(value, "a number of consecutive probes", 1..=1000)
}

pub(super) fn weight(value: &DeValue<'_>) -> Parsed<u32> {
    number(value, "a weight", 0..=65_535)
}

/// Path of a request (RFC 9112 section 3.2.1: origin form).
pub(super) fn request_path(value: &DeValue<'_>) -> Parsed<String> {
    let path = text(value, "the path of a request", "/healthz")?;
    let help = "write a path from `/` on, with anything but ASCII letters, digits and punctuation percent-encoded, \
                such as \"/healthz\"";
    if !path.starts_with('/') {
        return Err(Problem::new(
            format!("{} does not begin with `/`", quoted(path)),
            help,
        ));
    }
    // A space or a line break would end the request line and begin something else; a fragment is never sent.
    if !path
        .chars()
        .all(|character| character.is_ascii_graphic() && character != '#')
    {
        return Err(Problem::new(
            format!("{} is not the path of a request", quoted(path)),
            help,
        ));
    }
    Ok(path.to_owned())
}

/// Value of the header `Host`.
pub(super) fn host(value: &DeValue<'_>) -> Parsed<String> {
    let host = text(value, "a host name", "www.example.com")?;
    let right = |character: char| character.is_ascii_alphanumeric() || ".-_:[]".contains(character);
    if host.is_empty() || host.len() > 255 || !host.chars().all(right) {
        return Err(Problem::new(
            format!("{} cannot be a host name", quoted(host)),
            "write a name such as \"www.example.com\"",
        ));
    }
    Ok(host.to_owned())
}

/// Name that a certificate has to be for.
pub(super) fn server_name(value: &DeValue<'_>) -> Parsed<ServerName<'static>> {
    let name = text(value, "a name", "www.example.com")?;
    ServerName::try_from(name.to_owned()).map_err(|_| {
        Problem::new(
            format!("{} cannot be the name in a certificate", quoted(name)),
            "write a name or an address without a port, such as \"www.example.com\"",
        )
    })
}

/// File with the certificates of the authorities that are trusted; read at once.
pub(super) fn ca_file(value: &DeValue<'_>) -> Parsed<Trust> {
    let path = file(value, "/etc/xlb/ca.pem")?;
    Trust::in_file(&path).map_err(|error| {
        Problem::new(
            format!("{} {error}", path.display()),
            "write the path of a PEM file with the authorities' certificates, from \"-----BEGIN CERTIFICATE-----\" on",
        )
    })
}

/// Name of the gRPC service whose health is asked for.
pub(super) fn grpc_service(value: &DeValue<'_>) -> Parsed<String> {
    let name = text(value, "the name of a gRPC service", "orders.v1.Orders")?;
    if name.len() > LONGEST_GRPC_SERVICE || name.contains(char::is_control) {
        return Err(Problem::new(
            format!("{} cannot be the name of a gRPC service", quoted(name)),
            format!(
                "write at most {LONGEST_GRPC_SERVICE} bytes without control characters, such as \"orders.v1.Orders\""
            ),
        ));
    }
    Ok(name.to_owned())
}

/// What probe `udp` sends.
pub(super) fn payload(value: &DeValue<'_>) -> Parsed<Vec<u8>> {
    short_enough(text(value, "a text", "ping")?.as_bytes().to_vec())
}

/// The same as hexadecimal digits, with spaces as one likes.
pub(super) fn payload_in_hex(value: &DeValue<'_>) -> Parsed<Vec<u8>> {
    let written = text(value, "bytes in hexadecimal", "00 01 ff")?;
    let digits: Option<Vec<u32>> = written
        .chars()
        .filter(|character| *character != ' ')
        .map(|character| character.to_digit(16))
        .collect();
    let digits = digits
        .filter(|digits| digits.len().is_multiple_of(2))
        .ok_or_else(|| {
            Problem::new(
                format!("{} is not a number of bytes in hexadecimal", quoted(written)),
                "write two digits of 0-9 and a-f for each byte, such as \"00 01 ff\"",
            )
        })?;
    short_enough(
        digits
            .chunks(2)
            .map(|pair| (pair[0] << 4 | pair[1]) as u8)
            .collect(),
    )
}

/// What the answer to probe `udp` has to contain.
pub(super) fn expected(value: &DeValue<'_>) -> Parsed<Vec<u8>> {
    not_empty(payload(value)?)
}

pub(super) fn expected_in_hex(value: &DeValue<'_>) -> Parsed<Vec<u8>> {
    not_empty(payload_in_hex(value)?)
}

fn not_empty(bytes: Vec<u8>) -> Parsed<Vec<u8>> {
    if bytes.is_empty() {
        return Err(Problem::new(
            "every answer contains nothing",
            "write what the answer has to contain, or leave the key out and write `send`: then any answer is enough",
        ));
    }
    Ok(bytes)
}

fn short_enough(bytes: Vec<u8>) -> Parsed<Vec<u8>> {
    if bytes.len() > LONGEST_PAYLOAD {
        return Err(Problem::new(
            format!("these are {} bytes", bytes.len()),
            format!("write at most {LONGEST_PAYLOAD}: more may not fit into one packet"),
        ));
    }
    Ok(bytes)
}

/// A program and its arguments.
pub(super) fn command(value: &DeValue<'_>) -> Parsed<Command> {
    let help = format!("write {COMMAND}");
    let DeValue::Array(items) = value else {
        return Err(mismatch("a list", value, &help));
    };
    let mut words = Vec::new();
    for item in items.iter() {
        let word = text(
            item.get_ref(),
            "a program or an argument in quotes",
            "/usr/lib/xlb/check",
        )?;
        if word.len() > LONGEST_ARGUMENT || word.contains('\0') {
            return Err(Problem::new(
                format!("{} cannot be an argument", quoted(word)),
                format!("write at most {LONGEST_ARGUMENT} bytes without the character NUL"),
            ));
        }
        words.push(word.to_owned());
    }
    match words.split_first() {
        None => Err(Problem::new("this names no program", help)),
        Some((program, _)) if !program.starts_with('/') || program.ends_with('/') => Err(Problem::new(
            format!("{} is not the absolute path of a program", quoted(program)),
            "write the whole path from `/` on, such as \"/usr/lib/xlb/check\": no shell looks for it",
        )),
        Some((program, arguments)) => Ok(Command {
            program: PathBuf::from(program),
            arguments: arguments.to_vec(),
        }),
    }
}

pub(super) fn boolean(value: &DeValue<'_>) -> Parsed<bool> {
    value
        .as_bool()
        .ok_or_else(|| mismatch("true or false", value, "write true or false, without quotes"))
}

pub(super) fn when_all_down(value: &DeValue<'_>) -> Parsed<WhenAllDown> {
    let answers = [("reject", WhenAllDown::Reject), ("try-all", WhenAllDown::TryAll)];
    choice(value, "when-all-down", &answers)
}

pub(super) fn min_healthy(value: &DeValue<'_>) -> Parsed<u32> {
    number(value, "a number of healthy backends", 1..=65_535)
}

pub(super) fn max_connections(value: &DeValue<'_>) -> Parsed<u32> {
    number(value, "a number of connections", 1..=u32::MAX)
}

/// New flows, a second or at once.
pub(super) fn new_flows(value: &DeValue<'_>) -> Parsed<u32> {
    number(value, "a number of new flows", 1..=MOST_NEW_FLOWS)
}

/// Length of the prefix that makes a source, of addresses with so many bits.
pub(super) fn source_length(bits: u8) -> impl Fn(&DeValue<'_>) -> Parsed<u8> {
    move |value| {
        let length = number(value, "the length of a prefix", 1..=u32::from(bits))?;
        // In range, so the default is never taken.
        Ok(u8::try_from(length).unwrap_or(bits))
    }
}

/// The known word that was probably meant.
pub(super) fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > 2 * LONGEST_NAME {
        return None;
    }
    let word = word.to_lowercase().replace('_', "-");
    known
        .into_iter()
        .map(|known| (strsim::damerau_levenshtein(&word, known), known))
        .min()
        .filter(|(distance, known)| *distance <= 1 + known.len() / 4)
        .map(|(_, known)| known)
}

/// Text of the file in a message: in quotes, on one line, not endlessly long.
pub(super) fn quoted(text: &str) -> String {
    const LONGEST: usize = 60;
    let escaped = text.chars().take(LONGEST).collect::<String>();
    let rest = if text.chars().nth(LONGEST).is_some() {
        "…"
    } else {
        ""
    };
    format!("\"{}{rest}\"", escaped.escape_debug())
}

/// What kind of value this is.
pub(super) fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "text in quotes",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

fn text<'a>(value: &'a DeValue<'_>, what: &str, example: &str) -> Parsed<&'a str> {
    value.as_str().ok_or_else(|| {
        mismatch(
            what,
            value,
            &format!("write one text in quotes, such as \"{example}\""),
        )
    })
}

fn number(value: &DeValue<'_>, what: &str, range: RangeInclusive<u32>) -> Parsed<u32> {
    let help = format!(
        "write a number from {} to {}, without quotes",
        range.start(),
        range.end()
    );
    let DeValue::Integer(integer) = value else {
        return Err(mismatch(what, value, &help));
    };
    i64::from_str_radix(integer.as_str(), integer.radix())
        .ok()
        .and_then(|number| u32::try_from(number).ok())
        .filter(|number| range.contains(number))
        .ok_or_else(|| Problem::new(format!("{} cannot be {what}", shown(value)), help))
}

fn choice<T: Copy>(value: &DeValue<'_>, what: &str, meanings: &[(&str, T)]) -> Parsed<T> {
    let words: Vec<&str> = meanings.iter().map(|(word, _)| *word).collect();
    let all = format!("write {}", alternatives(&words));
    let Some(written) = value.as_str() else {
        return Err(mismatch(&format!("a {what} in quotes"), value, &all));
    };
    if let Some((_, meaning)) = meanings.iter().find(|(word, _)| *word == written) {
        return Ok(*meaning);
    }
    let help = match nearest(written, words) {
        Some(word) => format!("write \"{word}\""),
        None => all,
    };
    Err(Problem::new(format!("unknown {what} {}", quoted(written)), help))
}

fn mismatch(expected: &str, found: &DeValue<'_>, help: &str) -> Problem {
    Problem::new(format!("expected {expected}, found {}", shown(found)), help)
}

/// The value itself where it is short, otherwise its kind.
fn shown(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("the text {}", quoted(text)),
        DeValue::Integer(integer) if integer.as_str().len() <= 20 => integer.to_string(),
        DeValue::Float(float) if float.as_str().len() <= 20 => float.to_string(),
        DeValue::Boolean(boolean) => boolean.to_string(),
        other => kind(other).to_owned(),
    }
}

/// The words in quotes, with "or" before the last.
pub(super) fn alternatives(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [word] => format!("\"{word}\""),
        [first @ .., last] => {
            let first: Vec<String> = first.iter().map(|word| format!("\"{word}\"")).collect();
            format!("{} or \"{last}\"", first.join(", "))
        }
    }
}
