//! Debian's cloud kernels for the virtual machines: fetched once, unpacked under `target/vm/`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{
    packages::{self, NamePattern},
    process,
};

/// Loaded before the program runs; those that a kernel has built in are left out.
const MODULES: &[&str] = &[
    "veth",
    "virtio_pci",
    "virtio_net",
    "8021q",
    "bridge",
    "dummy",
    "ipip",
    "sch_ingress",
    "cls_bpf",
    "sch_netem",
    "tun",
    // Elsewhere the kernel has them loaded when they are needed.
    "tcp_diag",
];

#[derive(Debug)]
pub(crate) struct Kernel {
    folder: PathBuf,
    /// As `uname -r` says it.
    version: String,
}

impl Kernel {
    /// The releases on which `cargo xtask test` runs.
    pub(crate) const TESTED: [&'static str; 2] = ["6.1", "6.12"];

    /// The newest kernel of a release such as `6.1`, from the cache or from the mirror.
    ///
    /// # Errors
    /// The mirror has none, or it could not be unpacked.
    pub(crate) fn get(release: &str) -> Result<Self> {
        let cached = process::target_dir().join("vm/kernels").join(release);
        if !cached.exists() {
            let unfinished = cached.with_extension("unfinished");
            fs::remove_dir_all(&unfinished).ok();
            let pattern = NamePattern {
                start: format!("linux-image-{release}."),
                end: "-cloud-amd64",
            };
            packages::unpack(&pattern, &unfinished)
                .with_context(|| format!("no Debian cloud kernel {release} was fetched"))?;
            let version = only_entry(&unfinished.join("lib/modules"))?;
            let depmod = process::find_program("depmod").context("depmod is missing: `cargo xtask setup`")?;
            process::output(Command::new(depmod).arg("-b").arg(&unfinished).arg(&version))?;
            fs::rename(&unfinished, &cached)?;
        }
        let version = only_entry(&cached.join("lib/modules"))?;
        Ok(Self {
            folder: cached,
            version,
        })
    }

    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// The path of the bootable image.
    pub(crate) fn image(&self) -> PathBuf {
        self.folder.join("boot").join(format!("vmlinuz-{}", self.version))
    }

    /// The files of the modules that the tests need, and of `others`, each after those that it depends on.
    ///
    /// # Errors
    /// The kernel has one of them neither as a module nor built in.
    pub(crate) fn modules(&self, others: &[&str]) -> Result<Vec<PathBuf>> {
        let root = self.folder.join("lib/modules").join(&self.version);
        let dependencies = fs::read_to_string(root.join("modules.dep"))?;
        let built_in = fs::read_to_string(root.join("modules.builtin"))?;
        let names = load_order(&dependencies, &built_in, &[MODULES, others].concat())
            .with_context(|| format!("kernel {}", self.version))?;
        Ok(names.into_iter().map(|name| root.join(name)).collect())
    }
}

/// Orders `wanted` modules and what they depend on by the lines of `modules.dep`: each lists its dependencies
/// with those that load first at the end.
fn load_order<'a>(dependencies: &'a str, built_in: &str, wanted: &[&str]) -> Result<Vec<&'a str>> {
    let mut order: Vec<&str> = Vec::new();
    for name in wanted {
        let is_it = |path: &str| {
            let file = path.rsplit('/').next().unwrap_or(path);
            file.split(".ko")
                .next()
                .is_some_and(|stem| stem.replace('-', "_") == *name)
        };
        let found = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| is_it(path));
        let Some((path, needs)) = found else {
            anyhow::ensure!(built_in.lines().any(is_it), "there is no module {name}");
            continue;
        };
        for module in needs.split_whitespace().rev().chain([path]) {
            if !order.contains(&module) {
                order.push(module);
            }
        }
    }
    Ok(order)
}

fn only_entry(folder: &Path) -> Result<String> {
    let entry = fs::read_dir(folder)
        .with_context(|| format!("{} was not read", folder.display()))?
        .next()
        .with_context(|| format!("{} is empty", folder.display()))??;
    Ok(entry.file_name().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "net/ipip.ko.xz: net/tunnel4.ko.xz net/ip_tunnel.ko.xz\nnet/veth.ko.xz:\n\
        net/failover.ko.xz:\nnet/virtio_net.ko.xz: net/net_failover.ko.xz net/failover.ko.xz\n";

    #[test]
    fn modules_load_after_what_they_depend_on() {
        let order = load_order(DEPENDENCIES, "", &["virtio_net", "veth"]).unwrap();
        assert_eq!(
            order,
            [
                "net/failover.ko.xz",
                "net/net_failover.ko.xz",
                "net/virtio_net.ko.xz",
                "net/veth.ko.xz"
            ]
        );
    }

    #[test]
    fn a_module_built_into_the_kernel_is_not_loaded() {
        let order = load_order(DEPENDENCIES, "drivers/virtio-pci.ko\n", &["virtio_pci"]).unwrap();
        assert!(order.is_empty());
    }

    #[test]
    fn a_module_that_the_kernel_lacks_is_named() {
        let error = load_order(DEPENDENCIES, "", &["ip_vs"]).unwrap_err();
        assert!(error.to_string().contains("ip_vs"));
    }
}
