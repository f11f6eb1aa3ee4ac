use core::{
    cell::{Cell, RefCell},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::AtomicBool,
    thread,
    time::{Duration, Instant},
    vec::Vec,
};

use proptest::prelude::*;

use super::*;
use crate::abi::{Forward, MAX_SERVICES, WORDS};

type Bucket = [AtomicU64; WORDS];

fn bucket() -> Bucket {
    [const { AtomicU64::new(0) }; WORDS]
}

/// A flow of a test, by its number; some have the address of another, and some the ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Id {
    Short(u32),
    Long(u32),
    Alias(u32),
}

impl Id {
    fn kind(self) -> Kind {
        match self {
            Self::Short(_) => Kind::Short,
            Self::Long(_) => Kind::Long,
            Self::Alias(_) => Kind::Alias,
        }
    }

    fn client(self) -> Address {
        let (Self::Short(number) | Self::Long(number) | Self::Alias(number)) = self;
        match self {
            Self::Long(_) => Address([0x0120, 7, 0, number % 5]),
            _ => Address::from_v4_word(number % 5 + 1),
        }
    }

    fn key(self) -> u64 {
        match self {
            Self::Short(number) => short_key(number % 5 + 1, 1000 + (number / 5) as u16, 80),
            Self::Long(number) => long_key(1000 + (number / 5) as u16, 80, 7000 + number as u16, 9),
            Self::Alias(number) => alias_key(number, number as usize, 7000 + number as u16, 8080),
        }
    }

    /// Different for each.
    fn meta(self) -> Meta {
        self.meta_of(3)
    }

    fn meta_of(self, service: u32) -> Meta {
        let (Self::Short(number) | Self::Long(number) | Self::Alias(number)) = self;
        Meta::new(self.kind(), service, 1 + number, Forward::Nat.number())
            .with_state(TcpState::SynSent)
            .with_link(1 + number)
    }

    fn find<W: Words>(self, words: &W) -> Option<Found> {
        (0..UNITS).find_map(|unit| match self {
            Self::Long(_) if unit % 2 == 1 => None,
            Self::Long(_) => long_at(words, unit, &self.client(), self.key(), u64::MAX),
            _ => at(words, unit, self.kind(), self.key(), u64::MAX),
        })
    }

    fn put<W: Words>(self, words: &W, line: usize, limit: u32) -> Option<Room> {
        self.put_as(words, line, limit, self.meta())
    }

    fn put_as<W: Words>(self, words: &W, line: usize, limit: u32, meta: Meta) -> Option<Room> {
        let room = make_room(words, line, self.kind(), limit, worth_at(words, self.kind()))?;
        self.write(words, room.unit, meta);
        Some(room)
    }

    /// Where there is nothing in the line, and else as [`Self::put`].
    fn begin<W: Words>(self, words: &W, line: usize, limit: u32) -> Option<Room> {
        self.begin_as(words, line, limit, self.meta())
    }

    fn begin_as<W: Words>(self, words: &W, line: usize, limit: u32, meta: Meta) -> Option<Room> {
        let Some(unit) = take_free(words, line, self.kind()) else {
            return self.put_as(words, line, limit, meta);
        };
        assert_eq!(unit / 4, line / LINE);
        self.write(words, unit, meta);
        Some(Room {
            unit,
            evicted: [Meta::EMPTY; 2],
        })
    }

    fn write<W: Words>(self, words: &W, unit: usize, meta: Meta) {
        if self.kind() == Kind::Long {
            put_long(words, unit, self.key(), &self.client(), meta);
        } else {
            put(words, unit, self.key(), meta);
        }
    }

    fn of(meta: Meta) -> Self {
        let number = meta.backend() - 1;
        if meta.is(Kind::Short) {
            Self::Short(number)
        } else if meta.is(Kind::Long) {
            Self::Long(number)
        } else {
            Self::Alias(number)
        }
    }
}

/// As [`worth`], of flows that are not idle.
fn worth_of(meta: Meta) -> u32 {
    worth(&settings(), meta, 0)
}

fn worth_at<W: Words>(words: &W, kind: Kind) -> impl Fn(usize) -> u32 {
    move |unit| place_worth(words, unit, kind, |_, meta| worth_of(meta))
}

fn settings() -> Settings {
    let mut settings = Settings {
        tcp_idle: 1 << 40,
        tcp_opening: 1 << 38,
        tcp_closing: 1 << 38,
        udp_idle: 1 << 38,
        ..Settings::default()
    };
    settings.tick_shifts = ageing::tick_shifts(&settings);
    settings
}

fn any_id() -> impl Strategy<Value = Id> {
    (0_u32..3, 0_u32..12).prop_map(|(kind, number)| match kind {
        0 => Id::Short(number),
        1 => Id::Long(number),
        _ => Id::Alias(number),
    })
}

#[derive(Clone, Debug)]
enum Step {
    Put(Id, bool, u32),
    Begin(Id, bool, u32),
    Update(Id, TcpState),
    Remove(Id),
}

