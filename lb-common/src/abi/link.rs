use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The destination and the source MAC address as they begin an Ethernet header.
///
/// Three words rather than twelve bytes, because copies of byte arrays become byte loops in BPF.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Link(pub [u32; 3]);

const _: () = assert!(size_of::<Link>() == 12);

impl Link {
    /// The link from one interface to another.
    pub fn new(destination: [u8; 6], source: [u8; 6]) -> Self {
        let macs: [[u8; 6]; 2] = [destination, source];
        zerocopy::transmute!(macs)
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
}
