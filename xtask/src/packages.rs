//! Debian packages: installed where one is missing, or only unpacked where the machine need not change.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::process;

const BACKPORTS: &str = "bookworm-backports";

/// Installs packages; each comes with the reason, which is shown.
///
/// # Errors
/// No right to install, or apt failed.
pub(crate) fn install(packages: &[(&str, &str)]) -> Result<()> {
    for (package, reason) in packages {
        eprintln!("installing the Debian package {package}: {reason}");
    }
    process::require_root("installing Debian packages")?;
    let names: Vec<&str> = packages.iter().map(|(name, _)| *name).collect();
    let tell = |error: &anyhow::Error| {
        eprintln!("  {}", error.to_string().lines().next().unwrap_or_default());
    };
    let Err(error) = install_now(&[], &names) else {
        return Ok(());
    };
    tell(&error);
    // The lists are empty in a container's image, and old ones name packages that the mirror no longer has.
    process::run_quietly(
        "apt-get update: the package lists are missing or old",
        process::as_root("apt-get").args(["-q", "update"]),
    )?;
    let Err(error) = install_now(&[], &names) else {
        return Ok(());
    };
    tell(&error);
    // What the machine has of the backports may not go with what is older: qemu-utils with qemu-system-x86.
    let Ok(lists) = private_lists() else {
        return Err(error);
    };
    install_now(
        &[&lists[..], &["-t".to_owned(), BACKPORTS.to_owned()]].concat(),
        &names,
    )
}

fn install_now(options: &[String], names: &[&str]) -> Result<()> {
    let servers = ["nginx", "haproxy"];
    let new = servers.map(|name| (name, process::find_program(name).is_none()));
    process::run_quietly(
        &format!("apt-get install {}", names.join(" ")),
        process::as_root("env")
            .args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"])
            .args(options)
            // Nothing of the user's is removed to make room for ours.
            .args([
                "--no-remove",
                "--no-install-recommends",
                "-o",
                "Dpkg::Use-Pty=0",
                "install",
            ])
            .args(names),
    )?;
    for (name, is_new) in new {
        if is_new && process::find_program(name).is_some() {
            stop(name)?;
        }
    }
    Ok(())
}

/// Debian starts a server when it installs it; tests and measurements start their own.
fn stop(server: &str) -> Result<()> {
    if Path::new("/run/systemd/system").exists() {
        return process::run_quietly(
            &format!("{server}: stopped and not started at boot, the tests start their own"),
            process::as_root("systemctl").args(["disable", "--now", server]),
        );
    }
    process::run_quietly(
        &format!("{server}: stopped, the tests start their own"),
        process::as_root(format!("/etc/init.d/{server}")).arg("stop"),
    )
}

/// Downloads the newest package whose name matches, and unpacks it into `into` without installing it.
///
/// # Errors
/// No such package in any suite of the release, or the mirror failed.
pub(crate) fn unpack(pattern: &NamePattern, into: &Path) -> Result<String> {
    let downloads = process::target_dir().join("vm/download");
    fs::remove_dir_all(&downloads).ok();
    fs::create_dir_all(&downloads)?;
    // First with the machine's own lists; then with lists of our own, which need no root and have all suites.
    let name = match download(&[], pattern, &downloads) {
        Ok(name) => name,
        Err(_) => download(&private_lists()?, pattern, &downloads)?,
    };
    let archive = fs::read_dir(&downloads)?
        .next()
        .with_context(|| format!("apt-get downloaded no file for {name}"))??
        .path();
    fs::create_dir_all(into)?;
    process::output(Command::new("dpkg").arg("-x").arg(&archive).arg(into))?;
    fs::remove_dir_all(&downloads).ok();
    Ok(name)
}

/// Names that begin and end so, with a version between; the largest version is the newest.
#[derive(Debug, Clone)]
pub(crate) struct NamePattern {
    pub(crate) start: String,
    pub(crate) end: &'static str,
}

impl NamePattern {
    fn newest<'a>(&self, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
        names
            .filter(|name| name.starts_with(&self.start) && name.ends_with(self.end))
            .filter(|name| name.len() >= self.start.len() + self.end.len())
            .max_by_key(|name| numbers(name))
    }
}

