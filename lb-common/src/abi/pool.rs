//! Where new flows of a service go: its pool, in memory that the daemon writes and the program reads; why it is so is in
//! docs/design/slot-tables.md.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Sizes of the slot tables by hash, for few and for many members: primes, as Maglev wants it (NSDI 2016, section 3.4).
pub const FEW_SLOTS: u32 = 16_381;
pub const MANY_SLOTS: u32 = 65_537;
/// Slots of any table at most.
pub const MAX_SLOTS: u32 = MANY_SLOTS;
/// Members of a pool at most: ranks have 16 bits.
pub const MAX_MEMBERS: u32 = 65_536;

/// A cache line of the pools' memory; words of 64 bits.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PoolLine(pub [u64; LINE_WORDS]);

const _: () = assert!(size_of::<PoolLine>() == 64);

/// Words of a [`PoolLine`].
pub const LINE_WORDS: usize = 8;
/// Lines of a chunk, an array map: 1 MiB.
pub const CHUNK_LINES: u32 = 1 << CHUNK_SHIFT;
const CHUNK_SHIFT: u32 = 14;
/// Chunks at most: 4 GiB.
pub const MAX_CHUNKS: u32 = 4096;

/// The chunk that a line is in, and the index there.
#[inline(always)]
pub const fn place_of(line: u32) -> (u32, u32) {
    (line >> CHUNK_SHIFT, line & (CHUNK_LINES - 1))
}

/// What a pool begins with: its first two words. The members follow, ids of backends of 32 bits, by rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolHeader {
    /// The line in which the ranks by slot begin.
    pub ranks: u32,
    /// Bits of a rank, a power of two up to 16; 0 where a slot is its member's rank and there is no table.
    pub bits: u32,
    /// Slots; 0 where nobody gets new flows.
    pub slots: u32,
    pub members: u32,
}

/// Words of a [`PoolHeader`].
const HEADER_WORDS: usize = 2;

impl PoolHeader {
    #[inline(always)]
    pub const fn from_words(words: &[u64; LINE_WORDS]) -> Self {
        Self {
            ranks: words[0] as u32,
            bits: (words[0] >> 32) as u32,
            slots: words[1] as u32,
            members: (words[1] >> 32) as u32,
        }
    }

    pub const fn into_words(self) -> [u64; HEADER_WORDS] {
        [
            (self.bits as u64) << 32 | self.ranks as u64,
            (self.members as u64) << 32 | self.slots as u64,
        ]
    }
}

/// Part of a line, with how far from the beginning of something it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub line: u32,
    pub word: usize,
    pub shift: u32,
}

impl Part {
    #[inline(always)]
    const fn at_bit(bit: u32) -> Self {
        Self {
            line: bit >> 9,
            word: (bit >> 6) as usize & (LINE_WORDS - 1),
            shift: bit & 63,
        }
    }

    /// The rank of a slot, from the first line of the ranks on.
    #[inline(always)]
    pub const fn of_rank(slot: u32, bits: u32) -> Self {
        Self::at_bit(slot * bits)
    }

    /// The id of a member, from the first line of the pool on; 32 bits.
    #[inline(always)]
    pub const fn of_member(rank: u32) -> Self {
        Self::at_bit((rank + 2 * HEADER_WORDS as u32) * 32)
    }
}

/// Lines of a pool of so many members.
pub const fn pool_lines(members: u32) -> u32 {
    (members + 2 * HEADER_WORDS as u32).div_ceil(2 * LINE_WORDS as u32)
}

/// Bits that tell so many ranks apart: a power of two, so that none is in two words; 0 for one rank.
pub const fn rank_bits(ranks: u32) -> u32 {
    let bits = u32::BITS - ranks.saturating_sub(1).leading_zeros();
    if bits == 0 { 0 } else { bits.next_power_of_two() }
}

/// Lines of the ranks of so many slots.
pub const fn rank_lines(slots: u32, bits: u32) -> u32 {
    (slots as u64 * bits as u64).div_ceil(512) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_have_as_few_bits_as_tell_them_apart() {
        let ranks = [1, 2, 3, 4, 5, 16, 17, 256, 257, MAX_MEMBERS];
        assert_eq!(
            ranks.map(rank_bits),
            [0, 1, 2, 2, 4, 4, 8, 8, 16, 16],
            "for {ranks:?}"
        );
    }

    #[test]
    fn ten_members_are_in_the_line_of_their_header() {
        assert_eq!((pool_lines(0), pool_lines(12), pool_lines(13)), (1, 1, 2));
        assert_eq!(
            Part::of_member(11),
            Part {
                line: 0,
                word: 7,
                shift: 32
            }
        );
        assert_eq!(
            Part::of_member(12),
            Part {
                line: 1,
                word: 0,
                shift: 0
            }
        );
    }

    #[test]
    fn the_last_rank_is_in_the_last_line() {
        for bits in [1, 2, 4, 8, 16] {
            for slots in [1, 2, 511, 512, 513, FEW_SLOTS, MANY_SLOTS] {
                assert_eq!(Part::of_rank(slots - 1, bits).line + 1, rank_lines(slots, bits));
            }
        }
    }

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let header = PoolHeader {
            ranks: 0x0123_4567,
            bits: 16,
            slots: MANY_SLOTS,
            members: 0xfedc,
        };
        let [first, second] = header.into_words();
        assert_eq!(PoolHeader::from_words(&[first, second, 0, 0, 0, 0, 0, 0]), header);
    }
}
