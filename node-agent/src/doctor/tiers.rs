//! What the tiers of a job would find here.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
};

use rustix::fs::{MemfdFlags, memfd_create};
use tierkeep::{
    Error, passing,
    probe::{self, DISK_BYTES, bucket::BUCKET_BYTES},
    tier::object::address::Options,
};

use super::{Finding, Level};
use crate::show::bytes;

/// Below this a tmpfs holds no training state worth the name: docker gives 64 MiB.
const TMPFS_BYTES_MIN: u64 = 1 << 30;

const LARGER_TMPFS: &str = "docker: --shm-size; Kubernetes: an emptyDir with medium Memory at /dev/shm; \
     a host: `mount -o remount,size=... /dev/shm`; or TIERKEEP_RAM_DIR on a larger tmpfs";

/// The ram tier, within a limit of its own; `need`: bytes of all slots of the job on this host.
pub(super) fn memory(root: &Path, bytes_max: Option<u64>, need: Option<u64>) -> Vec<Finding> {
    let topic = "memory";
    let place = root.display();
    let found = match probe::ram(root, bytes_max) {
        Ok(found) => found,
        Err(e) => {
            let fix = "TIERKEEP_RAM_DIR: a directory on tmpfs that this user may write";
            return vec![Finding::new(Level::Error, topic, e.chain()).fix(fix)];
        }
    };
    let kind = found.filesystem.name;
    let sizes = format!(
        "{place}: {kind}, {} of {} free; tierkeep may have {} ({}), has {}",
        bytes(found.free),
        bytes(found.total),
        bytes(found.limit),
        found.limit_from,
        bytes(found.used)
    );
    let mut all = Vec::new();
    if !found.filesystem.is_memory {
        let text = format!("{place} is {kind}, no memory: saves are as slow as that");
        let fix = "TIERKEEP_RAM_DIR: a directory on tmpfs";
        all.push(Finding::new(Level::Warning, topic, text).fix(fix));
    }
    if let Err(e) = &found.pages {
        all.push(Finding::new(Level::Error, topic, e.chain()).fix(LARGER_TMPFS));
    }
    let left = found.limit.saturating_sub(found.used);
    match need {
        Some(need) if need > left => {
            let text = format!("slots of {} do not fit: {sizes}", bytes(need));
            all.push(Finding::new(Level::Error, topic, text).fix(LARGER_TMPFS));
        }
        None if found.total < TMPFS_BYTES_MIN => {
            let text = format!("{sizes}: too small for most states");
            all.push(Finding::new(Level::Warning, topic, text).fix(LARGER_TMPFS));
        }
        _ => all.push(Finding::new(Level::Ok, topic, sizes)),
    }
    all
}

/// The disk tier at a run's directory.
pub(super) fn disk(dest: &Path) -> Vec<Finding> {
    let topic = "disk";
    let found = match probe::disk(dest) {
        Ok(found) => found,
        Err(e) => {
            let fix = format!(
                "give this user a directory that it may write, with {} free, or more",
                bytes(DISK_BYTES)
            );
            return vec![Finding::new(Level::Error, topic, e.chain()).fix(fix)];
        }
    };
    #[allow(clippy::cast_precision_loss)] // It is for reading.
    let rate = DISK_BYTES as f64 / found.write_s / 1e9;
    let text = format!(
        "{}: {}, {} free; {} written and synced at {rate:.2} GB/s",
        found.tried_in.display(),
        found.filesystem.name,
        bytes(found.free),
        bytes(DISK_BYTES)
    );
    let mut all = vec![Finding::new(Level::Ok, topic, text)];
    if found.filesystem.is_memory {
        let text = "it is memory: nothing there survives a reboot";
        all.push(Finding::new(Level::Warning, topic, text).fix("give a directory on a disk"));
    }
    if found.filesystem.is_network {
        let text = format!(
            "{} is shared over a network: every save waits for it in turn",
            found.filesystem.name
        );
        all.push(Finding::new(Level::Note, topic, text));
    }
    if !found.direct {
        let text = "no O_DIRECT: writes go through the page cache, and cost more of the processor";
        all.push(Finding::new(Level::Note, topic, text));
    }
    if !found.recycles {
        let text = "no write leases: files of retired checkpoints are deleted, not used again";
        all.push(Finding::new(Level::Note, topic, text));
    }
    let needed =
        "several ranks, and a restart beside a dying job, need it: choose another file system";
    for (what, tried) in
        [("a rename that never replaces", &found.no_replace), ("POSIX locks", &found.locks)]
    {
        if let Err(e) = tried {
            let text = format!("{what} does not work here: {}", e.chain());
            all.push(Finding::new(Level::Error, topic, text).fix(needed));
        }
    }
    all
}

