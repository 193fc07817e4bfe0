//! What the host does to memory and processes, as its own files say.
//!
//! All paths lie below a root, so that other hosts can be looked at in tests.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use rustix::process::{Resource, getrlimit};

use super::{Finding, Level};
use crate::show::bytes;

/// Numbers up to this belong to system users, whose IPC systemd leaves alone (its SYSTEM_UID_MAX).
const SYSTEM_UID_MAX: u32 = 999;

/// One host, and the user that the job runs as.
pub(super) struct Host {
    root: PathBuf,
    uid: u32,
    is_kubernetes: bool,
}

impl Host {
    /// This one.
    pub(super) fn here() -> Self {
        let is_kubernetes = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
        Self { root: "/".into(), uid: rustix::process::getuid().as_raw(), is_kubernetes }
    }

    fn path(&self, absolute: &str) -> PathBuf {
        self.root.join(absolute.trim_start_matches('/'))
    }

    fn read(&self, absolute: &str) -> Option<String> {
        fs::read_to_string(self.path(absolute)).ok()
    }

    /// What may become of the files in memory.
    pub(super) fn memory(&self, ram_root: &Path) -> Vec<Finding> {
        let all = [self.container(ram_root), self.logout(ram_root), self.swap()];
        all.into_iter().flatten().collect()
    }

    /// Whose memory it is.
    fn container(&self, ram_root: &Path) -> Option<Finding> {
        let kind = if self.is_kubernetes {
            "a pod"
        } else if self.path("/.dockerenv").exists() || self.path("/run/.containerenv").exists() {
            "a container"
        } else {
            return None;
        };
        // A directory of a tmpfs is one that was mounted from outside; a tmpfs of its own is mounted whole.
        if self.mounted_from(ram_root).is_some_and(|inside| inside != "/") {
            let text = format!(
                "this is {kind}, and {} is the host's: what is there outlives {kind}",
                ram_root.display()
            );
            return Some(Finding::new(Level::Ok, "container", text));
        }
        let text = format!(
            "this is {kind}: what is in its memory survives a process that dies, not {kind} that goes"
        );
        let fix = match self.is_kubernetes {
            true => {
                "an emptyDir with medium Memory outlives containers of the pod; disk_every says \
                     how much is lost with the pod"
            }
            false => "mount the host's /dev/shm (docker: --ipc=host) to outlive the container",
        };
        Some(Finding::new(Level::Note, "container", text).fix(fix))
    }

    /// Which part of a file system is mounted where `path` lies.
    fn mounted_from(&self, path: &Path) -> Option<String> {
        let table = self.read("/proc/self/mountinfo")?;
        // Blanks in paths are written as \\040.
        let mounts = table.lines().filter_map(|line| {
            let mut words = line.split(' ').skip(3);
            let (inside, at) = (words.next()?, words.next()?.replace("\\040", " "));
            path.starts_with(&at).then(|| (at.len(), inside.to_owned()))
        });
        // Of several at one place the last one counts.
        mounts.max_by_key(|(len, _)| *len).map(|(_, inside)| inside)
    }

    /// What confines this process, where something does.
    pub(super) fn confinement(&self) -> Vec<Finding> {
        let status = self.read("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(str::trim)
        };
        let mut all = Vec::new();
        if field("Seccomp") == Some("2") {
            all.push(self.seccomp());
        }
        let enforces = self.read("/sys/fs/selinux/enforce").is_some_and(|said| said.trim() == "1");
        let label = self.read("/proc/self/attr/current").unwrap_or_default();
        let label = label.trim_matches(['\0', '\n']);
        if enforces && !label.is_empty() {
            let text = format!("SELinux confines this process to {label}");
            all.push(Finding::new(Level::Note, "confinement", text).fix(
                "where trainers are refused the agent's socket: label its directory for containers \
                 (`chcon -Rt container_file_t`), and give the agent spc_t",
            ));
        }
        all
    }

