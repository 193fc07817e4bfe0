//! `tierkeep ls`

use std::collections::BTreeMap;

use serde::Serialize;
use tierkeep::{
    reader::{Overview, Reader, StepInfo},
    restore::survey::Reach,
    tier::TierKind,
};

use super::{Context, no_run, no_step, savers, state_text, state_word};
use crate::{
    cli::Ls,
    fail::{Failure, OK, code_of, hint_for, say, tier_name},
    show,
};

#[derive(Serialize)]
struct Data {
    destination: String,
    tiers: Vec<TierData>,
    resume: Option<KeyData>,
    passed_over: Vec<String>,
    trouble: Vec<String>,
    steps: Vec<StepData>,
}

#[derive(Serialize)]
struct TierData {
    tier: String,
    address: String,
}

#[derive(Serialize)]
struct KeyData {
    step: u64,
    attempt: u32,
}

#[derive(Serialize)]
struct StepData {
    step: u64,
    attempt: u32,
    attempt_id: String,
    state: &'static str,
    why: Vec<String>,
    missing_ranks: Vec<u32>,
    sealed: bool,
    pinned: bool,
    in_lineage: bool,
    resume: bool,
    bytes: u64,
    saved_unix_ms: u64,
    ranks: Vec<u32>,
    tiers: BTreeMap<String, Vec<u32>>,
    damaged: Vec<BadData>,
    marked_bad: Vec<u32>,
}

#[derive(Serialize)]
struct BadData {
    rank: u32,
    tier: String,
    why: String,
}

pub(super) fn run(context: &mut Context<'_>, args: &Ls) -> Result<i32, Failure> {
    let reader = context.open()?;
    let mut view = reader.overview()?;
    if view.steps.is_empty() && view.trouble.is_empty() && reader.attempts()?.newest().is_none() {
        return Err(no_run(context.dest));
    }
    if let Some(step) = args.step {
        view.steps.retain(|s| s.key.step.0 == step);
        if view.steps.is_empty() {
            return Err(no_step(context.dest, step));
        }
    }
    if context.json {
        let data = data(context, &reader, &view);
        show::json(context.out, &data)?;
    } else {
        steps(context, &reader, &view)?;
        if args.step.is_some() {
            for info in &view.steps {
                shards(context, info)?;
            }
        }
    }
    Ok(talk(context, &view))
}

/// What is not data; the exit code.
fn talk(context: &Context<'_>, view: &Overview) -> i32 {
    if view.steps.is_empty() {
        say("note: there are no checkpoints yet");
    }
    for why in &view.passed_over {
        say(&format!("warning: a resume passes over {why}"));
    }
    for error in &view.trouble {
        say(&format!("error: what a resume takes cannot be told: {}", error.chain()));
        if let Some(hint) = hint_for(error, context.dest, context.ram_dir) {
            say(&format!("hint: {hint}"));
        }
    }
    view.trouble.first().map_or(OK, |e| code_of(e.kind()))
}

