//! The commands of bpf(2) that aya does not have: many map entries at once, and what concerns pinned links.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    thread,
    time::Duration,
};

use zerocopy::{FromBytes, Immutable, IntoBytes};

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_LINK_DETACH: libc::c_long = 34;

/// The part of `union bpf_attr` that batch commands read (`include/uapi/linux/bpf.h`).
#[repr(C)]
#[derive(Default)]
struct BatchAttributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// The part of `union bpf_attr` that `BPF_OBJ_GET` reads.
#[repr(C)]
#[derive(Default)]
struct ObjectAttributes {
    path: u64,
    fd: u32,
    flags: u32,
}

/// The part of `union bpf_attr` that `BPF_OBJ_GET_INFO_BY_FD` reads.
#[repr(C)]
#[derive(Default)]
struct InfoAttributes {
    fd: u32,
    length: u32,
    info: u64,
}

/// The part of `union bpf_attr` that `BPF_LINK_DETACH` reads.
#[repr(C)]
#[derive(Default)]
struct LinkAttributes {
    fd: u32,
}

/// The beginning of `struct bpf_link_info` as an XDP link fills it (Linux 5.9).
#[repr(C)]
#[derive(Default)]
struct XdpLinkInfo {
    kind: u32,
    id: u32,
    program_id: u32,
    _pad: u32,
    ifindex: u32,
    _rest: [u32; 3],
}

/// Entries asked for at once; large enough for any bucket of a hash map, which is read whole.
const CHUNK: usize = 4096;

/// Calls `visit` with each entry of a map; entries that come or go meanwhile may be seen or not.
///
/// # Errors
/// What the kernel says to `BPF_MAP_LOOKUP_BATCH` (Linux 5.6).
pub(super) fn for_each<K, V>(map: BorrowedFd<'_>, mut visit: impl FnMut(&K, &V)) -> io::Result<()>
where
    K: FromBytes + IntoBytes + Immutable + Clone,
    V: FromBytes + IntoBytes + Immutable + Clone,
{
    let mut position = None;
    loop {
        position = some(map, position, &mut visit)?;
        if position.is_none() {
            return Ok(());
        }
    }
}

/// As [`for_each`], but with some thousand entries alone: from a position on, or the first ones. Returns the position
/// of those that follow.
///
/// # Errors
/// As for [`for_each`].
pub(super) fn some<K, V>(
    map: BorrowedFd<'_>,
    mut position: Option<Vec<u8>>,
    mut visit: impl FnMut(&K, &V),
) -> io::Result<Option<Vec<u8>>>
where
    K: FromBytes + IntoBytes + Immutable + Clone,
    V: FromBytes + IntoBytes + Immutable + Clone,
{
    let mut chunk = CHUNK;
    loop {
        let mut keys = vec![zeroed::<K>(); chunk];
        let mut values = vec![zeroed::<V>(); chunk];
        // The kernel's own: a bucket of 4 bytes for hash maps, a key for others.
        let mut next = vec![0u8; size_of::<K>().max(size_of::<u32>())];
        let mut attributes = BatchAttributes {
            in_batch: position
                .as_mut()
                .map_or(0, |position| position.as_mut_ptr() as u64),
            out_batch: next.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: chunk as u32,
            map_fd: map.as_raw_fd() as u32,
            ..BatchAttributes::default()
        };
        let result = bpf(BPF_MAP_LOOKUP_BATCH, &mut attributes);
        let end = match &result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            // A bucket holds more than was asked for: nothing was read, ask for more.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                chunk *= 2;
                continue;
            }
            Err(_) => return result.map(|_| None),
        };
        let count = (attributes.count as usize).min(chunk);
        for (key, value) in keys[..count].iter().zip(&values[..count]) {
            visit(key, value);
        }
        return Ok((!end).then_some(next));
    }
}

/// Puts maps into an array of maps, from an index on.
///
/// # Errors
/// What the kernel says to `BPF_MAP_UPDATE_BATCH` (Linux 5.19 for this type of map).
pub(super) fn put_maps(outer: BorrowedFd<'_>, first: u32, maps: &[BorrowedFd<'_>]) -> io::Result<()> {
    let values: Vec<u32> = maps.iter().map(|map| map.as_raw_fd() as u32).collect();
    put_some(outer, first, &values)
}

/// Writes elements of an array map, from an index on.
///
/// # Errors
/// What the kernel says to `BPF_MAP_UPDATE_BATCH` (Linux 5.6); the map ends before.
pub(super) fn put_some<V>(map: BorrowedFd<'_>, first: u32, values: &[V]) -> io::Result<()>
where
    V: IntoBytes + Immutable,
{
    let keys: Vec<u32> = (first..).take(values.len()).collect();
    let mut attributes = BatchAttributes {
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: values.len() as u32,
        map_fd: map.as_raw_fd() as u32,
        ..BatchAttributes::default()
    };
    bpf(BPF_MAP_UPDATE_BATCH, &mut attributes).map(drop)
}

/// Waits until the programs have ended that run now on other CPUs: those that begin meanwhile see what was written
/// before.
pub(super) fn wait_for_programs() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_long = 1;
    // A grace period of RCU (`synchronize_rcu`), within which programs run.
    // SAFETY: the command takes no pointer.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 {
        // The kernel has no such command, or CPUs without ticks (`nohz_full`); no program runs for so long.
        thread::sleep(Duration::from_millis(100));
    }
}

/// What a pinned XDP link has where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PinnedLink {
    /// Index of the interface in its network namespace; 0 where it is gone.
    pub(super) ifindex: u32,
    /// Id of the program.
    pub(super) program_id: u32,
}

/// What the kernel tells of a pinned XDP link.
///
/// # Errors
/// There is no such pin, or the kernel does not tell.
pub(super) fn pinned_link(path: &Path) -> io::Result<PinnedLink> {
    let fd = open_pin(path)?;
    let mut info = XdpLinkInfo::default();
    let mut attributes = InfoAttributes {
        fd: fd.as_raw_fd() as u32,
        length: size_of::<XdpLinkInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(PinnedLink {
        ifindex: info.ifindex,
        program_id: info.program_id,
    })
}

/// Takes the program of a pinned link off its interface, now: the kernel frees a link that nobody holds any more some
/// time later, and until then the interface takes no other.
///
/// # Errors
/// There is no such pin, or what the kernel says to `BPF_LINK_DETACH` (Linux 5.9).
pub(super) fn detach_pinned_link(path: &Path) -> io::Result<()> {
    let link = open_pin(path)?;
    let mut attributes = LinkAttributes {
        fd: link.as_raw_fd() as u32,
    };
    bpf(BPF_LINK_DETACH, &mut attributes).map(drop)
}

fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = ObjectAttributes {
        path: path.as_ptr() as u64,
        ..ObjectAttributes::default()
    };
    let fd = bpf(BPF_OBJ_GET, &mut attributes)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn zeroed<T: FromBytes>() -> T {
    T::new_zeroed()
}

fn bpf<A>(command: libc::c_long, attributes: &mut A) -> io::Result<i32> {
    // SAFETY: the attributes are those of the command; the pointers in them are to live buffers of the length that
    // they name, for map entries of types that have the map's sizes, which were compared when it was opened.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<A>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}
