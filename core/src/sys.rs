//! The system calls that have no safe wrapper elsewhere. Every other file in this crate that needs
//! one of them comes here.
//!
//! It owns POSIX locks that know their holder, write leases and the page population of a map. It
//! decides nothing.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

/// The answer to a request for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// This process has it now.
    Taken,
    /// Another process has it; its number, 0 where the kernel cannot say (other pid namespace).
    HeldBy(i32),
}

fn whole_file(kind: libc::c_int) -> libc::flock {
    // SAFETY: `flock` is a plain C struct for which all zeros is a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock
}

/// Asks for an exclusive POSIX lock (`F_SETLK`) on the whole file, without waiting.
///
/// POSIX locks belong to the process: a fork's child does not have them, and closing *any*
/// descriptor of the file drops them. So the caller opens a lock file once a process.
pub(crate) fn lock(file: &File) -> io::Result<Lock> {
    let mut request = whole_file(libc::F_WRLCK);
    // SAFETY: the descriptor is open for the whole call and `request` is a valid `flock`.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &mut request) } == 0 {
        return Ok(Lock::Taken);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EAGAIN) => Ok(match holder(file)? {
            Some(pid) => Lock::HeldBy(pid),
            // It was let go between the two calls; the caller asks again.
            None => Lock::HeldBy(0),
        }),
        _ => Err(error),
    }
}

/// The process that holds a lock on the file, if it is another one.
pub(crate) fn holder(file: &File) -> io::Result<Option<i32>> {
    let mut request = whole_file(libc::F_WRLCK);
    // SAFETY: the descriptor is open for the whole call and `request` is a valid `flock`.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((libc::c_int::from(request.l_type) != libc::F_UNLCK).then_some(request.l_pid))
}

/// Opens a file that other processes may have put something else in the place of: a pipe or a device
/// is refused, not waited for.
pub(crate) fn open_regular(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let other = || Err(io::Error::other("it is no regular file"));
    match options.custom_flags(libc::O_NONBLOCK).open(path) {
        Ok(file) if !file.metadata()?.is_file() => other(),
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => other(), // A pipe that nobody reads.
        opened => opened,
    }
}

/// True where nobody else has the file open or mapped: a write lease was granted (and given back).
///
/// Refused also where the file system has no leases (NFS, FUSE): the caller then treats the file as
/// in use, which costs a recycled file and nothing else.
pub(crate) fn nobody_else_has_it_open(file: &File) -> bool {
    /// Of `fcntl`, on Linux.
    const F_SETSIG: libc::c_int = 10;
    // Whoever opens the file between the two calls below breaks the lease: by default the kernel tells
    // with SIGIO, which ends a process; nobody minds SIGURG.
    // SAFETY: the descriptor is open for the whole call; `F_SETSIG` takes an int.
    if unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) } != 0 {
        return false;
    }
    // SAFETY: the descriptor is open for the whole call; `F_SETLEASE` takes an int.
    let granted =
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK as libc::c_int) };
    if granted == 0 {
        // SAFETY: as above; giving a lease back that is held cannot fail.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK as libc::c_int) };
    }
    granted == 0
}

/// Maps a range of pages of a shared map for writing, so that no later store faults. Pages that
/// have no memory yet get it. Kernels before 5.14 say `EINVAL`: each page is then touched by hand,
/// with an atomic add of zero, which changes nothing that is there.
pub(crate) fn populate(map: &memmap2::MmapRaw, offset: usize, len: usize) -> io::Result<()> {
    match map.advise_range(memmap2::Advice::PopulateWrite, offset, len) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            assert!(offset + len <= map.len(), "{offset}+{len} of {}", map.len());
            for at in (offset..offset + len).step_by(4096) {
                // SAFETY: `at` is inside the map, which is writable; the atomic add of zero leaves
                // the byte as it is even where another process maps the same page.
                unsafe {
                    (*map.as_mut_ptr().add(at).cast::<std::sync::atomic::AtomicU8>())
                        .fetch_add(0, std::sync::atomic::Ordering::Relaxed)
                };
            }
            Ok(())
        }
        other => other,
    }
}

/// How many pages of a range lie in the page cache; `None` where the kernel (before 6.5) or the
/// file system cannot say.
pub(crate) fn cached_pages(file: &File, offset: u64, len: u64) -> Option<u64> {
    const SYS_CACHESTAT: libc::c_long = 451;
    let range = [offset, len];
    let mut answer = [0_u64; 5]; // nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted
    // SAFETY: the descriptor is open; `range` and `answer` have the layouts of `struct
    // cachestat_range` and `struct cachestat`, and the kernel writes only the second.
    let rc = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), answer.as_mut_ptr(), 0)
    };
    (rc == 0).then_some(answer[0])
}

/// This machine's name, for messages.
pub(crate) fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Makes this thread act on files as another user, with that user's groups: the kernel then decides
/// what it may touch. Threads that it starts do the same. Only a privileged process can.
///
/// The raw calls change this thread alone; those of libc would change all.
pub(crate) fn files_as(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: the list has so many numbers of the kernel's `gid_t`, and is only read.
    let rc = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    set_files_gid(gid);
    set_files_uid(uid);
    // They return the value before, and an error is known by asking again.
    if set_files_gid(u32::MAX) != gid || files_uid() != uid {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    }
    Ok(())
}

/// The user that this thread acts on files as until now; from here on as `uid`, where that is one.
pub(crate) fn set_files_uid(uid: u32) -> u32 {
    // SAFETY: it takes and returns a number, and changes this thread alone.
    unsafe { libc::setfsuid(uid) }.cast_unsigned()
}

