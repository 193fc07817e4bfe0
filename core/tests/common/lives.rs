//! Trials that are drawn from a seed, and what processes that are killed in them have said before.

use std::path::{Path, PathBuf};

use tierkeep::names::Id;

/// SplitMix64: neighbouring seeds give unlike numbers.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (x ^ (x >> 31)) % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// An environment variable that is a number, if it is.
pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

/// `TIERKEEP_KILL_SEED`, or one that is drawn.
pub fn seed() -> u64 {
    let drawn = || u32::from_ne_bytes(Id::random().unwrap().0[..4].try_into().unwrap()).into();
    number("TIERKEEP_KILL_SEED").unwrap_or_else(drawn)
}

/// One line a fact, each written whole.
pub fn say(place: &Path, rank: u32, line: &str) {
    use std::io::Write;
    let path = log_path(place, rank);
    let mut log = std::fs::File::options().create(true).append(true).open(path).expect("log");
    log.write_all(format!("{line}\n").as_bytes()).expect("log");
}

fn log_path(place: &Path, rank: u32) -> PathBuf {
    place.join(format!("log-{rank}"))
}

/// What the ranks said in one life of the job: (rank, word, the rest of the line).
pub fn said(place: &Path, world: u32) -> Vec<(u32, String, String)> {
    let mut all = Vec::new();
    for rank in 0..world {
        let log = std::fs::read_to_string(log_path(place, rank)).unwrap_or_default();
        for line in log.lines() {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            all.push((rank, word.to_owned(), rest.to_owned()));
        }
    }
    all
}

/// Before the next life.
pub fn forget(place: &Path, world: u32) {
    for rank in 0..world {
        let _ = std::fs::remove_file(log_path(place, rank));
    }
}
