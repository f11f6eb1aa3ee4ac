//! What the allocator keeps for later.

/// Gives back to the system what is free: to follow a large configuration takes several times as much memory as to have
/// followed it, and glibc keeps what lies between parts that are in use.
pub fn give_back() {
    // SAFETY: the function has no preconditions (malloc_trim(3)).
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}