fn steps(context: &mut Context<'_>, reader: &Reader, view: &Overview) -> Result<(), Failure> {
    if view.steps.is_empty() {
        return Ok(());
    }
    let durable = match reader.home().kind() {
        TierKind::Object => TierKind::Object,
        _ => TierKind::Disk,
    };
    let place = tier_name(durable).to_uppercase();
    let head = ["", "STEP", "ATTEMPT", "STATE", "RAM", &place, "SIZE", "SAVED (UTC)", "NOTES"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for info in &view.steps {
        let resume = view.resume.as_ref() == Some(&info.key);
        rows.push(vec![
            if resume { "*" } else { "" }.into(),
            info.key.step.0.to_string(),
            info.key.attempt.number.to_string(),
            state_text(info),
            share(info, TierKind::Ram),
            share(info, durable),
            show::bytes(info.bytes()),
            show::time(info.saved_unix_ms),
            notes(info, resume, view.trouble.is_empty()).join(", "),
        ]);
    }
    Ok(show::table(context.out, "", &rows, &[1, 2, 6])?)
}

/// `2/2`: ranks with a good copy there, of all.
fn share(info: &StepInfo, tier: TierKind) -> String {
    let there = info.shards.iter().filter(|s| s.good.contains(&tier)).count();
    let listed = info.ranks.iter().any(|(kind, ranks)| *kind == tier && !ranks.is_empty());
    if listed { format!("{there}/{}", savers(info).len()) } else { "-".into() }
}

fn notes(info: &StepInfo, resume: bool, lineage_known: bool) -> Vec<String> {
    let mut notes = Vec::new();
    let mut note = |yes: bool, word: &str| notes.extend(yes.then(|| word.to_owned()));
    note(resume, "a resume takes it");
    note(info.sealed, "sealed");
    note(info.pinned, "pinned");
    note(lineage_known && !info.in_lineage, "abandoned");
    note(info.shards.iter().any(|s| !s.bad.is_empty()), "damaged copies");
    if !info.marked_bad.is_empty() {
        let ranks: Vec<u32> = info.marked_bad.iter().map(|r| r.0).collect();
        notes.push(format!("marked bad by rank {}", show::ranges(&ranks)));
    }
    notes
}

/// Rank by rank.
fn shards(context: &mut Context<'_>, info: &StepInfo) -> Result<(), Failure> {
    writeln!(context.out, "\n{}", info.key)?;
    let mut rows = vec![["RANK", "TIERS", "SIZE", "NOTES"].map(String::from).to_vec()];
    for rank in savers(info) {
        let shard = info.shards.iter().find(|s| s.rank.0 == rank);
        let Some(shard) = shard else {
            rows.push(vec![rank.to_string(), "-".into(), "-".into(), "missing".into()]);
            continue;
        };
        let good: Vec<String> = shard.good.iter().map(|t| tier_name(*t)).collect();
        rows.push(vec![
            rank.to_string(),
            if good.is_empty() { "-".into() } else { good.join(", ") },
            show::bytes(shard.bytes),
            shard
                .bad
                .iter()
                .map(|b| format!("{}: {}", b.tier, b.why))
                .collect::<Vec<_>>()
                .join("; "),
        ]);
    }
    show::table(context.out, "  ", &rows, &[0, 2])?;
    if let Reach::Broken(why) = &info.reach {
        for why in why {
            writeln!(context.out, "  broken: {}", show::safe(why))?;
        }
    }
    Ok(())
}

fn data(context: &Context<'_>, reader: &Reader, view: &Overview) -> Data {
    let tiers = reader.tiers().into_iter();
    Data {
        destination: context.dest.display().to_string(),
        tiers: tiers
            .map(|t| TierData { tier: tier_name(t.kind()), address: t.address() })
            .collect(),
        resume: view
            .resume
            .as_ref()
            .map(|key| KeyData { step: key.step.0, attempt: key.attempt.number }),
        passed_over: view.passed_over.clone(),
        trouble: view.trouble.iter().map(tierkeep::Error::chain).collect(),
        steps: view
            .steps
            .iter()
            .map(|s| step_data(s, view.resume.as_ref() == Some(&s.key)))
            .collect(),
    }
}

fn step_data(info: &StepInfo, resume: bool) -> StepData {
    let (why, missing_ranks) = match &info.reach {
        Reach::Broken(why) => (why.clone(), vec![]),
        Reach::Unfinished(missing) => (vec![], missing.clone()),
        Reach::Whole(_) | Reach::Deleted => (vec![], vec![]),
    };
    let bad = info.shards.iter().flat_map(|s| {
        let data = |b: &tierkeep::restore::survey::BadCopy| BadData {
            rank: s.rank.0,
            tier: tier_name(b.tier),
            why: b.why.clone(),
        };
        s.bad.iter().map(data)
    });
    let ranks = info.ranks.iter();
    StepData {
        step: info.key.step.0,
        attempt: info.key.attempt.number,
        attempt_id: info.key.attempt.id_head.clone(),
        state: state_word(&info.reach),
        why,
        missing_ranks,
        sealed: info.sealed,
        pinned: info.pinned,
        in_lineage: info.in_lineage,
        resume,
        bytes: info.bytes(),
        saved_unix_ms: info.saved_unix_ms,
        ranks: savers(info),
        tiers: ranks.map(|(t, r)| (tier_name(*t), r.iter().map(|r| r.0).collect())).collect(),
        damaged: bad.collect(),
        marked_bad: info.marked_bad.iter().map(|r| r.0).collect(),
    }
}
