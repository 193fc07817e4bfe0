//! `tierkeep top`

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use tierkeep_proto::control::{Counters, Rank, StatusReply};

use super::{
    reach::Reached,
    status::{has_bucket, headline, notes, numbers, others, steps, tiers, who},
};
use crate::{
    cli::Top,
    fail::{Failure, OK, say},
    show, told,
};

pub(super) fn run(args: &Top, json: bool, out: &mut dyn Write) -> Result<i32, Failure> {
    let mut agent = Reached::new(args.node.agent.as_deref())?;
    let mut stops = agent.stops()?;
    let terminal = io::stdout().is_terminal() && !json;
    let mut before: Option<StatusReply> = None;
    let mut after = Duration::ZERO;
    while let Some(look) = agent.look(after, &mut stops) {
        match &look {
            Ok(now) if json => {
                serde_json::to_writer(&mut *out, &told::status(agent.socket(), now))
                    .map_err(io::Error::from)?;
                writeln!(out)?;
            }
            Ok(now) => {
                let mut text = Vec::new();
                snapshot(&mut text, now, before.as_ref())?;
                frame(out, &text, terminal)?;
            }
            // One that goes away may be back: it is upgraded, say.
            Err(failure) if terminal => frame(out, away(failure).as_bytes(), true)?,
            Err(failure) => say(&away(failure)),
        }
        out.flush()?;
        before = look.ok();
        after = args.interval;
    }
    Ok(OK)
}

fn away(failure: &Failure) -> String {
    format!("warning: {}; waiting for it", failure.why())
}

/// One look.
fn snapshot(
    out: &mut dyn Write,
    now: &StatusReply,
    before: Option<&StatusReply>,
) -> Result<(), Failure> {
    let rates: Vec<Option<Rates>> = now.ranks.iter().map(|r| rates(r, now, before)).collect();
    let known: Vec<Rates> = rates.iter().flatten().copied().collect();
    let sum =
        |of: fn(&Rates) -> f64| per_second((!known.is_empty()).then(|| known.iter().map(of).sum()));
    let bucket = has_bucket(now);
    write!(
        out,
        "{}; to RAM {}, to disk {}",
        headline(now),
        sum(|rates| rates.ram),
        sum(|rates| rates.disk)
    )?;
    let to_bucket = || format!(", to the bucket {}", sum(|rates| rates.bucket));
    writeln!(out, "{}", if bucket { to_bucket() } else { String::new() })?;
    if let Some(peers) = &now.peers {
        writeln!(out, "{}; to other nodes {}", others(peers), sum(|rates| rates.peers))?;
    }
    if now.ranks.is_empty() {
        return Ok(());
    }
    writeln!(out)?;
    let head = ["RUN", "RANK", "TRAINER"].into_iter().chain(tiers(bucket));
    let head = head.chain(["TO RAM", "TO DISK", "TO PEERS"]).chain(bucket.then_some("TO BUCKET"));
    let mut rows = vec![head.chain(["NOTES"]).map(String::from).collect::<Vec<_>>()];
    rows.extend(now.ranks.iter().zip(rates).map(|(rank, rates)| {
        let mut row = who(rank).to_vec();
        row.extend(steps(rank, bucket));
        let of: [fn(Rates) -> f64; 4] = [|r| r.ram, |r| r.disk, |r| r.peers, |r| r.bucket];
        let shown = if bucket { &of[..] } else { &of[..3] };
        row.extend(shown.iter().map(|of| per_second(rates.map(of))));
        row.push(notes(rank).join("; "));
        row
    }));
    Ok(show::table(out, "", &rows, &numbers(rows[0].len()))?)
}

/// Bytes a second since the last look.
#[derive(Clone, Copy)]
struct Rates {
    ram: f64,
    disk: f64,
    peers: f64,
    bucket: f64,
}

/// `None` where there was no last look at this rank, by this owner.
#[allow(clippy::cast_precision_loss)] // One decimal is shown.
fn rates(rank: &Rank, now: &StatusReply, before: Option<&StatusReply>) -> Option<Rates> {
    let before = before?;
    let place = |r: &Rank| (r.rank, r.destination.clone());
    let old = before.ranks.iter().find(|r| place(r) == place(rank))?;
    // By the agent's clock, whatever the way took; a next agent began anew.
    let seconds = now.uptime_ms.checked_sub(before.uptime_ms).filter(|ms| *ms > 0)? as f64 / 1e3;
    let (new, old) = (rank.counters.unwrap_or_default(), old.counters.unwrap_or_default());
    let rate =
        |of: fn(&Counters) -> u64| of(&new).checked_sub(of(&old)).map(|n| n as f64 / seconds);
    Some(Rates {
        ram: rate(|c| c.captured_bytes)?,
        disk: rate(|c| c.disk_bytes)?,
        peers: rate(|c| c.peer_bytes)?,
        bucket: rate(|c| c.object_bytes)?,
    })
}

/// `412.0 MiB/s`
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Not below 0; whole bytes will do.
fn per_second(rate: Option<f64>) -> String {
    rate.map_or_else(|| "-".into(), |rate| format!("{}/s", show::bytes(rate as u64)))
}

