//! The words of the flow table; how they are used is in `logic::flow_table`, and why in docs/design/flow-table.md.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::TcpState;

/// Units of 16 bytes in a bucket: four in each of its two cache lines.
pub const UNITS: usize = 8;
/// Words of 64 bits in a bucket, two for each unit.
pub const WORDS: usize = 2 * UNITS;
/// Words in a cache line.
pub const LINE: usize = WORDS / 2;

/// What flows with the same hash share; the value of the flow table's array.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Bucket(pub [u64; WORDS]);

const _: () = assert!(size_of::<Bucket>() == 128);

/// Buckets of a table for so many flows: half as many units again as flows.
pub const fn buckets(flows: u32) -> u32 {
    let units = flows as u64 * 3 / 2;
    let buckets = units.div_ceil(UNITS as u64);
    if buckets == 0 { 1 } else { buckets as u32 }
}

/// Flows that a table of so many buckets is for.
pub const fn flows(buckets: u32) -> u32 {
    (buckets as u64 * UNITS as u64 * 2 / 3) as u32
}

/// Flows that each CPU records in a second or so, of a table of so many buckets, before it takes further ones for a flood:
/// a thirty-second of those that the table is for, and no fewer than a host of any size sees in earnest.
pub const fn opening_budget(buckets: u32) -> u32 {
    let budget = buckets / 6;
    if budget < 4096 { 4096 } else { budget }
}

/// What a unit holds.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Empty = 0,
    /// A flow over IPv4 whose source port the backend sees as it is.
    Short = 1,
    /// Any other flow; takes the next unit too, for the client's address.
    Long = 2,
    /// Leads from the source port that a flow was given to the flow.
    Alias = 3,
}

/// The second word of a unit: all that is known of a flow but its client.
///
/// It is read and replaced as a whole. From the lowest bit: 14 bits of service id, 18 of backend id, 2 of [`Kind`], 3 of
/// state, 3 of [`Forward`](super::Forward), 8 of age, 15 of the link to the client, 1 that is a mark, see [`Meta::overflows`].
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta(pub u64);

/// "No service", of a unit that is being written.
const NOBODY: u64 = SERVICE_MASK;
const SERVICE_MASK: u64 = 0x3fff;
const BACKEND: u32 = 14;
const BACKEND_MASK: u64 = 0x3_ffff;
const KIND: u32 = 32;
const STATE: u32 = 34;
const FORWARD: u32 = 37;
const AGE: u32 = 40;
const LINK: u32 = 48;
const LINK_MASK: u64 = 0x7fff;
/// A mark of the bucket or of a line, not of the flow: it is not lost with it, as long as the map is there.
const OVERFLOWS: u64 = 1 << 63;
/// The bits that stay the same as long as a flow does, but for the link.
const IDENTITY: u64 = 0xffff_ffff | 3 << KIND | 7 << FORWARD;
/// In place of a link, of a flow that its client has left.
const LEFT: u32 = 0x7fff;
const _: () = assert!(super::MAX_SERVICES as u64 == NOBODY && super::MAX_BACKENDS as u64 == BACKEND_MASK);
/// State of a UDP flow of which more than its first datagram was seen.
const CONFIRMED: u64 = 7;

impl Meta {
    pub const EMPTY: Self = Self(0);

    #[inline(always)]
    pub const fn new(kind: Kind, service: u32, backend: u32, forward: u8) -> Self {
        Self(
            (service as u64 & SERVICE_MASK)
                | (backend as u64 & BACKEND_MASK) << BACKEND
                | (kind as u64) << KIND
                | ((forward & 7) as u64) << FORWARD,
        )
    }

    /// A unit that is being written; as long as the flow that it is for, so that nobody takes an address for a unit.
    #[inline(always)]
    pub const fn busy(self, kind: Kind) -> Self {
        Self(NOBODY | (kind as u64) << KIND | self.0 & OVERFLOWS)
    }

    /// The unit without a flow.
    #[inline(always)]
    pub const fn emptied(self) -> Self {
        Self(self.0 & OVERFLOWS)
    }

