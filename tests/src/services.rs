//! Services as the configuration file has them.

use std::fmt;

use crate::machine::Pace;

/// A `[[service]]` with its backends: the VIP of the lab, port 80 over TCP, probed over HTTP unless told otherwise.
#[derive(Clone, Debug)]
pub struct Service {
    keys: Vec<(String, String)>,
    health: Option<String>,
    backends: Vec<Backend>,
}

/// A `[[service.backend]]`.
#[derive(Clone, Debug)]
struct Backend {
    name: String,
    keys: String,
}

impl Service {
    pub fn tcp(name: &str) -> Self {
        Self::new(name, "tcp")
    }

    /// A UDP service, port 5353, without probes.
    pub fn udp(name: &str) -> Self {
        Self::new(name, "udp")
            .with("port", 5353)
            .health(r#"type = "none""#)
    }

    fn new(name: &str, protocol: &str) -> Self {
        let service = Self {
            keys: Vec::new(),
            health: None,
            backends: Vec::new(),
        };
        service
            .text("name", name)
            .text("vip", &xlb::lab::Topology::VIP.to_string())
            .with("port", 80)
            .text("protocol", protocol)
    }

    /// Sets a key to a value that is written without quotes.
    pub fn with(mut self, key: &str, value: impl fmt::Display) -> Self {
        self.keys.retain(|(known, _)| known != key);
        self.keys.push((key.to_owned(), value.to_string()));
        self
    }

    /// Sets a key to a text.
    pub fn text(self, key: &str, value: &str) -> Self {
        self.with(key, format_args!("\"{value}\""))
    }

    pub fn backend(self, name: &str, address: &str) -> Self {
        self.weighted(name, address, 100)
    }

    pub fn weighted(mut self, name: &str, address: &str, weight: u32) -> Self {
        self.backends.push(Backend {
            name: name.to_owned(),
            keys: format!("address = \"{address}\"\nweight = {weight}\n"),
        });
        self
    }

    /// Sets a key of the backend that was added last, to a value that is written without quotes.
    pub fn with_last(mut self, key: &str, value: impl fmt::Display) -> Self {
        if let Some(backend) = self.backends.last_mut() {
            backend.keys += &format!("{key} = {value}\n");
        }
        self
    }

    pub fn without(mut self, backend: &str) -> Self {
        self.backends.retain(|known| known.name != backend);
        self
    }

    /// The keys of `[service.health]`.
    pub fn health(mut self, keys: &str) -> Self {
        self.health = Some(keys.to_owned());
        self
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n[[service]]")?;
        for (key, value) in &self.keys {
            writeln!(f, "{key} = {value}")?;
        }
        writeln!(f, "[service.health]")?;
        match &self.health {
            Some(keys) => writeln!(f, "{keys}")?,
            None => {
                let pace = Pace::of_this_machine();
                writeln!(f, "type = \"http\"\npath = \"/healthz\"")?;
                writeln!(f, "interval = \"{}ms\"", pace.interval.as_millis())?;
                writeln!(f, "timeout = \"{}ms\"", pace.timeout.as_millis())?;
                writeln!(f, "rise = {}\nfall = {}", pace.rise, pace.fall)?;
            }
        }
        for Backend { name, keys } in &self.backends {
            writeln!(f, "[[service.backend]]\nname = \"{name}\"\n{keys}")?;
        }
        Ok(())
    }
}