/// Prints, on a terminal over what was there: as much of it as fits, or the lines would wander.
fn frame(out: &mut dyn Write, text: &[u8], terminal: bool) -> io::Result<()> {
    if !terminal {
        out.write_all(text)?;
        return writeln!(out);
    }
    // Some terminals do not know how large they are.
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok();
    let size = size.map(|s| (usize::from(s.ws_row), usize::from(s.ws_col)));
    let (rows, columns) = size.filter(|s| s.0 > 1 && s.1 > 0).unwrap_or((24, 80));
    out.write_all(b"\x1b[H")?;
    let text = String::from_utf8_lossy(text);
    for (at, line) in text.lines().take(rows - 1).enumerate() {
        let line: String = line.chars().take(columns).collect();
        // Each line takes away what was longer there before.
        write!(out, "{}{line}\x1b[K", if at > 0 { "\r\n" } else { "" })?;
    }
    write!(out, "\r\n\x1b[J")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(uptime_ms: u64, captured_bytes: u64, disk_bytes: u64) -> StatusReply {
        let counters = Some(Counters { captured_bytes, disk_bytes, ..Default::default() });
        let rank = Rank { destination: b"/ckpt/run".into(), world: 1, counters, ..Rank::default() };
        StatusReply { version: "0.1.0".into(), uptime_ms, ranks: vec![rank], ..Default::default() }
    }

    fn text(now: &StatusReply, before: Option<&StatusReply>) -> String {
        let mut out = Vec::new();
        snapshot(&mut out, now, before).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn rates_come_from_two_looks_by_the_agents_clock() {
        let first = seen(1000, 1 << 20, 0);
        assert!(text(&first, None).contains("; to RAM -, to disk -\n"), "{}", text(&first, None));
        let second = seen(1500, 3 << 20, 512 << 10);
        let shown = text(&second, Some(&first));
        assert!(shown.contains("; to RAM 4.0 MiB/s, to disk 1.0 MiB/s\n"), "{shown}");
        let row = shown.lines().last().unwrap();
        let cells: Vec<&str> = row.split_whitespace().collect();
        let rates = ["4.0", "MiB/s", "1.0", "MiB/s", "0", "B/s"];
        assert_eq!(cells, [&["/ckpt/run", "0/1", "gone", "-", "-", "-"][..], &rates].concat());
    }

    #[test]
    fn a_bucket_has_its_columns_where_some_rank_has_one() {
        let mut now = seen(1000, 0, 0);
        assert!(!text(&now, None).contains("BUCKET"));
        let mut before = now.clone();
        now.ranks.push(Rank { bucket: Some("s3://b/run".into()), rank: 1, ..now.ranks[0].clone() });
        now.ranks[1].object_step = Some(7);
        before.ranks = now.ranks.clone();
        now.uptime_ms = 2000;
        let counters = now.ranks[1].counters.as_mut().unwrap();
        (counters.object_bytes, counters.object_passed_over, counters.object_failed) =
            (1 << 20, 3, 1);
        let shown = text(&now, Some(&before));
        assert!(shown.contains("to disk 0 B/s, to the bucket 1.0 MiB/s\n"), "{shown}");
        let rows: Vec<Vec<&str>> = shown.lines().map(|l| l.split("  ").collect()).collect();
        let cells = |row: &[&str]| {
            let cells = row.iter().map(|cell| cell.trim()).filter(|cell| !cell.is_empty());
            cells.map(String::from).collect::<Vec<_>>()
        };
        let [head, without, with] = &rows[2..] else { panic!("{shown}") };
        assert_eq!(
            cells(head)[6..],
            ["IN BUCKET", "TO RAM", "TO DISK", "TO PEERS", "TO BUCKET", "NOTES"]
        );
        assert_eq!(cells(without)[6..], ["-", "0 B/s", "0 B/s", "0 B/s", "0 B/s"]);
        let notes = "3 steps passed over for the bucket; 1 step given up for the bucket";
        assert_eq!(cells(with)[6..], ["7", "0 B/s", "0 B/s", "0 B/s", "1.0 MiB/s", notes]);
    }

    #[test]
    fn a_next_owner_begins_anew() {
        // The agent was replaced, or the rank was taken again.
        for old in [seen(9000, 0, 0), seen(500, 2, 0)] {
            assert!(text(&seen(1000, 1, 0), Some(&old)).contains("to RAM -"));
        }
    }

    #[test]
    fn a_frame_stays_within_the_terminal() {
        let mut out = Vec::new();
        frame(&mut out, "x".repeat(100_000).as_bytes(), true).unwrap();
        let longest = out.iter().filter(|b| **b == b'x').count();
        assert!(longest < 100_000 && out.starts_with(b"\x1b[H") && out.ends_with(b"\x1b[J"));
        let mut out = Vec::new();
        frame(&mut out, b"plain\n", false).unwrap();
        assert_eq!(out, b"plain\n\n");
    }
}
