//! What the pinned maps of an instance hold, read beside its daemon.

use aya::maps::{Array, Map, MapData, MapError};
use lb_common::abi::{Bucket, FlowKey};
use xlb::datapath::{
    Contents, Datapath, Flow, Pins, Sizes,
    kernel::{KernelDatapath, Raw},
};

/// What the daemon governs.
///
/// # Panics
/// When there are no maps, or they cannot be read.
pub fn contents(pins: &Pins) -> Contents {
    open(pins).read().expect("reading the maps")
}

/// Backend ids by slot, as the program finds them for a service.
///
/// # Panics
/// When there are no maps, or the service has no pool.
pub fn by_slot(pins: &Pins, service: u32) -> Vec<u32> {
    let slots = open(pins).by_slot(service).expect("reading the slots");
    slots.expect("the service has a pool")
}

/// All flows.
///
/// # Panics
/// When there are no maps, or they cannot be read.
pub fn flows(pins: &Pins) -> Vec<(FlowKey, Flow)> {
    let mut flows = Vec::new();
    open(pins)
        .flows(&mut |key, flow| flows.push((*key, *flow)))
        .expect("reading the flow table");
    flows
}

/// How many units of the flow table are taken, by flows or what leads to them.
///
/// # Panics
/// When there are no maps, or they cannot be read.
pub fn units_in_use(pins: &Pins) -> usize {
    let data = MapData::from_pin(pins.map("FLOWS")).expect("opening FLOWS");
    let buckets: Array<MapData, Raw<Bucket>> = Array::try_from(Map::Array(data)).expect("FLOWS is an array");
    let in_use = |bucket: Result<Raw<Bucket>, MapError>| {
        let Raw(Bucket(words)) = bucket.expect("reading FLOWS");
        let metas = words.chunks(2).map(|unit| unit[1]);
        metas.filter(|meta| *meta != 0).count()
    };
    buckets.iter().map(in_use).sum()
}

fn open(pins: &Pins) -> KernelDatapath {
    assert!(pins.exist(), "the instance has no maps");
    // The sizes are those of the maps that exist.
    KernelDatapath::open(pins.clone(), Sizes::default()).expect("opening the maps")
}
