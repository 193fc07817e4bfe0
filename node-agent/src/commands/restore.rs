//! `tierkeep restore`

use serde::Serialize;
use tierkeep::{
    error::Result as CoreResult,
    names::{CheckpointKey, Rank},
    reader::Reader,
    restore::copy_out::copy_out,
};

use super::{Context, choose};
use crate::{
    cli::Restore,
    fail::{Failure, OK, say},
    progress::Bar,
    show,
};

#[derive(Serialize)]
struct Data {
    step: u64,
    attempt: u32,
    to: String,
    written_ranks: Vec<u32>,
    present_ranks: Vec<u32>,
    bytes: u64,
    resume: Option<u64>,
}

pub(super) fn run(context: &mut Context<'_>, args: &Restore) -> Result<i32, Failure> {
    let reader = context.open()?;
    let (key, savers) = choose(&reader, &args.which)?;
    let bytes = total(&reader, &key, &savers)?;
    let bar = Bar::new("copying", bytes);
    let add = |bytes| bar.add(bytes);
    let (ram_dir, options) = (context.ram_dir, context.options);
    let copied = copy_out(&reader, &key, &savers, &args.to, ram_dir, options, &add)?;
    drop(bar);
    let resume = Reader::open_with(&args.to, ram_dir, options)?.overview()?.resume;
    let numbers = |ranks: &[Rank]| ranks.iter().map(|r| r.0).collect::<Vec<_>>();
    let data = Data {
        step: key.step.0,
        attempt: key.attempt.number,
        to: args.to.display().to_string(),
        written_ranks: numbers(&copied.written),
        present_ranks: numbers(&copied.present),
        bytes: copied.bytes,
        resume: resume.as_ref().map(|k| k.step.0),
    };
    if context.json {
        show::json(context.out, &data)?;
    } else {
        let shards = show::count(copied.written.len(), "shard");
        let size = show::bytes(copied.bytes);
        writeln!(context.out, "{key}: {shards}, {size} copied to {}", data.to)?;
        if !copied.present.is_empty() {
            let shards = show::count(copied.present.len(), "shard");
            writeln!(context.out, "{shards} there already, every byte good")?;
        }
    }
    match resume {
        Some(resume) if resume == key => {}
        Some(other) => say(&format!("note: a job that resumes in {} takes {other}", data.to)),
        None => say(&format!("note: a job that resumes in {} must name the step", data.to)),
    }
    Ok(OK)
}

fn total(reader: &Reader, key: &CheckpointKey, savers: &[u32]) -> CoreResult<u64> {
    let ranks: Vec<Rank> = savers.iter().copied().map(Rank).collect();
    let shards = reader.shards(key, &ranks)?;
    Ok(shards.iter().map(|shard| shard.manifest().payload.length).sum())
}
