//! `cargo xtask tidy`: the rules of the code that no compiler checks.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::process;

/// Parts of `lb-userspace/src` that are pure: what they need is an argument.
const PURE: &[&str] = &["model", "compile", "reconcile/plan", "health/state"];
/// What a pure part may not name: the clock, chance, sockets, files, processes, and the runtime.
const IMPURE: &[&str] = &[
    "Instant::now",
    "SystemTime::now",
    "rand",
    "tokio",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "UnixListener",
    "std::fs",
    "std::process",
];
/// Names that say nothing of what is in the file.
const EMPTY_NAMES: &[&str] = &["utils", "util", "helpers", "helper", "v2", "common", "misc"];

/// # Errors
/// The rules are broken: each place is printed.
pub(crate) fn run() -> Result<()> {
    let workspace = process::workspace();
    let mut findings = Vec::new();
    for folder in [
        "lb-common/src",
        "lb-ebpf/src",
        "lb-userspace/src",
        "tests",
        "xtask/src",
        "fuzz",
    ] {
        for path in rust_files(&workspace.join(folder))? {
            let name = path.strip_prefix(workspace).unwrap_or(&path);
            let text =
                fs::read_to_string(&path).with_context(|| format!("{} was not read", path.display()))?;
            check_file(name, &text, &mut findings);
        }
    }
    let architecture = workspace.join("ARCHITECTURE.md");
    if architecture.exists() {
        let text = fs::read_to_string(&architecture)?;
        for path in code_map(&text) {
            if !workspace.join(&path).exists() {
                findings.push(format!(
                    "ARCHITECTURE.md: the code map names {path}, which is not there"
                ));
            }
        }
    }
    for finding in &findings {
        println!("{finding}");
    }
    if !findings.is_empty() {
        bail!("{} rules are broken", findings.len());
    }
    Ok(())
}

fn check_file(path: &Path, text: &str, findings: &mut Vec<String>) {
    for part in path.components() {
        let part = part.as_os_str().to_string_lossy();
        if EMPTY_NAMES.contains(&part.trim_end_matches(".rs")) {
            findings.push(format!(
                "{}: name it by what is in it, not {part}",
                path.display()
            ));
        }
    }
    let Ok(inside) = path.strip_prefix("lb-userspace/src") else {
        return;
    };
    let pure = PURE
        .iter()
        .any(|part| inside.starts_with(part) || inside.with_extension("") == Path::new(part));
    let pure = pure && !inside.ends_with("tests.rs");
    let has_kernel = inside.starts_with("datapath");
    for (index, line) in text.lines().enumerate() {
        // The tests of a file are at its end, and may do what they like.
        if line.trim() == "#[cfg(test)]" {
            return;
        }
        let code = line.split("//").next().unwrap_or(line);
        let place = format!("{}:{}", path.display(), index + 1);
        if !has_kernel && ["aya", "aya_log", "aya_obj"].iter().any(|name| names(code, name)) {
            findings.push(format!(
                "{place}: only datapath/ speaks to the kernel through aya"
            ));
        }
        if pure {
            for word in IMPURE.iter().filter(|word| names(code, word)) {
                findings.push(format!("{place}: {word} in a part without clock, chance or I/O"));
            }
        }
    }
}

/// Whether `code` has `word` not as a part of a longer identifier.
fn names(code: &str, word: &str) -> bool {
    let part = |character: Option<char>| character.is_some_and(|c| c.is_alphanumeric() || c == '_');
    code.match_indices(word).any(|(start, _)| {
        !part(code[..start].chars().next_back()) && !part(code[start + word.len()..].chars().next())
    })
}

fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else {
        return Ok(files);
    };
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            if !path.ends_with("target") {
                files.extend(rust_files(&path)?);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The paths in the first block of code under the heading `Code map`: a line is `NAMES  explanation`, its
/// indentation says in which folder, and `forward/{nat,dsr}.rs` is two names.
fn code_map(text: &str) -> Vec<String> {
    let block = text
        .lines()
        .skip_while(|line| !(line.starts_with('#') && line.to_lowercase().contains("code map")))
        .skip_while(|line| !line.starts_with("```"))
        .skip(1)
        .take_while(|line| !line.starts_with("```"));
    let mut folders: Vec<(usize, String)> = Vec::new();
    let mut paths = Vec::new();
    for line in block {
        let entry = line.trim_start();
        let indent = line.len() - entry.len();
        folders.retain(|(depth, _)| *depth < indent);
        let parent = folders
            .last()
            .map(|(_, folder)| folder.clone())
            .unwrap_or_default();
        let all_names = entry.split("  ").next().unwrap_or(entry);
        for name in all_names
            .split([' ', '→'])
            .filter(|name| name.contains(['.', '/']))
            .flat_map(expand)
        {
            let path = format!("{parent}{name}");
            if name.ends_with('/') {
                folders.push((indent, path.clone()));
            }
            paths.push(path);
        }
    }
    paths
}

fn expand(name: &str) -> Vec<String> {
    let parts = name
        .split_once('{')
        .and_then(|(start, rest)| rest.split_once('}').map(|(choices, end)| (start, choices, end)));
    match parts {
        None => vec![name.to_owned()],
        Some((start, choices, end)) => choices
            .split(',')
            .map(|choice| format!("{start}{choice}{end}"))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> Vec<String> {
        let mut findings = Vec::new();
        check_file(Path::new(path), text, &mut findings);
        findings
    }

    #[test]
    fn only_the_datapath_may_name_aya() {
        let text = "use aya::Ebpf;\n";
        assert_eq!(findings("lb-userspace/src/api/mod.rs", text).len(), 1);
        assert!(findings("lb-userspace/src/datapath/kernel.rs", text).is_empty());
        assert!(findings("lb-userspace/src/api/mod.rs", "// aya does it\nlet ayah = 1;\n").is_empty());
    }

    #[test]
    fn pure_parts_have_no_clock() {
        let text = "let now = Instant::now();\n";
        assert_eq!(findings("lb-userspace/src/health/state.rs", text).len(), 1);
        assert_eq!(findings("lb-userspace/src/compile/maglev.rs", text).len(), 1);
        assert!(findings("lb-userspace/src/health/driver.rs", text).is_empty());
    }

    #[test]
    fn tests_of_a_pure_part_may_use_a_clock() {
        let text = "#[cfg(test)]\nmod tests { fn f() { Instant::now(); } }\n";
        assert!(findings("lb-userspace/src/model/mod.rs", text).is_empty());
        assert!(findings("lb-userspace/src/compile/maglev/tests.rs", "Instant::now();\n").is_empty());
    }

    #[test]
    fn file_names_say_what_is_inside() {
        assert_eq!(findings("xtask/src/utils.rs", "").len(), 1);
        assert_eq!(findings("lb-userspace/src/v2/mod.rs", "").len(), 1);
    }

    #[test]
    fn the_code_map_is_read_with_folders_and_choices() {
        let text = "# Code map\n\n```\na/src/    the first\n  b/        inside\n    c.rs → d/{e,f}.rs  in order\n  g.rs\n```\n";
        assert_eq!(
            code_map(text),
            [
                "a/src/",
                "a/src/b/",
                "a/src/b/c.rs",
                "a/src/b/d/e.rs",
                "a/src/b/d/f.rs",
                "a/src/g.rs"
            ]
        );
    }
}
