//! The flow table and what goes with it, in memory that is shared with the kernel: read and changed by the same atomic
//! operations as the program's.

use std::{
    cell::OnceCell,
    collections::BTreeSet,
    io, mem,
    ops::Deref,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU64, Ordering},
};

use lb_common::{
    abi::{
        Address, Backend, Bucket, ClientLink, FlowKey, Forward, Kind, LiveCount, Meta, Settings,
        SettingsFlags, TCP, UDP, UNITS, WORDS,
    },
    logic::{
        ageing,
        flow_table::{
            Found, Words, again, at, bucket_of, client_of_long, end_hash, free_long, meta_at, meta_of,
            remove, second_bucket_of, update,
        },
    },
};

use super::{Flow, Position};

/// Buckets that are looked at in a step: some thousand flows, in less than a millisecond.
const STEP: usize = 1024;

/// Words of a [`LiveCount`] and of a [`ClientLink`].
const LIVE_WORDS: usize = size_of::<LiveCount>() / 8;
const LINK_WORDS: usize = size_of::<ClientLink>() / 8;
/// Index of a word.
const OPENED: usize = 0;
const ENDED: usize = 1;
const LINK_STATE: usize = 3;

const _: () = assert!(size_of::<Bucket>() == 8 * WORDS);
const _: () = assert!(mem::offset_of!(LiveCount, opened) == 8 * OPENED);
const _: () = assert!(mem::offset_of!(LiveCount, ended) == 8 * ENDED);
const _: () = assert!(mem::offset_of!(ClientLink, state) == 8 * LINK_STATE);

/// An array map's memory, as values of `N` words.
pub(super) struct Mapped<const N: usize> {
    memory: NonNull<[AtomicU64; N]>,
    count: usize,
}

// SAFETY: it is not bound to a thread, and all access is atomic.
unsafe impl<const N: usize> Send for Mapped<N> {}

impl<const N: usize> Mapped<N> {
    /// Maps the memory of an array map that was made to be mapped (`BPF_F_MMAPABLE`), of values of `8 * N` bytes.
    pub(super) fn new(map: BorrowedFd<'_>, count: u32) -> io::Result<Self> {
        let count = count as usize;
        // SAFETY: the kernel chooses the place. It refuses what is longer than the map.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                Self::length(count),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { memory, count })
    }

    const fn length(count: usize) -> usize {
        count * size_of::<[AtomicU64; N]>()
    }
}

impl<const N: usize> Deref for Mapped<N> {
    type Target = [[AtomicU64; N]];

    fn deref(&self) -> &Self::Target {
        // SAFETY: so much is mapped until `drop`, on a page's boundary, and any bytes are atomic words; whoever else
        // writes them writes whole words, too.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.count) }
    }
}

impl<const N: usize> Drop for Mapped<N> {
    fn drop(&mut self) {
        // SAFETY: it was mapped so, and no reference into it outlives this.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), Self::length(self.count)) };
    }
}

/// An array map and how many entries it has.
pub(super) struct MapOf<'a>(pub BorrowedFd<'a>, pub u32);

/// The flow table, the counts of live flows and the ways back to clients.
pub(super) struct FlowTable {
    buckets: Mappable<WORDS>,
    live: Mappable<LIVE_WORDS>,
    links: Mappable<LINK_WORDS>,
    pass: Pass,
}

/// An array map whose memory is mapped from when it is looked at until the end of a pass: as long as it is, it counts as
/// memory of the daemon.
struct Mappable<const N: usize> {
    map: OwnedFd,
    count: u32,
    mapped: OnceCell<Mapped<N>>,
}

impl<const N: usize> Mappable<N> {
    fn new(map: &MapOf<'_>) -> io::Result<Self> {
        Ok(Self {
            map: map.0.try_clone_to_owned()?,
            count: map.1,
            mapped: OnceCell::new(),
        })
    }

    /// Its memory, mapped from now on if it was not.
    fn get(&self) -> io::Result<&Mapped<N>> {
        if let Some(mapped) = self.mapped.get() {
            return Ok(mapped);
        }
        let mapped = Mapped::new(self.map.as_fd(), self.count)?;
        Ok(self.mapped.get_or_init(|| mapped))
    }

