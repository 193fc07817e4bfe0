//! Frames between a trainer and its agent: four bytes of length, a message, descriptors beside.
//!
//! It owns how many bytes a message may have. It does not own what is said (`tierkeep-proto`), nor
//! who says it (`link` for the trainer, `host` for the agent).
//!
//! # Invariants
//!
//! - A length is checked before anything is allocated for it, and memory grows with what has come,
//!   not with what was announced.
//! - A descriptor belongs to the frame with whose first byte it came.

pub(crate) mod convert;

use std::{
    io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use prost::Message;

use crate::passing::{self, FDS_MAX};

/// What this build speaks: the oldest and the newest.
pub(crate) const PROTOCOLS: (u32, u32) = (1, 1);

/// The longest frame. A manifest of 2,000 tensors has half a mebibyte; one that is longer than this
/// does not go over the socket.
pub(crate) const FRAME_BYTES_MAX: usize = 64 << 20;

/// The longest frame of somebody who has not said yet who he is.
pub(crate) const GREETING_BYTES_MAX: usize = 1 << 20;

const HEAD: usize = 4;
const PIECE: usize = 1 << 20;

/// This program, for people.
pub(crate) fn program() -> String {
    format!("tierkeep {}", env!("CARGO_PKG_VERSION"))
}

/// Sends one message.
///
/// # Errors
/// The socket's, or the message is too long.
pub(crate) fn send(
    socket: &UnixStream,
    message: &impl Message,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let len = message.encoded_len();
    if len > FRAME_BYTES_MAX {
        return Err(too_long(len));
    }
    let mut frame = Vec::with_capacity(HEAD + len);
    frame.extend_from_slice(&u32::try_from(len).map_err(|_| too_long(len))?.to_le_bytes());
    message.encode(&mut frame).map_err(io::Error::other)?;
    let mut sent = 0;
    while sent < frame.len() {
        let beside = if sent == 0 { fds } else { &[] };
        match passing::send(socket, &frame[sent..], beside) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            other => sent += other?,
        }
    }
    Ok(())
}

/// Receives one message of at most `bytes_max`; `None`: the other side has hung up between two.
///
/// # Errors
/// The socket's, [`io::ErrorKind::InvalidData`] for what is no message.
pub(crate) fn receive<M: Message + Default>(
    socket: &UnixStream,
    bytes_max: usize,
) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
    let mut fds = Vec::new();
    let mut head = [0; HEAD];
    if !fill(socket, &mut head, &mut fds)? {
        return Ok(None);
    }
    let len = usize::try_from(u32::from_le_bytes(head)).unwrap_or(usize::MAX);
    if len > bytes_max {
        return Err(too_long(len));
    }
    let mut frame = Vec::new();
    while frame.len() < len {
        let have = frame.len();
        frame.resize(have + (len - have).min(PIECE), 0);
        if !fill(socket, &mut frame[have..], &mut fds)? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let message = M::decode(frame.as_slice());
    let message = message.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    Ok(Some((message, fds)))
}

/// False: nothing came before the end.
fn fill(socket: &UnixStream, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<bool> {
    let mut have = 0;
    while have < into.len() {
        match passing::receive(socket, &mut into[have..]) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok((0, _)) if have == 0 => return Ok(false),
            Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((n, came)) => {
                have += n;
                fds.extend(came);
                if fds.len() > FDS_MAX {
                    let why = "more descriptors than one message may have";
                    return Err(io::Error::new(io::ErrorKind::InvalidData, why));
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

fn too_long(len: usize) -> io::Error {
    let why = format!("a message of {len} bytes: {FRAME_BYTES_MAX} at most");
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write, os::fd::AsFd};

    use tierkeep_proto::trainer::{Publish, Request, request::Call};

    use super::*;

    fn publish(bytes: usize) -> Request {
        let manifest = vec![7; bytes];
        Request { id: 3, call: Some(Call::Publish(Publish { manifest, ..Publish::default() })) }
    }

    #[test]
    fn a_message_arrives_whole_with_its_descriptors_whatever_its_length() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        for bytes in [0, 1, 5_000, 3 << 20] {
            let sender = ours.try_clone().unwrap();
            let fd = file.try_clone().unwrap();
            let sending = std::thread::spawn(move || send(&sender, &publish(bytes), &[fd.as_fd()]));
            let (came, fds) = receive::<Request>(&theirs, FRAME_BYTES_MAX).unwrap().unwrap();
            sending.join().unwrap().unwrap();
            assert_eq!((came, fds.len()), (publish(bytes), 1));
        }
        drop(ours);
        assert!(receive::<Request>(&theirs, FRAME_BYTES_MAX).unwrap().is_none());
    }

    #[test]
    fn lengths_that_lie_and_bytes_that_are_no_message_are_refused() {
        let refused = |bytes: &[u8]| {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(bytes).unwrap();
            drop(ours);
            receive::<Request>(&theirs, FRAME_BYTES_MAX).unwrap_err().kind()
        };
        assert_eq!(refused(&u32::MAX.to_le_bytes()), io::ErrorKind::InvalidData);
        assert_eq!(refused(&[9, 0]), io::ErrorKind::UnexpectedEof);
        assert_eq!(refused(&[9, 0, 0, 0, 1]), io::ErrorKind::UnexpectedEof);
        assert_eq!(refused(&[3, 0, 0, 0, 255, 255, 255]), io::ErrorKind::InvalidData);
    }

    #[test]
    fn descriptors_that_nobody_asked_for_do_not_pile_up() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        for byte in [9_u8, 0, 0, 0, 1, 2] {
            passing::send(&ours, &[byte], &[file.as_fd(); 8]).unwrap();
        }
        let error = receive::<Request>(&theirs, FRAME_BYTES_MAX).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
