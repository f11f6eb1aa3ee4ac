//! The pools of all services and their slot tables, in memory that is shared with the kernel; what lies where, and why, is in
//! docs/design/slot-tables.md.
//!
//! What is there is never changed: a pool that becomes another is written elsewhere, one store has the program find it, and
//! its lines are used again only after all programs have ended that may still read them.

mod ahead;

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use aya::maps::{Array, ArrayOfMaps, IterableMap, MapData, MapError};
use lb_common::abi::{
    CHUNK_LINES, LINE_WORDS, MAX_CHUNKS, MAX_MEMBERS, MAX_SLOTS, Part, PoolHeader, PoolLine, place_of,
    pool_lines, rank_bits, rank_lines,
};

use self::ahead::Ahead;
use super::{
    DatapathError, Pool, RankTable,
    flow_table::{MapOf, Mapped},
    kernel::{Raw, failed, unmapped},
    pool::TableKey,
    syscall,
};

const CHUNKS: &str = "POOL_CHUNKS";
/// `BPF_F_MMAPABLE`.
const MMAPABLE: u32 = 1 << 10;
/// The line before the ranks of a table: digest, checksum, and slots with the number of ranks.
const TABLE_HEADER: u32 = 1;

type Chunk = Array<MapData, Raw<PoolLine>>;

/// The pools of all services.
pub(super) struct Pools {
    /// By service id: the line of its pool.
    words: Mapped<1>,
    state: RefCell<State>,
}

struct State {
    memory: Memory,
    lines: Lines,
    graces: Graces,
    /// By service id.
    pools: HashMap<u32, PoolAt>,
    /// By the line that its ranks begin in.
    tables: HashMap<u32, TableAt>,
    /// The line that the ranks begin in.
    known: HashMap<TableKey, u32>,
    /// Tables of the pools that come next.
    ahead: Ahead,
}

/// Where a pool is.
#[derive(Clone, Copy)]
struct PoolAt {
    line: u32,
    lines: u32,
    /// The ranks of its table.
    ranks: Option<u32>,
}

/// A table in memory.
struct TableAt {
    key: TableKey,
    lines: u32,
    /// Pools that have it.
    users: u32,
}

impl Pools {
    /// Takes over the pools that there are.
    ///
    /// # Errors
    /// The memory cannot be mapped, or the chunks not be opened.
    pub(super) fn open(
        words: &MapOf<'_>,
        chunks: ArrayOfMaps<MapData, Chunk>,
        chunks_data: MapData,
    ) -> Result<Self, DatapathError> {
        let words = Mapped::new(words.0, words.1).map_err(unmapped("POOLS"))?;
        let memory = Memory::open(chunks, chunks_data)?;
        let mut state = State {
            lines: Lines::default(),
            graces: Graces::default(),
            pools: HashMap::new(),
            tables: HashMap::new(),
            known: HashMap::new(),
            ahead: Ahead::default(),
            memory,
        };
        // Programs may still read what an earlier daemon has just taken away.
        syscall::wait_for_programs();
        let mut used = BTreeMap::from([(0, 1)]);
        for (service, [word]) in (0..).zip(words.iter()) {
            let line = word.load(Ordering::SeqCst) as u32;
            if line != 0 {
                state.take_over(service, line, &mut used)?;
            }
        }
        state.lines.set_used(&used, state.memory.lines());
        Ok(Self {
            words,
            state: RefCell::new(state),
        })
    }

    /// Memory of all chunks.
    pub(super) fn memory(&self) -> u64 {
        u64::from(self.state.borrow().memory.lines()) * size_of::<PoolLine>() as u64
    }

    /// The pool of a service as it is in the memory; tables that are not what they were written as are unlike any other.
    ///
    /// `seen` are the tables that were looked at already, by line.
    pub(super) fn get(
        &self,
        service: u32,
        seen: &mut HashMap<u32, Arc<RankTable>>,
    ) -> Result<Option<Pool>, DatapathError> {
        let line = self.word(service)?.load(Ordering::SeqCst) as u32;
        if line == 0 {
            return Ok(None);
        }
        let mut state = self.state.borrow_mut();
        let Some((header, members)) = state.memory.pool(line)? else {
            return Ok(None);
        };
        let mut pool = Pool::of(members);
        if header.bits != 0 {
            let table = match seen.get(&header.ranks) {
                Some(table) => Arc::clone(table),
                None => {
                    let table = Arc::new(state.table(&header)?);
                    seen.insert(header.ranks, Arc::clone(&table));
                    table
                }
            };
            pool.table = Some(table);
        }
        // Else somebody has changed the header.
        let is_whole = header == header_of(&pool, header.ranks);
        Ok(is_whole.then_some(pool))
    }