fn any_step() -> impl Strategy<Value = Step> {
    let state = prop::sample::select(vec![
        TcpState::SynReceived,
        TcpState::Established,
        TcpState::FinClient,
        TcpState::Closed,
    ]);
    let limit = prop::sample::select(vec![worth::CLOSING, worth::OPEN + 1]);
    prop_oneof![
        2 => (any_id(), any::<bool>(), limit.clone()).prop_map(|(id, line, limit)| Step::Put(id, line, limit)),
        2 => (any_id(), any::<bool>(), limit).prop_map(|(id, line, limit)| Step::Begin(id, line, limit)),
        2 => (any_id(), state).prop_map(|(id, state)| Step::Update(id, state)),
        1 => any_id().prop_map(Step::Remove),
    ]
}

proptest! {
    #[test]
    fn a_bucket_does_as_a_plain_map(steps in prop::collection::vec(any_step(), 1..120)) {
        let words = bucket();
        let mut model: BTreeMap<Id, Meta> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Put(id, other, limit) | Step::Begin(id, other, limit) => {
                    if model.contains_key(&id) {
                        continue;
                    }
                    let units = |model: &BTreeMap<Id, Meta>| -> usize {
                        model.keys().map(|id| if id.kind() == Kind::Long { 2 } else { 1 }).sum()
                    };
                    let before = units(&model);
                    let line = if other { LINE } else { 0 };
                    let room = match step {
                        Step::Begin(..) => id.begin(&words, line, limit),
                        _ => id.put(&words, line, limit),
                    };
                    match room {
                        Some(room) => {
                            for evicted in room.evicted.into_iter().filter(|meta| !meta.is_empty()) {
                                prop_assert!(worth_of(evicted) < limit, "{evicted:?}");
                                prop_assert_eq!(model.remove(&Id::of(evicted)), Some(evicted));
                                // Nobody gives way where there is room for a single unit.
                                prop_assert!(before == UNITS || id.kind() == Kind::Long);
                            }
                            model.insert(id, id.meta());
                        }
                        None => {
                            prop_assert!(before == UNITS || id.kind() == Kind::Long);
                            let worthless = model.iter().any(|(other, meta)| {
                                worth_of(*meta) < limit && (id.kind() != Kind::Long || other.kind() == Kind::Long)
                            });
                            prop_assert!(!worthless, "one could have given way");
                        }
                    }
                }
                Step::Update(id, state) => {
                    let found = id.find(&words);
                    prop_assert_eq!(found.map(|found| found.meta), model.get(&id).copied());
                    if let Some(found) = found {
                        let meta = found.meta.with_state(state);
                        prop_assert!(update(&words, &found, meta));
                        prop_assert!(meta == found.meta || !update(&words, &found, meta), "only once");
                        prop_assert_eq!(again(&words, &found), Some(meta));
                        model.insert(id, meta);
                    }
                }
                Step::Remove(id) => {
                    let found = id.find(&words);
                    prop_assert_eq!(found.is_some(), model.remove(&id).is_some());
                    if let Some(found) = found {
                        prop_assert!(remove(&words, &found));
                        prop_assert!(!remove(&words, &found), "only once");
                        prop_assert_eq!(again(&words, &found), None);
                    }
                }
            }
            for number in 0..12 {
                for id in [Id::Short(number), Id::Long(number), Id::Alias(number)] {
                    let found = id.find(&words);
                    prop_assert_eq!(found.map(|found| found.meta), model.get(&id).copied(), "{:?}", id);
                    if let (Id::Long(_), Some(found)) = (id, found) {
                        prop_assert_eq!(client_of_long(&words, &found), Some(id.client()));
                    }
                }
            }
        }
    }

    #[test]
    fn both_ends_of_a_flow_and_all_parts_of_its_meta_are_kept(
        service in 0_u32..1024, backend in 0_u32..16_384, forward in 1_u8..7, state in 0_u8..7, age: u8, link in 0_u32..0x7fff, overflows: bool,
    ) {
        for kind in [Kind::Short, Kind::Long, Kind::Alias] {
            let meta = Meta::new(kind, service, backend, forward)
                .with_state(TcpState::from_number(state))
                .with_age(age)
                .with_link(link)
                .with_overflow(overflows);
            prop_assert_eq!((meta.service(), meta.backend(), meta.forward()), (service, backend, forward));
            prop_assert_eq!((meta.state() as u8, meta.age(), meta.link()), (state, age, link));
            prop_assert!(meta.is(kind) && !meta.is_busy() && !meta.is_empty());
            prop_assert!(!meta.is_left() && meta.left().is_left());
            prop_assert_eq!(meta.overflows(), overflows);
            // The mark is the bucket's: it stays, whatever comes and goes.
            for other in [meta.left(), meta.busy(kind), meta.emptied(), meta.replaced(Meta::EMPTY)] {
                prop_assert_eq!(other.overflows(), overflows);
            }
            prop_assert!(meta.is_of_same(meta.with_age(!age).with_state(TcpState::Closed).with_link(1)));
            let busy = meta.busy(kind);
            prop_assert!(!meta.is_of_same(busy) && busy.is(kind) && busy.is_busy());
        }
    }

    #[test]
    fn a_hash_is_of_a_bucket_of_the_table_and_of_one_of_its_lines(
        seed: [u64; 2], address: [u32; 4], port: u16, buckets in 1..=u32::MAX,
    ) {
        let hash = end_hash(seed, &Address(address), port, 6);
        prop_assert!(bucket_of(hash, buckets) < buckets);
        prop_assert!([0, LINE].contains(&line_of(hash)));
        prop_assert_ne!(hash, end_hash(seed, &Address(address), port, 17));
        prop_assert_ne!(hash, end_hash(seed, &Address(address), port ^ 1, 6));
    }
}

