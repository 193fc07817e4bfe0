//! A shard in fixed pieces: the unit of checksum, transfer, repair and range read.
//!
//! Chunks count from byte 0 of the payload file, header included; all but the last have the same
//! length.

/// Bytes of a chunk. One chunk is one O_DIRECT write; at 4 MiB a disk is at its speed (DESIGN
/// section 12), 1 TiB of shard has 262,144 checksums = 2 MiB of manifest, and a reader needs no
/// more than this much memory a thread.
pub const CHUNK_BYTES: u64 = 4 << 20;
/// The smallest that a reader accepts; also what O_DIRECT needs as alignment.
pub const CHUNK_BYTES_MIN: u64 = 4096;
/// The largest that a reader accepts: it bounds the buffer that a lying manifest can ask for.
pub const CHUNK_BYTES_MAX: u64 = 64 << 20;

const _: () = assert!(CHUNK_BYTES.is_multiple_of(CHUNK_BYTES_MIN));
const _: () = assert!(CHUNK_BYTES <= CHUNK_BYTES_MAX);

/// How many chunks `length` bytes have.
#[must_use]
pub fn chunk_count(length: u64, chunk_bytes: u64) -> u64 {
    length.div_ceil(chunk_bytes)
}

/// The length of chunk `index`.
#[must_use]
pub fn chunk_len(length: u64, chunk_bytes: u64, index: usize) -> u64 {
    let begin = (index as u64).saturating_mul(chunk_bytes);
    length.saturating_sub(begin).min(chunk_bytes)
}