    fn unmap(&mut self) {
        self.mapped.take();
    }
}

type Buckets = Mapped<WORDS>;

/// What [`FlowTable::tidy`] has seen.
#[derive(Default)]
struct Pass {
    /// Units that are being written, by bucket and index, and those of the pass before.
    busy: BTreeSet<(usize, usize)>,
    busy_before: BTreeSet<(usize, usize)>,
    /// Indices of links that flows have.
    links: BTreeSet<u32>,
}

impl Pass {
    fn tidy_unit(
        &mut self,
        buckets: &Buckets,
        settings: &Settings,
        now: u64,
        backend: &mut dyn FnMut(u32) -> Backend,
        (index, unit): (usize, usize),
    ) {
        let Some(bucket) = buckets.get(index) else {
            return;
        };
        let Some(meta) = meta_of(bucket, unit).filter(|meta| !meta.is_empty()) else {
            return;
        };
        if is_misplaced(unit, meta) {
            bucket.swap(meta_at(unit), meta.0, meta.emptied().0);
            return;
        }
        if meta.is_busy() {
            // For so long only if its writer was killed: the program writes without a pause.
            if !self.busy_before.contains(&(index, unit)) {
                self.busy.insert((index, unit));
            } else if meta.is(Kind::Long) {
                free_long(bucket, unit);
            } else {
                bucket.swap(meta_at(unit), meta.0, meta.emptied().0);
            }
            return;
        }
        let kind = if meta.is(Kind::Alias) {
            Kind::Alias
        } else if meta.is(Kind::Long) {
            Kind::Long
        } else {
            Kind::Short
        };
        let Some(found) = at(bucket, unit, kind, 0, 0) else {
            return;
        };
        if is_ageless(settings) {
            renew(bucket, &found, settings, now);
        } else if found.meta.is_left() {
            let is_of_nobody = backend(found.meta.backend()).service_plus_one == 0;
            if is_of_nobody || ageing::is_over(settings, found.meta, now) {
                remove(bucket, &found);
            }
            return;
        }
        if kind != Kind::Alias {
            self.links.insert(found.meta.link());
        } else if !leads_to_flow(buckets, settings, &backend(found.meta.backend()), index, &found) {
            remove(bucket, &found);
        }
    }

    /// Frees the ways back to clients that no flow had in this pass and the one before.
    fn free_links(&self, links: &Mapped<LINK_WORDS>) {
        // Index 0 is none.
        for (index, link) in (0..).zip(links.iter()).skip(1) {
            if self.links.contains(&index) {
                link.swap(LINK_STATE, ClientLink::UNUSED, ClientLink::VALID);
            // The program takes the mark away before it gives the link to a flow.
            } else if !link.swap(LINK_STATE, ClientLink::UNUSED, ClientLink::FREE) {
                link.swap(LINK_STATE, ClientLink::VALID, ClientLink::UNUSED);
            }
        }
    }
}

/// What has to be known beside the table to read it.
pub(super) struct Context<'a> {
    pub settings: Settings,
    /// On the clock of [`Flow::last_seen`].
    pub now: u64,
    /// The VIP of a service, by id.
    pub vip: &'a mut dyn FnMut(u32) -> Address,
}

impl FlowTable {
    /// # Errors
    /// There is no room for more file descriptors.
    pub(super) fn new(flows: &MapOf<'_>, live: &MapOf<'_>, links: &MapOf<'_>) -> io::Result<Self> {
        Ok(Self {
            buckets: Mappable::new(flows)?,
            live: Mappable::new(live)?,
            links: Mappable::new(links)?,
            pass: Pass::default(),
        })
    }

    /// The buckets of a step, and where the next begins.
    fn step(&self, position: Option<Position>) -> (std::ops::Range<usize>, Option<Position>) {
        let start = position.map_or(0, |Position(start)| start as usize);
        let count = self.buckets.count as usize;
        let end = count.min(start.saturating_add(STEP));
        let next = (end < count).then_some(Position(end as u32));
        (start.min(end)..end, next)
    }

