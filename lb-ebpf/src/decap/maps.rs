//! Every map. All but the counters are written by `xlb decap` and read here.

use aya_ebpf::{
    btf_maps::{HashMap, LpmTrie, PerCpuArray, lpm_trie::Key},
    macros::btf_map,
};
use lb_common::{
    abi::{
        Address, Count, DECAP_REASON_COUNT, DecapReason, MAX_DECAP_OWN_ADDRESSES, MAX_DECAP_SOURCES,
        MAX_DECAP_VIPS,
    },
    logic::encapsulation::Known,
};

/// Addresses of the host; the values mean nothing, as those of [`VIPS`].
#[btf_map]
static OWN_ADDRESSES: HashMap<Address, u32, { MAX_DECAP_OWN_ADDRESSES as usize }> = HashMap::new();

/// VIPs to unwrap for.
#[btf_map]
static VIPS: HashMap<Address, u32, { MAX_DECAP_VIPS as usize }> = HashMap::new();

/// By prefix of outer sources: 1 where their packets may be unwrapped, 0 where not.
#[btf_map]
static SOURCES: LpmTrie<Address, u32, { MAX_DECAP_SOURCES as usize }> = LpmTrie::new();

/// By reason. Written here.
#[btf_map]
static COUNTERS: PerCpuArray<Count, { DECAP_REASON_COUNT as usize }> = PerCpuArray::new();

/// What the maps say.
pub struct Maps;

impl Known for Maps {
    #[inline(always)]
    fn is_own(&self, address: &Address) -> bool {
        OWN_ADDRESSES.get_ptr(address.by_words()).is_some()
    }

    #[inline(always)]
    fn is_source(&self, address: &Address) -> bool {
        SOURCES
            .get(&Key::new(128, address.by_words()))
            .is_some_and(|allowed| *allowed != 0)
    }

    #[inline(always)]
    fn is_vip(&self, address: &Address) -> bool {
        VIPS.get_ptr(address.by_words()).is_some()
    }
}

/// Counts one packet.
#[inline(always)]
pub fn count(reason: DecapReason, bytes: u64) {
    if let Some(count) = COUNTERS.get_ptr_mut(reason.index()) {
        // SAFETY: the entry is this CPU's own and the program is not interrupted by itself.
        let count = unsafe { &mut *count };
        count.packets += 1;
        count.bytes += bytes;
    }
}
