//! A program that passes every packet: veth hands packets over in driver mode only to a peer that has a program too.
//!
//! Two instructions need neither an object nor a loader, so this speaks bpf(2) itself.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::Once,
};

use super::DatapathError;

/// The program on one interface, in driver mode; goes with this value.
#[derive(Debug)]
pub struct PassAll {
    /// Held, not used: closing it detaches the program.
    _link: OwnedFd,
}

impl PassAll {
    /// Attaches to an interface of the calling thread's network namespace.
    ///
    /// # Errors
    /// Where the kernel refuses the program or the interface has one already.
    pub fn attach(ifindex: u32) -> Result<Self, DatapathError> {
        allow_locked_memory();
        let program = load().map_err(|source| DatapathError {
            operation: "load",
            object: "the program that passes everything".to_owned(),
            source,
        })?;
        let link = attach(&program, ifindex).map_err(|source| DatapathError {
            operation: "attach in driver mode",
            object: format!("the program that passes everything to interface {ifindex}"),
            source,
        })?;
        Ok(Self { _link: link })
    }
}

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// `struct bpf_insn`.
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

static PROGRAM: [Instruction; 2] = [
    // r0 = XDP_PASS
    Instruction {
        code: 0xb7,
        registers: 0,
        offset: 0,
        immediate: 2,
    },
    // exit
    Instruction {
        code: 0x95,
        registers: 0,
        offset: 0,
        immediate: 0,
    },
];

/// The head of `union bpf_attr` for `BPF_PROG_LOAD`; the kernel takes what is missing as zero.
#[repr(C)]
struct LoadProgram {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// The head of `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
struct CreateLink {
    program: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

fn load() -> io::Result<OwnedFd> {
    let attributes = LoadProgram {
        program_type: BPF_PROG_TYPE_XDP,
        instruction_count: PROGRAM.len() as u32,
        instructions: PROGRAM.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: the struct is a prefix of the kernel's and its pointers are to statics that outlive the call.
    unsafe { bpf(BPF_PROG_LOAD, &attributes) }
}

fn attach(program: &OwnedFd, ifindex: u32) -> io::Result<OwnedFd> {
    let attributes = CreateLink {
        program: program.as_raw_fd() as u32,
        target_ifindex: ifindex,
        attach_type: BPF_XDP,
        flags: XDP_FLAGS_DRV_MODE,
    };
    // SAFETY: the struct is a prefix of the kernel's and holds no pointers.
    unsafe { bpf(BPF_LINK_CREATE, &attributes) }
}

/// Calls bpf(2) with a command that answers with a file descriptor.
///
/// # Safety
/// `attributes` is a prefix of the command's part of `union bpf_attr`, and pointers in it are valid for the call.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the pointer and the size are those of a live value; what is in it the caller vouches for.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Kernels before 5.11 charge programs against RLIMIT_MEMLOCK; a refusal shows when the program is loaded.
fn allow_locked_memory() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let unlimited = libc::rlimit {
            rlim_cur: libc::RLIM_INFINITY,
            rlim_max: libc::RLIM_INFINITY,
        };
        // SAFETY: the pointer is to a live value.
        unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) };
    });
}
