//! Whose certificates probe `https` believes: read with the configuration, so that a reload reads them anew.

use std::{
    fs::OpenOptions,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::Arc,
};

use nix::libc::O_NONBLOCK;
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem, pem::PemObject},
};

/// Bytes of a file with certificates; those of all public authorities together are a quarter of a megabyte.
const LONGEST_FILE: u64 = 4 * 1024 * 1024;

/// Which certificates of a server are believed.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Any: nothing is verified.
    Anybody,
    /// Those that one of these authorities has issued.
    Authorities(Arc<RootCertStore>),
}

impl Trust {
    /// Trusts the authorities in a PEM file and no others.
    ///
    /// # Errors
    /// The file cannot be read, holds no certificate, or one that is damaged.
    pub fn in_file(path: &Path) -> Result<Self, TrustError> {
        let mut authorities = RootCertStore::empty();
        for (index, certificate) in CertificateDer::pem_slice_iter(&read(path)?).enumerate() {
            authorities
                .add(certificate?)
                .map_err(|source| TrustError::Unusable {
                    number: index + 1,
                    source,
                })?;
        }
        if authorities.is_empty() {
            return Err(TrustError::Empty);
        }
        Ok(Self::Authorities(Arc::new(authorities)))
    }

    /// Trusts the authorities that this system trusts; `None` where it has none.
    ///
    /// Single certificates that cannot be read are left out, as other programs on the system do.
    pub fn of_system() -> Option<Self> {
        let mut authorities = RootCertStore::empty();
        authorities.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        (!authorities.is_empty()).then(|| Self::Authorities(Arc::new(authorities)))
    }
}

impl PartialEq for Trust {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Anybody, Self::Anybody) => true,
            (Self::Authorities(one), Self::Authorities(other)) => {
                Arc::ptr_eq(one, other) || one.roots == other.roots
            }
            _ => false,
        }
    }
}

impl Eq for Trust {}

/// Why a file gives no authorities.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    #[error("cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    #[error("is damaged: {0}")]
    Damaged(#[from] pem::Error),
    #[error("holds no certificate")]
    Empty,
    #[error("has a certificate that cannot be used, number {number}: {source}")]
    Unusable { number: usize, source: rustls::Error },
}

/// The file's contents; a pipe or a device, which may never end, is refused.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    if file.take(LONGEST_FILE + 1).read_to_end(&mut bytes)? as u64 > LONGEST_FILE {
        return Err(io::Error::other(format!("longer than {LONGEST_FILE} bytes")));
    }
    Ok(bytes)
}
