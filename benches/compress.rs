//! How small, and how fast a core is at it: `bench-compress FILE WIDTH` compresses the file's chunks, each
//! alone, by tierkeep's codec and by zstd at two levels, and prints JSON: the bytes in, and for each the
//! bytes out and the seconds of CPU to compress and to decompress.
//!
//! One round; `compress.py` asks for several, between those of others.

#![allow(missing_docs, clippy::disallowed_methods, clippy::print_stdout)]

use std::{error::Error, hint::black_box};

use tierkeep::{
    chunk::CHUNK_BYTES,
    codec::{Part, Scratch, compress, decompress},
};

const ZSTD_LEVELS: [i32; 2] = [1, 3];

/// What one way made of the file.
#[derive(Default)]
struct Made {
    bytes: usize,
    compress_s: f64,
    decompress_s: f64,
}

impl Made {
    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "bytes": self.bytes,
            "compress_s": self.compress_s,
            "decompress_s": self.decompress_s,
        })
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, file, width] = &arguments[..] else {
        return Err("bench-compress FILE WIDTH".into());
    };
    let file = std::fs::read(file)?;
    let width = width.parse()?;
    let mut scratch = Scratch::new()?;
    // What is done for the first time takes longer.
    codec(&file, width, &mut scratch)?;
    let mut all = serde_json::json!({ "length": file.len() });
    all["tierkeep"] = codec(&file, width, &mut scratch)?.json();
    for level in ZSTD_LEVELS {
        zstd_alone(&file[..file.len().min(CHUNK_BYTES as usize)], level)?;
        all[format!("zstd -{level}")] = zstd_alone(&file, level)?.json();
    }
    println!("{all}");
    Ok(())
}

fn codec(file: &[u8], width: usize, scratch: &mut Scratch) -> Result<Made, Box<dyn Error>> {
    let mut made = Made::default();
    let mut back = vec![1; CHUNK_BYTES as usize];
    let mut stored = Vec::with_capacity(CHUNK_BYTES as usize);
    for chunk in file.chunks(CHUNK_BYTES as usize) {
        let part = Part { bytes: chunk.len(), width, float: true };
        let begun = cpu_s();
        let compressed = black_box(compress(chunk, &[part], scratch));
        made.compress_s += cpu_s() - begun;
        let Some(compressed) = compressed else {
            made.bytes += chunk.len();
            continue;
        };
        made.bytes += compressed.len();
        stored.clear();
        stored.extend_from_slice(compressed);
        let back = &mut back[..chunk.len()];
        let begun = cpu_s();
        decompress(&stored, back, scratch)?;
        made.decompress_s += cpu_s() - begun;
        assert!(back == chunk, "other bytes came back");
    }
    Ok(made)
}

fn zstd_alone(file: &[u8], level: i32) -> Result<Made, Box<dyn Error>> {
    let mut made = Made::default();
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    let mut decompressor = zstd::bulk::Decompressor::new()?;
    let mut back = vec![1; CHUNK_BYTES as usize];
    let mut stored = vec![1; zstd::zstd_safe::compress_bound(CHUNK_BYTES as usize)];
    for chunk in file.chunks(CHUNK_BYTES as usize) {
        let begun = cpu_s();
        let len = compressor.compress_to_buffer(chunk, &mut stored[..])?;
        made.compress_s += cpu_s() - begun;
        made.bytes += len;
        let back = &mut back[..chunk.len()];
        let begun = cpu_s();
        decompressor.decompress_to_buffer(&stored[..len], back)?;
        made.decompress_s += cpu_s() - begun;
        assert!(back == chunk, "other bytes came back");
    }
    Ok(made)
}

/// Seconds of CPU that this thread has had: others on the machine do not count.
fn cpu_s() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it writes one timespec, which is there.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(done, 0, "no clock of a thread's CPU");
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
