//! A frame of the stack: read by views, written by helpers alone.
//!
//! Were a view written to, the kernel would have every packet that meets the program copied if it is shared, as those
//! of TCP are.

use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::generated::{
        bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_pull_data,
        bpf_skb_store_bytes, bpf_skb_vlan_pop, bpf_skb_vlan_push,
    },
};
use lb_common::{abi::Address, logic::headers::Frame};
use lb_ebpf::cursor::Checked;

/// The linear part of a frame.
pub struct Skb {
    context: *mut __sk_buff,
    data: usize,
    data_end: usize,
}

/// A checksum of TCP, UDP or ICMPv6, which covers the addresses of the packet.
pub struct Transport {
    /// Offset of the checksum in the frame.
    pub checksum: u32,
    /// Zero means that there is none.
    pub is_udp: bool,
}

impl Skb {
    #[inline(always)]
    pub fn new(context: *mut __sk_buff) -> Self {
        // SAFETY: the context is the one that the kernel called the program with.
        let (data, data_end) = unsafe {
            (
                read_volatile(&raw const (*context).data) as usize,
                read_volatile(&raw const (*context).data_end) as usize,
            )
        };
        Self {
            context,
            data,
            data_end,
        }
    }

    /// As [`Self::new`], with so many bytes of the frame in its linear part, or all where it has fewer.
    #[inline(always)]
    pub fn with_linear(context: *mut __sk_buff, bytes: u32) -> Self {
        let frame = Self::new(context);
        let wanted = if frame.length() < bytes {
            frame.length()
        } else {
            bytes
        };
        if frame.data + wanted as usize <= frame.data_end {
            return frame;
        }
        // SAFETY: as in `new`. Where there is no memory for it, the views find too little.
        unsafe { bpf_skb_pull_data(context, wanted) };
        Self::new(context)
    }

