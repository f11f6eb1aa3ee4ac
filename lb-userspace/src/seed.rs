//! The key of the hash: a file, so that the nodes that serve the same VIPs can share it.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Why there is no seed.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    #[error("reading the seed file {} failed", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("making the seed file {} failed; `hash.seed-file` names another place", path.display())]
    Make { path: PathBuf, source: io::Error },
    #[error(
        "the seed file {} does not hold 32 hexadecimal digits: copy it from another node, or remove it and a new one is made",
        path.display()
    )]
    Malformed { path: PathBuf },
}

/// Reads the seed, or makes one when the file is missing.
///
/// # Errors
/// The file cannot be read or made, or it holds something else.
pub fn load_or_make(path: &Path) -> Result<[u64; 2], SeedError> {
    match fs::read_to_string(path) {
        Ok(text) => parse(text.trim()).ok_or_else(|| SeedError::Malformed {
            path: path.to_owned(),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make(path).map_err(|source| SeedError::Make {
                path: path.to_owned(),
                source,
            })
        }
        Err(source) => Err(SeedError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

fn parse(text: &str) -> Option<[u64; 2]> {
    if text.len() != 32 || !text.is_ascii() {
        return None;
    }
    let half = |digits: &str| u64::from_str_radix(digits, 16).ok();
    Some([half(&text[..16])?, half(&text[16..])?])
}

fn make(path: &Path) -> io::Result<[u64; 2]> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let (high, low) = bytes.split_at(8);
    let word = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0, |word: u64, byte| word << 8 | u64::from(*byte))
    };
    let seed = [word(high), word(low)];
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    // Whole or not at all: another node's copy is put in place the same way.
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    writeln!(file, "{:016x}{:016x}", seed[0], seed[1])?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    Ok(seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_seed_is_made_once_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deeper/seed");
        let made = load_or_make(&path).unwrap();
        assert_ne!(made, [0, 0]);
        assert_eq!(load_or_make(&path).unwrap(), made);
    }

    #[test]
    fn a_seed_of_another_form_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seed");
        for text in [
            "",
            "12",
            "zz345678901234567890123456789012",
            "é34567890123456789012345678901",
        ] {
            fs::write(&path, text).unwrap();
            assert!(
                matches!(load_or_make(&path), Err(SeedError::Malformed { .. })),
                "{text}"
            );
        }
    }
}
