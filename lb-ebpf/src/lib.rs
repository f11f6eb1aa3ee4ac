//! What the XDP programs share: the frame. Each is an object of its own, so that none loads the maps of another.
#![cfg_attr(target_arch = "bpf", no_std)]

#[cfg(target_arch = "bpf")]
pub mod cursor;

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // `unreachable_unchecked` here would let the compiler delete bounds checks; a loop that survives fails to load.
    loop {}
}
