//! A file for `torch.load`: a zip archive of stored records, each at a multiple of 64 bytes.
//!
//! Every record has the 64-bit fields of the zip format, so that one path serves small files and
//! large ones. A record's checksum stands before its bytes: the bytes are written first, read back
//! from the page cache, and the headers come last.

use std::collections::BTreeMap;

use tierkeep::restore::read::Restorable;

use super::{
    Place,
    assemble::assemble,
    pickle::{Entry, is_known, pickle},
    plan::Output,
};
use crate::fail::{FAILED, Failure};

const ALIGN: u64 = 64;
/// Of a local header, without its name.
const LOCAL_BYTES: u64 = 30;
/// Bytes that are read back at a time.
const BLOCK_BYTES: usize = 4 << 20;

/// One record of the archive.
struct Record {
    name: String,
    len: u64,
    header_at: u64,
    data_at: u64,
    crc: u32,
}

pub(super) fn write(
    sources: &[Restorable],
    outputs: &[Output],
    place: &Place<'_>,
) -> Result<(), Failure> {
    if let Some(output) = outputs.iter().find(|o| !is_known(o.dtype)) {
        return Err(Failure::own(
            FAILED,
            format!("{} is {}, which torch does not have", output.name, output.dtype),
            "export to .safetensors, or leave it out with --include",
        ));
    }
    // Tied tensors share one storage.
    let mut storages: BTreeMap<&str, usize> = BTreeMap::new();
    let mut stored: Vec<&Output> = Vec::new();
    let mut entries = Vec::new();
    for output in outputs {
        let storage = *storages.entry(&output.path).or_insert_with(|| {
            stored.push(output);
            stored.len() - 1
        });
        let Output { name, dtype, shape, bytes, .. } = output;
        entries.push(Entry { name, dtype: *dtype, shape, storage, bytes: *bytes });
    }
    let small = [
        ("data.pkl", pickle(&entries)),
        ("byteorder", b"little".to_vec()),
        ("version", b"3\n".to_vec()),
    ];
    let mut records = Vec::new();
    let mut end = 0;
    for (name, bytes) in &small {
        end = add(&mut records, name, bytes.len() as u64, end);
    }
    for (index, output) in stored.iter().enumerate() {
        end = add(&mut records, &format!("data/{index}"), output.bytes, end);
    }
    place.set_len(end)?;
    let tensors: Vec<(&Output, u64)> =
        stored.iter().zip(&records[small.len()..]).map(|(o, r)| (*o, r.data_at)).collect();
    for ((_, bytes), record) in small.iter().zip(&records) {
        place.write(bytes, record.data_at)?;
    }
    assemble(sources, &tensors, place)?;
    for record in &mut records {
        record.crc = read_crc(place, record)?;
        place.write(&local_header(record), record.header_at)?;
    }
    place.write(&directory(&records, end), end)
}

/// Lays a record out after byte `at`; where it ends.
fn add(records: &mut Vec<Record>, name: &str, len: u64, at: u64) -> u64 {
    let name = format!("archive/{name}");
    // Name, 64-bit sizes (20), and the padding's own head (4).
    let data_at = (at + LOCAL_BYTES + name.len() as u64 + 20 + 4).next_multiple_of(ALIGN);
    records.push(Record { name, len, header_at: at, data_at, crc: 0 });
    data_at + len
}

fn read_crc(place: &Place<'_>, record: &Record) -> Result<u32, Failure> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut done = 0;
    while done < record.len {
        let len = usize::try_from(record.len - done).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES);
        place.read(&mut buffer[..len], record.data_at + done)?;
        hasher.update(&buffer[..len]);
        done += len as u64;
    }
    Ok(hasher.finalize())
}

/// Numbers of the zip format, little-endian, one after the other.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn u16(mut self, n: u16) -> Self {
        self.0.extend_from_slice(&n.to_le_bytes());
        self
    }

    fn u32(mut self, n: u32) -> Self {
        self.0.extend_from_slice(&n.to_le_bytes());
        self
    }

    fn u64(mut self, n: u64) -> Self {
        self.0.extend_from_slice(&n.to_le_bytes());
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Version needed (4.5: 64-bit), flags (UTF-8 names), method (stored), time and date (1980),
    /// checksum, the 32-bit sizes that say "see the 64-bit ones", and the length of the name.
    fn common(self, record: &Record) -> Self {
        let name = u16::try_from(record.name.len()).unwrap_or(u16::MAX);
        let see = u32::MAX;
        self.u16(45).u16(0x800).u16(0).u16(0).u16(0x21).u32(record.crc).u32(see).u32(see).u16(name)
    }
}

fn local_header(record: &Record) -> Vec<u8> {
    let head = LOCAL_BYTES + record.name.len() as u64;
    let extra = record.data_at - record.header_at - head;
    let extra = u16::try_from(extra).unwrap_or(u16::MAX);
    let padding = extra - 20 - 4;
    Fields::default()
        .bytes(b"PK\x03\x04")
        .common(record)
        .u16(extra)
        .bytes(record.name.as_bytes())
        .u16(1) // 64-bit sizes
        .u16(16)
        .u64(record.len)
        .u64(record.len)
        .bytes(b"FB") // torch's own padding
        .u16(padding)
        .bytes(&vec![b'Z'; usize::from(padding)])
        .0
}

/// The central directory, which begins at byte `at`, and the ends of both kinds.
fn directory(records: &[Record], at: u64) -> Vec<u8> {
    let mut fields = Fields::default();
    for record in records {
        fields = fields
            .bytes(b"PK\x01\x02")
            .u16(45)
            .common(record)
            .u16(28) // extra
            .u16(0) // comment
            .u16(0) // disk
            .u16(0) // internal attributes
            .u32(0) // external attributes
            .u32(u32::MAX)
            .bytes(record.name.as_bytes())
            .u16(1)
            .u16(24)
            .u64(record.len)
            .u64(record.len)
            .u64(record.header_at);
    }
    let (len, count) = (fields.0.len() as u64, records.len() as u64);
    fields
        .bytes(b"PK\x06\x06")
        .u64(44)
        .u16(45)
        .u16(45)
        .u32(0)
        .u32(0)
        .u64(count)
        .u64(count)
        .u64(len)
        .u64(at)
        .bytes(b"PK\x06\x07")
        .u32(0)
        .u64(at + len)
        .u32(1)
        .bytes(b"PK\x05\x06")
        .u16(0)
        .u16(0)
        .u16(u16::MAX)
        .u16(u16::MAX)
        .u32(u32::MAX)
        .u32(u32::MAX)
        .u16(0)
        .0
}
