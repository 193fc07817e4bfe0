//! What a place offers, tried with the very means that the tiers use: so that a host that lacks
//! something says so before the first save.
//!
//! It owns trying. It does not own what is said about the answers, nor what else a host may do to a
//! job (`tierkeep doctor`).
//!
//! # Invariants
//!
//! - What is tried is removed again, also where it failed half-way.
//! - Nothing is tried inside a run: a job may be at work there.

pub mod bucket;

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use memmap2::MmapOptions;

use crate::{
    chunk::CHUNK_BYTES,
    clock::{Clock, SystemClock},
    error::{Doing, Error, Result},
    names::{AttemptRef, CheckpointKey, Id, Rank, Step, payload_name},
    snapshot::budget::Budget,
    sys,
    tier::{
        Payload, Tier,
        buffer::{AlignedBuf, padded},
        disk::{DiskTier, free_bytes, open_direct},
        publish::{create_staged, make_dirs, move_file, own_word},
    },
};

/// Bytes that are written to a disk to see how fast it is.
pub const DISK_BYTES: u64 = 64 << 20;

/// A file system by its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filesystem {
    /// Its name, as `mount -t` has it; `unknown` where we do not know it.
    pub name: &'static str,
    /// It is memory.
    pub is_memory: bool,
    /// Other hosts may have it too.
    pub is_network: bool,
}

/// What a directory of the ram tier offers.
#[derive(Debug)]
pub struct Ram {
    /// Where the files lie.
    pub filesystem: Filesystem,
    /// Bytes of the file system.
    pub total: u64,
    /// Of these, not in use by anybody.
    pub free: u64,
    /// Bytes of all tierkeep files there.
    pub used: u64,
    /// The most that they may be, and where that comes from.
    pub limit: u64,
    /// The limit in words.
    pub limit_from: String,
    /// Pages were allocated, mapped and put in place.
    pub pages: Result<()>,
}

/// What a directory of the disk tier offers.
#[derive(Debug)]
pub struct Disk {
    /// The directory in which it was tried: the nearest one that exists.
    pub tried_in: PathBuf,
    /// Where the files lie.
    pub filesystem: Filesystem,
    /// Free bytes for this user.
    pub free: u64,
    /// Writes go around the page cache.
    pub direct: bool,
    /// Files of retired checkpoints are used again.
    pub recycles: bool,
    /// A rename that refuses to replace.
    pub no_replace: Result<()>,
    /// POSIX locks between processes.
    pub locks: Result<()>,
    /// Seconds that [`DISK_BYTES`] took, synced: into a new file, and again where files are used
    /// again.
    pub write_s: f64,
}

/// The kind of file system that `path` lies in.
///
/// # Errors
/// It did not answer.
pub fn filesystem(path: &Path) -> Result<Filesystem> {
    let stat = rustix::fs::statfs(path).at("stat the file system of", path)?;
    let kind = |name, is_memory, is_network| Filesystem { name, is_memory, is_network };
    Ok(match stat.f_type as u64 & 0xFFFF_FFFF {
        0x0102_1994 => kind("tmpfs", true, false),
        0x8584_58F6 => kind("ramfs", true, false),
        0xEF53 => kind("ext4", false, false),
        0x5846_5342 => kind("xfs", false, false),
        0x9123_683E => kind("btrfs", false, false),
        0x2FC1_2FC1 => kind("zfs", false, false),
        0xF2F5_2010 => kind("f2fs", false, false),
        0x794C_7630 => kind("overlay", false, false),
        0x6573_5546 => kind("fuse", false, true),
        0x6969 => kind("nfs", false, true),
        0xFF53_4D42 | 0xFE53_4D42 => kind("cifs", false, true),
        0x0BD0_0BD0 => kind("lustre", false, true),
        0x4750_4653 => kind("gpfs", false, true),
        0x00C3_6400 => kind("ceph", false, true),
        0x1980_0202 => kind("beegfs", false, true),
        _ => kind("unknown", false, false),
    })
}

/// Tries the directory of the ram tier, which is made where it is missing.
///
/// # Errors
/// It cannot be made, or did not answer.
pub fn ram(root: &Path, bytes_max: Option<u64>) -> Result<Ram> {
    let budget = Budget::open(root, bytes_max)?;
    let stat = rustix::fs::statvfs(root).at("stat the file system of", root)?;
    let used = budget.used()?;
    let (limit, limit_from) = budget.limit(used)?;
    Ok(Ram {
        filesystem: filesystem(root)?,
        total: stat.f_blocks.saturating_mul(stat.f_frsize),
        free: free_bytes(root).at("stat the file system of", root)?,
        used,
        limit,
        limit_from,
        pages: in_a_directory(root, |dir| pages(dir, &budget)),
    })
}

/// As a slot gets them.
fn pages(dir: &Path, budget: &Budget) -> Result<()> {
    let path = dir.join("pages");
    let file = create_staged(&path)?;
    let len = CHUNK_BYTES;
    budget.grow(&file, &path, len, &|| true)?;
    let bytes = usize::try_from(len).unwrap_or(usize::MAX);
    let map = MmapOptions::new().len(bytes).map_raw(&file).at("map", &path)?;
    sys::populate(&map, 0, bytes).at("populate", &path)
}