    /// Another flow in the place of this one.
    #[inline(always)]
    pub const fn replaced(self, by: Self) -> Self {
        Self(by.0 & !OVERFLOWS | self.0 & OVERFLOWS)
    }

    /// Tells whether the unit has a mark: flows that belong where it stands for are elsewhere, because there was no room, see
    /// `logic::flow_table::mark_overflow`.
    #[inline(always)]
    pub const fn overflows(self) -> bool {
        self.0 & OVERFLOWS != 0
    }

    #[inline(always)]
    pub const fn with_overflow(self, overflows: bool) -> Self {
        Self(self.0 & !OVERFLOWS | if overflows { OVERFLOWS } else { 0 })
    }

    #[inline(always)]
    pub const fn is_busy(self) -> bool {
        self.0 & SERVICE_MASK == NOBODY
    }

    #[inline(always)]
    pub const fn is_empty(self) -> bool {
        self.is(Kind::Empty)
    }

    #[inline(always)]
    pub const fn is(self, kind: Kind) -> bool {
        (self.0 >> KIND) & 3 == kind as u64
    }

    #[inline(always)]
    pub const fn service(self) -> u32 {
        (self.0 & SERVICE_MASK) as u32
    }

    #[inline(always)]
    pub const fn backend(self) -> u32 {
        (self.0 >> BACKEND & BACKEND_MASK) as u32
    }

    #[inline(always)]
    pub const fn forward(self) -> u8 {
        (self.0 >> FORWARD) as u8 & 7
    }

    /// [`TcpState::None`] for UDP.
    #[inline(always)]
    pub const fn state(self) -> TcpState {
        match (self.0 >> STATE) & 7 {
            CONFIRMED => TcpState::None,
            number => TcpState::from_number(number as u8),
        }
    }

    /// Tells whether the state is [`TcpState::Established`], by less than [`Self::state`] takes.
    #[inline(always)]
    pub const fn is_established(self) -> bool {
        (self.0 >> STATE) & 7 == TcpState::Established as u64
    }

    /// Tells whether a UDP flow was seen to go on after its first datagram.
    #[inline(always)]
    pub const fn is_confirmed(self) -> bool {
        (self.0 >> STATE) & 7 == CONFIRMED
    }

    #[inline(always)]
    pub const fn is_udp(self) -> bool {
        (self.0 >> STATE) & 7 == TcpState::None as u64 || self.is_confirmed()
    }

    #[inline(always)]
    pub const fn with_state(self, state: TcpState) -> Self {
        Self(self.0 & !(7 << STATE) | (state as u64) << STATE)
    }

    #[inline(always)]
    pub const fn confirmed(self) -> Self {
        Self(self.0 | CONFIRMED << STATE)
    }

    /// Ticks of the state's clock when the last packet was seen, see `logic::ageing`.
    #[inline(always)]
    pub const fn age(self) -> u8 {
        (self.0 >> AGE) as u8
    }

    #[inline(always)]
    pub const fn with_age(self, age: u8) -> Self {
        Self(self.0 & !(0xff << AGE) | (age as u64) << AGE)
    }

    /// Index of the link on which replies go to the client; 0 for none.
    #[inline(always)]
    pub const fn link(self) -> u32 {
        ((self.0 >> LINK) & LINK_MASK) as u32
    }

    #[inline(always)]
    pub const fn with_link(self, link: u32) -> Self {
        Self(self.0 & !(LINK_MASK << LINK) | (link as u64 & LINK_MASK) << LINK)
    }

    /// The same of another kind.
    #[inline(always)]
    pub const fn of_kind(self, kind: Kind) -> Self {
        Self(self.0 & !(3 << KIND) | (kind as u64) << KIND)
    }

    /// Kept for a while to tell late replies of the backend that its client has left.
    #[inline(always)]
    pub const fn left(self) -> Self {
        self.with_link(LEFT)
    }

    /// Tells whether the client of the flow has another backend by now.
    #[inline(always)]
    pub const fn is_left(self) -> bool {
        self.link() == LEFT
    }

    /// Tells whether both are of the same flow, as far as can be told from them.
    #[inline(always)]
    pub const fn is_of_same(self, other: Self) -> bool {
        (self.0 ^ other.0) & IDENTITY == 0
    }
}