/// The user that this thread acts on files as.
pub(crate) fn files_uid() -> u32 {
    set_files_uid(u32::MAX) // No user: it stays as it is.
}

/// While it lives, this thread acts on files as the process does, whomever it served until then.
pub(crate) struct AsItself {
    before: u32,
    /// It is about this thread.
    _stays: std::marker::PhantomData<*const ()>,
}

impl AsItself {
    pub(crate) fn begin() -> Self {
        let before = set_files_uid(rustix::process::geteuid().as_raw());
        Self { before, _stays: std::marker::PhantomData }
    }
}

impl Drop for AsItself {
    fn drop(&mut self) {
        set_files_uid(self.before);
    }
}

fn set_files_gid(gid: u32) -> u32 {
    // SAFETY: as above.
    unsafe { libc::setfsgid(gid) }.cast_unsigned()
}

/// Who is at the other end of a unix socket, as it was when it connected; its number is 0 where it is in
/// another pid namespace.
pub(crate) fn peer_creds(socket: &std::os::unix::net::UnixStream) -> io::Result<libc::ucred> {
    let mut creds = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut bytes = libc::socklen_t::try_from(size_of::<libc::ucred>()).unwrap_or_default();
    // SAFETY: the descriptor is open for the whole call, `creds` has so many bytes.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut creds).cast(),
            &raw mut bytes,
        )
    };
    if rc == 0 { Ok(creds) } else { Err(io::Error::last_os_error()) }
}

/// The process at the other end of a unix socket, as it was when it connected, to be waited for: also where
/// it is in another pid namespace, and whatever its number is given to. `None`: this kernel is older than
/// 6.5.
pub(crate) fn peer_pidfd(socket: &std::os::unix::net::UnixStream) -> Option<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut fd: libc::c_int = -1;
    let mut bytes = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or_default();
    // SAFETY: the descriptor is open for the whole call, `fd` has so many bytes.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut bytes,
        )
    };
    // SAFETY: the kernel has just made it for us, and nobody else has it.
    (rc == 0 && fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What tells this process from every other one since the boot, where the kernel has that (6.9).
pub(crate) fn process_of(pidfd: impl AsFd) -> Option<u64> {
    const PID_FS_MAGIC: u64 = 0x5049_4446;
    let kind = rustix::fs::fstatfs(&pidfd).ok()?.f_type;
    // Before, all of them were one anonymous file.
    (u64::try_from(kind).ok()? == PID_FS_MAGIC).then_some(())?;
    rustix::fs::fstat(&pidfd).ok().map(|stat| stat.st_ino)
}

/// The groups of the process at the other end of a unix socket, as they were when it connected.
pub(crate) fn peer_groups(socket: &std::os::unix::net::UnixStream) -> io::Result<Vec<u32>> {
    const SO_PEERGROUPS: libc::c_int = 59;
    let mut groups = vec![0_u32; 1024];
    for _ in 0..4 {
        let mut bytes = libc::socklen_t::try_from(groups.len() * 4).unwrap_or(libc::socklen_t::MAX);
        // SAFETY: the kernel writes at most `bytes` bytes into the list, and says how many.
        let rc = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &mut bytes,
            )
        };
        let count = usize::try_from(bytes).unwrap_or(0) / 4;
        if rc == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) {
            return Err(error);
        }
        groups.resize(count.max(groups.len()) + 1, 0);
    }
    Err(io::Error::from(io::ErrorKind::InvalidData))
}

/// Freed memory goes back to the system at once, and threads share two heaps: a process with many
/// threads that are busy now and then would keep all that any of them ever had.
#[cfg(target_env = "gnu")]
pub(crate) fn keep_little_memory() {
    for (what, value) in [
        (libc::M_ARENA_MAX, 2),
        (libc::M_MMAP_THRESHOLD, 256 << 10),
        (libc::M_TRIM_THRESHOLD, 1 << 20),
    ] {
        // SAFETY: it sets a number of the allocator; what it does not know it refuses.
        unsafe { libc::mallopt(what, value) };
    }
}

/// Between two looks at the whole heap: less than a round of an agent.
#[cfg(target_env = "gnu")]
const TRIM_PAUSE_MS: u64 = 400;

/// Gives pages back that are free in the middle of the heap; `now` is of any clock that all callers share.
/// The heap is the process's: several agents in one do it no more often than one. False: it was done a
/// moment ago.
#[cfg(target_env = "gnu")]
pub(crate) fn give_free_memory_back(now: std::time::Duration) -> bool {
    static LAST_MS: AtomicU64 = AtomicU64::new(0);
    let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let last = LAST_MS.load(Ordering::Relaxed);
    let due = last == 0 || now.saturating_sub(last) >= TRIM_PAUSE_MS;
    if !due || LAST_MS.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_err() {
        return false;
    }
    // SAFETY: it looks at what is free, under the allocator's own locks.
    unsafe { libc::malloc_trim(0) };
    true
}

/// Other allocators do.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn keep_little_memory() {}

/// Other allocators do.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn give_free_memory_back(_now: std::time::Duration) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_opens_a_file_while_it_is_probed_ends_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    // Breaks a lease that is there; without waiting for its holder.
                    let _ = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
                }
            });
            for _ in 0..20_000 {
                nobody_else_has_it_open(&file); // By default the signal ends the process.
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert!(nobody_else_has_it_open(&file));
    }
}
