//! Later fragments follow the first, which alone has the ports (RFC 791 section 3.2, RFC 8200 section 4.5).

use aya_ebpf::bindings::BPF_ANY;
use lb_common::abi::{FragmentKey, FragmentPorts};

use crate::{flow::now, maps::FRAGMENTS, scratch::Scratch};

/// For how long fragments are expected after their first: as long as Linux waits for them (`ipfrag_time`).
const TIMEOUT: u64 = 30_000_000_000;

/// Notes the ports of a packet whose first fragment this is.
#[inline(always)]
pub fn remember(scratch: &mut Scratch) {
    scratch.fragment_key = key(scratch);
    scratch.fragment_ports = FragmentPorts {
        seen: now(),
        source_port: scratch.packet.key.source_port,
        destination_port: scratch.packet.key.destination_port,
        _pad: 0,
    };
    // Where it fails, later fragments are counted as unknown.
    let _ = FRAGMENTS.insert(&scratch.fragment_key, &scratch.fragment_ports, BPF_ANY as u64);
}

/// Gives a later fragment the ports of its first; nothing where that has not been seen.
#[inline(always)]
pub fn follow(scratch: &mut Scratch) -> Option<()> {
    scratch.fragment_key = key(scratch);
    let ports = FRAGMENTS.get_ptr(&scratch.fragment_key)?;
    // SAFETY: an entry may be recycled under its reader: ports of another packet lead to another flow or none, as a
    // forged fragment could.
    let ports = unsafe { &*ports };
    if now().saturating_sub(ports.seen) > TIMEOUT {
        return None;
    }
    scratch.packet.key.source_port = ports.source_port;
    scratch.packet.key.destination_port = ports.destination_port;
    Some(())
}

#[inline(always)]
fn key(scratch: &Scratch) -> FragmentKey {
    let packet = &scratch.packet;
    FragmentKey {
        source: packet.key.source.by_words(),
        destination: packet.key.destination.by_words(),
        identification: packet.identification,
        protocol: packet.key.protocol,
    }
}
