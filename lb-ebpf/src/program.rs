//! The entry point and the sequence of stages, nothing else.

use aya_ebpf::{
    bindings::{xdp_action::XDP_DROP, xdp_md},
    macros::xdp,
    programs::XdpContext,
};
use lb_common::{
    abi::{Reason, Settings},
    logic::{
        address_filter::{self, Ends},
        headers::{Fragment, Kind, Undecodable, decode},
    },
};

use crate::{
    answer,
    cursor::Cursor,
    flow::{self, Known, Reply, Reset},
    forward, fragment, icmp, maps,
    scratch::{Scratch, per_cpu},
    service,
    verdict::{Verdict, conclude},
};

#[xdp(frags)]
// What the macro makes calls it.
#[inline(always)]
pub fn xlb(context: XdpContext) -> u32 {
    let Some((totals, scratch)) = per_cpu() else {
        return XDP_DROP;
    };
    let verdict = balance(context.ctx, Cursor::new(context.ctx), scratch);
    conclude(&context, totals, scratch.bytes, verdict)
}

#[inline(always)]
fn balance(context: *mut xdp_md, frame: Cursor, scratch: &mut Scratch) -> Verdict {
    let ends = ends(&frame);
    if ends.is_foreign() {
        // Of what says that it is longer than the part that can be viewed, the kernel is asked: that is a call.
        scratch.bytes = if address_filter::packet_end(&frame) <= frame.viewable() {
            frame.viewable() as u64
        } else {
            frame.length()
        };
        return Verdict::pass(Reason::NotForService);
    }
    let decoded = decode(&frame, &mut scratch.packet);
    // A frame in several buffers is longer than what can be viewed.
    let (viewable, end) = (frame.viewable() as u64, scratch.packet.end as u64);
    scratch.bytes = if end > viewable { end } else { viewable };
    match decoded {
        Ok(Kind::Transport) => {}
        Ok(Kind::LaterFragment) => {
            if fragment::follow(scratch).is_none() {
                return not_followed(scratch, Reason::FragmentUnknown);
            }
        }
        Ok(Kind::Icmp) => return Verdict::from_bits(icmp::message(context)),
        Err(Undecodable::NotTransport(reason)) => return Verdict::pass(reason),
        Err(Undecodable::Malformed(reason)) => return not_followed(scratch, reason),
    }
    let Some(settings) = maps::settings() else {
        return Verdict::drop(Reason::Internal);
    };
    let service_id = if ends.to_vip {
        service::of_packet(scratch)
    } else {
        None
    };
    match service_id {
        Some(service_id) => from_client(context, frame, scratch, settings, service_id),
        None if ends.from_backend => from_backend(context, frame, scratch, settings),
        None => Verdict::pass(Reason::NotForService),
    }
}

/// Whose packet it may be: most are none of ours, on a host that does other things as well.
#[inline(always)]
fn ends(frame: &Cursor) -> Ends {
    let words = maps::address_filter();
    address_filter::ends(frame, |index| {
        (words.and_then(|words| words.get(index as usize)).copied()).unwrap_or(u64::MAX)
    })
}

/// A packet that cannot be looked up: dropped with the reason if it is for a VIP.
#[inline(always)]
fn not_followed(scratch: &Scratch, reason: Reason) -> Verdict {
    if service::is_vip(&scratch.packet.key.destination) {
        Verdict::drop(reason)
    } else {
        Verdict::pass(Reason::NotForService)
    }
}

/// A packet from a client: its flow's backend, or a new one.
#[inline(always)]
fn from_client(
    context: *mut xdp_md,
    frame: Cursor,
    scratch: &mut Scratch,
    settings: &Settings,
    service_id: u32,
) -> Verdict {
    let verdict = Verdict::of_service(service_id);
    let is_local =
        service::is_local(settings, service_id) && !flow::leaves_host(settings, scratch, service_id);
    // What is for this host needs no hop.
    if scratch.packet.ttl <= 1 && !is_local {
        return verdict.dropped(Reason::TtlExceeded);
    }
    if scratch.packet.fragment == Fragment::First as u8 {
        fragment::remember(scratch);
    }
    // The backend is selected where the host's own packets pass, too.
    if is_local {
        return Verdict::pass(Reason::Local);
    }
    let known = match flow::known(settings, &frame, scratch, service_id) {
        Some(known) => known,
        None => {
            let begun = flow::begin(scratch, frame.ingress_ifindex(), service_id);
            match Known::from_bits(begun, service_id) {
                Ok(known) => known,
                Err(Reason::NoBackend) => return answer::rejection(context, scratch, verdict),
                Err(reason) => return verdict.dropped(reason),
            }
        }
    };
    let Some(backend) = maps::backend(known.backend_id) else {
        return verdict.dropped(Reason::Internal);
    };
    match known.reset {
        Reset::None => {}
        Reset::OfBackend => {
            if answer::reset_of_backend(context, scratch).is_none() {
                return verdict.dropped(Reason::NoBackend);
            }
        }
        Reset::OfSender => return answer::reset_of_sender(context, scratch, verdict),
    }
    forward::to_backend(context, scratch, settings, verdict, &known, backend)
}

/// A packet for no service: a backend's reply to a client, or none of ours.
#[inline(always)]
fn from_backend(context: *mut xdp_md, frame: Cursor, scratch: &mut Scratch, settings: &Settings) -> Verdict {
    match flow::of_reply(settings, scratch) {
        Reply::Of(known) if known.reset == Reset::None => forward::to_client(frame, scratch, &known),
        Reply::Of(known) => answer::reset_of_sender(context, scratch, Verdict::of_service(known.service_id)),
        Reply::Late => Verdict::drop(Reason::NoFlow),
        Reply::None => Verdict::pass(Reason::NotForService),
    }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
