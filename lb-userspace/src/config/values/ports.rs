//! Ports and ranges of them.

use toml::de::DeValue;

use super::{Parsed, Problem, number, quoted, shown};
use crate::config::validated::PortRange;

/// Ports of a service: a number, a range in quotes, or `any`.
pub(in crate::config) fn port_range(value: &DeValue<'_>) -> Parsed<PortRange> {
    match value {
        DeValue::Integer(_) => {
            let port = port(value)?;
            Ok(PortRange {
                first: port,
                last: port,
            })
        }
        DeValue::String(text) if text == "any" => Ok(PortRange::ANY),
        DeValue::String(text) => in_text(
            text,
            "write 80, [80, 443], \"8000-8099\" or \"any\", with ports from 1 to 65535",
        ),
        other => Err(Problem::new(
            format!("expected a port, found {}", shown(other)),
            "write 80, [80, 443], \"8000-8099\" or \"any\"",
        )),
    }
}

pub(in crate::config) fn port(value: &DeValue<'_>) -> Parsed<u16> {
    let number = number(value, "a port", 1..=u32::from(u16::MAX))?;
    u16::try_from(number).map_err(|error| Problem::new(error.to_string(), "write a number from 1 to 65535"))
}

/// One port, or the first and the last of a range.
pub(super) fn in_text(text: &str, help: &str) -> Parsed<PortRange> {
    let port = |digits: &str| {
        let port = digits
            .bytes()
            .all(|byte| byte.is_ascii_digit())
            .then(|| digits.parse());
        match port {
            Some(Ok(0)) | Some(Err(_)) if !digits.is_empty() => {
                Err(Problem::new(format!("{} cannot be a port", quoted(digits)), help))
            }
            Some(Ok(port)) => Ok(port),
            _ => Err(Problem::new(
                format!("{} is not a port or a range of ports", quoted(text)),
                help,
            )),
        }
    };
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (port(first)?, port(last)?),
        None => (port(text)?, port(text)?),
    };
    if first > last {
        return Err(Problem::new(
            format!("the range {first}-{last} is reversed"),
            format!("write the lower port first: {last}-{first}"),
        ));
    }
    Ok(PortRange { first, last })
}
