//! What the pinned maps of an instance hold, read beside its daemon.

use aya::maps::{HashMap, Map, MapData};
use lb_common::abi::{Flow, FlowKey};
use xlb::datapath::{
    Contents, Datapath, Pins,
    kernel::{KernelDatapath, Raw},
};

/// What the daemon governs.
///
/// # Panics
/// When there are no maps, or they cannot be read.
pub fn contents(pins: &Pins) -> Contents {
    open(pins).read().expect("reading the maps")
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

/// How many entries lead from replies to flows.
///
/// # Panics
/// When there are no maps, or they cannot be read.
pub fn replies(pins: &Pins) -> usize {
    let data = MapData::from_pin(pins.map("REPLIES")).expect("opening REPLIES");
    let replies: HashMap<MapData, Raw<FlowKey>, Raw<FlowKey>> =
        HashMap::try_from(Map::LruHashMap(data)).expect("REPLIES is a hash");
    replies.keys().filter(Result::is_ok).count()
}

fn open(pins: &Pins) -> KernelDatapath {
    assert!(pins.exist(), "the instance has no maps");
    // The size is that of the maps that exist.
    KernelDatapath::open(pins.clone(), 1024).expect("opening the maps")
}