    /// See [`Datapath::some_flows`](super::Datapath::some_flows).
    pub(super) fn some_flows(
        &self,
        context: &mut Context<'_>,
        position: Option<Position>,
        visit: &mut dyn FnMut(&FlowKey, &Flow),
    ) -> io::Result<Option<Position>> {
        let buckets = self.buckets.get()?;
        let (indices, next) = self.step(position);
        for bucket in indices.filter_map(|index| buckets.get(index)) {
            for unit in 0..UNITS {
                if let Some((key, found)) = flow_at(bucket, unit, context) {
                    visit(&key, &flow(&found, &key, context));
                }
            }
        }
        Ok(next)
    }

    /// Removes the flow of a client's 5-tuple, and counts its end, unless a packet of it was seen at or after
    /// `unless_seen_since`; tells how many flows that were.
    pub(super) fn remove(
        &self,
        context: &mut Context<'_>,
        key: &FlowKey,
        unless_seen_since: u64,
    ) -> io::Result<u64> {
        let buckets = self.buckets.get()?;
        // Now, so that no flow goes whose end cannot be counted.
        self.live.get()?;
        let seed = context.settings.table_seed;
        let hash = end_hash(seed, &key.source, key.source_port, key.protocol);
        let places = [bucket_of, second_bucket_of].map(|bucket| bucket(hash, self.buckets.count));
        let places = if places[0] == places[1] {
            &places[..1]
        } else {
            &places[..]
        };
        let mut removed = 0;
        for (bucket, unit) in (places.iter())
            .filter_map(|index| buckets.get(*index as usize))
            .flat_map(|bucket| (0..UNITS).map(move |unit| (bucket, unit)))
        {
            // Anew where a packet has changed it meanwhile.
            while let Some((_, found)) = flow_at(bucket, unit, context).filter(|(found, _)| found == key) {
                let last_seen = ageing::last_seen(&context.settings, found.meta, context.now);
                if unless_seen_since != u64::MAX && last_seen >= unless_seen_since {
                    break;
                }
                if remove(bucket, &found) {
                    removed += 1;
                    if !ageing::has_ended(found.meta.forward(), found.meta.state()) {
                        self.add_live(found.meta.backend(), ENDED, 1)?;
                    }
                    break;
                }
            }
        }
        Ok(removed)
    }

    /// See [`Datapath::tidy_flows`](super::Datapath::tidy_flows). `backend` gives the backend of an id, in use or not.
    pub(super) fn tidy(
        &mut self,
        settings: &Settings,
        now: u64,
        backend: &mut dyn FnMut(u32) -> Backend,
        position: Option<Position>,
    ) -> io::Result<Option<Position>> {
        let (indices, next) = self.step(position);
        let buckets = self.buckets.get()?;
        if position.is_none() {
            self.pass.busy_before = mem::take(&mut self.pass.busy);
            self.pass.links.clear();
        }
        for index in indices {
            for unit in 0..UNITS {
                (self.pass).tidy_unit(buckets, settings, now, backend, (index, unit));
            }
        }
        if next.is_none() {
            self.pass.free_links(self.links.get()?);
            self.buckets.unmap();
            self.live.unmap();
            self.links.unmap();
        }
        Ok(next)
    }

    /// The counts of a backend; nothing where there is no such id.
    pub(super) fn live(&self, backend: u32) -> io::Result<Option<LiveCount>> {
        let count = self.live.get()?.get(backend as usize);
        Ok(count.map(|count| LiveCount {
            opened: count.load(OPENED),
            ended: count.load(ENDED),
        }))
    }

    /// Has a backend have no live flows: none has its id any more.
    pub(super) fn clear_live(&self, backend: u32) -> io::Result<()> {
        if let Some(count) = self.live(backend)? {
            self.add_live(backend, ENDED, count.opened.wrapping_sub(count.ended))?;
        }
        Ok(())
    }

    /// Adds to the live flows of a backend; tells whether there is such an id.
    pub(super) fn adjust_live(&self, backend: u32, by: i64) -> io::Result<bool> {
        self.add_live(backend, if by < 0 { ENDED } else { OPENED }, by.unsigned_abs())
    }

