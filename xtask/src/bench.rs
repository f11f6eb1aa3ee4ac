//! `cargo xtask bench`: what xlb costs. The measuring is the crate `bench`, which this builds and runs with the `xlb`
//! that users get; it needs the toolchain of the eBPF object, which xtask installs and so must not need itself.

use std::{ffi::OsString, process::ExitCode};

use anyhow::{Context, Result};

use crate::{build, process, setup};

// Help and options are those of the program, whatever they will be.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// See `cargo xtask bench --help`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    options: Vec<OsString>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.options.iter().any(|option| option == "--end-to-end") {
        setup::comparison()?;
    } else {
        setup::run(setup::Scope::Build)?;
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
