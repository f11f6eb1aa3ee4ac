//! The entry point and the sequence of stages, nothing else.

use aya_ebpf::{macros::xdp, programs::XdpContext};
use lb_common::{
    abi::Reason,
    logic::headers::{Segment, Undecodable, decode},
};

use crate::{
    cursor::Cursor,
    flow::{self, Record},
    forward, maps, select, service,
    verdict::{Verdict, conclude},
};

#[xdp]
pub fn xlb(context: XdpContext) -> u32 {
    let frame = Cursor::new(&context);
    let verdict = balance(&frame);
    conclude(&context, &frame, verdict)
}

#[inline(always)]
fn balance(frame: &Cursor) -> Verdict {
    match decode(frame) {
        Ok(segment) => match service::find(&segment.key) {
            Some(service_id) => from_client(frame, &segment, service_id),
            None => from_backend(frame, &segment),
        },
        Err(Undecodable::NotTransport(reason)) => Verdict::pass(reason),
        Err(Undecodable::Malformed { destination, reason }) if service::is_vip(&destination) => {
            Verdict::drop(reason)
        }
        Err(Undecodable::Malformed { .. }) => Verdict::pass(Reason::NotForService),
    }
}

/// A packet from a client: its flow's backend, or a new one.
#[inline(always)]
fn from_client(frame: &Cursor, segment: &Segment, service_id: u32) -> Verdict {
    let verdict = Verdict::of_service(service_id);
    if segment.ttl <= 1 {
        return verdict.dropped(Reason::TtlExceeded);
    }
    let (Some(settings), Some(service)) = (maps::settings(), maps::service(service_id)) else {
        return verdict.dropped(Reason::Internal);
    };
    let now = flow::now();
    let (flow, backend_id, backend) = match flow::known(settings, segment, now) {
        Some(known) => known,
        None => {
            let Some((backend_id, backend)) = select::backend(settings, service, service_id, &segment.key)
            else {
                return verdict.dropped(Reason::NoBackend);
            };
            let record = Record {
                frame,
                settings,
                service,
                service_id,
                backend_id,
                backend,
                now,
            };
            match flow::record(&record, segment) {
                Ok(flow) => (flow, backend_id, backend),
                Err(reason) => return verdict.dropped(reason),
            }
        }
    };
    forward::to_backend(frame, segment, verdict, flow, backend_id, backend)
}

/// A packet for no service: a backend's reply to a client, or none of ours.
#[inline(always)]
fn from_backend(frame: &Cursor, segment: &Segment) -> Verdict {
    if !service::is_backend(&segment.key.source) {
        return Verdict::pass(Reason::NotForService);
    }
    match flow::of_reply(segment) {
        Ok(Some(reply)) => forward::to_client(frame, segment, &reply),
        Ok(None) => Verdict::pass(Reason::NotForService),
        Err(reason) => Verdict::drop(reason),
    }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
