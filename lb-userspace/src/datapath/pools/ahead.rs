//! Slot tables that are made on all processors while those before them are written.

use std::{
    num::NonZero,
    sync::{
        Arc,
        mpsc::{Receiver, sync_channel},
    },
    thread,
};

use super::{RankTable, TableKey};

/// Tables that a thread has made and nobody has written: each takes 128 KiB.
const WAITING: usize = 4;
const MAX_THREADS: usize = 4;

/// Tables in the order in which they are to be written.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// By thread. They have the tables in turns.
    made: Vec<Receiver<(TableKey, Option<Vec<u16>>)>>,
    /// The thread that has the next.
    next: usize,
}

impl Ahead {
    /// Begins to make them, where there is more than one processor.
    pub(super) fn of(tables: Vec<Arc<RankTable>>) -> Self {
        if tables.len() < 2 {
            return Self::default();
        }
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        // On that of the caller, too, who waits for them more than they for him.
        let threads = if processors > 1 {
            processors.min(MAX_THREADS)
        } else {
            0
        };
        let tables = Arc::new(tables);
        let mut made = Vec::new();
        for first in 0..threads {
            let (sender, receiver) = sync_channel(WAITING);
            let tables = Arc::clone(&tables);
            let make = move || {
                for table in tables.iter().skip(first).step_by(threads) {
                    let ranks = table.ranks().map(|ranks| ranks.into_owned());
                    if sender.send((table.key(), ranks)).is_err() {
                        return;
                    }
                }
            };
            if thread::Builder::new()
                .name("tables".to_owned())
                .spawn(make)
                .is_err()
            {
                // Each table is made when it is written.
                return Self::default();
            }
            made.push(receiver);
        }
        Self { made, next: 0 }
    }

    /// The ranks of a table if it is the next; else there are none any more, and the threads end.
    pub(super) fn take(&mut self, key: TableKey) -> Option<Vec<u16>> {
        match self.made.get(self.next)?.recv() {
            Ok((next, ranks)) if next == key => {
                self.next = (self.next + 1) % self.made.len();
                ranks
            }
            _ => {
                self.made.clear();
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables() -> Vec<Arc<RankTable>> {
        let table = |identity| Arc::new(RankTable::in_turns(vec![1, identity, 3]));
        (2..12).map(table).collect()
    }

    #[test]
    fn tables_are_had_in_their_order() {
        let tables = tables();
        let mut ahead = Ahead::of(tables.clone());
        let has_threads = !ahead.made.is_empty();
        for table in &tables {
            let made = ahead.take(table.key());
            assert_eq!(made.is_some(), has_threads);
            assert!(made.is_none_or(|ranks| ranks == *table.ranks().unwrap()));
        }
        assert_eq!(ahead.take(tables[0].key()), None);
    }

    #[test]
    fn one_that_is_not_the_next_is_not_had_and_none_after_it() {
        let tables = tables();
        let mut ahead = Ahead::of(tables.clone());
        assert_eq!(ahead.take(tables[5].key()), None);
        assert_eq!(ahead.take(tables[1].key()), None);
    }
}