    /// Backend ids by slot, as the program finds them; nothing where the service has no pool.
    pub(super) fn by_slot(&self, service: u32) -> Result<Option<Vec<u32>>, DatapathError> {
        let line = self.word(service)?.load(Ordering::SeqCst) as u32;
        let mut state = self.state.borrow_mut();
        let found = if line == 0 { None } else { state.memory.pool(line)? };
        let Some((header, members)) = found else {
            return Ok(None);
        };
        if header.bits == 0 {
            return Ok(Some(members));
        }
        let mut ids = Vec::with_capacity(header.slots as usize);
        for slot in 0..header.slots {
            let part = Part::of_rank(slot, header.bits);
            let line = state.memory.line(header.ranks + part.line)?;
            let rank = line[part.word].load(Ordering::Relaxed) >> part.shift & ((1 << header.bits) - 1);
            ids.push(members.get(rank as usize).copied().unwrap_or(0));
        }
        Ok(Some(ids))
    }

    /// Begins what takes long of the pools that are put next, in their order.
    pub(super) fn prepare<'a>(&self, pools: impl Iterator<Item = &'a Pool>) {
        let mut state = self.state.borrow_mut();
        let (mut tables, mut keys, mut lines) = (Vec::new(), HashSet::new(), 0);
        for pool in pools {
            lines += pool_lines(pool.members.len() as u32);
            if let Some(table) = &pool.table
                && !state.known.contains_key(&table.key())
                && keys.insert(table.key())
            {
                lines += rank_lines(table.slots, table.bits()) + TABLE_HEADER;
                tables.push(Arc::clone(table));
            }
        }
        state.ahead = Ahead::of(tables);
        if state.memory.chunks.is_empty() && lines > 0 {
            // Where it fails, or is not enough, more is added when there is no room.
            let _ = state.add_chunks(lines.div_ceil(CHUNK_LINES).min(MAX_CHUNKS));
        }
    }

    /// Has new flows of a service go to another pool from now on.
    ///
    /// # Errors
    /// There is no such service, or no memory; then it stays as it was.
    pub(super) fn put(&self, service: u32, pool: &Pool) -> Result<(), DatapathError> {
        let word = self.word(service)?;
        let mut state = self.state.borrow_mut();
        let at = state.write(pool)?;
        word.store(at.line.into(), Ordering::SeqCst);
        if let Some(former) = state.pools.insert(service, at) {
            state.release(former);
        }
        Ok(())
    }

    /// Leaves a service without a pool.
    ///
    /// # Errors
    /// It has none.
    pub(super) fn remove(&self, service: u32) -> Result<(), DatapathError> {
        if self.word(service)?.swap(0, Ordering::SeqCst) == 0 {
            let source = io::Error::from_raw_os_error(libc::ENOENT);
            return Err(DatapathError::new("delete", object(service), source));
        }
        let mut state = self.state.borrow_mut();
        if let Some(former) = state.pools.remove(&service) {
            state.release(former);
        }
        Ok(())
    }

    fn word(&self, service: u32) -> Result<&AtomicU64, DatapathError> {
        match self.words.get(service as usize) {
            Some([word]) => Ok(word),
            None => Err(DatapathError::new(
                "update",
                object(service),
                io::Error::from_raw_os_error(libc::E2BIG),
            )),
        }
    }
}

fn object(service: u32) -> String {
    format!("POOLS[{service}]")
}

fn header_of(pool: &Pool, ranks: u32) -> PoolHeader {
    PoolHeader {
        ranks: if pool.table.is_some() { ranks } else { 0 },
        bits: pool.table.as_ref().map_or(0, |table| table.bits()),
        slots: pool.slots(),
        members: pool.members.len() as u32,
    }
}

