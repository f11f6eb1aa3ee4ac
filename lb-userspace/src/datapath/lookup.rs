//! The maps by which a packet's addresses are looked up, in memory that is shared with the kernel.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::atomic::{AtomicU64, Ordering},
};

use lb_common::{
    abi::{ADDRESS_FILTER_WORDS, Address, ROLE_BACKEND, ROLE_VIP, SERVICE_BUCKETS, ServiceKey, WORDS},
    logic::{address_filter, service_table},
};

use super::flow_table::Mapped;

/// The services by what clients connect to.
pub(super) struct ServiceKeys(Mapped<WORDS>);

impl ServiceKeys {
    /// Maps the memory of the map.
    ///
    /// # Errors
    /// What the kernel says to mmap(2).
    pub(super) fn new(map: BorrowedFd<'_>) -> io::Result<Self> {
        Mapped::new(map, SERVICE_BUCKETS).map(Self)
    }

    /// Every key and its service's id.
    pub(super) fn iter(&self) -> impl Iterator<Item = (ServiceKey, u32)> {
        self.0.iter().flat_map(service_table::residents)
    }

    /// Puts a key there, or gives it another service.
    ///
    /// # Errors
    /// There is no room for it.
    pub(super) fn insert(&self, key: &ServiceKey, service: u32) -> io::Result<()> {
        if service_table::insert(|index| self.bucket(index), key, service) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::E2BIG))
        }
    }

    /// Removes a key.
    ///
    /// # Errors
    /// It is not there.
    pub(super) fn remove(&self, key: &ServiceKey) -> io::Result<()> {
        if service_table::remove(|index| self.bucket(index), key) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ENOENT))
        }
    }

    fn bucket(&self, index: u32) -> &[AtomicU64; WORDS] {
        &self.0[index as usize]
    }
}

/// The addresses that may be ours, with how many have each bit.
pub(super) struct AddressFilter {
    words: Mapped<{ ADDRESS_FILTER_WORDS as usize }>,
    /// By bit: as many as [`u16::MAX`] keep it for ever.
    counts: Vec<u16>,
}

impl AddressFilter {
    /// Maps the memory of the map, and has it tell of these addresses and no others.
    ///
    /// # Errors
    /// What the kernel says to mmap(2).
    pub(super) fn new(
        map: BorrowedFd<'_>,
        addresses: impl IntoIterator<Item = (Address, u32)>,
    ) -> io::Result<Self> {
        let mut filter = Self {
            words: Mapped::new(map, 1)?,
            counts: vec![0; 64 * ADDRESS_FILTER_WORDS as usize],
        };
        for (address, roles) in addresses {
            filter.change(&address, 0, roles);
        }
        for (index, counts) in filter.counts.chunks(64).enumerate() {
            let wanted = (0..64)
                .filter(|bit| counts[*bit] > 0)
                .fold(0, |word, bit| word | 1 << bit);
            filter.words[0][index].store(wanted, Ordering::SeqCst);
        }
        Ok(filter)
    }

    /// Notes that an address has other roles than before.
    pub(super) fn change(&mut self, address: &Address, before: u32, now: u32) {
        let (index, shift) = address_filter::place(address);
        for role in [ROLE_VIP, ROLE_BACKEND] {
            let bit = shift + role.trailing_zeros();
            let count = &mut self.counts[(64 * index + bit) as usize];
            let word: &AtomicU64 = &self.words[0][index as usize];
            match (before & role != 0, now & role != 0) {
                (false, true) => {
                    *count = count.saturating_add(1);
                    word.fetch_or(1 << bit, Ordering::SeqCst);
                }
                (true, false) if *count < u16::MAX => {
                    *count = count.saturating_sub(1);
                    if *count == 0 {
                        word.fetch_and(!(1 << bit), Ordering::SeqCst);
                    }
                }
                _ => {}
            }
        }
    }
}
