//! Pure functions that both sides use.

pub mod address_filter;
pub mod ageing;
pub mod bench_flow;
pub mod checksum;
pub mod encapsulation;
pub mod flow_state;
pub mod flow_table;
pub mod hash;
pub mod headers;
pub mod icmp;
pub mod outer;
pub mod service_table;
pub mod source_port;
pub mod source_rate;
pub mod tcp_state;
