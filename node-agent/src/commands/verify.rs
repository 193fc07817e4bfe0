//! `tierkeep verify`

use serde::Serialize;
use tierkeep::{
    reader::Reader,
    restore::survey::Found,
    verify::{Depth, Finding, Gravity, Verdict, verify, verify_records},
};

use super::{Context, no_run, no_step};
use crate::{
    cli::Verify,
    fail::{DAMAGE, FAILED, Failure, OK, say, tier_name},
    progress::Bar,
    show,
};

#[derive(Serialize)]
struct Data {
    destination: String,
    good: bool,
    damage: usize,
    unreadable: usize,
    records: Records,
    steps: Vec<StepData>,
}

#[derive(Serialize)]
struct Records {
    attempts: usize,
    findings: Vec<FindingData>,
}

#[derive(Serialize)]
struct StepData {
    step: u64,
    attempt: u32,
    good: bool,
    restorable: bool,
    bytes: u64,
    told_bytes: u64,
    findings: Vec<FindingData>,
    marks_cleared: Vec<u32>,
}

#[derive(Serialize)]
struct FindingData {
    gravity: &'static str,
    tier: String,
    file: String,
    chunks: Vec<usize>,
    why: String,
}

pub(super) fn run(context: &mut Context<'_>, args: &Verify) -> Result<i32, Failure> {
    let reader = context.open()?;
    let (records, mut found) = verify_records(&reader)?;
    if found.is_empty() && records.good.is_empty() && records.findings.is_empty() {
        return Err(no_run(context.dest));
    }
    if let Some(step) = args.step {
        found.retain(|f| f.key.step.0 == step);
        if found.is_empty() {
            return Err(no_step(context.dest, step));
        }
    }
    let mut data = Data {
        destination: context.dest.display().to_string(),
        good: true,
        damage: 0,
        unreadable: 0,
        records: Records {
            attempts: records.good.len(),
            findings: records.findings.iter().map(finding_data).collect(),
        },
        steps: Vec::new(),
    };
    if !context.json {
        lines(context, &records.findings)?;
    }
    let run_id = records.good.last().map(|r| r.run_id);
    let bar = Bar::new("verifying", total(&reader, &found));
    for found in &found {
        let depth = if args.deep { Depth::Bytes } else { Depth::Told };
        let verdict = verify(&reader, found, run_id.as_ref(), depth, &|bytes| bar.add(bytes));
        let cleared = clear(&reader, &verdict);
        if !context.json {
            step(context, &verdict)?;
        }
        data.steps.push(step_data(&verdict, cleared));
    }
    drop(bar);
    let all = || data.steps.iter().flat_map(|s| &s.findings).chain(&data.records.findings);
    let of = |gravity| all().filter(|f| f.gravity == word(gravity)).count();
    (data.damage, data.unreadable) = (of(Gravity::Damage), of(Gravity::Unreadable));
    data.good = data.damage == 0 && data.unreadable == 0;
    if context.json {
        show::json(context.out, &data)?;
    }
    Ok(summary(context, &data))
}

/// The last word; the exit code.
fn summary(context: &Context<'_>, data: &Data) -> i32 {
    let bytes: u64 = data.steps.iter().map(|s| s.bytes).sum();
    let steps = show::count(data.steps.len(), "checkpoint");
    let records = show::count(data.records.attempts, "attempt record");
    say(&format!("{steps} and {records} read, {}", show::bytes(bytes)));
    if data.damage > 0 {
        say(&format!("error: {} found", show::count(data.damage, "damaged file")));
        let lost = data.steps.iter().any(|s| !s.restorable && s.findings.iter().any(is_damage));
        say(&format!(
            "hint: {}",
            if lost {
                format!(
                    "a step that is not restorable is passed over by the next resume; \
                     `tierkeep ls {}` shows which step it takes",
                    context.dest.display()
                )
            } else {
                "every step is restorable from another copy; a restore mends the copies of its step"
                    .into()
            }
        ));
        return DAMAGE;
    }
    if data.unreadable > 0 {
        say(&format!("error: {} could not be read", show::count(data.unreadable, "file")));
        return FAILED;
    }
    OK
}

fn is_damage(finding: &FindingData) -> bool {
    finding.gravity == word(Gravity::Damage)
}

/// Bytes of all payloads in all tiers, for the bar.
fn total(reader: &Reader, found: &[Found]) -> u64 {
    let mut sum = 0_u64;
    for found in found {
        for (tier, listing) in reader.tiers().into_iter().zip(&found.listings) {
            for file in listing.payloads.values().flatten() {
                let len = tier.open(&found.key.file(file)).map_or(0, |source| source.len());
                sum = sum.saturating_add(len);
            }
        }
    }
    sum
}

/// Marks of a step that is good are cleared; where that fails, the verdict stands all the same.
fn clear(reader: &Reader, verdict: &Verdict) -> Vec<u32> {
    if !verdict.is_good() {
        return Vec::new();
    }
    match reader.clear_marks(&verdict.key) {
        Ok(ranks) => {
            for rank in &ranks {
                say(&format!("note: cleared the mark that {rank} left on {}", verdict.key));
            }
            ranks.iter().map(|r| r.0).collect()
        }
        Err(e) => {
            say(&format!("warning: the marks of {} were not cleared: {}", verdict.key, e.chain()));
            Vec::new()
        }
    }
}

fn step(context: &mut Context<'_>, verdict: &Verdict) -> Result<(), Failure> {
    let worst = verdict.findings.iter().map(|f| f.gravity).max().unwrap_or(Gravity::Note);
    let word = match (worst, verdict.restorable) {
        (Gravity::Note, true) => "good",
        (Gravity::Note, false) => "not complete",
        (Gravity::Unreadable, true) => "restorable, with unreadable copies",
        (Gravity::Unreadable, false) => "unreadable",
        (Gravity::Damage, true) => "damaged, restorable from other copies",
        (Gravity::Damage, false) => "damaged, not restorable",
    };
    let read = show::bytes(verdict.bytes);
    let told = match verdict.told_bytes {
        0 => "".into(),
        told => format!(", {} by the bucket's checksums (--deep reads them)", show::bytes(told)),
    };
    writeln!(context.out, "{}: {word}, {read} read{told}", verdict.key)?;
    lines(context, &verdict.findings)
}

fn lines(context: &mut Context<'_>, findings: &[Finding]) -> Result<(), Failure> {
    for f in findings {
        writeln!(
            context.out,
            "  {} ({}): {}: {}",
            word(f.gravity),
            f.tier,
            show::safe(&f.file),
            show::safe(&f.why)
        )?;
    }
    Ok(())
}

fn word(gravity: Gravity) -> &'static str {
    match gravity {
        Gravity::Note => "note",
        Gravity::Unreadable => "unreadable",
        Gravity::Damage => "damage",
    }
}

fn step_data(verdict: &Verdict, marks_cleared: Vec<u32>) -> StepData {
    StepData {
        step: verdict.key.step.0,
        attempt: verdict.key.attempt.number,
        good: verdict.is_good(),
        restorable: verdict.restorable,
        bytes: verdict.bytes,
        told_bytes: verdict.told_bytes,
        findings: verdict.findings.iter().map(finding_data).collect(),
        marks_cleared,
    }
}

fn finding_data(finding: &Finding) -> FindingData {
    FindingData {
        gravity: word(finding.gravity),
        tier: tier_name(finding.tier),
        file: finding.file.clone(),
        chunks: finding.chunks.clone(),
        why: finding.why.clone(),
    }
}