impl State {
    /// Learns where a pool is that was found.
    fn take_over(
        &mut self,
        service: u32,
        line: u32,
        used: &mut BTreeMap<u32, u32>,
    ) -> Result<(), DatapathError> {
        let Some((header, members)) = self.memory.pool(line)? else {
            return Ok(());
        };
        let lines = pool_lines(members.len() as u32);
        used.insert(line, lines);
        let mut ranks = None;
        if header.bits != 0 {
            let table = self.memory.table_header(&header)?;
            let lines = rank_lines(header.slots, header.bits) + TABLE_HEADER;
            let at = self.tables.entry(header.ranks).or_insert(TableAt {
                key: table.key,
                lines,
                users: 0,
            });
            at.users += 1;
            if at.users == 1 {
                used.insert(header.ranks - TABLE_HEADER, lines);
                self.known.insert(table.key, header.ranks);
            }
            ranks = Some(header.ranks);
        }
        self.pools.insert(service, PoolAt { line, lines, ranks });
        Ok(())
    }

    /// The table of a pool. One that is not as it was written is not given to other pools any more.
    fn table(&mut self, header: &PoolHeader) -> Result<RankTable, DatapathError> {
        let table = self.memory.table_header(header)?;
        let (mut digest, slots, members) = table.key;
        let lines = rank_lines(header.slots, header.bits);
        let checksum = self.memory.checksum(header.ranks, lines)?;
        if checksum != table.checksum || slots != header.slots || rank_bits(members) != header.bits {
            digest = 0;
            if let Some(at) = self.tables.get(&header.ranks) {
                self.known.remove(&at.key);
            }
        }
        Ok(RankTable::found(header.slots, members, digest))
    }

    /// Writes a pool where no program looks yet.
    fn write(&mut self, pool: &Pool) -> Result<PoolAt, DatapathError> {
        let ranks = match &pool.table {
            Some(table) => Some(self.write_table(table)?),
            None => None,
        };
        let lines = pool_lines(pool.members.len() as u32);
        let line = match self.allocate(lines) {
            Ok(line) => line,
            Err(error) => {
                if let Some(ranks) = ranks {
                    self.release_table(ranks);
                }
                return Err(error);
            }
        };
        let header = header_of(pool, ranks.unwrap_or(0)).into_words();
        let ids = pool.members.chunks(2).map(|pair| {
            let second = pair.get(1).copied().unwrap_or(0);
            u64::from(second) << 32 | u64::from(pair[0])
        });
        let at = PoolAt { line, lines, ranks };
        match self.memory.write(line, header.into_iter().chain(ids)) {
            Ok(()) => Ok(at),
            Err(error) => {
                self.release(at);
                Err(error)
            }
        }
    }

    /// Writes a table unless it is there; gives the line of its ranks, with one more user.
    fn write_table(&mut self, table: &RankTable) -> Result<u32, DatapathError> {
        let key = table.key();
        if let Some(at) = self.known.get(&key)
            && let Some(known) = self.tables.get_mut(at)
        {
            known.users += 1;
            return Ok(*at);
        }
        let unknown = || io::Error::other("the table that it shall have is not there any more");
        let ranks = match self.ahead.take(key) {
            Some(ranks) => ranks.into(),
            None => (table.ranks()).ok_or_else(|| DatapathError::new("write", CHUNKS, unknown()))?,
        };
        let words = packed(&ranks, table.bits());
        let lines = rank_lines(table.slots, table.bits()) + TABLE_HEADER;
        let line = self.allocate(lines)?;
        let sum = words.iter().fold(0, |sum, word| add_to_checksum(sum, *word));
        let shape = u64::from(table.members) << 32 | u64::from(table.slots);
        let header = [table.digest, sum, shape, 0, 0, 0, 0, 0];
        if let Err(error) = self.memory.write(line, header.into_iter().chain(words)) {
            self.graces.retire(line, lines);
            return Err(error);
        }
        let at = line + TABLE_HEADER;
        self.tables.insert(at, TableAt { key, lines, users: 1 });
        self.known.insert(key, at);
        Ok(at)
    }