    /// What a filter of system calls leaves: the rarer ones are tried.
    fn seccomp(&self) -> Finding {
        let own = rustix::process::getpid();
        let pidfd = rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty());
        let topic = "confinement";
        match pidfd {
            Ok(_) => {
                let text = "seccomp filters system calls; those that are needed pass (io_uring is not one)";
                Finding::new(Level::Ok, topic, text)
            }
            Err(e) => {
                let text = format!(
                    "seccomp refuses pidfd_open ({e}): a trainer's death is seen by its socket alone"
                );
                let fix = "allow it, as the profiles of containerd and CRI-O do (RuntimeDefault)";
                Finding::new(Level::Warning, topic, text).fix(fix)
            }
        }
    }

    /// systemd removes the files of a user in /dev/shm when the user's last session ends.
    fn logout(&self, ram_root: &Path) -> Option<Finding> {
        let booted = self.path("/run/systemd/system").is_dir();
        let exempt = self.uid <= SYSTEM_UID_MAX || self.lingers() || !self.removes_ipc();
        if !booted || exempt || !ram_root.starts_with("/dev/shm") {
            return None;
        }
        let text = format!(
            "systemd removes what user {} has in /dev/shm when its last session ends (RemoveIPC)",
            self.uid
        );
        Some(
            Finding::new(Level::Warning, "log-out", text)
                .fix("`loginctl enable-linger`, or RemoveIPC=no in /etc/systemd/logind.conf"),
        )
    }

    fn lingers(&self) -> bool {
        let users = self.read("/etc/passwd").unwrap_or_default();
        let name = users.lines().find_map(|line| {
            let mut parts = line.split(':');
            let name = parts.next()?;
            (parts.nth(1)?.parse() == Ok(self.uid)).then_some(name)
        });
        name.is_some_and(|n| self.path(&format!("/var/lib/systemd/linger/{n}")).exists())
    }

    /// `RemoveIPC` of logind: drop-ins of all places in the order of their names, after the main
    /// file; one in /etc hides one of its name in /run, and that one in /usr/lib.
    fn removes_ipc(&self) -> bool {
        let mut drop_ins: BTreeMap<String, PathBuf> = BTreeMap::new();
        let mut main = None;
        for place in ["/usr/lib/systemd", "/run/systemd", "/etc/systemd"] {
            let file = self.path(&format!("{place}/logind.conf"));
            main = Some(file).filter(|f| f.exists()).or(main);
            let entries = fs::read_dir(self.path(&format!("{place}/logind.conf.d")));
            for entry in entries.into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.ends_with(".conf") {
                    drop_ins.insert(name, entry.path());
                }
            }
        }
        let files = main.into_iter().chain(drop_ins.into_values());
        let mut said = files.filter_map(|file| fs::read_to_string(file).ok()).filter_map(|text| {
            let set = |line: &str| {
                let (key, value) = line.split_once('=')?;
                (key.trim() == "RemoveIPC").then(|| value.trim().to_owned())
            };
            text.lines().filter_map(set).next_back()
        });
        !matches!(said.next_back().as_deref(), Some("no" | "false" | "0" | "off" | "n" | "f"))
    }

    /// Pages of tmpfs go to swap like any other.
    fn swap(&self) -> Option<Finding> {
        let table = self.read("/proc/swaps")?;
        let kib =
            table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(2)?.parse().ok());
        let total = kib.fold(0_u64, |sum, n: u64| sum.saturating_add(n)).saturating_mul(1024);
        if total == 0 {
            return None;
        }
        let text = format!(
            "{} of swap: under memory pressure slots go there, and saves and restores with them",
            bytes(total)
        );
        let fix = "`swapoff -a`, or memory.swap.max = 0 for the job";
        Some(Finding::new(Level::Warning, "swap", text).fix(fix))
    }

    /// What the kernel and the shell's limits give.
    pub(super) fn limits(&self) -> Vec<Finding> {
        let mut all: Vec<Finding> = self.kernel().into_iter().collect();
        if let Some(files) = getrlimit(Resource::Nofile).current.filter(|n| *n < 1024) {
            let text = format!("{files} may be open at once: a large job needs more");
            let fix = "`ulimit -n 65536`, or LimitNOFILE= of the unit";
            all.push(Finding::new(Level::Warning, "open files", text).fix(fix));
        }
        if let Some(limit) = getrlimit(Resource::Memlock).current {
            let text = format!(
                "{} may be locked: where a GPU's driver counts against it, slots are not pinned and \
                 copies from the device are slower",
                bytes(limit)
            );
            let fix = "`ulimit -l unlimited`, or LimitMEMLOCK=infinity of the unit";
            all.push(Finding::new(Level::Note, "locked memory", text).fix(fix));
        }
        all
    }

    fn kernel(&self) -> Option<Finding> {
        let release = self.read("/proc/sys/kernel/osrelease")?;
        let release = release.trim();
        let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
        let version = (numbers.next()?, numbers.next()?);
        let text = if version < (5, 14) {
            "it has no MADV_POPULATE_WRITE: slots are put in place page by page"
        } else if version < (6, 5) {
            "it cannot say which pages of a file are in memory: hot files are read as cold ones"
        } else {
            return Some(Finding::new(Level::Ok, "kernel", format!("Linux {release}")));
        };
        Some(Finding::new(Level::Note, "kernel", format!("Linux {release}: {text}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)], uid: u32) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let mut file = fs::File::create(&path).unwrap();
            std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        }
        let host = Host { root: root.path().into(), uid, is_kubernetes: false };
        (root, host)
    }

    #[test]
    fn a_log_out_that_removes_the_slots_is_told_unless_the_user_is_exempt() {
        let shm = Path::new("/dev/shm/tierkeep-1000");
        let systemd = ("/run/systemd/system/x", "");
        let passwd = ("/etc/passwd", "root:x:0:0::/:/bin/sh\nada:x:1000:1000::/home/ada:/bin/sh\n");
        let told = |files: &[(&str, &str)], uid, place: &Path| {
            let (_root, host) = host(files, uid);
            host.logout(place)
        };
        let finding = told(&[systemd, passwd], 1000, shm).unwrap();
        assert_eq!(finding.level, Level::Warning);
        assert!(finding.found.contains("user 1000"), "{finding:?}");
        assert!(finding.fix.unwrap().contains("enable-linger"));
        let conf = |text| ("/etc/systemd/logind.conf", text);
        for (files, warned) in [
            (vec![], true),
            (vec![conf("[Login]\n#RemoveIPC=no\n")], true),
            (vec![conf("[Login]\nRemoveIPC=no\n")], false),
            (
                vec![
                    conf("RemoveIPC=no\n"),
                    ("/run/systemd/logind.conf.d/a.conf", "RemoveIPC=yes"),
                ],
                true,
            ),
            (
                vec![
                    ("/usr/lib/systemd/logind.conf.d/a.conf", "RemoveIPC=yes"),
                    ("/etc/systemd/logind.conf.d/a.conf", "[Login]\n RemoveIPC = no"),
                ],
                false,
            ),
            (
                vec![
                    ("/usr/lib/systemd/logind.conf.d/a.conf", "RemoveIPC=yes"),
                    ("/etc/systemd/logind.conf.d/a.conf", "[Login]\nRemoveIPC=off"),
                ],
                false,
            ),
            (vec![("/var/lib/systemd/linger/ada", "")], false),
        ] {
            let all: Vec<_> = files.iter().copied().chain([systemd, passwd]).collect();
            assert_eq!(told(&all, 1000, shm).is_some(), warned, "{files:?}");
        }
        assert!(told(&[systemd, passwd], 0, shm).is_none(), "a system user");
        assert!(told(&[passwd], 1000, shm).is_none(), "no systemd");
        assert!(told(&[systemd, passwd], 1000, Path::new("/mnt/ram")).is_none(), "elsewhere");
    }

    #[test]
    fn swap_is_summed() {
        let table =
            "Filename\tType\tSize\tUsed\tPriority\n/a file 1048576 0 -2\n/b file 1024 0 -3\n";
        let (_root, swapping) = host(&[("/proc/swaps", table)], 0);
        assert!(swapping.swap().unwrap().found.starts_with("1.0 GiB of swap"));
        let (_root, none) = host(&[("/proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n")], 0);
        assert!(none.swap().is_none());
    }

    #[test]
    fn kernels_are_told_by_what_they_lack() {
        for (release, level, word) in [
            ("5.10.0-28-amd64", Level::Note, "POPULATE_WRITE"),
            ("6.1.0\n", Level::Note, "which pages"),
            ("6.12.3+", Level::Ok, "Linux 6.12.3+"),
        ] {
            let (_root, host) = host(&[("/proc/sys/kernel/osrelease", release)], 0);
            let found = host.kernel().unwrap();
            assert_eq!(found.level, level, "{found:?}");
            assert!(found.found.contains(word), "{found:?}");
        }
    }

    #[test]
    fn a_container_is_told() {
        let shm = Path::new("/dev/shm/tierkeep");
        let (_root, mut container) = host(&[("/.dockerenv", "")], 0);
        assert!(container.container(shm).unwrap().fix.unwrap().contains("--ipc=host"));
        container.is_kubernetes = true;
        assert!(container.container(shm).unwrap().found.contains("a pod that goes"));
        let (_root, bare) = host(&[], 0);
        assert!(bare.container(shm).is_none());
    }

    #[test]
    fn a_hosts_memory_outlives_the_pod_that_has_it_mounted() {
        let own = "25 1 0:23 / /dev/shm rw - tmpfs shm rw\n";
        let hosts = "30 25 0:9 /tierkeep /dev/shm/tierkeep rw,relatime - tmpfs tmpfs rw\n";
        let shm = Path::new("/dev/shm/tierkeep");
        for (mounts, level) in [(own.to_owned(), Level::Note), (format!("{own}{hosts}"), Level::Ok)]
        {
            let (_root, mut pod) = host(&[("/proc/self/mountinfo", &mounts)], 9177);
            pod.is_kubernetes = true;
            let found = pod.container(shm).unwrap();
            assert_eq!(found.level, level, "{found:?}");
        }
    }

    #[test]
    fn what_confines_a_process_is_told() {
        let (_root, free) = host(&[("/proc/self/status", "Seccomp:\t0\n")], 9177);
        assert!(free.confinement().is_empty());
        let (_root, confined) = host(
            &[
                ("/proc/self/status", "Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n"),
                ("/sys/fs/selinux/enforce", "1"),
                ("/proc/self/attr/current", "system_u:system_r:container_t:s0:c1,c2\0"),
            ],
            9177,
        );
        let found = confined.confinement();
        assert_eq!(found[0].level, Level::Ok, "{found:?}");
        assert!(found[1].found.ends_with("to system_u:system_r:container_t:s0:c1,c2"), "{found:?}");
    }
}
