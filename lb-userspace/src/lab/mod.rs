//! Network namespaces, joined by veth pairs, for the demo and the tests.
//!
//! They have no names in the file system: file descriptors of this process are all that holds them, so the kernel frees
//! them, with everything in them, when the process ends in whatever way.

pub mod http_backend;
pub mod http_client;
mod offload;
pub mod topology;

use std::{
    fs::{self, File},
    future::Future,
    io,
    net::IpAddr,
    os::{fd::AsFd, unix::process::CommandExt},
    panic,
    process::Command,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use ipnet::IpNet;
use nix::sched::{CloneFlags, setns, unshare};

use crate::{
    datapath::{DatapathError, pass::PassAll},
    net::{self, NetError, construct},
};

pub use construct::{Route, VlanTag};
pub use topology::{Family, Topology};

/// A network namespace of our own; goes when this value, its children and the threads inside have gone.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: Arc<File>,
    /// Programs that pass everything, attached as long as they are held.
    passing: Mutex<Vec<PassAll>>,
}

/// Why the lab could not be built.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    #[error("creating network namespace {name} is not permitted; run as root or grant CAP_SYS_ADMIN")]
    NotPermitted { name: String },
    /// The system refused something; `action` tells what.
    #[error("{action} in network namespace {name} failed: {source}")]
    System {
        name: String,
        action: String,
        #[source]
        source: io::Error,
    },
    #[error("network namespace {name}: {source}")]
    Net {
        name: String,
        #[source]
        source: NetError,
    },
    #[error("network namespace {name}: {source}")]
    Datapath {
        name: String,
        #[source]
        source: DatapathError,
    },
    /// An address or prefix in the caller's text is none.
    #[error("{text:?} is not an address or prefix")]
    Address { text: String },
    /// More hosts than the lab's networks have addresses for.
    #[error("a topology takes at most {limit} {what}, not {count}")]
    TooMany {
        what: &'static str,
        limit: usize,
        count: usize,
    },
}

impl Namespace {
    /// Makes a namespace with its loopback interface up; `name` is for messages alone.
    ///
    /// # Errors
    /// Without the capability to make one, and where the kernel has none.
    pub fn new(name: &str) -> Result<Self, LabError> {
        let failed = |action: &str, source: io::Error| match source.raw_os_error() {
            Some(libc::EPERM) => LabError::NotPermitted {
                name: name.to_owned(),
            },
            _ => LabError::System {
                name: name.to_owned(),
                action: action.to_owned(),
                source,
            },
        };
        // A thread of its own, so that the caller stays in the namespace where it is.
        let made = on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        let file = made
            .and_then(|file| file)
            .map_err(|source| failed("creating it", source))?;
        let namespace = Self {
            name: name.to_owned(),
            file: Arc::new(file),
            passing: Mutex::new(Vec::new()),
        };
        // Addresses that the kernel makes itself are to be usable at once, too: no duplicate address detection.
        for scope in ["all", "default"] {
            namespace.sysctl_if_present(&format!("net/ipv6/conf/{scope}/accept_dad"), "0")?;
        }
        namespace.set_up("lo")?;
        Ok(namespace)
    }

    /// Joins two namespaces by a pair of veth interfaces, both up.
    pub fn connect(left: &Self, left_name: &str, right: &Self, right_name: &str) -> Result<(), LabError> {
        left.net(construct::create_veth_pair(
            (left_name, left.file.as_fd()),
            (right_name, right.file.as_fd()),
        ))?;
        left.set_up(left_name)?;
        right.set_up(right_name)
    }

    /// Adds a VLAN device on top of an interface, and sets it up.
    pub fn add_vlan(&self, name: &str, lower: &str, tag: VlanTag) -> Result<(), LabError> {
        self.net(construct::create_vlan(name, lower, tag))?;
        self.set_up(name)
    }