    fn release(&mut self, pool: PoolAt) {
        self.graces.retire(pool.line, pool.lines);
        if let Some(ranks) = pool.ranks {
            self.release_table(ranks);
        }
    }

    fn release_table(&mut self, ranks: u32) {
        let Some(at) = self.tables.get_mut(&ranks) else {
            return;
        };
        at.users -= 1;
        if at.users > 0 {
            return;
        }
        let (key, lines) = (at.key, at.lines);
        self.tables.remove(&ranks);
        if self.known.get(&key) == Some(&ranks) {
            self.known.remove(&key);
        }
        self.graces.retire(ranks - TABLE_HEADER, lines);
    }

    /// Lines that nobody uses, one after the other.
    fn allocate(&mut self, count: u32) -> Result<u32, DatapathError> {
        self.graces.free_ended(&mut self.lines);
        loop {
            if let Some(line) = self.lines.take(count) {
                return Ok(line);
            }
            // A quarter more: the kernel waits with each addition until all programs have ended.
            let (chunks, needed) = (self.memory.chunks.len() as u32, count.div_ceil(CHUNK_LINES));
            let more = (chunks / 4).min(MAX_CHUNKS - chunks);
            // Less where there is not enough memory for that.
            match self.add_chunks(needed.max(more)) {
                Err(_) if more > needed => self.add_chunks(needed)?,
                added => added?,
            }
        }
    }

    fn add_chunks(&mut self, count: u32) -> Result<(), DatapathError> {
        let (first, last) = self.memory.grow(count)?;
        self.lines.free(first, last - first);
        Ok(())
    }
}

/// Ranks as they are in the kernel's memory, in whole lines.
fn packed(ranks: &[u16], bits: u32) -> Vec<u64> {
    let lines = rank_lines(ranks.len() as u32, bits);
    let mut words = vec![0; lines as usize * LINE_WORDS];
    for (slot, rank) in (0..).zip(ranks) {
        let part = Part::of_rank(slot, bits);
        words[part.line as usize * LINE_WORDS + part.word] |= u64::from(*rank) << part.shift;
    }
    words
}