/// Where it is another, a new daemon finds no flow of those before: then `LAYOUT_VERSION` is another, too.
#[test]
fn the_hash_of_a_clients_end_is_that_of_this_layout() {
    let seed = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
    let of = |address| end_hash(seed, &address, 443_u16.to_be(), 6);
    let v4 = of(Address::from_v4_word(u32::from_ne_bytes([192, 0, 2, 1])));
    let v6 = of(Address([0x2001_0db8_u32.to_be(), 0, 0, 1_u32.to_be()]));
    assert_eq!(
        (crate::abi::LAYOUT_VERSION, v4, v6),
        (5, 0x8849_affe_f1b3_fca9, 0x3d01_8275_d3ad_ae11)
    );
}

/// Flows that are worth least first.
#[test]
fn what_is_over_gives_way_before_what_is_closed_opening_closing_and_open() {
    let settings = settings();
    let meta = |state| Meta::new(Kind::Short, 1, 1, 1).with_state(state);
    let ticks = |state, idle: u64| (meta(state), idle << settings.tick_shifts[1]);
    let confirmed = meta(TcpState::None).confirmed();
    let second = (1 << 30, 60 << 30);
    let order = [
        vec![
            worth(&settings, Meta::EMPTY, 0),
            worth(&settings, meta(TcpState::SynSent), 1 << 39),
            worth(&settings, meta(TcpState::Established), 1 << 41),
            worth(&settings, confirmed, 1 << 39),
        ],
        vec![
            worth(&settings, meta(TcpState::Closed), 0),
            worth(&settings, meta(TcpState::Established).left(), 0),
        ],
        [60, 30, 0]
            .into_iter()
            .map(|idle| {
                let (meta, now) = ticks(TcpState::SynSent, idle);
                worth(&settings, meta, now)
            })
            .collect(),
        vec![worth(&settings, meta(TcpState::FinClient), second.0)],
        vec![
            worth(&settings, meta(TcpState::Established), 1 << 39),
            worth(&settings, meta(TcpState::Established), 0),
        ],
        vec![worth(&settings, Meta::default().busy(Kind::Short), 0)],
    ];
    for pair in order.windows(2) {
        assert!(pair[0].iter().max() < pair[1].iter().min(), "{order:?}");
    }
    assert!(order[2].is_sorted() && order[4].is_sorted());
    // One datagram is no flow that goes on.
    assert_eq!(
        worth(&settings, meta(TcpState::None), 0),
        worth(&settings, meta(TcpState::SynSent), 0)
    );
    assert_eq!(
        worth(&settings, confirmed, 0),
        worth(&settings, meta(TcpState::Established), 0)
    );
}

#[test]
fn an_opening_flow_never_takes_the_place_of_an_open_one() {
    let words = bucket();
    for number in 0..8 {
        let id = Id::Short(number);
        id.put(&words, 0, worth::CLOSING).unwrap();
        let found = id.find(&words).unwrap();
        assert!(update(
            &words,
            &found,
            found.meta.with_state(TcpState::Established)
        ));
    }
    for id in [Id::Short(50), Id::Long(50), Id::Alias(50)] {
        assert_eq!(id.put(&words, 0, worth::CLOSING), None);
        assert_eq!(id.put(&words, LINE, worth::CLOSING), None);
    }
    assert!((0..8).all(|number| Id::Short(number).find(&words).is_some()));
    // One that is closing gives way to none that is opening either; one that is closed does.
    let found = Id::Short(3).find(&words).unwrap();
    assert!(update(
        &words,
        &found,
        found.meta.with_state(TcpState::FinBackend)
    ));
    assert_eq!(Id::Short(50).put(&words, 0, worth::CLOSING), None);
    let found = Id::Short(3).find(&words).unwrap();
    assert!(update(&words, &found, found.meta.with_state(TcpState::Closed)));
    let room = Id::Short(50).put(&words, 0, worth::CLOSING).unwrap();
    assert_eq!(Id::of(room.evicted[0]), Id::Short(3));
    // A long one needs two.
    assert_eq!(
        Id::Long(50)
            .put(&words, 0, worth::OPENING + 1)
            .map(|room| room.evicted),
        None
    );
}

/// Notes what is written.
struct Noting<'a>(&'a Bucket, RefCell<Vec<(usize, u64)>>);

