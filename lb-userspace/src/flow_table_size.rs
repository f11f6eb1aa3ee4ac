//! How many flows the table has room for when the configuration leaves it to us.

use nix::sys::sysinfo::sysinfo;

use crate::datapath::kernel::flow_table_memory;

/// The part of the machine's memory that the table may take: it is allocated at once and whole.
const MEMORY_DIVISOR: u64 = 128;
const SMALLEST: u32 = 16_384;
const LARGEST: u32 = 1 << 20;

/// Flows for the memory of this machine.
pub fn automatic() -> u32 {
    let memory = sysinfo().map(|info| info.ram_total()).unwrap_or(0);
    for_memory(memory)
}

/// The largest power of two that fits into its part of `memory` bytes, within bounds.
fn for_memory(memory: u64) -> u32 {
    let mut flows = SMALLEST;
    while flows < LARGEST && flow_table_memory(flows * 2) <= memory / MEMORY_DIVISOR {
        flows *= 2;
    }
    flows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_grows_with_the_machine_within_bounds() {
        assert_eq!(for_memory(0), SMALLEST);
        assert_eq!(for_memory(64 << 20), 16_384);
        assert_eq!(for_memory(1 << 30), 262_144);
        assert_eq!(for_memory(4 << 30), LARGEST);
        assert_eq!(for_memory(1 << 50), LARGEST);
    }
}
