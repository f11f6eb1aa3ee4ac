//! What the tests ask of the machine they run on, and what it changes for them.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use xlb::{
    lab::{LabError, Namespace, VlanTag},
    net::NetError,
};

/// Fails with the reason where a test could not run; it is never skipped.
pub fn require_root_nginx_and_curl() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests make network namespaces and load programs: run them as root"
    );
    for (program, package) in [(NGINX, "nginx-light"), (CURL, "curl")] {
        assert!(
            Path::new(program).exists(),
            "{program} is missing: `apt-get install {package}`"
        );
    }
}

pub const NGINX: &str = "/usr/sbin/nginx";
pub const CURL: &str = "/usr/bin/curl";

/// Whether this is an emulated machine, some twenty times slower: `XLB_TEST_VM=1`.
pub fn is_emulated() -> bool {
    env::var_os("XLB_TEST_VM").is_some_and(|value| value == "1")
}

/// Whether this kernel has VLAN devices; those of the virtual machines must.
///
/// # Panics
/// When one of those has none, or what it answers is neither.
pub fn has_vlan_devices() -> bool {
    let made = Namespace::new("vlan").and_then(|namespace| {
        Namespace::connect(&namespace, "eth0", &namespace, "eth1")?;
        namespace.add_vlan("vlan", "eth0", VlanTag::Customer(1))
    });
    match made {
        Ok(()) => true,
        Err(LabError::Net {
            source: NetError::NoVlan,
            ..
        }) if !is_emulated() => false,
        Err(error) => panic!("{error}"),
    }
}

/// CPUs that the kernel may run the program on.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// So many, or a tenth of them on an emulated machine.
pub fn count(full: usize) -> usize {
    if is_emulated() { full.div_ceil(10) } else { full }
}

/// A bound on a time that the work of this machine is part of.
pub fn bound(duration: Duration) -> Duration {
    if is_emulated() { duration * 10 } else { duration }
}

/// How backends are probed: as fast as the machine can follow.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub interval: Duration,
    pub timeout: Duration,
    pub rise: u32,
    pub fall: u32,
}

impl Pace {
    pub fn of_this_machine() -> Self {
        let interval = Duration::from_millis(if is_emulated() { 2000 } else { 200 });
        Self {
            interval,
            timeout: interval,
            rise: 2,
            fall: 3,
        }
    }

    /// How long after its death a backend may get new connections.
    pub fn detection(&self) -> Duration {
        self.fall * self.interval + self.timeout + bound(Duration::from_millis(500))
    }
}

/// The `xlb` under test: `XLB_BIN`, or the one built beside this test.
///
/// # Panics
/// When there is none, or it is older than its sources.
pub fn xlb() -> PathBuf {
    if let Some(path) = env::var_os("XLB_BIN") {
        return path.into();
    }
    let test = env::current_exe().expect("a process knows its program");
    // target/PROFILE/deps/netns-HASH
    let folder = test.ancestors().nth(2).expect("a test is built two folders deep");
    let path = folder.join("xlb");
    let built = fs::metadata(&path).and_then(|metadata| metadata.modified());
    let Ok(built) = built else {
        panic!(
            "{} is missing: build it with `cargo build -p lb-userspace`, or name one in XLB_BIN",
            path.display()
        );
    };
    // What cargo notes of each binary: its path, a colon, and the paths of its sources.
    let sources = fs::read_to_string(path.with_extension("d")).unwrap_or_default();
    for source in sources.split_whitespace().skip(1) {
        let changed = fs::metadata(source).and_then(|metadata| metadata.modified());
        assert!(
            changed.is_ok_and(|changed| changed <= built),
            "{} is older than {source}: build it anew with `cargo build -p lb-userspace`",
            path.display()
        );
    }
    path
}

/// Waits until something holds.
///
/// # Panics
/// When it does not within [`bound`] of the time given.
pub fn eventually(what: &str, within: Duration, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(
            start.elapsed() < bound(within),
            "{what}: not within {:?}",
            bound(within)
        );
        std::thread::sleep(bound(Duration::from_millis(20)));
    }
}
