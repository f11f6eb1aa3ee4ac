use lb_common::{
    abi::{Backend, FlowKey, Forward, TcpState},
    logic::ageing,
};

/// What is known of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// When the last packet of either direction was seen: nanoseconds of `CLOCK_MONOTONIC_COARSE`, early by up to a tick
    /// of the flow's state, see [`ageing::last_seen`].
    pub last_seen: u64,
    pub backend: u32,
    pub service: u32,
    /// Source port that the backend sees, network byte order.
    pub source_port: u16,
    /// The lower half of the backend's generation when the flow began, where the flow's entry has it.
    pub generation: Option<u16>,
    /// [`TcpState::None`] for UDP.
    pub tcp_state: TcpState,
    /// The [`Forward`] of the service when the flow began, as its number.
    pub forward: u8,
}

impl Flow {
    /// Tells whether it counts as live: see [`ageing::has_ended`].
    pub const fn is_live(&self) -> bool {
        !ageing::has_ended(self.forward, self.tcp_state)
    }
}

/// The 5-tuple of the replies of a flow that is translated.
pub fn reply_key(client: &FlowKey, flow: &Flow, backend: &Backend) -> FlowKey {
    FlowKey {
        source: backend.address,
        destination: if flow.forward == Forward::FullNat.number() {
            backend.source
        } else {
            client.source
        },
        source_port: if backend.port == 0 {
            client.destination_port
        } else {
            backend.port
        },
        destination_port: flow.source_port,
        protocol: client.protocol,
    }
}
