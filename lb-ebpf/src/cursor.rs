//! The frame: all bounds checks live here, no other module sees where the data ends.

use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::xdp_md,
    helpers::generated::{bpf_csum_diff, bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len},
};
use lb_common::logic::headers::{Frame, Packet, View, decode_extensions};

/// Offsets stay below this: 14 bytes of Ethernet, two VLAN tags, IPv6 with six extension headers of at most 2,048
/// bytes, and what an ICMP error quotes. The verifier is told by a mask.
const OFFSET_MASK: usize = 0x3fff;

/// A frame between the two pointers that the kernel gave.
pub struct Cursor {
    context: *mut xdp_md,
    data: usize,
    data_end: usize,
    /// A frame in several buffers has more.
    viewable: usize,
}

impl Cursor {
    #[inline(always)]
    pub fn new(context: *mut xdp_md) -> Self {
        // The end is read twice, so that the compiler does not know that both are the same: it would conclude from
        // a check of the length that a check of the bounds is needless, and the verifier wants to see that one.
        // SAFETY: the context is the one that the kernel called the program with.
        let (data, data_end, viewable) = unsafe {
            let data = read_volatile(&raw const (*context).data) as usize;
            (
                data,
                read_volatile(&raw const (*context).data_end) as usize,
                read_volatile(&raw const (*context).data_end) as usize - data,
            )
        };
        Self {
            context,
            data,
            data_end,
            viewable,
        }
    }

    /// Bytes that can be viewed.
    #[inline(always)]
    pub fn viewable(&self) -> usize {
        self.viewable
    }

    /// Length of the frame in bytes, further buffers included (Linux 5.18).
    #[inline(always)]
    pub fn length(&self) -> u64 {
        // SAFETY: as in `new`.
        unsafe { bpf_xdp_get_buff_len(self.context) }
    }

    #[inline(always)]
    pub fn ingress_ifindex(&self) -> u32 {
        // SAFETY: as in `new`.
        unsafe { (*self.context).ingress_ifindex }
    }

    /// The frame with so many bytes more in front of it, or fewer where the number is negative. What was a view of
    /// the frame is none any more.
    #[inline(always)]
    pub fn with_more_in_front(self, bytes: i32) -> Option<Self> {
        // SAFETY: the helper checks the room itself.
        if unsafe { bpf_xdp_adjust_head(self.context, -bytes) } != 0 {
            return None;
        }
        Some(Self::new(self.context))
    }

    /// The frame with fewer bytes at its end.
    #[inline(always)]
    pub fn cut_to(self, length: usize) -> Option<Self> {
        let fewer = self.length() as i64 - length as i64;
        // SAFETY: as in `with_more_in_front`.
        if unsafe { bpf_xdp_adjust_tail(self.context, -fewer as i32) } != 0 {
            return None;
        }
        Some(Self::new(self.context))
    }
}

impl Frame for Cursor {
    type View = Checked;

    #[inline(always)]
    fn reaches(&self, end: usize) -> bool {
        end <= self.viewable || end as u64 <= self.length()
    }

    #[inline(always)]
    fn view<const N: usize>(&self, offset: usize) -> Option<Checked> {
        Checked::between::<N>(self.data, self.data_end, offset)
    }

    #[inline(always)]
    fn extensions(&self, packet: &mut Packet, next: u8, offset: usize) -> u32 {
        extensions(self.context, packet, next as u32, offset as u32)
    }
}

/// [`Frame::extensions`] of the frame of a context. A function that the verifier checks for itself, once for all offsets.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn extensions(context: *mut xdp_md, packet: *mut Packet, next: u32, offset: u32) -> u32 {
    // SAFETY: the caller's reference, which the verifier has seen to be as long as a packet.
    match unsafe { packet.as_mut() } {
        Some(packet) => decode_extensions(
            &Cursor::new(context),
            packet,
            next as u8,
            offset as usize & OFFSET_MASK,
        ),
        None => u32::MAX,
    }
}

/// Bytes of the frame that are known to be there.
///
/// The verifier tracks the bounds and knows every access: an offset beyond what was checked does not load. Words
/// may be misaligned, which the verifier allows where the machine does.
#[derive(Clone, Copy)]
pub struct Checked(usize);

impl Checked {
    /// The `N` bytes at an offset between two pointers of a context, or nothing where they end before.
    #[inline(always)]
    pub fn between<const N: usize>(data: usize, data_end: usize, offset: usize) -> Option<Self> {
        let start = data + (offset & OFFSET_MASK);
        if start + N > data_end {
            return None;
        }
        Some(Self(start))
    }

    #[inline(always)]
    pub fn set_u8(&self, at: usize, value: u8) {
        // SAFETY: within the checked bytes, see the type.
        unsafe { *((self.0 + at) as *mut u8) = value }
    }

    #[inline(always)]
    pub fn set_u16(&self, at: usize, value: u16) {
        // SAFETY: within the checked bytes, see the type.
        unsafe { *((self.0 + at) as *mut u16) = value }
    }

    #[inline(always)]
    pub fn set_u32(&self, at: usize, value: u32) {
        // SAFETY: within the checked bytes, see the type.
        unsafe { *((self.0 + at) as *mut u32) = value }
    }

    #[inline(always)]
    pub fn set_u64(&self, at: usize, value: u64) {
        // SAFETY: within the checked bytes, see the type.
        unsafe { *((self.0 + at) as *mut u64) = value }
    }
}

impl Checked {
    /// The ones' complement sum of the first `N` bytes, a multiple of 4.
    #[inline(always)]
    pub fn sum<const N: usize>(&self) -> u32 {
        // SAFETY: within the checked bytes, see the type; the helper reads them alone.
        unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, self.0 as *mut u32, N as u32, 0) as u32 }
    }
}

impl View for Checked {
    #[inline(always)]
    fn u8(&self, at: usize) -> u8 {
        // SAFETY: within the checked bytes, see the type.
        unsafe { *((self.0 + at) as *const u8) }
    }

    #[inline(always)]
    fn u16(&self, at: usize) -> u16 {
        // SAFETY: within the checked bytes, see the type.
        unsafe { *((self.0 + at) as *const u16) }
    }

    #[inline(always)]
    fn u32(&self, at: usize) -> u32 {
        // SAFETY: within the checked bytes, see the type.
        unsafe { *((self.0 + at) as *const u32) }
    }
}
