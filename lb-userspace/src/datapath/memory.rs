//! The maps as plain collections, as strict as the kernel or stricter; for tests and for trying out a plan.

use std::{collections::BTreeMap, io};

use lb_common::{
    abi::{
        Address, FILTER_ALLOW, FILTER_DENY, FlowKey, LiveCount, MAX_MEMBERS, MAX_SERVICE_KEYS,
        MAX_SOURCE_FILTERS, SettingsFlags,
    },
    logic::hash::siphash13,
};

use super::{Contents, Counters, Datapath, DatapathError, Flow, Operation, Position, Sizes};

/// A data path without a kernel.
#[derive(Clone, Debug, Default)]
pub struct MemoryDatapath {
    /// Change it to play somebody else who changes the maps.
    pub contents: Contents,
    pub sizes: Sizes,
    /// The flow table, by the client's 5-tuple.
    pub flows: BTreeMap<FlowKey, Flow>,
    /// What is the time.
    pub now: u64,
    /// Counts of flows by backend id; change them to play the program.
    pub live: BTreeMap<u32, LiveCount>,
}

/// Parts that the flow table is visited in, as the kernel visits its buckets.
const BUCKETS: u32 = 8;

fn bucket_of(key: &FlowKey) -> u32 {
    let Address([.., address]) = key.source;
    (siphash13([0, 0], [u64::from(address), u64::from(key.source_port)]) % u64::from(BUCKETS)) as u32
}

/// The part of the table at a position, and the position of the next.
fn step(position: Option<Position>) -> (u32, Option<Position>) {
    let bucket = position.map_or(0, |Position(bucket)| bucket);
    let next = bucket.saturating_add(1);
    (bucket, (next < BUCKETS).then_some(Position(next)))
}

impl Datapath for MemoryDatapath {
    fn read(&self) -> Result<Contents, DatapathError> {
        Ok(self.contents.clone())
    }

    fn apply(&mut self, operation: &Operation) -> Result<(), DatapathError> {
        self.check(operation)?;
        self.contents.record(operation);
        Ok(())
    }

    fn some_flows(
        &self,
        position: Option<Position>,
        visit: &mut dyn FnMut(&FlowKey, &Flow),
    ) -> Result<Option<Position>, DatapathError> {
        let (bucket, next) = step(position);
        (self.flows.iter())
            .filter(|(key, _)| bucket_of(key) == bucket)
            .for_each(|(key, flow)| visit(key, flow));
        Ok(next)
    }

    fn remove_flows(&mut self, keys: &[FlowKey], unless_seen_since: u64) -> Result<u64, DatapathError> {
        let mut removed = 0;
        for key in keys {
            let is_due = |flow: &&Flow| flow.last_seen < unless_seen_since || unless_seen_since == u64::MAX;
            let Some(flow) = self.flows.get(key).filter(is_due).copied() else {
                continue;
            };
            self.flows.remove(key);
            removed += 1;
            if flow.is_live() {
                self.adjust_live(flow.backend, -1)?;
            }
        }
        Ok(removed)
    }

    /// Nothing is left behind here.
    fn tidy_flows(&mut self, position: Option<Position>) -> Result<Option<Position>, DatapathError> {
        let (bucket, next) = step(position);
        if self.contents.settings.flags & SettingsFlags::AGELESS != 0 {
            (self.flows.iter_mut())
                .filter(|(key, _)| bucket_of(key) == bucket)
                .for_each(|(_, flow)| flow.last_seen = self.now);
        }
        Ok(next)
    }

    fn live_counts(&self, backends: &[u32]) -> Result<Vec<LiveCount>, DatapathError> {
        let of = |id: &u32| self.live.get(id).copied().unwrap_or_default();
        Ok(backends.iter().map(of).collect())
    }

    fn adjust_live(&mut self, backend: u32, by: i64) -> Result<(), DatapathError> {
        let live = self.live.entry(backend).or_default();
        let count = if by < 0 { &mut live.ended } else { &mut live.opened };
        *count = count.wrapping_add(by.unsigned_abs());
        Ok(())
    }

    /// No packet passes here.
    fn counters(&self, _services: &[u32], _backends: &[u32]) -> Result<Counters, DatapathError> {
        Ok(Counters::default())
    }
}