impl Words for Noting<'_> {
    fn load(&self, at: usize) -> u64 {
        self.0.load(at)
    }

    fn store(&self, at: usize, value: u64) {
        self.0.store(at, value);
        self.1.borrow_mut().push((at, value));
    }

    fn swap(&self, at: usize, old: u64, new: u64) -> bool {
        let is_swapped = self.0.swap(at, old, new);
        if is_swapped {
            self.1.borrow_mut().push((at, new));
        }
        is_swapped
    }
}

/// Has others write at certain of the reader's steps.
struct Interfered<'a> {
    words: &'a Bucket,
    step: Cell<usize>,
    writes: Vec<(usize, &'a [(usize, u64)])>,
}

impl Words for Interfered<'_> {
    fn load(&self, at: usize) -> u64 {
        let step = self.step.replace(self.step.get() + 1);
        for (when, writes) in &self.writes {
            if *when == step {
                writes
                    .iter()
                    .for_each(|(at, value)| self.words.store(*at, *value));
            }
        }
        self.words.load(at)
    }

    fn store(&self, _: usize, _: u64) {}

    fn swap(&self, _: usize, _: u64, _: u64) -> bool {
        false
    }
}

/// Every way in which one replacement and a search fall into each other, on one CPU.
#[test]
fn who_searches_while_a_flow_gives_way_to_another_finds_one_of_them_whole_or_nothing() {
    let ids = [
        Id::Short(1),
        Id::Short(2),
        Id::Long(1),
        Id::Long(6),
        Id::Alias(1),
        Id::Alias(2),
    ];
    for before in ids {
        for after in ids.into_iter().filter(|after| *after != before) {
            let words = bucket();
            before.put(&words, 0, worth::BUSY).unwrap();
            let noting = Noting(&words, RefCell::default());
            assert!(remove(&noting, &before.find(&words).unwrap()));
            after.put(&noting, 0, worth::BUSY).unwrap();
            let writes = noting.1.into_inner();
            for wanted in [before, after] {
                for (first, then, halves) in (0..20).flat_map(|first| {
                    let later = (0..6).flat_map(move |later| (0..8).map(move |halves| (later, halves)));
                    later.map(move |(later, halves)| (first, first + later, halves))
                }) {
                    let words = bucket();
                    before.put(&words, 0, worth::BUSY).unwrap();
                    let (one, other) = writes.split_at(halves.min(writes.len()));
                    let interfered = Interfered {
                        words: &words,
                        step: Cell::new(0),
                        writes: vec![(first, one), (then, other)],
                    };
                    if let Some(found) = wanted.find(&interfered) {
                        let what = (before, after, wanted, first, then, halves);
                        assert_eq!((found.key, found.meta), (wanted.key(), wanted.meta()), "{what:?}");
                    }
                }
            }
        }
    }
}

/// Has another do something at one of the writer's steps.
struct Between<'a> {
    words: &'a Bucket,
    steps_before: Cell<usize>,
    other: RefCell<Option<Box<dyn FnOnce() + 'a>>>,
}

impl Between<'_> {
    fn step(&self) {
        if self.steps_before.get() == 0
            && let Some(other) = self.other.take()
        {
            other();
        }
        self.steps_before.set(self.steps_before.get().saturating_sub(1));
    }
}

impl Words for Between<'_> {
    fn load(&self, at: usize) -> u64 {
        self.step();
        self.words.load(at)
    }

    fn store(&self, at: usize, value: u64) {
        self.step();
        self.words.store(at, value);
    }

    fn swap(&self, at: usize, old: u64, new: u64) -> bool {
        self.step();
        self.words.swap(at, old, new)
    }
}

