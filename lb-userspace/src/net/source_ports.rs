//! The source ports that xlb may use: those which the host's own connections, of both families, do not.

use std::{fs, io};

const LOCAL_PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// The first of the source ports that this network namespace leaves to xlb, and how many there are.
///
/// # Errors
/// When the range of local ports cannot be read, or leaves nothing.
pub fn source_ports() -> io::Result<(u16, u16)> {
    let about = |error: &dyn std::fmt::Display| {
        io::Error::other(format!("reading {LOCAL_PORT_RANGE} failed: {error}"))
    };
    let text = fs::read_to_string(LOCAL_PORT_RANGE).map_err(|error| about(&error))?;
    let mut bounds = text.split_whitespace().map(str::parse::<u16>);
    let (Some(Ok(low)), Some(Ok(high))) = (bounds.next(), bounds.next()) else {
        return Err(about(&format!("{:?} is not a pair of ports", text.trim())));
    };
    gap(low, high).ok_or_else(|| {
        io::Error::other(format!(
            "net.ipv4.ip_local_port_range is {low} {high} and leaves no source ports for xlb; narrow it: \
             sysctl -w net.ipv4.ip_local_port_range='32768 60999'"
        ))
    })
}

/// The larger of the two runs of unprivileged ports beside `low..=high`: its first port and its length.
fn gap(low: u16, high: u16) -> Option<(u16, u16)> {
    const FIRST: u16 = 1024;
    let below = (FIRST, low.saturating_sub(FIRST));
    let above = (
        (high.saturating_add(1)).max(FIRST),
        u16::MAX - high.max(FIRST - 1),
    );
    let larger = if above.1 > below.1 { above } else { below };
    (larger.1 > 0).then_some(larger)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Namespace;

    #[test]
    fn the_larger_gap_is_taken() {
        assert_eq!(gap(32768, 60999), Some((1024, 31744)));
        assert_eq!(gap(1024, 40000), Some((40001, 25535)));
        assert_eq!(gap(10000, 65535), Some((1024, 8976)));
        assert_eq!(gap(2000, 3000), Some((3001, 62535)));
    }

    #[test]
    fn a_range_over_all_ports_leaves_none() {
        assert_eq!(gap(1024, 65535), None);
        assert_eq!(gap(1, 65535), None);
    }

    #[test]
    fn a_range_below_the_unprivileged_ports_leaves_all_of_those() {
        assert_eq!(gap(1, 1000), Some((1024, 64512)));
        assert_eq!(gap(1, 1023), Some((1024, 64512)));
    }

    #[test]
    fn the_range_of_the_own_namespace_counts() {
        let namespace = Namespace::new("ports").unwrap();
        namespace
            .sysctl("net/ipv4/ip_local_port_range", "20000 60000")
            .unwrap();
        assert_eq!(namespace.run(source_ports).unwrap().unwrap(), (1024, 18976));
        namespace
            .sysctl("net/ipv4/ip_local_port_range", "1024 65535")
            .unwrap();
        let error = namespace.run(source_ports).unwrap().unwrap_err();
        assert!(error.to_string().contains("narrow it: sysctl -w"), "{error}");
    }
}
