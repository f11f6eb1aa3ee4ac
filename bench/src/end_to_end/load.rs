//! The load: ApacheBench with a fixed number of requests, whose every answer is checked.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    network::Network,
    server::{BACKEND_HEADER, BODY},
};

/// Requests under way at a time, of each process of the load.
const CONCURRENCY: u32 = 16;
/// Connections that are made to see who answers.
const LOOKS: u32 = 64;

/// How requests are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Each on a connection of its own.
    Connections,
    /// On connections that are kept.
    KeepAlive,
}

/// Has processes of the client make so many requests to each of the targets at once; gives the time that it took.
///
/// # Errors
/// A request failed, or its answer was not what it should be.
pub fn run(network: &Network, targets: &[SocketAddr], kind: Kind, requests: u32) -> Result<Duration> {
    let start = Instant::now();
    let mut processes = Vec::new();
    for target in targets {
        let mut command = network.client().command("ab");
        command.args(["-q", "-s", "30", "-c", &CONCURRENCY.min(requests).to_string()]);
        command.args(["-n", &requests.to_string()]);
        if kind == Kind::KeepAlive {
            command.arg("-k");
        }
        let process = command
            .arg(format!("http://{target}/"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("ab did not start: `cargo xtask bench --end-to-end` installs it")?;
        processes.push(process);
    }
    let mut outputs = Vec::new();
    for process in processes {
        outputs.push(process.wait_with_output()?);
    }
    let took = start.elapsed();
    for output in outputs {
        ensure!(
            output.status.success(),
            "ab: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        check(&String::from_utf8_lossy(&output.stdout), kind, requests)?;
    }
    Ok(took)
}

/// Reads what `ab` tells of its requests.
fn check(text: &str, kind: Kind, requests: u32) -> Result<()> {
    let number = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':')
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    };
    let told = |name: &str| number(name).with_context(|| format!("ab does not tell of {name:?}:\n{text}"));
    let kept = number("Keep-Alive requests").unwrap_or(0);
    let is_right = told("Complete requests")? == u64::from(requests)
        && told("Failed requests")? == 0
        && told("Document Length")? == BODY as u64
        && number("Non-2xx responses").is_none()
        && kept
            == match kind {
                Kind::Connections => 0,
                Kind::KeepAlive => u64::from(requests),
            };
    ensure!(is_right, "answers were not right:\n{text}");
    Ok(())
}

/// Makes some requests and reads the answers whole: they have to be right, and to come from all backends.
///
/// # Errors
/// One was not.
pub fn look(network: &Network, targets: &[SocketAddr]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for look in 0..LOOKS {
        let target = targets[look as usize % targets.len()];
        let answer = network
            .client()
            .run(|| request(target))?
            .with_context(|| format!("a request to {target} failed"))?;
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .with_context(|| format!("no answer but {answer:?}"))?;
        ensure!(head.starts_with("HTTP/1.1 200 "), "the answer was {head:?}");
        ensure!(
            body.len() == BODY && body.bytes().all(|byte| byte == b'x'),
            "the body was {body:?}"
        );
        let backend = head
            .lines()
            .find_map(|line| line.strip_prefix(BACKEND_HEADER)?.strip_prefix(": "));
        match backend {
            Some(backend) => seen.insert(backend.to_owned()),
            None => bail!("the answer does not tell its backend: {head:?}"),
        };
    }
    ensure!(
        seen.len() == super::network::BACKENDS,
        "only the backends {seen:?} answered {LOOKS} requests"
    );
    Ok(())
}

fn request(target: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIGHT: &str = "Document Length:        1024 bytes\nComplete requests:      200\nFailed requests:        0\n\
                         Keep-Alive requests:    200\n";

    #[test]
    fn a_failed_or_missing_request_is_noticed() {
        assert!(check(RIGHT, Kind::KeepAlive, 200).is_ok());
        assert!(check(RIGHT, Kind::KeepAlive, 201).is_err());
        assert!(check(RIGHT, Kind::Connections, 200).is_err());
        let failed = RIGHT.replace("Failed requests:        0", "Failed requests:        3");
        assert!(check(&failed, Kind::KeepAlive, 200).is_err());
        let refused = format!("{RIGHT}Non-2xx responses:      200\n");
        assert!(check(&refused, Kind::KeepAlive, 200).is_err());
        let longer = RIGHT.replace("1024", "1025");
        assert!(check(&longer, Kind::KeepAlive, 200).is_err());
        assert!(check("nonsense", Kind::KeepAlive, 200).is_err());
    }
}