/// Every way in which one that begins a flow is held up by another that begins one, on one CPU.
#[test]
fn flows_that_begin_in_one_bucket_at_once_leave_each_other_whole() {
    let put_closed = |words: &Bucket, id: Id| {
        id.put(words, 0, worth::BUSY).unwrap();
        let found = id.find(words).unwrap();
        assert!(update(words, &found, found.meta.with_state(TcpState::Closed)));
    };
    let kinds: [fn(u32) -> Id; 3] = [Id::Short, Id::Long, Id::Alias];
    for fill in [Id::Short as fn(u32) -> Id, Id::Long] {
        for filled in [0, 3, 8] {
            for (mine, others) in kinds
                .iter()
                .flat_map(|mine| kinds.map(|others| (mine(50), others(60))))
            {
                for (steps_before, begins) in (0..60).flat_map(|steps| [(steps, false), (steps, true)]) {
                    let words = bucket();
                    let units = if fill(0).kind() == Kind::Long { 2 } else { 1 };
                    (0..filled / units).for_each(|number| put_closed(&words, fill(number)));
                    let put_by_other = Cell::new(false);
                    let between = Between {
                        words: &words,
                        steps_before: Cell::new(steps_before),
                        other: RefCell::new(Some(Box::new(|| {
                            let room = if begins {
                                others.begin(&words, 0, worth::OPENING)
                            } else {
                                others.put(&words, 0, worth::OPENING)
                            };
                            put_by_other.set(room.is_some());
                        }))),
                    };
                    let room = if begins {
                        mine.begin(&between, 0, worth::OPENING)
                    } else {
                        mine.put(&between, 0, worth::OPENING)
                    };
                    let what = (mine, others, filled, steps_before, begins);
                    drop(between);
                    assert_eq!(mine.find(&words).is_some(), room.is_some(), "{what:?}");
                    assert_eq!(others.find(&words).is_some(), put_by_other.get(), "{what:?}");
                    for unit in (1..UNITS).step_by(2) {
                        let is_long = Meta(words.load(meta_at(unit))).is(Kind::Long);
                        assert!(is_address(&words, unit) || !is_long, "{what:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_free_place_is_taken_in_the_line_alone_and_from_no_flow() {
    for kind in [Id::Short as fn(u32) -> Id, Id::Long, Id::Alias] {
        let words = bucket();
        let in_a_line = if kind(0).kind() == Kind::Long { 2 } else { 4 };
        for number in 0..in_a_line {
            let unit = take_free(&words, LINE, kind(number).kind()).unwrap();
            assert_eq!(unit / 4, 1);
            kind(number).write(&words, unit, kind(number).meta());
            let found = kind(number).find(&words).unwrap();
            assert!(update(&words, &found, found.meta.with_state(TcpState::Closed)));
        }
        let noting = Noting(&words, RefCell::default());
        assert_eq!(take_free(&noting, LINE, kind(99).kind()), None);
        assert_eq!(noting.1.into_inner(), []);
    }
    // What is left beside a short flow is no place for a long one, but for another short one.
    let words = bucket();
    Id::Short(0).begin(&words, 0, worth::OPENING).unwrap();
    assert_eq!(take_free(&words, 0, Kind::Long), Some(2));
    assert_eq!(take_free(&words, 0, Kind::Short), Some(1));
    assert_eq!(take_free(&words, 0, Kind::Short), None);
}

/// Whatever a client's address is, and whenever the flow begins.
#[test]
fn the_address_of_a_flow_that_begins_meanwhile_is_not_given_for_a_unit() {
    let words = bucket();
    let noting = Noting(&words, RefCell::default());
    let like_a_long_flow = Address([0x0120, 7, 1, Kind::Long as u32]);
    let room = make_room(&noting, 0, Kind::Long, worth::BUSY, worth_at(&noting, Kind::Long)).unwrap();
    put_long(
        &noting,
        room.unit,
        Id::Long(3).key(),
        &like_a_long_flow,
        Id::Long(3).meta(),
    );
    assert!(Meta(words.load(meta_at(1))).is(Kind::Long));
    let writes = noting.1.into_inner();
    for (step, count) in (0..4).flat_map(|step| (0..=writes.len()).map(move |count| (step, count))) {
        let words = bucket();
        let interfered = Interfered {
            words: &words,
            step: Cell::new(0),
            writes: vec![(step, &writes[..count])],
        };
        let meta = meta_of(&interfered, 1);
        assert!(
            meta.is_none_or(|meta| meta.is_empty() || meta.is_busy()),
            "{step} {count} {meta:?}"
        );
    }
}

/// Every way in which what is done with a flow falls into a mark, on one CPU.
#[test]
fn a_mark_that_is_set_while_a_flow_begins_changes_or_ends_stays_and_no_unit_stays_busy() {
    let kinds = [Id::Short as fn(u32) -> Id, Id::Long, Id::Alias];
    for (mark, kind) in [BUCKET, mark_of(0), mark_of(LINE)]
        .iter()
        .flat_map(|mark| kinds.map(|kind| (*mark, kind)))
    {
        for (line, action, steps_before) in [0, LINE]
            .iter()
            .flat_map(|line| (0..5).flat_map(move |action| (0..40).map(move |steps| (*line, action, steps))))
        {
            let words = bucket();
            for number in 0..2 {
                kind(number).begin(&words, line, worth::OPENING).unwrap();
            }
            let between = Between {
                words: &words,
                steps_before: Cell::new(steps_before),
                other: RefCell::new(Some(Box::new(|| assert!(mark_overflow(&words, mark))))),
            };
            let found = kind(1).find(&words).unwrap();
            match action {
                0 => drop(kind(2).begin(&between, line, worth::OPENING)),
                1 => drop(kind(2).put(&between, line, worth::OPENING)),
                2 => drop(update(
                    &between,
                    &found,
                    found.meta.with_state(TcpState::Established),
                )),
                3 => drop(remove(&between, &found)),
                _ => {
                    // One that is begun is given up.
                    let kind = kind(2).kind();
                    if let Some(unit) = take_free(&between, line, kind) {
                        match kind {
                            Kind::Long => free_long(&between, unit),
                            _ => free(&between, unit),
                        }
                    }
                }
            }
            let was_marked = between.other.borrow().is_none();
            drop(between);
            let what = (mark, kind(0), line, action, steps_before);
            assert_eq!(overflows(&words, mark), was_marked, "{what:?}");
            for unit in 0..UNITS {
                assert!(!meta_of(&words, unit).is_some_and(Meta::is_busy), "{what:?}");
            }
        }
    }
}

/// Whichever flows come and go.
#[test]
fn marks_of_lines_and_of_the_bucket_are_told_apart_and_outlive_the_flows_in_their_units() {
    let marks = [BUCKET, mark_of(0), mark_of(LINE)];
    for mark in marks {
        let words = bucket();
        let is_noted = || marks.map(|unit| overflows(&words, unit)) == marks.map(|unit| unit == mark);
        assert!(mark_overflow(&words, mark) && is_noted());
        for (kind, count) in [(Id::Short as fn(u32) -> Id, 8), (Id::Long, 4), (Id::Alias, 8)] {
            for number in 0..count {
                kind(number).begin(&words, 0, worth::OPENING).unwrap();
                assert!(is_noted());
            }
            for number in 0..count {
                let id = kind(number);
                assert!(remove(&words, &id.find(&words).unwrap()));
                assert!(is_noted(), "{id:?}");
            }
        }
    }
}

/// Whatever the client's address is: a word of it may be what the unit had in that place before.
#[test]
fn a_unit_that_has_become_the_second_of_a_long_flow_is_taken_for_no_other_flow() {
    for (is_closed, begins) in [(false, true), (false, false), (true, false)] {
        for (kind, steps_before) in [Kind::Short, Kind::Alias]
            .iter()
            .flat_map(|kind| (0..20).map(move |steps| (*kind, steps)))
        {
            let words = bucket();
            // Both units of all pairs are taken, or the first alone.
            for unit in 0..UNITS {
                let id = Id::Short(unit as u32);
                if is_closed || unit % 2 == 0 {
                    id.write(&words, unit, id.meta());
                    let busy = id.meta().busy(Kind::Short);
                    words.store(meta_at(unit), busy.0);
                    id.write(&words, unit, id.meta().with_state(TcpState::Closed));
                }
            }
            let second = words.load(meta_at(1));
            let client = Address([0x0120, 7, second as u32, (second >> 32) as u32]);
            let long = Id::Long(9);
            let between = Between {
                words: &words,
                steps_before: Cell::new(steps_before),
                other: RefCell::new(Some(Box::new(|| {
                    for unit in (0..UNITS).step_by(2) {
                        // Where the other has one of them there is no room.
                        let (first, second) = pair(&words, unit);
                        if first.is_busy() || second.is_busy() {
                            continue;
                        }
                        words.store(meta_at(unit), first.busy(Kind::Long).0);
                        put_long(&words, unit, long.key(), &client, long.meta());
                    }
                }))),
            };
            let mine = if kind == Kind::Alias {
                Id::Alias(60)
            } else {
                Id::Short(60)
            };
            let room = if begins {
                mine.begin(&between, 0, worth::OPENING)
            } else {
                mine.put(&between, 0, worth::OPENING)
            };
            drop(between);
            let what = (is_closed, begins, kind as u8, steps_before);
            assert_eq!(mine.find(&words).is_some(), room.is_some(), "{what:?}");
            for unit in (0..UNITS).step_by(2) {
                if let Some(found) = at(&words, unit, Kind::Long, long.key(), u64::MAX) {
                    assert_eq!(client_of_long(&words, &found), Some(client), "{what:?} {unit}");
                }
            }
        }
    }
}

const CLIENT_WORD: u32 = 7;
const CLIENT_PORT_OF_TEST: u16 = 1000;

/// Replies of a backend to the client of the tests below.
fn replies() -> ReplyKeys {
    ReplyKeys::of(&FlowKey {
        source: Address::from_v4_word(9),
        destination: Address::from_v4_word(CLIENT_WORD),
        source_port: 8080,
        destination_port: CLIENT_PORT_OF_TEST,
        protocol: 6,
    })
}

/// Kind and key of a flow that these may be of, by a number; or of an alias.
fn replied(kind: Kind, number: u16) -> (u64, Meta) {
    let key = match kind {
        Kind::Short => short_key(CLIENT_WORD, CLIENT_PORT_OF_TEST, 80 + number),
        Kind::Long => long_key(CLIENT_PORT_OF_TEST, 80 + number, CLIENT_PORT_OF_TEST, 9),
        _ => alias_key(3, 0, CLIENT_PORT_OF_TEST, 8080),
    };
    let meta = Meta::new(kind, 3, 1 + u32::from(number), Forward::Nat.number());
    (key, meta.with_state(TcpState::SynSent))
}

/// Writes it where there is nothing in a line; gives the unit.
fn begin_replied<W: Words>(words: &W, line: usize, (key, meta): (u64, Meta)) -> usize {
    let kind = if meta.is(Kind::Long) {
        Kind::Long
    } else {
        Kind::Short
    };
    let unit = take_free(words, line, kind).unwrap();
    if meta.is(Kind::Long) {
        put_long(words, unit, key, &Address::from_v4_word(CLIENT_WORD), meta);
    } else {
        put(words, unit, key, meta);
    }
    unit
}

/// Every way in which one that records a flow is held up by another, who records one of the same replies: where it is looked
/// for first, in the other line, or in another bucket.
#[test]
fn of_two_who_record_flows_with_the_same_replies_at_most_one_is_told_to_be_alone() {
    let kinds = [Kind::Short, Kind::Long, Kind::Alias];
    for (line, marks) in [(0, &[][..]), (LINE, &[mark_of(0)]), (LINE, &[mark_of(0), BUCKET])] {
        for (mine, other) in kinds.iter().flat_map(|mine| kinds.map(|other| (*mine, other))) {
            let mut alone = [0, 0];
            for steps_before in 0..60 {
                let words = bucket();
                let is_other_alone = Cell::new(false);
                let between = Between {
                    words: &words,
                    steps_before: Cell::new(steps_before),
                    other: RefCell::new(Some(Box::new(|| {
                        for mark in marks {
                            assert!(mark_overflow(&words, *mark));
                        }
                        if marks.contains(&BUCKET) {
                            // It is elsewhere, and sees by the keys here whether it is alone.
                            let mine = replied(mine, 0).1;
                            is_other_alone.set(
                                !(0..UNITS).any(|unit| Meta(words.load(meta_at(unit))).is_of_same(mine)),
                            );
                        } else {
                            let unit = begin_replied(&words, line, replied(other, 1));
                            is_other_alone.set(is_alone(&words, 0, &replies(), Some(unit)));
                        }
                    }))),
                };
                let unit = begin_replied(&between, 0, replied(mine, 0));
                let is_mine_alone = is_alone(&between, 0, &replies(), Some(unit));
                let has_other_begun = between.other.borrow().is_none();
                drop(between);
                let what = (line, marks, mine as u8, other as u8, steps_before);
                assert!(
                    !has_other_begun || !is_mine_alone || !is_other_alone.get(),
                    "{what:?}"
                );
                assert!(has_other_begun || is_mine_alone, "{what:?}");
                alone[0] += u32::from(has_other_begun && is_mine_alone);
                alone[1] += u32::from(is_other_alone.get());
            }
            assert!(alone[1] > 0, "{marks:?}");
            // After a mark was seen not to be there nothing more is read.
            assert!(alone[0] > 0 || !marks.is_empty());
        }
    }
}

#[test]
fn flows_that_are_gone_or_left_and_addresses_are_in_no_ones_way() {
    let is_free = |words: &Bucket| is_alone(words, 0, &replies(), None);
    for kind in [Kind::Short, Kind::Long, Kind::Alias] {
        let words = bucket();
        assert!(is_free(&words));
        let unit = begin_replied(&words, 0, replied(kind, 0));
        assert!(!is_free(&words));
        assert!(is_alone(&words, 0, &replies(), Some(unit)));
        let (key, meta) = replied(kind, 0);
        let found = Found { unit, key, meta };
        assert!(update(&words, &found, meta.left()));
        assert!(is_free(&words));
        let meta = meta.left();
        assert!(remove(&words, &Found { unit, key, meta }));
        assert_eq!(words.load(key_at(unit)), key);
        assert!(is_free(&words));
    }
    // The first half of an address that is like the key of a flow.
    let (key, meta) = replied(Kind::Short, 0);
    let imitating = Address([
        key as u32,
        (key >> 32) as u32,
        meta.0 as u32,
        (meta.0 >> 32) as u32,
    ]);
    let words = bucket();
    let long = Id::Long(9);
    let unit = take_free(&words, 0, Kind::Long).unwrap();
    put_long(&words, unit, long.key(), &imitating, long.meta());
    assert_eq!(words.load(key_at(unit + 1)), key);
    assert!(is_free(&words));
}

/// Whatever a client's address is.
#[test]
fn an_address_is_taken_for_no_flow() {
    let (flow, words) = (Id::Short(3), bucket());
    let (key, meta) = (flow.key(), flow.meta().0);
    let imitating = Address([key as u32, (key >> 32) as u32, meta as u32, (meta >> 32) as u32]);
    let long = Id::Long(3);
    let room = make_room(&words, 0, Kind::Long, worth::BUSY, worth_at(&words, Kind::Long)).unwrap();
    put_long(&words, room.unit, long.key(), &imitating, long.meta());
    assert_eq!((words.load(key_at(1)), words.load(meta_at(1))), (key, meta));
    assert_eq!(flow.find(&words), None);
    let found = long_at(&words, 0, &imitating, long.key(), u64::MAX).unwrap();
    let noting = Noting(&words, RefCell::default());
    assert!(remove(&noting, &found));
    let writes = noting.1.into_inner();
    // Nor while it goes.
    for step in 0..20 {
        for halves in 0..=writes.len() {
            let words = bucket();
            put_long(&words, 0, long.key(), &imitating, long.meta());
            words.store(meta_at(0), long.meta().0);
            let (one, other) = writes.split_at(halves);
            let interfered = Interfered {
                words: &words,
                step: Cell::new(0),
                writes: vec![(step, one), (step + 1, other)],
            };
            assert_eq!(flow.find(&interfered), None, "{step} {halves}");
        }
    }
}

/// Writers and readers of one bucket, all at once: who finds a flow gets its own meta, whole.
#[test]
fn nobody_sees_the_meta_of_one_flow_with_the_key_of_another() {
    let (words, stop) = (bucket(), AtomicBool::new(false));
    let ids: Vec<Id> = (0..6)
        .flat_map(|number| [Id::Short(number), Id::Long(number), Id::Alias(number)])
        .collect();
    // So that one that is found and one that is read later can be told: state and age go together.
    let states = [TcpState::SynSent, TcpState::SynReceived, TcpState::Established];
    // And so that one that went and came back while a reader was held up can be told from the one that it had found.
    let services = AtomicU32::new(0);
    let (found, changed) = thread::scope(|scope| {
        let writers: Vec<_> = (0..2_usize)
            .map(|writer| {
                let (words, stop, ids, services) = (&words, &stop, &ids, &services);
                scope.spawn(move || {
                    let (mut round, mut changed) = (writer, 0_u64);
                    while !stop.load(Ordering::Relaxed) {
                        round = round.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let id = ids[(round >> 33) % ids.len()];
                        let line = if round >> 32 & 1 == 0 { 0 } else { LINE };
                        let meta = id.meta_of(services.fetch_add(1, Ordering::Relaxed) % MAX_SERVICES);
                        match id.find(words) {
                            Some(found) if round >> 40 & 3 == 0 => {
                                changed += u64::from(remove(words, &found));
                            }
                            Some(found) => {
                                let state = states[(round >> 42) % states.len()];
                                let meta = found.meta.with_state(state).with_age(7 * state as u8);
                                changed += u64::from(update(words, &found, meta));
                            }
                            None if round >> 41 & 1 == 0 => {
                                changed += u64::from(id.put_as(words, line, worth::BUSY, meta).is_some());
                            }
                            None => {
                                changed += u64::from(id.begin_as(words, line, worth::BUSY, meta).is_some());
                            }
                        }
                    }
                    changed
                })
            })
            .collect();
        let readers: Vec<_> = (0..2_usize)
            .map(|reader| {
                let (words, stop, ids) = (&words, &stop, &ids);
                scope.spawn(move || {
                    let (mut round, mut count) = (reader, 0_u64);
                    while !stop.load(Ordering::Relaxed) {
                        round += 1;
                        let id = ids[round % ids.len()];
                        let Some(found) = id.find(words) else { continue };
                        count += 1;
                        assert_eq!(Id::of(found.meta), id, "{:?}", found.meta);
                        assert_eq!(found.meta.link(), id.meta().link());
                        assert!(!found.meta.is_busy() && found.key == id.key());
                        let state = found.meta.state();
                        let age = if state == TcpState::SynSent && found.meta.age() == 0 {
                            0
                        } else {
                            7 * state as u8
                        };
                        assert_eq!(found.meta.age(), age);
                        if id.kind() == Kind::Long
                            && let Some(client) = client_of_long(words, &found)
                        {
                            assert_eq!(client, id.client());
                        }
                    }
                    count
                })
            })
            .collect();
        let end = Instant::now() + Duration::from_secs(2);
        while Instant::now() < end && !readers.iter().any(thread::ScopedJoinHandle::is_finished) {
            thread::sleep(Duration::from_millis(20));
        }
        stop.store(true, Ordering::Relaxed);
        let changed: u64 = writers.into_iter().map(|writer| writer.join().unwrap()).sum();
        let found: u64 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
        (found, changed)
    });
    assert!(found > 1000 && changed > 1000, "{found} {changed}");
    // Nothing is left busy, and what is there can be found.
    let there: BTreeSet<Id> = ids.into_iter().filter(|id| id.find(&words).is_some()).collect();
    let units: usize = there
        .iter()
        .map(|id| if id.kind() == Kind::Long { 2 } else { 1 })
        .sum();
    let in_use =
        (0..UNITS).filter(|unit| is_address(&words, *unit) || !Meta(words.load(meta_at(*unit))).is_empty());
    assert!(units <= in_use.count());
}

#[test]
fn a_meta_holds_the_highest_ids_and_is_not_taken_for_one_that_is_being_written() {
    use crate::abi::{MAX_BACKENDS, MAX_SERVICES};
    for (service, backend) in [
        (MAX_SERVICES - 1, MAX_BACKENDS),
        (0, MAX_BACKENDS),
        (MAX_SERVICES - 1, 0),
    ] {
        let meta = Meta::new(Kind::Long, service, backend, 5)
            .with_age(255)
            .with_link(0x7ffe);
        assert_eq!(
            (meta.service(), meta.backend(), meta.forward()),
            (service, backend, 5)
        );
        assert!(meta.is(Kind::Long) && !meta.is_busy() && !meta.is_left());
        assert!(meta.busy(Kind::Long).is_busy());
        let other = Meta::new(Kind::Long, service, backend ^ 1 << 17, 5);
        assert!(!meta.is_of_same(other));
    }
}