    /// Length of the frame in bytes.
    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: as in `new`.
        unsafe { (*self.context).len }
    }

    /// Puts words in the place of others; `flags` are those of `bpf_skb_store_bytes`.
    #[inline(always)]
    pub fn store<const N: usize>(&self, offset: u32, words: &[u32; N]) -> Option<()> {
        self.store_with(offset, words, 0)
    }

    #[inline(always)]
    fn store_with<const N: usize>(&self, offset: u32, words: &[u32; N], flags: u32) -> Option<()> {
        let (from, length) = (words.as_ptr().cast(), size_of::<[u32; N]>() as u32);
        // SAFETY: the helper reads so many bytes of `words`, and checks the offset itself.
        let result = unsafe { bpf_skb_store_bytes(self.context, offset, from, length, flags as u64) };
        (result == 0).then_some(())
    }

    /// Puts an address in the place of another at an offset in the IP header at `ip_offset`, and keeps the checksums
    /// right, whether they are there already, left to the network card, or verified by it.
    #[inline(always)]
    pub fn replace_address(
        &self,
        ip_offset: u32,
        offset: u32,
        old: &Address,
        new: &Address,
        transport: Option<Transport>,
    ) -> Option<()> {
        let is_v4 = new.is_v4();
        if let Some(transport) = transport {
            let mut flags = BPF_F_PSEUDO_HDR as u64;
            if transport.is_udp {
                flags |= BPF_F_MARK_MANGLED_0 as u64;
            }
            // SAFETY: as in `store`; the differences are of whole addresses, or of the words that differ.
            let result = unsafe {
                if is_v4 {
                    let (from, to) = (old.v4_word() as u64, new.v4_word() as u64);
                    bpf_l4_csum_replace(self.context, transport.checksum, from, to, flags | 4)
                } else {
                    let difference = difference(old, new) as u64;
                    bpf_l4_csum_replace(self.context, transport.checksum, 0, difference, flags)
                }
            };
            if result != 0 {
                return None;
            }
        }
        if !is_v4 {
            // Without a checksum of its own, an IPv6 header changes what the card has summed up.
            return self.store_with(offset, &new.0, BPF_F_RECOMPUTE_CSUM);
        }
        self.replace_v4(ip_offset, offset, old, new)
    }

    /// Puts an IPv4 address in the place of another, and keeps the header's checksum right.
    #[inline(always)]
    pub fn replace_v4(&self, ip_offset: u32, offset: u32, old: &Address, new: &Address) -> Option<()> {
        let (from, to) = (old.v4_word() as u64, new.v4_word() as u64);
        // SAFETY: as in `store`.
        let result = unsafe { bpf_l3_csum_replace(self.context, ip_offset + 10, from, to, 4) };
        if result != 0 {
            return None;
        }
        self.store(offset, &[new.v4_word()])
    }

    /// Puts an IPv6 address that an ICMPv6 message quotes in the place of another, and keeps the checksum of the
    /// message right.
    #[inline(always)]
    pub fn replace_quoted_v6(&self, offset: u32, old: &Address, new: &Address, checksum: u32) -> Option<()> {
        // SAFETY: as in `store`.
        let result =
            unsafe { bpf_l4_csum_replace(self.context, checksum, 0, difference(old, new) as u64, 0) };
        if result != 0 {
            return None;
        }
        self.store(offset, &new.0)
    }

    /// The first VLAN tag on the wire: the one that the kernel notes beside the frame, or else the first within, as its
    /// four bytes lie there.
    #[inline(always)]
    pub fn outer_tag(&self, within: u32) -> (u16, u16) {
        // SAFETY: as in `new`.
        let (is_noted, protocol, control) = unsafe {
            (
                (*self.context).vlan_present,
                (*self.context).vlan_proto,
                (*self.context).vlan_tci,
            )
        };
        if is_noted != 0 {
            (protocol as u16, control as u16)
        } else {
            (within as u16, u16::from_be((within >> 16) as u16))
        }
    }

    /// Takes the first VLAN tag away; the next is noted beside the frame then.
    #[inline(always)]
    pub fn pop_tag(&self) -> Option<()> {
        // SAFETY: as in `store`.
        let result = unsafe { bpf_skb_vlan_pop(self.context) };
        (result == 0).then_some(())
    }

    /// Puts a VLAN tag, EtherType as it lies in the frame and control information, before all others.
    #[inline(always)]
    pub fn push_tag(&self, (protocol, control): (u16, u16)) -> Option<()> {
        // SAFETY: as in `store`.
        let result = unsafe { bpf_skb_vlan_push(self.context, protocol, control) };
        (result == 0).then_some(())
    }

    /// Makes room for outer headers between the Ethernet header and the packet.
    #[inline(always)]
    pub fn make_room(&self, bytes: u32, flags: u64) -> Option<()> {
        // SAFETY: as in `store`.
        let result = unsafe { bpf_skb_adjust_room(self.context, bytes as i32, BPF_ADJ_ROOM_MAC, flags) };
        (result == 0).then_some(())
    }
}

/// The difference that the change of an address makes for a checksum.
#[inline(always)]
fn difference(old: &Address, new: &Address) -> u32 {
    let (mut from, mut to) = (old.by_words(), new.by_words());
    // SAFETY: the helper reads 16 bytes of both.
    unsafe { bpf_csum_diff(from.0.as_mut_ptr(), 16, to.0.as_mut_ptr(), 16, 0) as u32 }
}

impl Frame for Skb {
    type View = Checked;

    #[inline(always)]
    fn reaches(&self, end: usize) -> bool {
        end <= self.length() as usize
    }

    #[inline(always)]
    fn view<const N: usize>(&self, offset: usize) -> Option<Checked> {
        Checked::between::<N>(self.data, self.data_end, offset)
    }

    #[inline(always)]
    fn length_in_stack(&self) -> Option<usize> {
        Some(self.length() as usize)
    }
}
