use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The destination and the source MAC address as they begin an Ethernet header.
///
/// Three words rather than twelve bytes, because copies of byte arrays become byte loops in BPF.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Link(pub [u32; 3]);

const _: () = assert!(size_of::<Link>() == 12);

/// In the first byte of a MAC address, which is the first of the word.
const GROUP_BIT: u32 = 0x0100_0000_u32.to_be();

impl Link {
    /// The link from one interface to another.
    pub fn new(destination: [u8; 6], source: [u8; 6]) -> Self {
        let macs: [[u8; 6]; 2] = [destination, source];
        zerocopy::transmute!(macs)
    }

    /// Tells whether frames go to a multicast or broadcast address (IEEE 802, section 8.2.2).
    #[inline(always)]
    pub const fn is_for_group(&self) -> bool {
        self.0[0] & GROUP_BIT != 0
    }

    /// MAC address that frames are sent to.
    pub fn destination(&self) -> [u8; 6] {
        self.macs()[0]
    }

    /// MAC address that frames are sent from.
    pub fn source(&self) -> [u8; 6] {
        self.macs()[1]
    }

    fn macs(&self) -> [[u8; 6]; 2] {
        zerocopy::transmute!(*self)
    }
}

/// Up to two VLAN tags (IEEE 802.1Q, 802.1ad), the outer one first; a word of 0 is no tag.
///
/// A tag is its EtherType and its control information as they lie in a frame, so that tags are copied as words.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Tags(pub [u32; 2]);

const _: () = assert!(size_of::<Tags>() == 8);

impl Tags {
    /// How many tags there are.
    #[inline(always)]
    pub const fn count(&self) -> u32 {
        if self.0[0] == 0 {
            0
        } else {
            1 + (self.0[1] != 0) as u32
        }
    }

    /// A tag from its EtherType and control information, both in host byte order.
    pub const fn tag(ethertype: u16, control: u16) -> u32 {
        ((ethertype as u32) << 16 | control as u32).to_be()
    }
}

/// A way back to clients: the interface that their packets arrive on and what frames to them begin with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ClientLink {
    pub link: Link,
    pub ifindex: u32,
    pub tags: Tags,
    /// One of the constants below.
    pub state: u64,
}

const _: () = assert!(size_of::<ClientLink>() == 32);

impl ClientLink {
    pub const FREE: u64 = 0;
    /// Is being written.
    pub const BUSY: u64 = 1;
    pub const VALID: u64 = 2;
    /// Valid, but free soon unless a packet comes by it: no flow had it when the daemon looked.
    pub const UNUSED: u64 = 3;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_the_beginning_of_an_ethernet_header() {
        let link = Link::new([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]);
        assert_eq!(link.as_bytes(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        assert_eq!(link.destination(), [1, 2, 3, 4, 5, 6]);
        assert_eq!(link.source(), [7, 8, 9, 10, 11, 12]);
    }

    #[test]
    fn a_tag_lies_as_in_a_frame() {
        let tags = Tags([Tags::tag(0x88a8, 0x2064), Tags::tag(0x8100, 7)]);
        assert_eq!(tags.as_bytes(), [0x88, 0xa8, 0x20, 0x64, 0x81, 0x00, 0x00, 0x07]);
        assert_eq!(tags.count(), 2);
        assert_eq!(Tags([Tags::tag(0x8100, 0), 0]).count(), 1);
        assert_eq!(Tags::default().count(), 0);
    }
}