/// Tries the disk tier below the nearest directory of `dest` that exists: in a directory of its own,
/// with a payload of [`DISK_BYTES`].
///
/// # Errors
/// It may not be written, is full, or did not answer.
pub fn disk(dest: &Path) -> Result<Disk> {
    let dest = crate::config::absolute(dest)?;
    let nearest = dest.ancestors().find(|path| path.exists()).unwrap_or(&dest);
    if !nearest.is_dir() {
        return Err(Error::invalid(format!("{} is a file", nearest.display())));
    }
    in_a_directory(nearest, |dir| {
        let filesystem = filesystem(dir)?;
        let free = free_bytes(dir).at("stat the file system of", dir)?;
        let tier = DiskTier::open(&dir.join("run"))?;
        let clock = SystemClock;
        let begun = clock.monotonic();
        let first = put(&tier, 1)?;
        let write_s = clock.monotonic().saturating_sub(begun).as_secs_f64();
        tier.retire(&first.0)?;
        let second = put(&tier, 2)?;
        Ok(Disk {
            tried_in: nearest.into(),
            filesystem,
            free,
            direct: writes_direct(dir)?,
            recycles: first.1 == second.1,
            no_replace: refuses_to_replace(dir),
            locks: locks(dir),
            write_s,
        })
    })
}

/// A payload of one step; its name and its inode.
fn put(tier: &DiskTier, step: u64) -> Result<(String, u64)> {
    let name = name_of_a_payload(step)?;
    let _ = tier.put(&name, &Bytes(DISK_BYTES))?;
    let path = tier.root().join(&name);
    Ok((name, fs::metadata(&path).at("stat", &path)?.ino()))
}

/// As a rank would name it.
fn name_of_a_payload(step: u64) -> Result<String> {
    let id = Id::random()?;
    let key = CheckpointKey::new(Step(step), &AttemptRef { number: 1, id });
    Ok(key.file(&payload_name(Rank(0), &id)))
}

/// So many bytes that nobody stores as a hole or packs together.
struct Bytes(u64);

impl Payload for Bytes {
    fn len(&self) -> u64 {
        self.0
    }

    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        scratch.ensure(len);
        let mut word = offset.wrapping_add(0x9E37_79B9_7F4A_7C15);
        for eight in scratch[..padded(len)].chunks_exact_mut(8) {
            word = word.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            eight.copy_from_slice(&word.to_le_bytes());
        }
        Ok(&scratch[..len])
    }
}

fn writes_direct(dir: &Path) -> Result<bool> {
    let path = dir.join("direct");
    drop(create_staged(&path)?);
    let Some(file) = open_direct(&path)? else { return Ok(false) };
    Ok(file.write_all_at(&AlignedBuf::new(1), 0).is_ok())
}

fn refuses_to_replace(dir: &Path) -> Result<()> {
    let (one, other) = (dir.join("one"), dir.join("other"));
    drop(create_staged(&one)?);
    drop(create_staged(&other)?);
    match move_file(&one, &other, false) {
        Err(_) if one.exists() => {}
        Err(e) => return Err(e),
        Ok(()) => return Err(Error::invalid("a rename replaced a file that it must not")),
    }
    move_file(&one, &dir.join("free"), false)
}

fn locks(dir: &Path) -> Result<()> {
    let path = dir.join("lock");
    let file: File = create_staged(&path)?;
    match sys::lock(&file).at("lock", &path)? {
        sys::Lock::Taken => Ok(()),
        sys::Lock::HeldBy(pid) => {
            Err(Error::invalid(format!("a new file is said to be locked by process {pid}")))
        }
    }
}

/// Does `work` in a new directory, which is removed afterwards.
fn in_a_directory<T>(parent: &Path, work: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let dir = parent.join(format!(".tierkeep-probe-{}", own_word()));
    let done = make_dirs(&dir, false).and_then(|()| work(&dir));
    let removed = fs::remove_dir_all(&dir);
    if done.is_ok() {
        removed.at("remove", &dir)?;
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_empty(dir: &Path) -> bool {
        fs::read_dir(dir).unwrap().flatten().all(|entry| entry.file_name() == ".budget.lock")
    }

    #[test]
    fn a_disk_is_tried_where_the_destination_will_be_and_left_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let found = disk(&dir.path().join("not/there/yet")).unwrap();
        assert_eq!(found.tried_in, dir.path());
        assert!(found.no_replace.is_ok() && found.locks.is_ok() && found.write_s > 0.0);
        assert!(found.recycles, "no write lease on {:?}", found.filesystem);
        assert!(is_empty(dir.path()));
        let file = dir.path().join("file");
        fs::File::create(&file).unwrap();
        assert!(disk(&file.join("run")).unwrap_err().to_string().ends_with("file is a file"));
    }

    #[test]
    fn memory_is_tried_within_its_budget() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let found = ram(dir.path(), Some(1 << 30)).unwrap();
        assert_eq!(found.filesystem.name, "tmpfs");
        assert!(found.filesystem.is_memory && found.total >= found.free && found.pages.is_ok());
        assert_eq!((found.used, found.limit), (0, 1 << 30));
        let small = ram(dir.path(), Some(1000)).unwrap();
        assert!(matches!(small.pages, Err(Error::Budget { .. })), "{:?}", small.pages);
        assert!(is_empty(dir.path()));
    }
}