    fn add_live(&self, backend: u32, word: usize, count: u64) -> io::Result<bool> {
        let live = self.live.get()?.get(backend as usize);
        let added = live.map(|live| live[word].fetch_add(count, Ordering::SeqCst));
        Ok(added.is_some())
    }
}

/// Tells whether there is the flow that an alias in a bucket leads to, as the program does for a reply.
fn leads_to_flow(
    buckets: &Buckets,
    settings: &Settings,
    backend: &Backend,
    index: usize,
    alias: &Found,
) -> bool {
    let Some(bucket) = buckets.get(alias.key as u32 as usize >> 3) else {
        return false;
    };
    let port = (alias.key >> 32) as u16;
    let unit = alias.key as usize & 6;
    if Meta(bucket.load(meta_at(unit))).is_busy() {
        // Of a flow that is being written.
        return true;
    }
    let Some(found) = at(bucket, unit, Kind::Long, u64::from(port) << 32, 0xffff << 32) else {
        return false;
    };
    let Some(client) = client_of_long(bucket, &found) else {
        return false;
    };
    let source = if found.meta.forward() == Forward::FullNat.number() {
        backend.source
    } else {
        client
    };
    let hash = end_hash(settings.table_seed, &source, port, protocol(found.meta));
    found.meta.of_kind(Kind::Alias).is_of_same(alias.meta)
        && [
            bucket_of(hash, buckets.len() as u32),
            second_bucket_of(hash, buckets.len() as u32),
        ]
        .contains(&(index as u32))
}

/// The flow at a unit, and its client's 5-tuple.
fn flow_at(bucket: &[AtomicU64; WORDS], unit: usize, context: &mut Context<'_>) -> Option<(FlowKey, Found)> {
    let meta = Meta(bucket.load(meta_at(unit)));
    let is_long = meta.is(Kind::Long);
    if is_misplaced(unit, meta) {
        return None;
    }
    let kind = if is_long { Kind::Long } else { Kind::Short };
    let found = at(bucket, unit, kind, 0, 0).filter(|found| !found.meta.is_left())?;
    let word = |index: u32| (found.key >> (16 * index)) as u16;
    let (source, source_port, destination_port) = if is_long {
        (client_of_long(bucket, &found)?, word(0), word(1))
    } else {
        (Address::from_v4_word(found.key as u32), word(2), word(3))
    };
    let key = FlowKey {
        source,
        destination: (context.vip)(found.meta.service()),
        source_port,
        destination_port,
        protocol: protocol(found.meta),
    };
    Some((key, found))
}

/// Tells whether a unit has what belongs to a pair of units without being the first of one; no program writes that.
const fn is_misplaced(unit: usize, meta: Meta) -> bool {
    unit % 2 == 1 && meta.is(Kind::Long)
}

fn flow(found: &Found, key: &FlowKey, context: &Context<'_>) -> Flow {
    let is_long = found.meta.is(Kind::Long);
    Flow {
        last_seen: ageing::last_seen(&context.settings, found.meta, context.now),
        backend: found.meta.backend(),
        service: found.meta.service(),
        source_port: if is_long {
            (found.key >> 32) as u16
        } else {
            key.source_port
        },
        generation: is_long.then_some((found.key >> 48) as u16),
        tcp_state: found.meta.state(),
        forward: found.meta.forward(),
    }
}

fn protocol(meta: Meta) -> u32 {
    u32::from(if meta.is_udp() { UDP } else { TCP })
}

fn is_ageless(settings: &Settings) -> bool {
    settings.flags & SettingsFlags::AGELESS != 0
}

/// Has a flow count as seen now.
fn renew(bucket: &[AtomicU64; WORDS], found: &Found, settings: &Settings, now: u64) {
    let mut found = *found;
    while !update(
        bucket,
        &found,
        found
            .meta
            .with_age(ageing::ticks(settings, found.meta.state(), now)),
    ) {
        // A packet has changed it meanwhile, by the new ticks or not.
        match again(bucket, &found) {
            Some(meta) => found.meta = meta,
            None => return,
        }
    }
}
