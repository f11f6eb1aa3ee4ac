//! What clients connect to, and which service that is: the buckets of the flow table with services in them. A lookup is a look
//! at one cache line, however many services there are.

use super::flow_table::{
    self, Found, Words, bucket_of, key_at, line_of, make_room, meta_at, other_line, place_worth, put,
    put_long, second_bucket_of, worth,
};
use crate::abi::{Address, Kind, LINE, Meta, SERVICE_BUCKETS, ServiceKey, UNITS};

/// A bucket, and the line of it in which a key is looked for first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub bucket: u32,
    pub line: usize,
}

/// Hash of a key; operators choose them, so that it needs no secret.
#[inline(always)]
fn hash(key: &ServiceKey) -> u64 {
    let [a, b, c, d] = &key.vip.0;
    let high = if key.vip.is_v4() {
        0
    } else {
        (*a as u64) << 32 | (*b ^ c.rotate_left(7)) as u64
    };
    let low = (*d as u64) << 32 | (key.port as u64) << 8 | key.protocol as u64;
    // The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    let hash = low ^ high.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ hash >> 31
}

/// Where a key is, in the first or the second of two rounds.
#[inline(always)]
pub fn place(key: &ServiceKey, round: u32) -> Place {
    let hash = hash(key);
    let bucket = if round == 0 {
        bucket_of(hash, SERVICE_BUCKETS)
    } else {
        second_bucket_of(hash, SERVICE_BUCKETS)
    };
    Place {
        bucket,
        line: line_of(hash),
    }
}

/// The words that stand for a key: for IPv4 all of it, for IPv6 all but the address. Never 0.
#[inline(always)]
fn words_of(key: &ServiceKey) -> (Kind, u64) {
    let rest = (key.port as u64) << 32 | (key.protocol as u64) << 48 | 1 << 56;
    if key.vip.is_v4() {
        (Kind::Short, rest | key.vip.v4_word() as u64)
    } else {
        (Kind::Long, rest)
    }
}

/// The service of a key, in one line of a bucket.
#[inline(always)]
pub fn in_line<W: Words>(words: &W, line: usize, key: &ServiceKey) -> Option<u32> {
    let (kind, want) = words_of(key);
    let first = (line & LINE) / 2;
    let mut step = 0;
    while step < 4 {
        let found = if matches!(kind, Kind::Short) {
            flow_table::at(words, first + step, Kind::Short, want, u64::MAX)
        } else if step % 2 == 0 {
            flow_table::long_at(words, first + step, &key.vip, want, u64::MAX)
        } else {
            None
        };
        if let Some(found) = found {
            return Some(found.meta.service());
        }
        step += 1;
    }
    None
}

/// Tells whether keys of a bucket may be in their second one.
#[inline(always)]
pub fn overflows<W: Words>(words: &W) -> bool {
    flow_table::overflows(words, flow_table::BUCKET)
}

/// The service of a key in a whole table, given its buckets by index.
pub fn get<W: Words>(bucket: impl Fn(u32) -> W, key: &ServiceKey) -> Option<u32> {
    for round in 0..2 {
        let place = place(key, round);
        let words = bucket(place.bucket);
        let found = in_line(&words, place.line, key).or_else(|| in_line(&words, other_line(place.line), key));
        if found.is_some() || !overflows(&words) {
            return found;
        }
    }
    None
}

/// Puts a key into a table, or gives it another service; tells whether there was room.
pub fn insert<W: Words>(bucket: impl Fn(u32) -> W, key: &ServiceKey, service: u32) -> bool {
    if let Some((words, found)) = find(&bucket, key) {
        let (kind, _) = words_of(key);
        return flow_table::update(
            &words,
            &found,
            found.meta.replaced(Meta::new(kind, service, 0, 0)),
        );
    }
    put_where_there_is_room(&bucket, key, service) || {
        // Those that are in the way may have room in their second bucket; readers find them in one or in both.
        (0..2).any(|round| {
            let full = place(key, round).bucket;
            residents(&bucket(full)).any(|(resident, of)| {
                move_away(&bucket, full, &resident, of) && put_where_there_is_room(&bucket, key, service)
            })
        })
    }
}

fn put_where_there_is_room<W: Words>(bucket: &impl Fn(u32) -> W, key: &ServiceKey, service: u32) -> bool {
    (0..2).any(|round| {
        let place = place(key, round);
        let words = bucket(place.bucket);
        let has_put = put_into(&words, place.line, key, service);
        if !has_put {
            flow_table::mark_overflow(&words, flow_table::BUCKET);
        }
        has_put
    })
}

fn put_into<W: Words>(words: &W, line: usize, key: &ServiceKey, service: u32) -> bool {
    let (kind, word) = words_of(key);
    // What is there stays.
    let worth_at = |unit| place_worth(words, unit, kind, |_, _| worth::BUSY);
    let Some(room) = make_room(words, line, kind, worth::CLOSED, worth_at) else {
        return false;
    };
    let meta = Meta::new(kind, service, 0, 0);
    if matches!(kind, Kind::Long) {
        put_long(words, room.unit, word, &key.vip, meta);
    } else {
        put(words, room.unit, word, meta);
    }
    true
}

