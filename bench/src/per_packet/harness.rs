//! The harness program and its runs.

use std::{fmt, path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};
pub use aya::programs::ProgramFd as Program;
use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, MapData, ProgramArray},
    programs::{ProgramInfo, TestRun, TestRunOptions, Xdp},
};
use lb_common::abi::BenchProgress;
use nix::sys::resource::{UsageWho, getrusage};
use xlb::datapath::kernel::Raw;

use super::{frame::Packet, template};

/// The object that the build script has built.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf-bench.o"));

/// What is put around a packet fits.
const ROOM: usize = 256;

/// The harness in front of some program, for one packet in all its flows.
pub struct Harness {
    /// Holds the program.
    ebpf: Ebpf,
    progress: Array<MapData, Raw<BenchProgress>>,
    under_test: ProgramArray<MapData>,
    empty: Program,
    frame: Vec<u8>,
    ingress: u32,
}

impl fmt::Debug for Harness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harness")
            .field("frame", &self.frame)
            .finish_non_exhaustive()
    }
}

/// What a run is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Packets before the clock starts, so that caches hold what they will.
    pub lead: u32,
    /// Packets that are timed.
    pub packets: u32,
    /// The first packet's flow.
    pub flow: u64,
    /// Flows go round from 0 to before this one.
    pub flows_end: u64,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Ran {
    /// For each packet, the harness included.
    pub nanoseconds: f64,
    /// The last packet's.
    pub verdict: u32,
    /// The last packet as it left.
    pub output: Vec<u8>,
    /// The flow that is next.
    pub flow: u64,
}

impl Run {
    /// All packets of it.
    pub fn total(self) -> u32 {
        self.lead + self.packets
    }
}

impl Harness {
    /// Loads the harness for a packet that comes in by this interface of the thread's network namespace, and compares the
    /// frames that it sets up with those that a library builds.
    ///
    /// # Errors
    /// The kernel refuses it, or a frame is not as it is to be.
    pub fn new(packet: &Packet, ingress: u32) -> Result<Self> {
        let (frame, template) = template::of(packet)?;
        let template = Raw(template);
        let mut ebpf = EbpfLoader::new()
            .override_global("TEMPLATE", &template, true)
            // The floor's table is not used here.
            .map_max_entries("FLOOR_FLOWS", 1)
            .load(OBJECT)
            .context("the harness's maps were not made")?;
        let empty = load(&mut ebpf, "empty")?;
        load(&mut ebpf, "harness")?;
        let mut map = |name| {
            ebpf.take_map(name)
                .with_context(|| format!("the object has no map {name}"))
        };
        let (progress, under_test) = (map("PROGRESS")?, map("UNDER_TEST")?);
        let mut harness = Self {
            ebpf,
            progress: progress.try_into()?,
            under_test: under_test.try_into()?,
            empty,
            frame,
            ingress,
        };
        harness.check(packet)?;
        Ok(harness)
    }

    /// Length of the frames that it sets up, in bytes.
    pub fn length(&self) -> usize {
        self.frame.len()
    }

    /// Runs a program, or the empty one, behind the harness.
    ///
    /// # Errors
    /// The kernel refuses the program or the run, or the run was cut short.
    pub fn run(&mut self, program: Option<&Program>, run: Run) -> Result<Ran> {
        self.under_test
            .set(0, program.unwrap_or(&self.empty), 0)
            .context("the program was not put behind the harness, which takes XDP programs for frames in several buffers")?;
        let progress = BenchProgress {
            first_timed: run.lead.into(),
            last: u64::from(run.total()) - 1,
            flow: run.flow,
            flows_end: run.flows_end,
            ..BenchProgress::default()
        };
        self.progress.set(0, Raw(progress), 0)?;

        let mut output = vec![0; self.frame.len() + ROOM];
        // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, self.frame.len() as u32, 0, self.ingress, 0, 0].map(u32::to_ne_bytes);
        let harness: &Xdp = self
            .ebpf
            .program("harness")
            .context("the object has no harness")?
            .try_into()?;
        let switches = involuntary_switches()?;
        let result = harness
            .test_run(TestRunOptions {
                data_in: Some(&self.frame),
                data_out: Some(&mut output),
                ctx_in: Some(context.as_flattened()),
                repeat: run.total(),
                ..TestRunOptions::default()
            })
            .context("the test run failed")?;
        let switches = involuntary_switches()? - switches;
        output.truncate(result.data_size_out as usize);

        let Raw(progress) = self.progress.get(&0, 0)?;
        if progress.packets != u64::from(run.total()) {
            bail!("{} of {} packets were run", progress.packets, run.total());
        }
        Ok(Ran {
            nanoseconds: nanoseconds(&progress, result.duration, switches),
            verdict: result.return_value,
            output,
            flow: progress.flow,
        })
    }

    fn check(&mut self, packet: &Packet) -> Result<()> {
        for flow in [0, 77_777, u32::MAX - 1] {
            // Two packets: the second is what the harness makes of the first.
            let ran = self.run(
                None,
                Run {
                    lead: 0,
                    packets: 2,
                    flow: flow.into(),
                    flows_end: u64::MAX,
                },
            )?;
            let mut expected = packet.frame(flow + 1)?;
            expected.resize(self.frame.len(), 0);
            ensure!(
                ran.output == expected,
                "the harness sets up a wrong frame for flow {}: {:02x?} and not {expected:02x?}",
                flow + 1,
                ran.output
            );
        }
        Ok(())
    }
}

/// The program's own clock is fine but runs on while the thread does not; the kernel's figure for all packets leaves
/// that out, but is cut to whole nanoseconds.
fn nanoseconds(progress: &BenchProgress, by_kernel: Duration, switches: i64) -> f64 {
    let timed = progress.last - progress.first_timed;
    if switches == 0 && timed > 0 {
        (progress.stopped - progress.started) as f64 / timed as f64
    } else {
        by_kernel.as_nanos() as f64 + 0.5
    }
}

fn involuntary_switches() -> Result<i64> {
    Ok(getrusage(UsageWho::RUSAGE_THREAD)?.involuntary_context_switches())
}

/// A program that is pinned.
///
/// # Errors
/// There is none.
pub fn pinned(path: &Path) -> Result<Program> {
    let program = ProgramInfo::from_pin(path).and_then(|info| info.fd());
    program.with_context(|| format!("{} was not opened", path.display()))
}

/// The object of the measurements, for a program of it under test.
pub fn object() -> Result<Ebpf> {
    Ebpf::load(OBJECT).context("the maps of the floor were not made")
}

/// Loads a program of the object.
pub fn load(ebpf: &mut Ebpf, name: &str) -> Result<Program> {
    let failed = || format!("the program {name} was not loaded");
    let program: &mut Xdp = ebpf.program_mut(name).with_context(failed)?.try_into()?;
    program.load().with_context(failed)?;
    program.fd()?.try_clone().with_context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_figure_counts_where_the_thread_was_stopped() {
        let progress = BenchProgress {
            first_timed: 10,
            last: 1010,
            started: 5_000,
            stopped: 45_200,
            ..BenchProgress::default()
        };
        let figure = |switches| nanoseconds(&progress, Duration::from_nanos(38), switches);
        assert!((figure(0) - 40.2).abs() < 1e-9);
        assert!((figure(1) - 38.5).abs() < 1e-9);
    }
}
