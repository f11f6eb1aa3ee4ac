//! The program's own log records, which debug builds alone compile in.

use std::io;

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::unix::AsyncFd;

use super::DatapathError;

/// Passes the program's records on to the log until the runtime ends.
///
/// # Errors
/// The object has no records, or their ring cannot be polled.
pub(super) fn start(ebpf: &mut Ebpf) -> Result<(), DatapathError> {
    let failed = |source| DatapathError::new("read", "AYA_LOGS", source);
    let logger = EbpfLogger::init(ebpf).map_err(|error| failed(io::Error::other(error)))?;
    // SAFETY: the logger owns its descriptor and gives the same one for as long as it lives, here in the task.
    let registered = unsafe { AsyncFd::register(logger) };
    let mut logger = registered.map_err(|error| failed(error.into()))?;
    tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
    Ok(())
}
