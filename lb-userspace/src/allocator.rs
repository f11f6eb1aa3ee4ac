//! What the allocator keeps for later.

/// Has the allocator map what is large for itself, so that it is the system's again once it is free: glibc would raise the size
/// from which it does so to that of what was freed, up to 32 MiB. A slot table is not large: one after the other is made.
pub fn keep_little() {
    // SAFETY: there is no other thread yet, and the parameter takes any number (mallopt(3)).
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 256 << 10)
    };
}

/// Gives back to the system what is free: to follow a large configuration takes several times as much memory as to have
/// followed it, and glibc keeps what lies between parts that are in use.
pub fn give_back() {
    // SAFETY: the function has no preconditions (malloc_trim(3)).
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}
