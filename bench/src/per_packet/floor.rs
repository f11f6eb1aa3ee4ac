//! The floor program with its service.

use std::fmt;

use anyhow::{Context, Result};
use aya::{Ebpf, maps::HashMap};
use lb_common::abi::{Address, ServiceKey, TCP};
use xlb::datapath::kernel::Raw;

use super::harness::{self, Program};
use crate::balancer::configuration::{Family, Forward, PORT};

/// A floor whose flow table is empty.
pub struct Floor {
    /// Holds the maps.
    _ebpf: Ebpf,
    pub program: Program,
}

impl fmt::Debug for Floor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Floor").finish_non_exhaustive()
    }
}

impl Floor {
    /// Loads it, with the service that packets of IPv4 to `ipip` are for.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn new() -> Result<Self> {
        let mut ebpf = harness::object()?;
        let program = harness::load(&mut ebpf, "floor")?;
        let map = ebpf
            .map_mut("FLOOR_SERVICES")
            .context("the object has no services of the floor")?;
        let mut services: HashMap<_, Raw<ServiceKey>, u64> = map.try_into()?;
        let key = ServiceKey {
            vip: Address::from(Forward::Ipip.vip(Family::V4)),
            port: PORT.to_be(),
            protocol: TCP,
            _pad: 0,
        };
        services.insert(Raw(key), 1, 0)?;
        Ok(Self { _ebpf: ebpf, program })
    }
}
