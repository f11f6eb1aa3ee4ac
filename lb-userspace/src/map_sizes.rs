//! How much the maps are made for where the configuration leaves it to us.

use lb_common::abi::{DEFAULT_BACKENDS, DEFAULT_SERVICES, MAX_BACKENDS, MAX_SERVICES};
use nix::sys::sysinfo::sysinfo;

use crate::{
    config::Config,
    datapath::{Sizes, kernel::flow_table_memory},
};

/// The part of the machine's memory that the flow table may take: it is allocated at once and whole.
const MEMORY_DIVISOR: u64 = 128;
const SMALLEST: u32 = 16_384;
const LARGEST: u32 = 1 << 20;

/// The sizes of new maps for a configuration.
pub fn of(config: &Config) -> Sizes {
    let backends = config.services.iter().map(|service| service.backends.len()).sum();
    Sizes {
        flows: config.flow_table.size.unwrap_or_else(|| {
            let memory = sysinfo().map(|info| info.ram_total()).unwrap_or(0);
            flows_for_memory(memory)
        }),
        services: (config.limits.services)
            .unwrap_or_else(|| with_room(config.services.len(), DEFAULT_SERVICES, MAX_SERVICES)),
        backends: (config.limits.backends)
            .unwrap_or_else(|| with_room(backends, DEFAULT_BACKENDS, MAX_BACKENDS)),
    }
}

/// The next power of two from twice as many on, within bounds: what leaves needs room beside what comes.
fn with_room(configured: usize, smallest: u32, largest: u32) -> u32 {
    let doubled = u32::try_from(configured).unwrap_or(u32::MAX).saturating_mul(2);
    doubled
        .checked_next_power_of_two()
        .unwrap_or(largest)
        .clamp(smallest, largest)
}

/// The largest power of two that fits into its part of `memory` bytes, within bounds.
fn flows_for_memory(memory: u64) -> u32 {
    let mut flows = SMALLEST;
    while flows < LARGEST && flow_table_memory(flows * 2) <= memory / MEMORY_DIVISOR {
        flows *= 2;
    }
    flows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Limits,
        model::fixture::{backend, model, service},
    };

    #[test]
    fn the_flow_table_grows_with_the_machine_within_bounds() {
        assert_eq!(flows_for_memory(0), SMALLEST);
        assert_eq!(flows_for_memory(64 << 20), 16_384);
        assert_eq!(flows_for_memory(1 << 30), 262_144);
        assert_eq!(flows_for_memory(4 << 30), LARGEST);
        assert_eq!(flows_for_memory(1 << 50), LARGEST);
    }

    #[test]
    fn there_is_room_for_twice_of_what_is_configured_within_bounds() {
        let sized = |configured| with_room(configured, 1024, 16_383);
        assert_eq!(
            [0, 512, 513, 1000, 4096, 4097, 10_000, usize::MAX].map(sized),
            [1024, 1024, 2048, 2048, 8192, 16_383, 16_383, 16_383]
        );
    }

    #[test]
    fn what_the_configuration_says_is_taken() {
        let mut config = model(vec![service("web", 10, &[80], vec![backend("a", 11, 80)])]).config;
        let sizes = of(&config);
        assert_eq!((sizes.services, sizes.backends), (1024, 16_384));
        config.limits = Limits {
            services: Some(1),
            backends: Some(100_000),
        };
        config.flow_table.size = Some(2048);
        let sizes = of(&config);
        assert_eq!((sizes.services, sizes.backends, sizes.flows), (1, 100_000, 2048));
    }
}
