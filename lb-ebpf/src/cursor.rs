//! The frame: all bounds checks live here, no other module sees where the data ends.

use core::ptr::read_volatile;

use aya_ebpf::{helpers::bpf_xdp_get_buff_len, programs::XdpContext};
use lb_common::{
    abi::Link,
    logic::headers::{Frame, View},
};

/// A frame between the two pointers that the kernel gave.
pub struct Cursor {
    data: usize,
    data_end: usize,
    length: usize,
    pub ingress_ifindex: u32,
}

impl Cursor {
    #[inline(always)]
    pub fn new(context: &XdpContext) -> Self {
        let data = context.data();
        // The end is read twice, so that the compiler does not know that both are the same: it would conclude from
        // a check of the length that a check of the bounds is needless, and the verifier wants to see that one.
        // SAFETY: the context is the one that the kernel called the program with.
        let (ingress_ifindex, data_end, length) = unsafe {
            (
                (*context.ctx).ingress_ifindex,
                read_volatile(&raw const (*context.ctx).data_end) as usize,
                read_volatile(&raw const (*context.ctx).data_end) as usize - data,
            )
        };
        Self {
            data,
            data_end,
            length,
            ingress_ifindex,
        }
    }

    /// A frame that may go on in further buffers: its length is that of all, while what can be viewed ends with the
    /// first (Linux 5.18).
    #[inline(always)]
    pub fn over_buffers(context: &XdpContext) -> Self {
        // SAFETY: the context is the one that the kernel called the program with.
        let length = unsafe { bpf_xdp_get_buff_len(context.ctx) } as usize;
        Self {
            length,
            ..Self::new(context)
        }
    }

    /// The link on which a reply to this frame goes back: its MAC addresses, swapped.
    #[inline(always)]
    pub fn link_back(&self) -> Option<Link> {
        let view = self.view::<12>(0)?;
        let (a, b, c) = (view.u32(0), view.u32(4), view.u32(8));
        // Six bytes are one and a half words, so each word of the result is joined from two halves.
        Some(Link([
            (b >> 16) | (c << 16),
            (c >> 16) | (a << 16),
            (a >> 16) | (b << 16),
        ]))
    }
}

impl Frame for Cursor {
    type View = Checked;

    #[inline(always)]
    fn len(&self) -> usize {
        self.length
    }

    #[inline(always)]
    fn view<const N: usize>(&self, offset: usize) -> Option<Checked> {
        let start = self.data + offset;
        if start + N > self.data_end {
            return None;
        }
        Some(Checked(start))
    }
}

/// Bytes of the frame that are known to be there.
///
/// The verifier tracks the bounds and knows every access: an offset beyond what was checked does not load. Words
/// may be misaligned, which the verifier allows where the machine does.
#[derive(Clone, Copy)]
pub struct Checked(usize);

impl Checked {
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
