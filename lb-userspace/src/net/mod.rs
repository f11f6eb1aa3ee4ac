//! Netlink: links, addresses, neighbours and next hops; no other module speaks it.