/// Against damage, not against forgery: whoever writes these maps decides all.
fn add_to_checksum(sum: u64, word: u64) -> u64 {
    (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

/// What the line before a table says.
struct TableHeader {
    key: TableKey,
    checksum: u64,
}

/// The chunks, of which one at a time is in our own memory: the tables are the program's to read.
struct Memory {
    map: ArrayOfMaps<MapData, Chunk>,
    /// The same map.
    data: MapData,
    chunks: Vec<Chunk>,
    window: Option<(u32, Mapped<LINE_WORDS>)>,
}

impl Memory {
    fn open(map: ArrayOfMaps<MapData, Chunk>, data: MapData) -> Result<Self, DatapathError> {
        let mut chunks = Vec::new();
        for index in 0..MAX_CHUNKS {
            match map.get(&index, 0) {
                Ok(chunk) => chunks.push(chunk),
                Err(MapError::KeyNotFound) => break,
                Err(error) => return Err(failed("read", format!("{CHUNKS}[{index}]"), error)),
            }
        }
        Ok(Self {
            map,
            data,
            chunks,
            window: None,
        })
    }

    fn lines(&self) -> u32 {
        self.chunks.len() as u32 * CHUNK_LINES
    }

    /// Adds chunks; gives their lines: the first, and the one after the last.
    fn grow(&mut self, count: u32) -> Result<(u32, u32), DatapathError> {
        let first = self.chunks.len() as u32;
        let last = first + count;
        let object = format!("{CHUNKS}[{}]", last - 1);
        if last > MAX_CHUNKS {
            let full = io::Error::from_raw_os_error(libc::ENOSPC);
            return Err(DatapathError::new("update", object, full));
        }
        let mut added = Vec::new();
        for _ in 0..count {
            let chunk: Chunk =
                Array::create(CHUNK_LINES, MMAPABLE).map_err(|error| failed("create", &object, error))?;
            added.push(chunk);
        }
        let fds: Vec<BorrowedFd<'_>> = added.iter().map(|chunk| chunk.map().fd().as_fd()).collect();
        // At once where the kernel can (Linux 5.19).
        if syscall::put_maps(self.data.fd().as_fd(), first, &fds).is_err() {
            for (index, chunk) in (first..).zip(&added) {
                self.map
                    .set(index, chunk, 0)
                    .map_err(|error| failed("update", &object, error))?;
            }
        }
        self.chunks.extend(added);
        Ok((first * CHUNK_LINES, last * CHUNK_LINES))
    }

    fn line(&mut self, line: u32) -> Result<&[AtomicU64; LINE_WORDS], DatapathError> {
        let (index, within) = place_of(line);
        if self.window.as_ref().is_none_or(|(mapped, _)| *mapped != index) {
            let object = || format!("{CHUNKS}[{index}]");
            let missing = || DatapathError::new("read", object(), io::ErrorKind::NotFound.into());
            let chunk = self.chunks.get(index as usize).ok_or_else(missing)?;
            let memory = Mapped::new(chunk.map().fd().as_fd(), CHUNK_LINES).map_err(unmapped(object()))?;
            self.window = Some((index, memory));
        }
        match &self.window {
            Some((_, memory)) => Ok(&memory[within as usize]),
            None => Err(DatapathError::new("read", CHUNKS, io::ErrorKind::NotFound.into())),
        }
    }

    fn write(&mut self, first: u32, words: impl IntoIterator<Item = u64>) -> Result<(), DatapathError> {
        for (at, word) in (0_u32..).zip(words) {
            let line = self.line(first + at / LINE_WORDS as u32)?;
            line[at as usize % LINE_WORDS].store(word, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Header and members of the pool that begins in a line; nothing where none can be.
    fn pool(&mut self, line: u32) -> Result<Option<(PoolHeader, Vec<u32>)>, DatapathError> {
        let all = self.lines();
        if line >= all {
            return Ok(None);
        }
        let words = self
            .line(line)?
            .each_ref()
            .map(|word| word.load(Ordering::Relaxed));
        let header = PoolHeader::from_words(&words);
        let fits = |line: u32, lines: u32| line.checked_add(lines).is_some_and(|end| end <= all);
        let has_table = header.bits == 0
            || header.bits <= 16
                && header.bits.is_power_of_two()
                && header.slots <= MAX_SLOTS
                && header.ranks > 0
                && fits(header.ranks, rank_lines(header.slots, header.bits));
        if header.members > MAX_MEMBERS || !fits(line, pool_lines(header.members)) || !has_table {
            return Ok(None);
        }
        let mut members = Vec::with_capacity(header.members as usize);
        for rank in 0..header.members {
            let part = Part::of_member(rank);
            members
                .push((self.line(line + part.line)?[part.word].load(Ordering::Relaxed) >> part.shift) as u32);
        }
        Ok(Some((header, members)))
    }

    fn table_header(&mut self, pool: &PoolHeader) -> Result<TableHeader, DatapathError> {
        let line = self.line(pool.ranks - TABLE_HEADER)?;
        let [digest, checksum, shape] = [0, 1, 2].map(|at: usize| line[at].load(Ordering::Relaxed));
        Ok(TableHeader {
            key: (digest, shape as u32, (shape >> 32) as u32),
            checksum,
        })
    }

    fn checksum(&mut self, first: u32, lines: u32) -> Result<u64, DatapathError> {
        let mut sum = 0;
        for line in first..first + lines {
            for word in self.line(line)? {
                sum = add_to_checksum(sum, word.load(Ordering::Relaxed));
            }
        }
        Ok(sum)
    }
}

/// The lines that nobody uses.
#[derive(Debug, Default)]
struct Lines {
    /// How many, by the first of them.
    free: BTreeMap<u32, u32>,
}

impl Lines {
    /// All but these are free.
    fn set_used(&mut self, used: &BTreeMap<u32, u32>, end: u32) {
        self.free.clear();
        let mut next = 0;
        for (first, count) in used {
            if *first > next {
                self.free.insert(next, first - next);
            }
            next = next.max(first.saturating_add(*count));
        }
        if end > next {
            self.free.insert(next, end - next);
        }
    }

    /// The first that are enough.
    fn take(&mut self, count: u32) -> Option<u32> {
        let (first, found) = self.free.iter().find(|(_, found)| **found >= count)?;
        let (first, found) = (*first, *found);
        self.free.remove(&first);
        if found > count {
            self.free.insert(first + count, found - count);
        }
        Some(first)
    }

    fn free(&mut self, mut first: u32, mut count: u32) {
        // Line 0 stands for none.
        if first == 0 && count > 0 {
            (first, count) = (1, count - 1);
        }
        if let Some((before, found)) = self.free.range(..first).next_back()
            && before + found == first
        {
            (first, count) = (*before, found + count);
        }
        if let Some(after) = self.free.remove(&(first + count)) {
            count += after;
        }
        self.free.insert(first, count);
    }
}

/// Lines that programs may still read, until a grace period of RCU has passed that began later.
#[derive(Default)]
struct Graces {
    /// With the number of the request after which they are free.
    retired: VecDeque<(u64, u32, u32)>,
    requests: Arc<AtomicU64>,
    /// The last request that a grace period began after and has ended.
    ended: Arc<AtomicU64>,
    /// To the thread that waits, as soon as there is one.
    ask: Option<mpsc::SyncSender<()>>,
}

impl Graces {
    fn retire(&mut self, first: u32, count: u32) {
        let request = self.requests.fetch_add(1, Ordering::SeqCst) + 1;
        self.retired.push_back((request, first, count));
        let ask = self.ask.get_or_insert_with(|| {
            let (ask, asked) = mpsc::sync_channel(1);
            let (requests, ended) = (Arc::clone(&self.requests), Arc::clone(&self.ended));
            // Without the thread nothing is used again.
            let _ = thread::Builder::new()
                .name("graces".to_owned())
                .spawn(move || wait(&asked, &requests, &ended));
            ask
        });
        // Where it is full, the thread will see this request, too.
        let _ = ask.try_send(());
    }

    fn free_ended(&mut self, lines: &mut Lines) {
        let ended = self.ended.load(Ordering::SeqCst);
        while let Some((_, first, count)) = self.retired.pop_front_if(|(request, ..)| *request <= ended) {
            lines.free(first, count);
        }
    }
}

/// Waits until the programs have ended that may read what was retired, as often as it is asked.
fn wait(asked: &mpsc::Receiver<()>, requests: &AtomicU64, ended: &AtomicU64) {
    while asked.recv().is_ok() {
        let request = requests.load(Ordering::SeqCst);
        syscall::wait_for_programs();
        ended.store(request, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_line_is_given_to_two(operations in prop::collection::vec((any::<bool>(), 1_u32..40), 1..200)) {
            let mut lines = Lines::default();
            lines.set_used(&BTreeMap::from([(0, 1)]), 1000);
            let mut taken = BTreeMap::new();
            for (takes, count) in operations {
                if takes {
                    let Some(first) = lines.take(count) else { continue };
                    prop_assert!(first > 0 && first + count <= 1000);
                    let before = taken.range(..first + count).next_back();
                    prop_assert!(before.is_none_or(|(other, length)| other + length <= first));
                    taken.insert(first, count);
                } else if let Some((first, count)) = taken.pop_first() {
                    lines.free(first, count);
                }
                // As a restarted daemon finds them.
                let mut used = taken.clone();
                used.insert(0, 1);
                let mut found = Lines::default();
                found.set_used(&used, 1000);
                prop_assert_eq!(&found.free, &lines.free);
            }
        }

        #[test]
        fn packed_ranks_are_found_where_they_are_looked_for(
            ranks in prop::collection::vec(any::<u16>(), 1..600),
            bits in prop::sample::select(vec![1_u32, 2, 4, 8, 16]),
        ) {
            let ranks: Vec<u16> = ranks.iter().map(|rank| (u32::from(*rank) & ((1 << bits) - 1)) as u16).collect();
            let words = packed(&ranks, bits);
            for (slot, rank) in (0..).zip(&ranks) {
                let part = Part::of_rank(slot, bits);
                let word = words[part.line as usize * LINE_WORDS + part.word];
                prop_assert_eq!((word >> part.shift & ((1 << bits) - 1)) as u16, *rank);
            }
        }
    }
}
