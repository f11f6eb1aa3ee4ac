//! Network namespaces, joined by veth pairs, for the demo and the tests.
