//! One of several daemons on a kernel, and the paths that are its own.

use std::{fmt, path::PathBuf, str::FromStr};

/// The instance unless `--instance` names another.
pub const DEFAULT: &str = "default";
/// The folder of sockets and locks.
const RUN_FOLDER: &str = "/run/xlb";

/// The name of an instance; part of the paths of its pins, its socket and its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance(String);

impl Instance {
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Where the control socket is unless the configuration names another place.
    pub fn socket(&self) -> PathBuf {
        self.run_folder().join("xlb.sock")
    }

    /// Held by the daemon of this instance while it runs.
    pub fn lock(&self) -> PathBuf {
        self.run_folder().join("xlb.lock")
    }

    fn run_folder(&self) -> PathBuf {
        if self.0 == DEFAULT {
            PathBuf::from(RUN_FOLDER)
        } else {
            PathBuf::from(RUN_FOLDER).join(&self.0)
        }
    }
}

impl FromStr for Instance {
    type Err = InstanceError;

    fn from_str(name: &str) -> Result<Self, InstanceError> {
        let is_valid = (1..=63).contains(&name.len())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
        if is_valid {
            Ok(Self(name.to_owned()))
        } else {
            Err(InstanceError)
        }
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A name that no instance can have.
#[derive(Debug, thiserror::Error)]
#[error("an instance's name has 1 to 63 letters, digits, `-` and `_`")]
pub struct InstanceError;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_do_not_share_paths() {
        let default: Instance = DEFAULT.parse().unwrap();
        let other: Instance = "other".parse().unwrap();
        assert_eq!(default.socket(), PathBuf::from("/run/xlb/xlb.sock"));
        assert_eq!(other.socket(), PathBuf::from("/run/xlb/other/xlb.sock"));
        assert_ne!(default.lock(), other.lock());
    }

    #[test]
    fn a_name_cannot_leave_its_folder() {
        for name in ["", "..", "a/b", "a.b", &"x".repeat(64)] {
            assert!(name.parse::<Instance>().is_err(), "{name}");
        }
    }
}