/// The bucket that a run's place is in.
pub(super) fn bucket(url: &str, options: &Options) -> Vec<Finding> {
    let topic = "bucket";
    let found = match probe::bucket::bucket(url, options) {
        Ok(Some(found)) => found,
        Ok(None) => {
            let text = format!(
                "{url}: may be listed; whether it may be written is not tried: these credentials may not \
                 write beside it"
            );
            let fix = "allow them to write, list and delete there; where they may write the run's own place \
                       alone, it may work as it is";
            return vec![Finding::new(Level::Warning, topic, text).fix(fix)];
        }
        // The sentence says what to do.
        Err(e) => return vec![Finding::new(Level::Error, topic, e.chain())],
    };
    #[allow(clippy::cast_precision_loss)] // It is for reading.
    let rate = |seconds: f64| BUCKET_BYTES as f64 / seconds / 1e9;
    let text = format!(
        "{url}: answers in {:.0} ms; {} written at {:.2} GB/s, and read at {:.2} GB/s and the same",
        1e3 * found.answers_in_s,
        bytes(BUCKET_BYTES),
        rate(found.write_s),
        rate(found.read_s)
    );
    let mut all = vec![Finding::new(Level::Ok, topic, text)];
    if !found.decides {
        let text = "it does not decide which of two writers was first (If-None-Match): two jobs of one run \
                    that start within a second of each other may both begin, and one of them then ends";
        let fix = "start them one after the other, or use a store that knows conditional writes";
        all.push(Finding::new(Level::Note, topic, text).fix(fix));
    }
    all
}

/// A descriptor goes over a socket, and what is written through it is there.
pub(super) fn descriptors() -> Finding {
    let topic = "descriptors";
    match pass() {
        Ok(()) => Finding::new(Level::Ok, topic, "pass over a unix socket"),
        Err(e) => {
            let text = format!("do not pass over a unix socket: {}", e.chain());
            Finding::new(Level::Error, topic, text)
                .fix("allow sendmsg and recvmsg with SCM_RIGHTS (seccomp, SELinux)")
        }
    }
}

fn pass() -> Result<(), Error> {
    let io = |source| Error::Io { what: "pass a descriptor".into(), source };
    let (ours, theirs) = UnixStream::pair().map_err(io)?;
    let name = "tierkeep-doctor";
    let mut file = File::from(memfd_create(name, MemfdFlags::CLOEXEC).map_err(|e| io(e.into()))?);
    passing::send(&ours, b"x", &[file.as_fd()]).map_err(io)?;
    let (_, fds) = passing::receive(&theirs, &mut [0; 8]).map_err(io)?;
    let came = fds.into_iter().next();
    let came = came.ok_or_else(|| io(std::io::ErrorKind::UnexpectedEof.into()))?;
    File::from(came).write_all(b"slot").map_err(io)?;
    let mut back = String::new();
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    file.read_to_string(&mut back).map_err(io)?;
    if back == "slot" { Ok(()) } else { Err(Error::Bug(format!("{back:?} came back"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(findings: &[Finding]) -> Vec<(Level, &str)> {
        findings.iter().map(|f| (f.level, f.found.as_str())).collect()
    }

    #[test]
    fn memory_that_is_too_small_is_an_error_with_the_sum() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let good = memory(dir.path(), None, Some(1 << 20));
        assert!(good.iter().all(|f| f.level == Level::Ok), "{good:?}");
        let bad = memory(dir.path(), None, Some(1 << 50));
        assert_eq!(bad[0].level, Level::Error);
        assert!(bad[0].found.starts_with("slots of 1.0 PiB do not fit: "), "{bad:?}");
        assert!(bad[0].fix.as_deref().unwrap().contains("--shm-size"));
        let file = dir.path().join("file");
        File::create(&file).unwrap();
        assert_eq!(memory(&file.join("x"), None, None)[0].level, Level::Error);
    }

    #[test]
    fn a_directory_on_a_disk_is_no_memory_and_one_in_memory_no_disk() {
        let disk_dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let found = memory(disk_dir.path(), None, None);
        assert_eq!(found[0].level, Level::Warning, "{:?}", said(&found));
        assert!(found[0].found.contains("no memory"));
        let ram = tempfile::tempdir_in("/dev/shm").unwrap();
        let found = disk(&ram.path().join("run"));
        assert_eq!(found[0].level, Level::Ok, "{:?}", said(&found));
        assert!(found.iter().any(|f| f.found.contains("survives a reboot")), "{:?}", said(&found));
    }

    #[test]
    fn descriptors_pass() {
        assert_eq!(descriptors().level, Level::Ok);
    }
}