impl MemoryDatapath {
    /// Refuses what the kernel refuses: keys beyond an array, more entries than a hash holds, values of another
    /// size, and removing what is not there.
    fn check(&self, operation: &Operation) -> Result<(), DatapathError> {
        let contents = &self.contents;
        let Sizes {
            services, backends, ..
        } = self.sizes;
        match operation {
            Operation::PutSettings(_) => Ok(()),
            Operation::PutAddress(key, _) => {
                check_room(&contents.addresses, key, services + backends, "addresses")
            }
            Operation::PutServiceKey(key, id) => {
                check_index(*id, services, "service-keys")?;
                check_room(&contents.service_keys, key, MAX_SERVICE_KEYS, "service-keys")
            }
            Operation::PutService(id, _) => check_index(*id, services, "services"),
            Operation::PutPool(id, pool) if pool.members.len() > MAX_MEMBERS as usize => {
                Err(refusal("update", format!("pools [{id}]"), libc::EINVAL))
            }
            Operation::PutPool(id, _) => check_index(*id, services, "pools"),
            Operation::PutBackend(0, _) => Err(refusal("update", "backends [0]".to_owned(), libc::EINVAL)),
            Operation::PutBackend(id, _) => check_index(*id, backends + 1, "backends"),
            Operation::RemoveAddress(key) => check_present(&contents.addresses, key, "addresses"),
            Operation::RemoveServiceKey(key) => check_present(&contents.service_keys, key, "service-keys"),
            Operation::RemoveService(id) => check_present(&contents.services, id, "services"),
            Operation::RemovePool(id) => check_present(&contents.pools, id, "pools"),
            Operation::RemoveBackend(id) => check_present(&contents.backends, id, "backends"),
            Operation::PutFilter(key, length, value) => {
                if *length > 160 || ![FILTER_ALLOW, FILTER_DENY].contains(value) {
                    return Err(refusal(
                        "update",
                        format!("source-filters [{key:?}]"),
                        libc::EINVAL,
                    ));
                }
                check_index(key.service, services, "source-filters")?;
                let limit = MAX_SOURCE_FILTERS;
                check_room(
                    &contents.source_filters,
                    &(*key, *length),
                    limit,
                    "source-filters",
                )
            }
            Operation::RemoveFilter(key, length) => {
                check_present(&contents.source_filters, &(*key, *length), "source-filters")
            }
        }
    }
}

fn check_index(index: u32, limit: u32, map: &str) -> Result<(), DatapathError> {
    if index < limit {
        Ok(())
    } else {
        Err(refusal("update", format!("{map} [{index}]"), libc::E2BIG))
    }
}

fn check_room<K: Ord + std::fmt::Debug, V>(
    entries: &BTreeMap<K, V>,
    key: &K,
    limit: u32,
    map: &str,
) -> Result<(), DatapathError> {
    if entries.len() < limit as usize || entries.contains_key(key) {
        Ok(())
    } else {
        Err(refusal("update", format!("{map} [{key:?}]"), libc::E2BIG))
    }
}

fn check_present<K: Ord + std::fmt::Debug, V>(
    entries: &BTreeMap<K, V>,
    key: &K,
    map: &str,
) -> Result<(), DatapathError> {
    if entries.contains_key(key) {
        Ok(())
    } else {
        Err(refusal("delete", format!("{map} [{key:?}]"), libc::ENOENT))
    }
}

fn refusal(operation: &'static str, object: String, errno: i32) -> DatapathError {
    DatapathError {
        operation,
        object,
        source: io::Error::from_raw_os_error(errno),
    }
}

#[cfg(test)]
mod tests {
    use lb_common::abi::{Backend, DEFAULT_BACKENDS, DEFAULT_SERVICES};

    use super::*;
    use crate::datapath::Pool;

    fn errno(result: Result<(), DatapathError>) -> Option<i32> {
        result.err().and_then(|error| error.source.raw_os_error())
    }

    #[test]
    fn removing_what_is_absent_is_refused() {
        let mut datapath = MemoryDatapath::default();
        for operation in [
            Operation::RemoveAddress(Address::default()),
            Operation::RemoveBackend(1),
            Operation::RemovePool(0),
            Operation::RemoveService(0),
            Operation::RemoveServiceKey(Default::default()),
            Operation::RemoveFilter(Default::default(), 32),
        ] {
            assert_eq!(
                errno(datapath.apply(&operation)),
                Some(libc::ENOENT),
                "{operation:?}"
            );
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut datapath = MemoryDatapath::default();
        let backend = Backend::default();
        assert_eq!(
            errno(datapath.apply(&Operation::PutBackend(0, backend))),
            Some(libc::EINVAL)
        );
        assert_eq!(
            errno(datapath.apply(&Operation::PutBackend(DEFAULT_BACKENDS + 1, backend))),
            Some(libc::E2BIG)
        );
        assert_eq!(
            errno(datapath.apply(&Operation::PutBackend(DEFAULT_BACKENDS, backend))),
            None
        );
        assert_eq!(
            errno(datapath.apply(&Operation::PutService(DEFAULT_SERVICES, Default::default()))),
            Some(libc::E2BIG)
        );
        assert_eq!(
            errno(datapath.apply(&Operation::PutPool(
                0,
                Pool::of(vec![1; MAX_MEMBERS as usize + 1])
            ))),
            Some(libc::EINVAL)
        );
        let room = DEFAULT_SERVICES + DEFAULT_BACKENDS;
        for number in 0..room {
            let operation = Operation::PutAddress(Address([number, 0, 0, 0]), 1);
            assert_eq!(errno(datapath.apply(&operation)), None);
        }
        let known = Operation::PutAddress(Address([0; 4]), 2);
        assert_eq!(errno(datapath.apply(&known)), None);
        let one_more = Operation::PutAddress(Address([room, 0, 0, 0]), 1);
        assert_eq!(errno(datapath.apply(&one_more)), Some(libc::E2BIG));
    }

    #[test]
    fn a_flow_seen_since_is_not_removed() {
        let mut datapath = MemoryDatapath::default();
        let key = FlowKey::default();
        datapath.flows.insert(
            key,
            Flow {
                last_seen: 11,
                ..Flow::default()
            },
        );
        assert_eq!(datapath.remove_flows(&[key], 11).unwrap(), 0);
        assert_eq!(datapath.remove_flows(&[key, key], 12).unwrap(), 1);
        assert!(datapath.flows.is_empty());
    }
}