fn numbers(name: &str) -> Vec<u64> {
    name.split(|character: char| !character.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

fn download(options: &[String], pattern: &NamePattern, folder: &Path) -> Result<String> {
    let names = process::output(
        Command::new("apt-cache")
            .args(options)
            .args(["pkgnames", &pattern.start]),
    )?;
    let name = pattern.newest(names.lines()).with_context(|| {
        format!(
            "no package {}*{} in the package lists",
            pattern.start, pattern.end
        )
    })?;
    process::run_quietly(
        &format!("apt-get download {name}"),
        Command::new("apt-get")
            .args(options)
            .args(["-q", "-o", "APT::Sandbox::User=", "download", name])
            .current_dir(folder),
    )?;
    Ok(name.to_owned())
}

/// Options that make apt use lists under `target/vm/apt`: all suites of bookworm, from the machine's own mirror.
fn private_lists() -> Result<Vec<String>> {
    let root = process::target_dir().join("vm/apt");
    for folder in ["lists/partial", "cache/archives/partial", "sources.d"] {
        fs::create_dir_all(root.join(folder))?;
    }
    let mirrors = process::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE)",
        "Created-By: Packages",
    ]))
    .unwrap_or_default();
    let sources = bookworm_sources(&mirrors)
        .context("apt has no source of Debian packages, so there is no mirror to ask for the kernels")?;
    fs::write(root.join("sources.list"), sources)?;
    let path = |name: &str| root.join(name).display().to_string();
    let options: Vec<String> = [
        format!("Dir::Etc::sourcelist={}", path("sources.list")),
        format!("Dir::Etc::sourceparts={}", path("sources.d")),
        format!("Dir::State::lists={}", path("lists")),
        format!("Dir::Cache={}", path("cache")),
    ]
    .into_iter()
    .flat_map(|option| ["-o".to_owned(), option])
    .collect();
    process::run_quietly(
        "apt-get update with lists of our own: the machine's do not have what is needed",
        Command::new("apt-get")
            .args(&options)
            .args(["-q", "-o", "APT::Sandbox::User=", "update"]),
    )?;
    Ok(options)
}

/// A sources.list from lines of `URI SUITE`, as the machine has them; nothing where none of them is Debian's.
fn bookworm_sources(mirrors: &str) -> Option<String> {
    let uri_of = |security: bool| {
        mirrors.lines().find_map(|line| {
            let (uri, suite) = line.split_once(' ')?;
            let debian = ["bookworm", "trixie", "bullseye"]
                .iter()
                .any(|name| suite.starts_with(name));
            (debian && suite.ends_with("-security") == security).then(|| uri.trim_end_matches('/').to_owned())
        })
    };
    let main = uri_of(false)?;
    let security = uri_of(true).unwrap_or_else(|| format!("{main}-security"));
    let keyring = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]";
    Some(format!(
        "deb {keyring} {main} bookworm main\n\
         deb {keyring} {main} bookworm-updates main\n\
         deb {keyring} {security} bookworm-security main\n\
         deb {keyring} {main} {BACKPORTS} main\n"
    ))
}

/// The static busybox: unpacked only, since installed it would displace another busybox.
///
/// # Errors
/// It could not be downloaded.
pub(crate) fn busybox() -> Result<PathBuf> {
    let folder = process::target_dir().join("vm/busybox");
    let program = folder.join("bin/busybox");
    if !program.exists() {
        unpack(
            &NamePattern {
                start: "busybox-static".to_owned(),
                end: "",
            },
            &folder,
        )
        .context("busybox, the virtual machine's shell, was not fetched")?;
    }
    if !program.exists() {
        bail!("the package busybox-static has no {}", program.display());
    }
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_the_one_with_the_largest_numbers() {
        let pattern = NamePattern {
            start: "linux-image-6.12.".to_owned(),
            end: "-cloud-amd64",
        };
        let names = [
            "linux-image-6.12.9+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-amd64",
            "linux-image-6.12-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
        ];
        assert_eq!(
            pattern.newest(names.into_iter()),
            Some("linux-image-6.12.117+deb12-cloud-amd64")
        );
    }

    #[test]
    fn private_lists_keep_the_mirror_of_the_machine() {
        let sources = bookworm_sources(
            "http://mirror.example/debian/ bookworm\nhttp://mirror.example/sec/ bookworm-security",
        )
        .unwrap();
        assert!(sources.contains("http://mirror.example/debian bookworm-backports main"));
        assert!(sources.contains("http://mirror.example/sec bookworm-security main"));
    }

    #[test]
    fn without_a_debian_mirror_there_are_no_private_lists() {
        assert_eq!(bookworm_sources("https://packages.example/ other"), None);
    }

    #[test]
    fn the_security_mirror_is_beside_the_main_one_unless_the_machine_knows_better() {
        let sources = bookworm_sources("http://mirror.example/debian bookworm").unwrap();
        assert!(sources.contains("http://mirror.example/debian-security bookworm-security main"));
    }
}
