use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Address;

/// What holds for all services; the single entry of its map. Times are in nanoseconds.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Settings {
    /// Key of the hash, shared by all nodes that serve the same VIPs.
    pub seed: [u64; 2],
    /// Idle time after which an established TCP flow ends.
    pub tcp_idle: u64,
    /// Idle time after which a TCP flow that is opening ends.
    pub tcp_opening: u64,
    /// Idle time after which a TCP flow that is closing ends.
    pub tcp_closing: u64,
    /// Idle time after which a UDP flow ends.
    pub udp_idle: u64,
    /// First of the source ports that flows may be given, host byte order.
    pub source_port_first: u16,
    /// How many source ports there are, from the first on.
    pub source_port_count: u16,
    /// Bits of [`SettingsFlags`].
    pub flags: u32,
    /// Outer source addresses of `ipip`, one for each family: the bits that do not vary from flow to flow.
    pub ipip_source_v4: Address,
    pub ipip_source_v6: Address,
    /// The bits that vary, of the last word of each; network byte order.
    pub ipip_varying_v4: u32,
    pub ipip_varying_v6: u32,
    /// The shifts that make ticks of nanoseconds, of [`Self::tcp_idle`], [`Self::tcp_opening`], [`Self::tcp_closing`] and
    /// [`Self::udp_idle`], see `logic::ageing`.
    pub tick_shifts: [u8; 4],
    pub _pad: u32,
    /// Key of the hash by which the flow table finds flows: the same as long as there is the table.
    pub table_seed: [u64; 2],
}

const _: () = assert!(size_of::<Settings>() == 120);

/// Bits of [`Settings::flags`].
#[derive(Clone, Copy, Debug)]
pub struct SettingsFlags;

impl SettingsFlags {
    /// There is a service of all ports of a VIP: its key has port 0.
    pub const ANY_PORT: u32 = 1 << 0;
    /// There is a service with the forward `local`, whose packets XDP leaves to the next program.
    pub const LOCAL: u32 = 1 << 1;
    /// No flow is idle for too long: their times are being brought to other ticks.
    pub const AGELESS: u32 = 1 << 2;
    /// The program is attached to the loopback interface, so that packets which come in by it are the network's.
    pub const ON_LOOPBACK: u32 = 1 << 3;
}
