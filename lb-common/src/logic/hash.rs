//! SipHash-1-3 over words of fixed number (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012).
//!
//! The input of `n` words is hashed as its `8 * n` bytes in little-endian order, so that the result is that of
//! any other SipHash-1-3. The key is secret and shared by the nodes that serve the same VIPs: who cannot know it
//! cannot choose addresses that all fall on one backend.

use crate::abi::{FlowKey, SLOT_COUNT};

#[inline(always)]
fn round(v: &mut [u64; 4]) {
    v[0] = v[0].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(13) ^ v[0];
    v[0] = v[0].rotate_left(32);
    v[2] = v[2].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(16) ^ v[2];
    v[0] = v[0].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(21) ^ v[0];
    v[2] = v[2].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(17) ^ v[2];
    v[2] = v[2].rotate_left(32);
}

/// Hashes `N` 64-bit words under a 128-bit key.
#[inline(always)]
pub fn siphash13<const N: usize>(key: [u64; 2], words: [u64; N]) -> u64 {
    let mut v = [
        key[0] ^ 0x736f_6d65_7073_6575,
        key[1] ^ 0x646f_7261_6e64_6f6d,
        key[0] ^ 0x6c79_6765_6e65_7261,
        key[1] ^ 0x7465_6462_7974_6573,
    ];
    let mut i = 0;
    while i < N {
        v[3] ^= words[i];
        round(&mut v);
        v[0] ^= words[i];
        i += 1;
    }
    // The last block holds the length modulo 256 in its top byte; no bytes are left over.
    let last = ((N as u64) * 8) << 56;
    v[3] ^= last;
    round(&mut v);
    v[0] ^= last;
    v[2] ^= 0xff;
    round(&mut v);
    round(&mut v);
    round(&mut v);
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

#[inline(always)]
fn word(high: u32, low: u32) -> u64 {
    (high as u64) << 32 | low as u64
}

/// Hash of a flow: what `consistent-hash` looks up.
#[inline(always)]
pub fn flow_hash(seed: [u64; 2], key: &FlowKey) -> u64 {
    let s = &key.source.0;
    let d = &key.destination.0;
    let ports = (key.source_port as u32) << 16 | key.destination_port as u32;
    if key.source.is_v4() && key.destination.is_v4() {
        return siphash13(seed, [word(s[3], d[3]), word(ports, key.protocol)]);
    }
    siphash13(
        seed,
        [
            word(s[0], s[1]),
            word(s[2], s[3]),
            word(d[0], d[1]),
            word(d[2], d[3]),
            word(ports, key.protocol),
        ],
    )
}

/// Hash of a client's address: what `ip-hash` looks up.
#[inline(always)]
pub fn client_hash(seed: [u64; 2], key: &FlowKey) -> u64 {
    let s = &key.source.0;
    siphash13(seed, [word(s[0], s[1]), word(s[2], s[3])])
}

/// Maps a hash to a slot without a division: the high half scaled to the number of slots.
#[inline(always)]
pub const fn slot_of(hash: u64) -> u32 {
    (((hash >> 32) * SLOT_COUNT as u64) >> 32) as u32
}