/// The keys in a bucket, and their services.
pub fn residents<W: Words>(words: &W) -> impl Iterator<Item = (ServiceKey, u32)> {
    let of = |unit: usize| {
        let (word, meta) = (words.load(key_at(unit)), Meta(words.load(meta_at(unit))));
        let vip = if meta.is(Kind::Long) {
            let found = flow_table::Found {
                unit,
                key: word,
                meta,
            };
            flow_table::client_of_long(words, &found)?
        } else if meta.is(Kind::Short) && !flow_table::is_address(words, unit) {
            Address::from_v4_word(word as u32)
        } else {
            return None;
        };
        let key = ServiceKey {
            vip,
            port: (word >> 32) as u16,
            protocol: (word >> 48) as u8,
            _pad: 0,
        };
        Some((key, meta.service()))
    };
    let residents: [_; UNITS] = core::array::from_fn(of);
    residents.into_iter().flatten()
}

/// Moves a key out of a full bucket into its second one, if that is another and has room. Never back into its first: a
/// reader looks there first, and could miss it in both.
fn move_away<W: Words>(bucket: &impl Fn(u32) -> W, full: u32, key: &ServiceKey, service: u32) -> bool {
    let [first, second] = [place(key, 0), place(key, 1)];
    if first.bucket != full || second.bucket == full {
        return false;
    }
    flow_table::mark_overflow(&bucket(full), flow_table::BUCKET);
    if !put_into(&bucket(second.bucket), second.line, key, service) {
        return false;
    }
    let words = bucket(full);
    find_in(&words, key).is_some_and(|found| flow_table::remove(&words, &found))
}

/// Removes a key from a table; tells whether it was there.
pub fn remove<W: Words>(bucket: impl Fn(u32) -> W, key: &ServiceKey) -> bool {
    find(&bucket, key).is_some_and(|(words, found)| flow_table::remove(&words, &found))
}

fn find<W: Words>(bucket: &impl Fn(u32) -> W, key: &ServiceKey) -> Option<(W, Found)> {
    (0..2).find_map(|round| {
        let words = bucket(place(key, round).bucket);
        find_in(&words, key).map(|found| (words, found))
    })
}

fn find_in<W: Words>(words: &W, key: &ServiceKey) -> Option<Found> {
    let (kind, want) = words_of(key);
    (0..UNITS).find_map(|unit| match kind {
        Kind::Long if unit % 2 == 1 => None,
        Kind::Long => flow_table::long_at(words, unit, &key.vip, want, u64::MAX),
        _ => flow_table::at(words, unit, kind, want, u64::MAX),
    })
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        sync::atomic::{AtomicU64, Ordering},
    };

    use proptest::prelude::*;

    use super::*;
    use crate::abi::{Address, WORDS};

    struct Table(Vec<[AtomicU64; WORDS]>);

    impl Table {
        fn new() -> Self {
            Self(
                (0..SERVICE_BUCKETS)
                    .map(|_| [const { AtomicU64::new(0) }; WORDS])
                    .collect(),
            )
        }

        fn bucket(&self, index: u32) -> InMemory<'_> {
            InMemory(&self.0[index as usize])
        }
    }

    struct InMemory<'a>(&'a [AtomicU64; WORDS]);

    impl Words for InMemory<'_> {
        fn load(&self, at: usize) -> u64 {
            self.0[at].load(Ordering::SeqCst)
        }

        fn store(&self, at: usize, value: u64) {
            self.0[at].store(value, Ordering::SeqCst);
        }

        fn swap(&self, at: usize, old: u64, new: u64) -> bool {
            let order = Ordering::SeqCst;
            self.0[at].compare_exchange(old, new, order, order).is_ok()
        }
    }

    fn key(number: u32, is_v4: bool) -> ServiceKey {
        let vip = if is_v4 {
            Address::from_v4_word((0x0a00_0000 + number / 3).to_be())
        } else {
            Address([0x20_01_u32.to_be(), 7, number / 50, (number / 3).to_be()])
        };
        ServiceKey {
            vip,
            port: (number % 3 * 4000) as u16,
            protocol: if number.is_multiple_of(2) { 6 } else { 17 },
            _pad: 0,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn a_table_is_a_map(operations in prop::collection::vec((0..400_u32, any::<bool>(), any::<bool>(), 0..9_u32), 1..2000)) {
            let table = Table::new();
            let mut model = BTreeMap::new();
            for (number, is_v4, puts, service) in operations {
                let key = key(number, is_v4);
                if puts {
                    prop_assert!(insert(|index| table.bucket(index), &key, service));
                    model.insert(key, service);
                } else {
                    prop_assert_eq!(remove(|index| table.bucket(index), &key), model.remove(&key).is_some());
                }
                prop_assert_eq!(get(|index| table.bucket(index), &key), model.get(&key).copied());
            }
            for number in 0..400 {
                for is_v4 in [true, false] {
                    let key = key(number, is_v4);
                    prop_assert_eq!(get(|index| table.bucket(index), &key), model.get(&key).copied());
                }
            }
        }
    }

    #[test]
    fn as_many_keys_fit_as_are_allowed_of_either_family() {
        for is_v4 in [true, false] {
            let table = Table::new();
            for number in 0..crate::abi::MAX_SERVICE_KEYS {
                assert!(
                    insert(|index| table.bucket(index), &key(number, is_v4), number % 1000),
                    "{number}"
                );
            }
            for number in 0..crate::abi::MAX_SERVICE_KEYS {
                assert_eq!(
                    get(|index| table.bucket(index), &key(number, is_v4)),
                    Some(number % 1000)
                );
            }
        }
    }
}
