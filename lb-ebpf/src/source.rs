//! Which sources may start new flows, and how many.

use aya_ebpf::{bindings::BPF_ANY, btf_maps::lpm_trie::Key};
use lb_common::{
    abi::{FILTER_ALLOW, FilterKey, FlowKey, Reason, Service, ServiceFlags, SourceKey, SourceRate},
    logic::source_rate,
};

use crate::maps::{SOURCE_FILTERS, SOURCES};

/// Bits of a service id and an address: the whole of a filter's key.
const WHOLE: u32 = 32 + 128;

/// Tells why a source may start no new flow of a service.
///
/// # Errors
/// [`Reason::SourceDenied`], [`Reason::SourceRate`].
#[inline(always)]
pub fn admit(service: &Service, service_id: u32, key: &FlowKey, now: u64) -> Result<(), Reason> {
    if service.flags & ServiceFlags::HAS_FILTERS != 0 && !is_allowed(service, service_id, key) {
        return Err(Reason::SourceDenied);
    }
    if service.new_flow_rate != 0 && !take_token(service, service_id, key, now) {
        return Err(Reason::SourceRate);
    }
    Ok(())
}

#[inline(always)]
fn is_allowed(service: &Service, service_id: u32, key: &FlowKey) -> bool {
    let key = Key::new(
        WHOLE,
        FilterKey {
            service: service_id,
            address: key.source.by_words(),
        },
    );
    match SOURCE_FILTERS.get(&key) {
        Some(filter) => *filter == FILTER_ALLOW,
        None => service.flags & ServiceFlags::DENIES_OTHERS == 0,
    }
}

/// Takes one new flow from what the source's prefix may start. CPUs that meet may both take the same one: the cap is
/// one for order, not for accounts.
#[inline(always)]
fn take_token(service: &Service, service_id: u32, key: &FlowKey, now: u64) -> bool {
    let source = SourceKey {
        service: service_id,
        prefix: source_rate::prefix(service, &key.source),
    };
    if let Some(rate) = SOURCES.get_ptr_mut(&source) {
        // SAFETY: an entry may be recycled under its reader, which at worst miscounts one flow.
        return source_rate::take(unsafe { &mut *rate }, service, now);
    }
    let mut rate = SourceRate {
        filled: now,
        tokens: source_rate::full(service),
    };
    source_rate::take(&mut rate, service, now);
    let _ = SOURCES.insert(&source, &rate, BPF_ANY as u64);
    true
}
