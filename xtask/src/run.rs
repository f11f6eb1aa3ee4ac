//! `cargo xtask run`: the demo, or a shell, in a virtual machine.

use std::{io::IsTerminal, process::ExitCode, time::Duration};

use anyhow::{Result, ensure};

use crate::{
    build,
    kernel::Kernel,
    setup,
    vm::{self, Machine},
};

/// What booting and building the demo's namespaces may take beyond the demo's own time, on emulated processors.
const MARGIN: Duration = Duration::from_secs(300);

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The kernel release, of which Debian's newest is booted
    #[arg(long, default_value = "6.12")]
    kernel: String,
    /// How long the demo drives traffic
    #[arg(long, default_value_t = 30, conflicts_with = "shell")]
    seconds: u32,
    /// A prompt in the machine instead of the demo; `exit` ends it
    #[arg(long)]
    shell: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    ensure!(
        !arguments.shell || std::io::stdin().is_terminal(),
        "a shell needs a terminal on its standard input"
    );
    setup::run(setup::Scope::Vm)?;
    build::build_static(&[vm::INIT])?;
    let seconds = arguments.seconds.to_string();
    let program: Vec<_> = if arguments.shell {
        // setsid gives the shell its terminal, and so Ctrl-C to what runs in it.
        ["/bin/setsid", "-c", "/bin/bash", "-l"].map(Into::into).into()
    } else {
        ["/bin/xlb", "demo", "--seconds", &seconds].map(Into::into).into()
    };
    let code = vm::boot(&Machine {
        kernel: &Kernel::get(&arguments.kernel)?,
        program,
        files: Vec::new(),
        modules: &[],
        environment: Vec::new(),
        terminal: std::io::stdout().is_terminal(),
        keyboard: arguments.shell,
        limit: (!arguments.shell).then(|| Duration::from_secs(arguments.seconds.into()) + MARGIN),
    })?;
    Ok(ExitCode::from(code))
}
