//! Buckets in the kernel's memory, which others read and write, too.

use core::{
    intrinsics::{AtomicOrdering, atomic_cxchg},
    ptr::{read_volatile, write_volatile},
};

use lb_common::{
    abi::{Bucket, WORDS},
    logic::flow_table::Words,
};

/// A bucket of a map.
#[derive(Clone, Copy)]
pub struct InKernel(pub *mut Bucket);

impl InKernel {
    #[inline(always)]
    fn word(&self, at: usize) -> *mut u64 {
        // SAFETY: the pointer is of a map's value, and the index is within it.
        unsafe { (&raw mut (*self.0).0).cast::<u64>().add(at & (WORDS - 1)) }
    }
}

impl Words for InKernel {
    #[inline(always)]
    fn load(&self, at: usize) -> u64 {
        // SAFETY: as in `word`; other CPUs and the daemon write whole words.
        unsafe { read_volatile(self.word(at)) }
    }

    #[inline(always)]
    fn store(&self, at: usize, value: u64) {
        // SAFETY: as in `load`. Stores stay in order on the architectures that there are builds for.
        unsafe { write_volatile(self.word(at), value) }
    }

    #[inline(always)]
    fn swap(&self, at: usize, old: u64, new: u64) -> bool {
        // SAFETY: as in `load`.
        unsafe {
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
                self.word(at),
                old,
                new,
            )
            .1
        }
    }
}
