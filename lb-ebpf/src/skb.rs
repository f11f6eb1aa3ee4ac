//! A packet as the host's stack has it: its beginning, and writing into it with checksums that hardware may still have
//! to compute, or has computed.

use core::mem::offset_of;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::generated::{bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_pull_data, bpf_skb_store_bytes},
};
use lb_common::logic::{
    checksum::{difference_of_addresses, difference16},
    headers::{Frame, Kind, decode},
};
use lb_ebpf::cursor::Checked;
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};

use crate::scratch::{Scratch, scratch};

/// Bytes that all headers fit into that are looked at.
const HEADERS: u32 = 256;

/// What can be viewed of a packet: its linear part.
struct Linear {
    data: usize,
    data_end: usize,
    length: usize,
}

impl Linear {
    #[inline(always)]
    fn new(context: *mut __sk_buff) -> Self {
        // SAFETY: the context is the one that the kernel called the program with.
        unsafe {
            Self {
                data: (*context).data as usize,
                data_end: (*context).data_end as usize,
                length: (*context).len as usize,
            }
        }
    }

    #[inline(always)]
    fn is_whole(&self) -> bool {
        self.data + self.length == self.data_end
    }
}

impl Frame for Linear {
    type View = Checked;

    #[inline(always)]
    fn reaches(&self, end: usize) -> bool {
        end <= self.length
    }

    #[inline(always)]
    fn view<const N: usize>(&self, offset: usize) -> Option<Checked> {
        Checked::between::<N>(self.data, self.data_end, offset)
    }

    #[inline(always)]
    fn length_in_stack(&self) -> Option<usize> {
        Some(self.length)
    }
}

/// Decodes a packet into [`Scratch::packet`]; nothing where it is neither TCP nor UDP.
#[inline(always)]
pub fn decoded(context: *mut __sk_buff) -> Option<Kind> {
    let mut kind = try_decode(context);
    let linear = Linear::new(context);
    if kind == UNDECODED && !linear.is_whole() {
        let length = linear.length as u32;
        // SAFETY: as in `Linear::new`.
        unsafe { bpf_skb_pull_data(context, if length < HEADERS { length } else { HEADERS }) };
        kind = try_decode(context);
    }
    match kind {
        TRANSPORT => Some(Kind::Transport),
        LATER_FRAGMENT => Some(Kind::LaterFragment),
        _ => None,
    }
}

const UNDECODED: u32 = 0;
const TRANSPORT: u32 = 1;
const LATER_FRAGMENT: u32 = 2;

/// A function that the verifier checks for itself: it is called twice. Gives the kind as a number.
#[unsafe(no_mangle)]
extern "C" fn try_decode(context: *mut __sk_buff) -> u32 {
    let Some(scratch) = scratch() else {
        return UNDECODED;
    };
    match decode(&Linear::new(context), &mut scratch.packet) {
        Ok(Kind::Transport) => TRANSPORT,
        Ok(Kind::LaterFragment) => LATER_FRAGMENT,
        _ => UNDECODED,
    }
}

/// `BPF_F_IPV6`: leaves the sum over the whole packet, where hardware has computed it, as IPv6 has no checksum of the
/// header that would balance the change (Linux 6.16, and stable kernels since).
const IS_IPV6: u64 = 1 << 7;

/// Gives a UDP packet, which is in [`Scratch::packet`], the 5-tuple in [`Scratch::tuple`]. Gives 0, or 1 where the kernel
/// refuses it; what can be viewed of the packet may have moved then.
///
/// A function that the verifier checks for itself.
#[unsafe(no_mangle)]
pub extern "C" fn readdress(context: *mut __sk_buff) -> u32 {
    match scratch().and_then(|scratch| try_readdress(context, scratch)) {
        Some(()) => 0,
        None => 1,
    }
}

#[inline(always)]
fn try_readdress(context: *mut __sk_buff, scratch: &Scratch) -> Option<()> {
    let (packet, new) = (&scratch.packet, &scratch.tuple);
    let old = &packet.key;
    let addresses = difference_of_addresses(&old.source, &new.source)
        + difference_of_addresses(&old.destination, &new.destination);
    if !packet.is_later_fragment() {
        let ports = difference16(old.source_port, new.source_port)
            + difference16(old.destination_port, new.destination_port);
        let offset = packet.transport_offset;
        let check = offset + offset_of!(UdpHdr, check) as u32;
        let flags = BPF_F_MARK_MANGLED_0 as u64;
        let pseudo = flags | BPF_F_PSEUDO_HDR as u64;
        let changed = packet.is_v6 != 0 && change(context, check, addresses, pseudo | IS_IPV6).is_some();
        if !changed {
            change(context, check, addresses, pseudo)?;
        }
        change(context, check, ports, flags)?;
        store(context, offset, &[new.source_port, new.destination_port])?;
    }
    if packet.is_v6 != 0 {
        let at = packet.ip_offset + offset_of!(Ipv6Hdr, src_addr) as u32;
        return store(context, at, &[new.source.by_words(), new.destination.by_words()]);
    }
    let check = packet.ip_offset + offset_of!(Ipv4Hdr, check) as u32;
    // SAFETY: the helper checks the offset; a size of 0 makes the value a difference.
    if unsafe { bpf_l3_csum_replace(context, check, 0, addresses as u64, 0) } != 0 {
        return None;
    }
    let at = packet.ip_offset + offset_of!(Ipv4Hdr, src_addr) as u32;
    store(context, at, &[new.source.v4_word(), new.destination.v4_word()])
}

/// Changes the checksum of UDP by a difference.
#[inline(always)]
fn change(context: *mut __sk_buff, at: u32, difference: u32, flags: u64) -> Option<()> {
    // SAFETY: as in `try_readdress`.
    (unsafe { bpf_l4_csum_replace(context, at, 0, difference as u64, flags) } == 0).then_some(())
}

#[inline(always)]
fn store<T>(context: *mut __sk_buff, at: u32, value: &T) -> Option<()> {
    // SAFETY: the pointer is to a live value of that size; the helper checks the offset.
    let result =
        unsafe { bpf_skb_store_bytes(context, at, (&raw const *value).cast(), size_of::<T>() as u32, 0) };
    (result == 0).then_some(())
}
