//! A stored form into its chunk. It may be anything: nothing that it says is believed before it is compared
//! with how much there is to read and to fill.

use std::mem::take;

use zstd::bulk::Decompressor;

use super::{FLOAT, PLANE_HEAD, RUN_HEAD, SEGMENT, Scratch, VERSION, WIDTH_MAX, planes};
use crate::error::{Error, Result};

/// Fills `into` with the chunk that was stored.
///
/// # Errors
/// [`Error::Damaged`] where this is not the stored form of a chunk of that length; `into` may have been
/// written to. That the chunk is the right one, its checksum says.
pub fn decompress(stored: &[u8], into: &mut [u8], scratch: &mut Scratch) -> Result<()> {
    unpack(stored, into, scratch).map_err(|why| Error::damaged("a compressed chunk", why))
}

fn unpack(stored: &[u8], mut into: &mut [u8], scratch: &mut Scratch) -> Result<(), String> {
    let mut stored = Stored(stored);
    let version = stored.next(1)?[0];
    if version != VERSION {
        return Err(format!("version {version}, where {VERSION} is known"));
    }
    while !into.is_empty() {
        let kind = stored.next(1)?[0];
        let len = number(stored.next(RUN_HEAD - 1)?);
        if kind & !(FLOAT | 3) != 0 || len == 0 || len > into.len() {
            return Err(format!("a run of kind {kind} and {len} of {} bytes", into.len()));
        }
        let (run, rest) = take(&mut into).split_at_mut(len);
        into = rest;
        let (width, float) = (1 << (kind & 3), kind & FLOAT != 0);
        for segment in run.chunks_mut(SEGMENT * width) {
            scratch.fill(segment, width, float, &mut stored)?;
        }
    }
    match stored.0.len() {
        0 => Ok(()),
        len => Err(format!("{len} bytes after its end")),
    }
}

impl Scratch {
    fn fill(
        &mut self,
        segment: &mut [u8],
        width: usize,
        float: bool,
        stored: &mut Stored<'_>,
    ) -> Result<(), String> {
        let Self { planes: rooms, decompressor, .. } = self;
        let count = segment.len() / width;
        let (elements, tail) = segment.split_at_mut(count * width);
        if count > 0 && width == 1 {
            match stored.plane(count)? {
                Plane::Raw(plane) => elements.copy_from_slice(plane),
                Plane::Frame(frame) => expand(frame, decompressor, elements)?,
            }
        } else if count > 0 {
            let mut planes: [&[u8]; WIDTH_MAX] = [&[]; WIDTH_MAX];
            for (plane, room) in planes.iter_mut().zip(rooms.chunks_exact_mut(count)).take(width) {
                *plane = match stored.plane(count)? {
                    Plane::Raw(plane) => plane,
                    Plane::Frame(frame) => {
                        expand(frame, decompressor, room)?;
                        room
                    }
                };
            }
            planes::merge(&planes, width, float, elements);
        }
        tail.copy_from_slice(stored.next(tail.len())?);
        Ok(())
    }
}

/// The plane's bytes, all of them: zstd writes where it is told to and takes no memory for what a frame
/// claims.
fn expand(frame: &[u8], zstd: &mut Decompressor<'_>, plane: &mut [u8]) -> Result<(), String> {
    match zstd.decompress_to_buffer(frame, plane) {
        Ok(len) if len == plane.len() => Ok(()),
        Ok(len) => Err(format!("a plane of {len} bytes instead of {}", plane.len())),
        Err(error) => Err(format!("a plane of {} bytes: {error}", plane.len())),
    }
}

/// What is left to read.
struct Stored<'a>(&'a [u8]);

enum Plane<'a> {
    Raw(&'a [u8]),
    Frame(&'a [u8]),
}

impl<'a> Stored<'a> {
    fn next(&mut self, len: usize) -> Result<&'a [u8], String> {
        let left = self.0.len();
        let (next, rest) =
            self.0.split_at_checked(len).ok_or_else(|| format!("{left} bytes instead of {len}"))?;
        self.0 = rest;
        Ok(next)
    }

    fn plane(&mut self, count: usize) -> Result<Plane<'a>, String> {
        let len = number(self.next(PLANE_HEAD)?);
        if len > count {
            return Err(format!("a plane of {count} bytes stored in {len}"));
        }
        let bytes = self.next(len)?;
        Ok(if len == count { Plane::Raw(bytes) } else { Plane::Frame(bytes) })
    }
}

/// A little-endian number of at most four bytes.
fn number(bytes: &[u8]) -> usize {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
}
