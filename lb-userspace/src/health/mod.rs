//! The health of backends: a pure state machine, its driver and one file per probe.
