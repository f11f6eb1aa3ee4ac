//! `cargo xtask bench`: what xlb costs. The measuring is the crate `bench`, which this builds and runs with the `xlb`
//! that users get; it needs the toolchain of the eBPF object, which xtask installs and so must not need itself.

use std::{ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};

use crate::{
    build,
    kernel::Kernel,
    process, setup,
    vm::{self, Machine},
};

/// The kernel of the virtual machine.
const KERNEL: &str = "6.12";
/// What other balancers need of it.
const MODULES: &[&str] = &["nft_chain_nat", "nft_nat", "nft_numgen", "ip_vs", "ip_vs_mh"];
/// Requests on emulated processors, unless others are asked for.
const REQUESTS: &str = "2000";
/// For the default of rounds.
const LIMIT: Duration = Duration::from_secs(2 * 60 * 60);

// Help and options are those of the program, whatever they will be.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// See `cargo xtask bench --help`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    options: Vec<OsString>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let has = |name: &str| arguments.options.iter().any(|option| option == name);
    let is_in_vm = has("--vm");
    if has("--end-to-end") {
        setup::comparison(is_in_vm)?;
    } else {
        ensure!(!is_in_vm, "--vm is for --end-to-end");
        setup::run(setup::Scope::Build)?;
    }
    if is_in_vm {
        build::build_static(&["xlb-bench", vm::INIT])?;
        return in_vm(&arguments.options);
    }
    process::require_root("loading programs and making network namespaces")?;
    build::build_static(&["xlb-bench"])?;
    let status = process::as_root(build::static_binary("xlb-bench"))
        .arg("--xlb")
        .arg(build::static_binary("xlb"))
        .args(&arguments.options)
        .status()
        .context("the measuring did not start")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn in_vm(options: &[OsString]) -> Result<ExitCode> {
    let is_given = |name: &str| options.iter().any(|option| option == name);
    // Its output and its messages come by the same wire.
    ensure!(!is_given("--json"), "a virtual machine prints no JSON");
    let mut program: Vec<OsString> = ["/bin/xlb-bench", "--xlb", "/bin/xlb"].map(Into::into).into();
    program.extend(options.iter().filter(|option| *option != "--vm").cloned());
    if !is_given("--requests") {
        program.extend(["--requests", REQUESTS].map(Into::into));
    }
    let mut files = setup::comparison_files()?;
    files.push((build::static_binary("xlb-bench"), PathBuf::from("bin/xlb-bench")));
    let code = vm::boot(&Machine {
        kernel: &Kernel::get(KERNEL)?,
        program,
        files,
        modules: MODULES,
        environment: Vec::new(),
        terminal: false,
        keyboard: false,
        limit: Some(LIMIT),
    })?;
    Ok(ExitCode::from(code))
}
