//! Which operations lead from one state of the maps to another, and in which order; pure.

use std::collections::BTreeMap;

use lb_common::abi::{Settings, SettingsFlags};

use crate::datapath::{Contents, Operation};

/// Lists the operations that make `desired` of `actual`: none if they are equal.
///
/// What is referred to comes before what refers to it and goes after it: settings, addresses, backends, source filters,
/// pools, services, keys; then removals the other way round. A packet meets a whole state at any point in
/// between.
pub fn plan(actual: &Contents, desired: &Contents) -> Vec<Operation> {
    let mut operations = Vec::new();
    let is_ageless = |settings: &Settings| settings.flags & SettingsFlags::AGELESS != 0;
    if is_ageless(&desired.settings) && !is_ageless(&actual.settings) {
        // Before there are other ticks, by which flows that live would be over.
        operations.push(Operation::PutSettings(Settings {
            flags: actual.settings.flags | SettingsFlags::AGELESS,
            ..actual.settings
        }));
    }
    // Services of all ports are looked for from before the first until after the last of their keys.
    let widened_settings = Settings {
        flags: actual.settings.flags | desired.settings.flags,
        ..desired.settings
    };
    if actual.settings != widened_settings {
        operations.push(Operation::PutSettings(widened_settings));
    }
    // An address loses a role only after what needed it is gone.
    let widened = (desired.addresses.iter())
        .map(|(address, roles)| (*address, roles | actual.addresses.get(address).unwrap_or(&0)))
        .collect();
    operations.extend(changed(&actual.addresses, &widened).map(|(k, v)| Operation::PutAddress(*k, *v)));
    operations
        .extend(changed(&actual.backends, &desired.backends).map(|(k, v)| Operation::PutBackend(*k, *v)));
    operations.extend(
        changed(&actual.source_filters, &desired.source_filters)
            .map(|((key, length), v)| Operation::PutFilter(*key, *length, *v)),
    );
    operations.extend(changed(&actual.pools, &desired.pools).map(|(k, v)| Operation::PutPool(*k, v.clone())));
    operations
        .extend(changed(&actual.services, &desired.services).map(|(k, v)| Operation::PutService(*k, *v)));
    operations.extend(
        changed(&actual.service_keys, &desired.service_keys).map(|(k, v)| Operation::PutServiceKey(*k, *v)),
    );

    operations.extend(
        gone(&actual.service_keys, &desired.service_keys).map(|key| Operation::RemoveServiceKey(*key)),
    );
    if widened_settings != desired.settings {
        operations.push(Operation::PutSettings(desired.settings));
    }
    operations.extend(gone(&actual.services, &desired.services).map(|id| Operation::RemoveService(*id)));
    operations.extend(
        gone(&actual.source_filters, &desired.source_filters)
            .map(|(key, length)| Operation::RemoveFilter(*key, *length)),
    );
    operations.extend(gone(&actual.pools, &desired.pools).map(|id| Operation::RemovePool(*id)));
    operations.extend(gone(&actual.backends, &desired.backends).map(|id| Operation::RemoveBackend(*id)));
    operations.extend(changed(&widened, &desired.addresses).map(|(k, v)| Operation::PutAddress(*k, *v)));
    operations.extend(
        gone(&actual.addresses, &desired.addresses).map(|address| Operation::RemoveAddress(*address)),
    );
    operations
}

/// Entries of `desired` that are not so in `actual`.
fn changed<'a, K: Ord, V: PartialEq>(
    actual: &'a BTreeMap<K, V>,
    desired: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    desired
        .iter()
        .filter(|(key, value)| actual.get(key) != Some(value))
}

/// Keys of `actual` that are not in `desired`.
fn gone<'a, K: Ord, V>(
    actual: &'a BTreeMap<K, V>,
    desired: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = &'a K> {
    actual.keys().filter(|key| !desired.contains_key(key))
}
