//! The program on interfaces of a namespace, with real links and pins; wants root and bpffs.

#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::{
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use aya::programs::ProgramInfo;
use xlb::{
    datapath::{
        AttachMode, Pins, Sizes,
        kernel::{KernelDatapath, Mode},
    },
    lab::Namespace,
};

/// A data path of its own, whose pins go with it.
struct Instance {
    pins: Pins,
    datapath: KernelDatapath,
}

impl Instance {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let pins = Pins::new(&format!("attach-{}-{number}", std::process::id()));
        let datapath = KernelDatapath::open(pins.clone(), Sizes::of_flows(1024)).unwrap();
        Self { pins, datapath }
    }

    /// Attaches to these interfaces alone; gives the error in one line.
    fn attach(&mut self, interfaces: &[&str], mode: Mode) -> Result<(), String> {
        let interfaces: Vec<String> = interfaces.iter().map(|name| (*name).to_owned()).collect();
        let attached = self.datapath.attach(&interfaces, mode);
        attached
            .map(drop)
            .map_err(|error| format!("{:#}", anyhow::Error::from(error)))
    }

    /// Id of the program that this data path has loaded.
    fn program_id(&mut self) -> u32 {
        let program = self.datapath.ebpf_mut().program("xlb").unwrap();
        program.info().unwrap().id()
    }

    fn links(&self) -> Vec<(String, AttachMode, PathBuf)> {
        self.pins.list_links()
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = self.pins.remove_all();
    }
}

/// A host with one interface of this name, and the other end of it.
fn host_with(interface: &str) -> (Namespace, Namespace) {
    let (host, other) = (Namespace::new("host").unwrap(), Namespace::new("other").unwrap());
    Namespace::connect(&host, interface, &other, "eth0").unwrap();
    (host, other)
}

fn ip(arguments: &[&str]) {
    assert!(Command::new("ip").args(arguments).status().unwrap().success());
}

/// Tells whether an interface runs an XDP program.
fn runs_a_program(interface: &str) -> bool {
    let shown = Command::new("ip")
        .args(["link", "show", interface])
        .output()
        .unwrap();
    String::from_utf8(shown.stdout).unwrap().contains("prog/xdp")
}

#[test]
fn an_interface_with_a_dot_in_its_name_is_attached_and_found_again() {
    let (host, _other) = host_with("eth0.100");
    host.run(|| {
        let mut instance = Instance::new();
        instance.attach(&["eth0.100"], Mode::Auto).unwrap();
        assert!(runs_a_program("eth0.100"));
        let links = instance.links();
        assert_eq!(links.len(), 1);
        assert_eq!(links[0].0, "eth0.100");
        instance.attach(&["eth0.100"], Mode::Auto).unwrap();
        assert_eq!(instance.links(), links);
    })
    .unwrap();
}

#[test]
fn an_interface_that_was_renamed_keeps_its_program() {
    let (host, _other) = host_with("eth0");
    host.run(|| {
        let mut instance = Instance::new();
        instance.attach(&["eth0"], Mode::Auto).unwrap();
        ip(&["link", "set", "eth0", "down"]);
        ip(&["link", "set", "eth0", "name", "lan0"]);
        instance.attach(&["lan0"], Mode::Auto).unwrap();
        assert!(runs_a_program("lan0"));
        let names: Vec<String> = instance.links().into_iter().map(|(name, ..)| name).collect();
        assert_eq!(names, ["lan0"]);
    })
    .unwrap();
}

#[test]
fn the_mode_can_be_changed_any_number_of_times() {
    let (host, _other) = host_with("eth0");
    host.run(|| {
        let mut instance = Instance::new();
        for (mode, obtained) in [
            (Mode::Native, AttachMode::Native),
            (Mode::Generic, AttachMode::Generic),
        ]
        .repeat(10)
        {
            instance.attach(&["eth0"], mode).unwrap();
            let modes: Vec<AttachMode> = instance.links().into_iter().map(|(_, mode, _)| mode).collect();
            assert_eq!(modes, [obtained]);
        }
    })
    .unwrap();
}

#[test]
fn a_mode_that_is_refused_leaves_the_one_before() {
    let host = Namespace::new("host").unwrap();
    host.run(|| {
        let mut instance = Instance::new();
        instance.attach(&["lo"], Mode::Generic).unwrap();
        instance.attach(&["lo"], Mode::Native).unwrap_err();
        assert!(runs_a_program("lo"));
        assert_eq!(instance.links()[0].1, AttachMode::Generic);
    })
    .unwrap();
}

#[test]
fn a_program_of_somebody_else_is_named_whatever_its_mode() {
    let (host, _other) = host_with("eth0");
    host.run(|| {
        for (theirs, ours) in [
            (Mode::Native, Mode::Auto),
            (Mode::Native, Mode::Generic),
            (Mode::Generic, Mode::Native),
        ] {
            let mut other = Instance::new();
            other.attach(&["eth0"], theirs).unwrap();
            let error = Instance::new().attach(&["eth0"], ours).unwrap_err();
            assert!(
                error.contains("it has another XDP program"),
                "{theirs:?} {ours:?}: {error}"
            );
        }
    })
    .unwrap();
}

#[test]
fn the_program_is_pinned_once_and_stays_over_a_restart() {
    let mut instance = Instance::new();
    let path = instance.pins.program("xlb");
    let id = || ProgramInfo::from_pin(&path).unwrap().id();
    let (first, own) = (id(), instance.program_id());
    assert_eq!(first, own);
    instance.datapath = KernelDatapath::open(instance.pins.clone(), Sizes::of_flows(1024)).unwrap();
    // A debug build's program has a ring for log records of its own, so that it is another one each time.
    if cfg!(debug_assertions) {
        assert_eq!(id(), instance.program_id());
    } else {
        assert_eq!(id(), first);
    }
}
