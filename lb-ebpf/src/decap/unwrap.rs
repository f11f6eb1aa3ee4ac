//! Takes the outer headers away: the Ethernet header moves to the inner packet, and the frame then begins there.

use core::mem::offset_of;

use lb_common::logic::{
    encapsulation::{Family, Unwrapping, ipv4_with_ecn, ipv6_with_ecn},
    headers::{Frame, View},
};
use lb_ebpf::cursor::Cursor;
use network_types::ip::Ipv4Hdr;

/// Unwraps a frame.
#[inline(always)]
pub fn unwrap(frame: Cursor, unwrapping: &Unwrapping) -> Option<()> {
    let inner = frame.view::<{ Ipv4Hdr::LEN }>(unwrapping.link_length + unwrapping.outer_length)?;
    match unwrapping.inner {
        Family::V4 => {
            let (start, sum) = (inner.u16(0), inner.u16(offset_of!(Ipv4Hdr, check)));
            let (start, sum) = ipv4_with_ecn(start, sum, unwrapping.ecn);
            inner.set_u16(0, start);
            inner.set_u16(offset_of!(Ipv4Hdr, check), sum);
        }
        Family::V6 => inner.set_u8(1, ipv6_with_ecn(inner.u8(1), unwrapping.ecn)),
    }

    // The two headers may overlap: an Ethernet header with two tags is longer than an IPv4 header. So all is read
    // before anything is written.
    let from = frame.view::<22>(0)?;
    let (a, b, c, d, e) = (from.u32(0), from.u32(4), from.u32(8), from.u32(12), from.u32(16));
    let to = frame.view::<22>(unwrapping.outer_length)?;
    to.set_u32(0, a);
    to.set_u32(4, b);
    to.set_u32(8, c);
    let ethertype = unwrapping.inner.ethertype();
    match unwrapping.link_length {
        14 => to.set_u16(12, ethertype),
        18 => {
            to.set_u32(12, d);
            to.set_u16(16, ethertype);
        }
        _ => {
            to.set_u32(12, d);
            to.set_u32(16, e);
            to.set_u16(20, ethertype);
        }
    }
    let shorter = -(unwrapping.outer_length as i32);
    frame.with_more_in_front(shorter).map(|_| ())
}
