//! The layout of what crosses the kernel boundary.
//!
//! Every type is `repr(C)` with fixed-width fields and named, zeroed padding; zerocopy's `IntoBytes` refuses a
//! layout with hidden padding at compile time and a const assert pins each size. Addresses and ports are in
//! network byte order, everything else in the host's. A change to any layout raises [`LAYOUT_VERSION`].

mod address;
mod backend;
mod bench;
mod counters;
mod decap_reason;
mod flow;
mod flow_table;
mod fragment;
mod link;
mod pool;
mod probe_path;
mod reason;
mod service;
mod settings;
mod source_filter;

pub use address::Address;
pub use backend::{Backend, BackendFlags};
pub use bench::{BenchProgress, BenchTemplate, FloorBackend, FloorBucket, TEMPLATE_WORDS};
pub use counters::{BackendCounters, Count, LiveCount, PerCpu, REASON_ENTRIES, Scratch, Totals, of_cpu};
pub use decap_reason::{DECAP_REASON_COUNT, DecapReason};
pub use flow::{FlowKey, TcpState};
pub use flow_table::{Bucket, Kind, LINE, Meta, UNITS, WORDS, buckets, flows, opening_budget};
pub use fragment::{FragmentKey, FragmentPorts};
pub use link::{ClientLink, Link, Tags};
pub use pool::{
    CHUNK_LINES, FEW_SLOTS, LINE_WORDS, MANY_SLOTS, MAX_CHUNKS, MAX_MEMBERS, MAX_SLOTS, Part, PoolHeader,
    PoolLine, place_of, pool_lines, rank_bits, rank_lines,
};
pub use probe_path::{MAX_PROBE_PATHS, MAX_PROBES, PROBE_MARK, PROBE_MARK_MASK, ProbePath};
pub use reason::{REASON_COUNT, Reason, VerdictClass};
pub use service::{Forward, Service, ServiceFlags, ServiceKey, Strategy};
pub use settings::{Settings, SettingsFlags};
pub use source_filter::{FILTER_ALLOW, FILTER_DENY, FilterKey, SourceKey, SourceRate};

/// Version of the map layouts, part of the pin path: a daemon never reads maps of another layout.
pub const LAYOUT_VERSION: u32 = 5;

/// Services that the maps can be made for: ids have 14 bits, of which one stands for none.
pub const MAX_SERVICES: u32 = 16_383;
/// Services that the maps are for unless the daemon sets another number at load time.
pub const DEFAULT_SERVICES: u32 = 1024;
/// Service keys (VIP, port, protocol) that fit in the maps: a service with a port range takes one each.
pub const MAX_SERVICE_KEYS: u32 = 65_536;
/// Buckets of the map of service keys: four units for each key, of which one over IPv6 takes two.
pub const SERVICE_BUCKETS: u32 = MAX_SERVICE_KEYS * 4 / UNITS as u32;
/// Backends of all services together that the maps can be made for: ids have 18 bits, and 0 means "none".
pub const MAX_BACKENDS: u32 = 262_143;
/// Backends that the maps are for unless the daemon sets another number at load time.
pub const DEFAULT_BACKENDS: u32 = 16_384;
/// Words of the map that tells addresses that are none of ours: 262,144 addresses have bits of their own.
pub const ADDRESS_FILTER_WORDS: u32 = 8192;
/// Flows in the table until the daemon sets another size at load time.
pub const DEFAULT_FLOWS: u32 = 65_536;
/// Ways back to clients that fit in their map: one for each router and each client on a link of this host.
pub const MAX_CLIENT_LINKS: u32 = 16_384;
/// Prefixes of all services together that fit in the map of source filters.
pub const MAX_SOURCE_FILTERS: u32 = 65_536;
/// Sources whose new flows are counted at a time.
pub const MAX_SOURCES: u32 = 65_536;
/// Fragmented packets that are followed at a time.
pub const MAX_FRAGMENTS: u32 = 16_384;
/// VIPs that fit in the map of `xlb decap`.
pub const MAX_DECAP_VIPS: u32 = 4096;
/// Addresses of the host that fit in the map of `xlb decap`.
pub const MAX_DECAP_OWN_ADDRESSES: u32 = 16_384;
/// Prefixes of outer sources that fit in the map of `xlb decap`.
pub const MAX_DECAP_SOURCES: u32 = 4096;

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;
/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;
/// IP protocol number of IPv4 in an IP packet (RFC 2003).
pub const IPV4_IN_IP: u8 = 4;
/// IP protocol number of IPv6 in an IP packet (RFC 2473).
pub const IPV6_IN_IP: u8 = 41;
/// UDP port of Generic UDP Encapsulation, host byte order.
pub const GUE_PORT: u16 = 6080;

/// Role bit in the map of addresses: the address is a VIP.
pub const ROLE_VIP: u32 = 1;
/// Role bit in the map of addresses: the address belongs to a backend.
pub const ROLE_BACKEND: u32 = 2;