    /// Runs `work` on a thread inside, and returns its value; a panic in it goes on in the caller.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        on_a_thread(|| self.enter().map(|()| work()))
            .and_then(|entered| entered)
            .map_err(|source| self.failed("running on a thread", source))
    }

    /// Starts `work` on a thread inside that goes on by itself; the namespace lives at least as long as the thread.
    ///
    /// The thread's value is an error when it could not enter.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<thread::JoinHandle<io::Result<T>>, LabError> {
        let file = Arc::clone(&self.file);
        thread::Builder::new()
            .name(self.name.chars().take(15).collect())
            .spawn(move || {
                setns(&*file, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })
            .map_err(|source| self.failed("starting a thread", source))
    }

    /// Moves the calling thread inside, for good: for the threads of a runtime.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(&*self.file, CloneFlags::CLONE_NEWNET)?)
    }

    /// A command whose process runs inside, and is killed when the thread that started it ends, however it does.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let file = Arc::clone(&self.file);
        let starter = nix::unistd::getpid();
        let enter = move || {
            // SAFETY: the call takes plain integers and touches no memory of ours.
            if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
                return Err(io::Error::last_os_error());
            }
            if nix::unistd::getppid() != starter {
                return Err(io::Error::other("the starter has ended"));
            }
            Ok(setns(&*file, CloneFlags::CLONE_NEWNET)?)
        };
        // SAFETY: between fork and exec the closure makes system calls alone; it neither allocates nor locks unless it
        // fails.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Writes a setting of this namespace; `key` is a path below `/proc/sys`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<(), LabError> {
        // The file shows the namespace of the thread that opens it.
        self.run(|| fs::write(format!("/proc/sys/{key}"), value))?
            .map_err(|source| self.failed(&format!("setting {key} to {value}"), source))
    }

    /// Adds an address with its prefix, `10.0.0.1/24`, usable at once.
    pub fn add_address(&self, interface: &str, address: &str) -> Result<(), LabError> {
        self.add_addresses(interface, &[prefix(address)?])
    }

    /// Adds several addresses with their prefixes.
    pub fn add_addresses(&self, interface: &str, addresses: &[IpNet]) -> Result<(), LabError> {
        self.net(construct::add_addresses(interface, addresses, false))
    }

    /// Adds an address that is not usable before the kernel has asked whether another host has it.
    pub fn add_address_to_be_checked(&self, interface: &str, address: &str) -> Result<(), LabError> {
        self.net(construct::add_addresses(interface, &[prefix(address)?], true))
    }

    /// Removes an address from whatever interface has it.
    pub fn remove_address(&self, address: IpAddr) -> Result<(), LabError> {
        self.net(construct::remove_address(address))
    }

    /// Adds a route by a gateway, in place of one to the same prefix.
    pub fn add_route(&self, destination: &str, gateway: &str) -> Result<(), LabError> {
        self.set_route(&Route::by(prefix(destination)?, address(gateway)?))
    }

    /// Adds a route, in place of one to the same prefix.
    pub fn set_route(&self, route: &Route) -> Result<(), LabError> {
        self.net(construct::set_route(route))
    }

    /// Adds a route that answers "unreachable", in place of one to the same prefix.
    pub fn add_unreachable_route(&self, destination: &str) -> Result<(), LabError> {
        self.set_route(&Route::unreachable(prefix(destination)?))
    }

    /// Removes a route.
    pub fn remove_route(&self, destination: &str) -> Result<(), LabError> {
        self.net(construct::remove_route(prefix(destination)?))
    }

    /// Adds a permanent neighbour, in place of what is known of that address.
    pub fn add_neighbour(&self, interface: &str, address: IpAddr, mac: [u8; 6]) -> Result<(), LabError> {
        self.net(construct::set_neighbour(interface, address, mac))
    }

    /// Sets an interface up.
    pub fn set_up(&self, interface: &str) -> Result<(), LabError> {
        self.net(construct::set_up(interface, true))
    }

    /// Sets an interface down.
    pub fn set_down(&self, interface: &str) -> Result<(), LabError> {
        self.net(construct::set_up(interface, false))
    }

    /// Gives an interface a MAC address.
    pub fn set_mac(&self, interface: &str, mac: [u8; 6]) -> Result<(), LabError> {
        self.net(construct::set_mac(interface, mac))
    }

    /// Sets the MTU of an interface, in bytes.
    pub fn set_mtu(&self, interface: &str, mtu: u32) -> Result<(), LabError> {
        self.net(construct::set_mtu(interface, mtu))
    }

    /// Index of an interface.
    pub fn ifindex(&self, interface: &str) -> Result<u32, LabError> {
        Ok(self.link(interface)?.ifindex)
    }

    /// An interface as it is now.
    pub fn link(&self, interface: &str) -> Result<net::Link, LabError> {
        let mut links = self.net(net::links_named(&[interface]))?;
        Ok(links.remove(0))
    }

    /// Makes the interface's sender fill in checksums and cut segments itself, as a network card would on the wire.
    ///
    /// Otherwise packets carry partial checksums over a veth pair, and stay wrong once a program has rewritten them.
    pub fn disable_offload(&self, interface: &str) -> Result<(), LabError> {
        self.run(|| offload::disable(interface))?
            .map_err(|source| self.failed(&format!("switching off the offloads of {interface}"), source))
    }

    /// Attaches a program that passes everything, in driver mode: what a veth needs for packets that a program on its
    /// peer sends.
    pub fn pass_all(&self, interface: &str) -> Result<(), LabError> {
        let ifindex = self.ifindex(interface)?;
        let attached = self
            .run(|| PassAll::attach(ifindex))?
            .map_err(|source| LabError::Datapath {
                name: self.name.clone(),
                source,
            })?;
        self.passing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(attached);
        Ok(())
    }

    /// Detaches the programs that [`Self::pass_all`] has attached, so that another one can be.
    pub fn pass_no_longer(&self) {
        self.passing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// The name that it was made with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number that the kernel knows it by, as `stat /proc/PID/ns/net` shows it.
    pub fn inode(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(self.file.metadata()?.ino())
    }

    /// Asks the kernel inside.
    fn net<T: Send>(&self, work: impl Future<Output = Result<T, NetError>> + Send) -> Result<T, LabError> {
        self.run(|| Ok(runtime()?.block_on(work)))?
            .map_err(|source| self.failed("starting a runtime", source))?
            .map_err(|source| LabError::Net {
                name: self.name.clone(),
                source,
            })
    }

    fn sysctl_if_present(&self, key: &str, value: &str) -> Result<(), LabError> {
        match self.sysctl(key, value) {
            Err(LabError::System { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    fn failed(&self, action: &str, source: io::Error) -> LabError {
        LabError::System {
            name: self.name.clone(),
            action: action.to_owned(),
            source,
        }
    }
}

/// A runtime for one thread, which has to be in the namespace that its sockets shall belong to.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Runs `work` on a thread of its own; a panic in it goes on in the caller.
fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, work)?;
        Ok(thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause)))
    })
}

