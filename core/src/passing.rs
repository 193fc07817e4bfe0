//! File descriptors over a unix socket (`SCM_RIGHTS`): how a slot goes from the process that owns it
//! to the one that copies into it.
//!
//! # Invariants
//!
//! - Descriptors arrive with the first byte that they were sent beside, closed on exec.
//! - More of them than are asked for is an error, and all that came are closed.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Descriptors in one message at most.
pub const FDS_MAX: usize = 8;

const SPACE: usize = rustix::cmsg_space!(ScmRights(FDS_MAX));

/// Sends some of `bytes`, one at least, with `fds` beside the first one; how many went.
///
/// # Errors
/// The socket failed, or there are more than [`FDS_MAX`] descriptors.
pub fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > FDS_MAX {
        return Err(too_many());
    }
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(too_many());
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut beside, SendFlags::NOSIGNAL)?)
}

/// Receives into `buffer`, and the descriptors that came beside; 0 bytes: the other side is gone.
///
/// # Errors
/// The socket failed, or more than [`FDS_MAX`] descriptors came.
pub fn receive(socket: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let got =
        recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut beside, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = message {
            fds.extend(came);
        }
    }
    // The kernel rounds the space up, and closes what does not fit there.
    if got.flags.contains(ReturnFlags::CTRUNC) || fds.len() > FDS_MAX {
        return Err(too_many());
    }
    Ok((got.bytes, fds))
}

fn too_many() -> io::Error {
    let why = format!("more than {FDS_MAX} descriptors in one message");
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::{fd::AsFd, unix::fs::FileExt},
    };

    use super::*;

    #[test]
    fn what_is_written_through_a_passed_descriptor_is_in_the_file() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        assert_eq!(send(&ours, b"here", &[file.as_fd()]).unwrap(), 4);
        let mut buffer = [0; 16];
        let (n, fds) = receive(&theirs, &mut buffer).unwrap();
        assert_eq!((&buffer[..n], fds.len()), (&b"here"[..], 1));
        let flags = rustix::io::fcntl_getfd(&fds[0]).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        File::from(fds.into_iter().next().unwrap()).write_all_at(b"slot", 0).unwrap();
        let mut back = [0; 4];
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(&back, b"slot");
        drop(ours);
        assert_eq!(receive(&theirs, &mut buffer).unwrap().0, 0);
    }

    #[test]
    fn too_many_descriptors_are_refused_on_both_sides() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = open();
        for many in [FDS_MAX + 1, 40] {
            let fds = vec![file.as_fd(); many];
            assert_eq!(send(&ours, b"x", &fds).unwrap_err().kind(), io::ErrorKind::InvalidData);
            // From somebody who does not ask us.
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
            let mut beside = SendAncillaryBuffer::new(&mut space);
            assert!(beside.push(SendAncillaryMessage::ScmRights(&fds)));
            sendmsg(&ours, &[IoSlice::new(b"x")], &mut beside, SendFlags::empty()).unwrap();
            let error = receive(&theirs, &mut [0; 4]).unwrap_err();
            assert!(error.to_string().contains("more than 8 descriptors"), "{error}");
        }
        assert_eq!(open(), before, "descriptors stay open");
    }
}