fn prefix(text: &str) -> Result<IpNet, LabError> {
    text.parse().or_else(|_| address(text).map(IpNet::from))
}

fn address(text: &str) -> Result<IpAddr, LabError> {
    text.parse().map_err(|_| LabError::Address {
        text: text.to_owned(),
    })
}

/// Runs a future to its end on this thread, and so in this thread's namespace.
#[cfg(test)]
pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> T {
    runtime().unwrap().block_on(work)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        time::{Duration, Instant},
    };

    use super::*;

    fn pair() -> (Namespace, Namespace) {
        let (left, right) = (Namespace::new("left").unwrap(), Namespace::new("right").unwrap());
        Namespace::connect(&left, "eth0", &right, "eth1").unwrap();
        for (namespace, interface, number) in [(&left, "eth0", 1), (&right, "eth1", 2)] {
            namespace
                .add_address(interface, &format!("10.0.0.{number}/24"))
                .unwrap();
            namespace
                .add_address(interface, &format!("2001:db8::{number}/64"))
                .unwrap();
        }
        (left, right)
    }

    /// Sends a word from `client` to a listener in `server`, and takes it back.
    fn talk(client: &Namespace, server: &Namespace, address: &str) {
        let listener = server.run(|| TcpListener::bind((address, 0))).unwrap().unwrap();
        let port = listener.local_addr().unwrap().port();
        let echo = server
            .spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut word = [0; 4];
                stream.read_exact(&mut word).unwrap();
                stream.write_all(&word).unwrap();
            })
            .unwrap();
        let word = client
            .run(|| {
                let mut stream = TcpStream::connect((address, port)).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                stream.write_all(b"word").unwrap();
                let mut word = [0; 4];
                stream.read_exact(&mut word).unwrap();
                word
            })
            .unwrap();
        assert_eq!(&word, b"word");
        echo.join().unwrap().unwrap();
    }

    fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !holds() {
            assert!(Instant::now() < deadline, "{what}, not within 10 seconds");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn two_namespaces_talk_over_both_families() {
        let (left, right) = pair();
        talk(&left, &right, "10.0.0.2");
        talk(&left, &right, "2001:db8::2");
    }

    #[test]
    fn the_caller_stays_in_its_own_namespace() {
        let own = fs::read_link("/proc/thread-self/ns/net").unwrap();
        let namespace = Namespace::new("other").unwrap();
        let inside = namespace
            .run(|| fs::read_link("/proc/thread-self/ns/net"))
            .unwrap()
            .unwrap();
        assert_eq!(
            inside.to_string_lossy(),
            format!("net:[{}]", namespace.inode().unwrap())
        );
        assert_ne!(inside, own);
        assert_eq!(fs::read_link("/proc/thread-self/ns/net").unwrap(), own);
    }

    #[test]
    fn a_dropped_namespace_takes_its_interfaces_along() {
        let (left, right) = pair();
        left.pass_all("eth0").unwrap();
        drop(left);
        eventually("the peer has gone", || right.link("eth1").is_err());
    }

    #[test]
    fn a_command_runs_inside_and_ends_with_its_starter() {
        let namespace = Namespace::new("inside").unwrap();
        let output = namespace
            .command("readlink")
            .arg("/proc/self/ns/net")
            .output()
            .unwrap();
        let expected = format!("net:[{}]\n", namespace.inode().unwrap());
        assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);

        let mut child = on_a_thread(|| namespace.command("sleep").arg("1000").spawn())
            .unwrap()
            .unwrap();
        eventually("the child has been killed", || {
            child.try_wait().unwrap().is_some()
        });
    }

    #[test]
    fn a_killed_process_leaves_no_namespace_behind() {
        const VICTIM: &str = "XLB_LAB_TEST_VICTIM";
        if std::env::var_os(VICTIM).is_some() {
            // The process that is going to be killed: it runs in the survivor's namespace.
            let file = Arc::new(File::open("/proc/self/ns/net").unwrap());
            let survivor = Namespace {
                name: "survivor".to_owned(),
                file,
                passing: Mutex::default(),
            };
            let victim = Namespace::new("victim").unwrap();
            Namespace::connect(&survivor, "eth0", &victim, "eth0").unwrap();
            victim.pass_all("eth0").unwrap();
            // A child holds the namespace, too.
            victim.command("sleep").arg("1000").status().unwrap();
            unreachable!("killed before");
        }
        let survivor = Namespace::new("survivor").unwrap();
        let mut process = survivor
            .command(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "lab::tests::a_killed_process_leaves_no_namespace_behind",
            ])
            .env(VICTIM, "1")
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        eventually("the pair is up", || {
            survivor.link("eth0").is_ok_and(|link| link.running)
        });
        process.kill().unwrap();
        process.wait().unwrap();
        eventually("the pair has gone", || survivor.link("eth0").is_err());
    }

    #[test]
    fn a_setting_stays_inside() {
        let path = "/proc/sys/net/ipv4/ip_forward";
        let outside = fs::read_to_string(path).unwrap();
        let namespace = Namespace::new("setting").unwrap();
        for value in ["1", "0"] {
            namespace.sysctl("net/ipv4/ip_forward", value).unwrap();
            let inside = namespace.run(|| fs::read_to_string(path)).unwrap().unwrap();
            assert_eq!(inside.trim(), value);
        }
        assert_eq!(fs::read_to_string(path).unwrap(), outside);
    }

    #[test]
    fn the_passing_program_attaches_in_driver_mode_once_and_passes() {
        let (left, right) = pair();
        left.disable_offload("eth0").unwrap();
        left.pass_all("eth0").unwrap();
        let again = left.pass_all("eth0").unwrap_err().to_string();
        assert!(again.contains("attach in driver mode failed"), "{again}");
        talk(&left, &right, "10.0.0.2");
        left.pass_no_longer();
        left.pass_all("eth0").unwrap();
    }

    #[test]
    fn a_panic_inside_reaches_the_caller() {
        let namespace = Namespace::new("panic").unwrap();
        let caught = panic::catch_unwind(panic::AssertUnwindSafe(|| namespace.run(|| panic!("inside"))));
        assert_eq!(caught.unwrap_err().downcast_ref(), Some(&"inside"));
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let namespace = Namespace::new("refused").unwrap();
        let error = namespace.add_address("lo", "10.0.0/24").unwrap_err();
        assert_eq!(error.to_string(), "\"10.0.0/24\" is not an address or prefix");
    }
}
