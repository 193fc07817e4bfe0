//! `tierkeep inspect`

use std::collections::BTreeMap;

use serde::Serialize;
use tierkeep::{
    error::Error,
    glob,
    manifest::{Meta, ShardManifest, TensorEntry, replicated::Replica},
    reader::{Overview, Reader, StepInfo},
    restore::{read::Restorable, survey::ShardLook},
    state::value::Value,
};

use super::{Context, no_run, no_step, state_text, state_word};
use crate::{
    cli::Inspect,
    fail::{Failure, NOT_FOUND, OK, code_of, say, tier_name},
    show, tree,
};

/// Lines of values that are shown unless all are asked for.
const VALUES_MAX: usize = 24;

#[derive(Serialize)]
struct Data<'a> {
    step: u64,
    attempt: u32,
    attempt_id: &'a str,
    state: &'static str,
    sealed: bool,
    pinned: bool,
    in_lineage: bool,
    resume: bool,
    bytes: u64,
    saved_unix_ms: u64,
    ranks: Vec<RankData<'a>>,
}

#[derive(Serialize)]
struct RankData<'a> {
    rank: u32,
    tiers: Vec<String>,
    damaged: BTreeMap<String, &'a str>,
    bytes: u64,
    #[serde(flatten)]
    shard: Option<ShardData<'a>>,
}

#[derive(Serialize)]
struct ShardData<'a> {
    run_id: String,
    payload: &'a str,
    chunk_bytes: u64,
    chunks: usize,
    crc32: String,
    meta: &'a Meta,
    tensors: Vec<TensorData<'a>>,
    stored_by_others: Vec<OtherData<'a>>,
    tree: &'a serde_json::Value,
}

#[derive(Serialize)]
struct OtherData<'a> {
    name: &'a str,
    dtype: &'a str,
    shape: &'a [u64],
    rank: u32,
}

#[derive(Serialize)]
struct TensorData<'a> {
    name: &'a str,
    dtype: &'a str,
    shape: &'a [u64],
    global_shape: Option<&'a [u64]>,
    offset: Option<&'a [u64]>,
    bytes: u64,
    at: [u64; 2],
}

pub(super) fn run(context: &mut Context<'_>, args: &Inspect) -> Result<i32, Failure> {
    let reader = context.open()?;
    let view = reader.overview()?;
    let info = find(context, args, &view)?;
    let mut code = OK;
    let mut shards = Vec::new();
    for look in info.shards.iter().filter(|s| args.rank.is_none_or(|r| s.rank.0 == r)) {
        let shard = match shard(&reader, info, look) {
            Ok(shard) => Some(shard),
            Err(e) => {
                say(&format!("error: {}", e.chain()));
                code = code_of(e.kind());
                None
            }
        };
        shards.push((look, shard));
    }
    if let (Some(rank), true) = (args.rank, shards.is_empty()) {
        return Err(Failure::own(
            NOT_FOUND,
            format!("rank {rank} of {} was not found", info.key),
            format!(
                "`tierkeep ls {} --step {}` lists its ranks",
                context.dest.display(),
                info.key.step.0
            ),
        ));
    }
    let resume = view.resume.as_ref() == Some(&info.key);
    if context.json {
        let ranks = shards.iter().map(|(look, shard)| rank_data(args, look, shard.as_ref()));
        show::json(context.out, &data(info, resume, ranks.collect()))?;
    } else {
        head(context, info, resume)?;
        for (look, shard) in &shards {
            rank(context, args, look, shard.as_ref().map(Restorable::manifest))?;
        }
    }
    Ok(code)
}

fn shard(reader: &Reader, info: &StepInfo, look: &ShardLook) -> Result<Restorable, Error> {
    reader.shard(&info.key, look.rank)
}

/// The step that is asked for, else what a resume takes, else the newest.
fn find<'a>(
    context: &Context<'_>,
    args: &Inspect,
    view: &'a Overview,
) -> Result<&'a StepInfo, Failure> {
    let (step, attempt) = (args.which.step, args.which.attempt);
    let wished = |s: &&StepInfo| {
        step.is_none_or(|n| s.key.step.0 == n) && attempt.is_none_or(|n| s.key.attempt.number == n)
    };
    let resume = view.resume.as_ref().filter(|_| step.is_none() && attempt.is_none());
    let found = match resume {
        Some(key) => view.steps.iter().find(|s| s.key == *key),
        // Of two attempts' the one that a resume could take.
        None => view.steps.iter().filter(wished).max_by_key(|s| (s.in_lineage, &s.key)),
    };
    found.ok_or_else(|| match (step, attempt) {
        (Some(step), _) => no_step(context.dest, step),
        (None, Some(attempt)) => Failure::own(
            NOT_FOUND,
            format!("attempt {attempt} has no checkpoint in {}", context.dest.display()),
            format!("`tierkeep ls {}` lists what is there", context.dest.display()),
        ),
        (None, None) => no_run(context.dest),
    })
}

fn head(context: &mut Context<'_>, info: &StepInfo, resume: bool) -> Result<(), Failure> {
    let out = &mut context.out;
    let mut facts = vec![state_text(info)];
    let mut fact = |yes: bool, word: &str| facts.extend(yes.then(|| word.to_owned()));
    fact(resume, "a resume takes it");
    fact(info.sealed, "sealed");
    fact(info.pinned, "pinned");
    fact(!info.in_lineage, "not in the lineage");
    writeln!(out, "{}: {}", info.key, facts.join(", "))?;
    writeln!(
        out,
        "saved {} UTC, {} in {}",
        show::time(info.saved_unix_ms),
        show::bytes(info.bytes()),
        show::count(info.shards.len(), "shard")
    )?;
    Ok(())
}

fn rank(
    context: &mut Context<'_>,
    args: &Inspect,
    look: &ShardLook,
    manifest: Option<&ShardManifest>,
) -> Result<(), Failure> {
    let out = &mut *context.out;
    let good: Vec<String> = look.good.iter().map(|t| tier_name(*t)).collect();
    let place =
        if good.is_empty() { "nowhere good".into() } else { format!("in {}", good.join(", ")) };
    writeln!(out, "\n{}: {}, {place}", look.rank, show::bytes(look.bytes))?;
    for bad in &look.bad {
        writeln!(out, "  {}: {}", bad.tier, show::safe(&bad.why))?;
    }
    let Some(manifest) = manifest else { return Ok(()) };
    let info = &manifest.payload;
    writeln!(
        out,
        "  {}, {} of {}, crc32 {:08x}",
        show::safe(&info.file),
        show::count(info.chunks.len(), "chunk"),
        show::bytes(info.chunk_bytes),
        info.crc
    )?;
    if !manifest.meta.tags.is_empty() {
        writeln!(out, "  tags: {}", show::safe(&manifest.meta.tags.join(", ")))?;
    }
    for (name, value) in &manifest.meta.metrics {
        writeln!(out, "  metric {} = {value}", show::safe(name))?;
    }
    let mut rows = vec![["TENSOR", "DTYPE", "SHAPE", "SIZE", "BOX"].map(String::from).to_vec()];
    for tensor in tensors(args, manifest) {
        rows.push(vec![
            tensor.name.clone(),
            tensor.dtype.clone(),
            show::shape(&tensor.shape),
            show::bytes(tensor.at[1] - tensor.at[0]),
            the_box(tensor),
        ]);
    }
    for tensor in elsewhere(args, manifest) {
        let (shape, by) = (show::shape(&tensor.shape), format!("stored by rank {}", tensor.saver));
        rows.push(vec![tensor.name.clone(), tensor.dtype.clone(), shape, "-".into(), by]);
    }
    if rows.len() > 1 {
        show::table(out, "  ", &rows, &[3])?;
    }
    if args.tensors.is_none() {
        values(context, args, manifest)?;
    }
    Ok(())
}

fn tensors<'a>(
    args: &'a Inspect,
    manifest: &'a ShardManifest,
) -> impl Iterator<Item = &'a TensorEntry> {
    let wanted = |t: &&TensorEntry| args.tensors.as_ref().is_none_or(|g| glob::matches(g, &t.name));
    manifest.tensors.iter().filter(wanted)
}

/// What this rank holds as others do, and leaves to one of them.
fn elsewhere<'a>(
    args: &'a Inspect,
    manifest: &'a ShardManifest,
) -> impl Iterator<Item = &'a Replica> {
    let wanted = |t: &&Replica| args.tensors.as_ref().is_none_or(|g| glob::matches(g, &t.name));
    let replicated = manifest.replicated.iter();
    replicated.flat_map(|r| r.elsewhere(manifest.identity.rank)).filter(wanted)
}

/// `[1024, 0] of 4096x4096`
fn the_box(tensor: &TensorEntry) -> String {
    match (&tensor.global_shape, &tensor.offset) {
        (Some(global), Some(offset)) => format!("{offset:?} of {}", show::shape(global)),
        _ => String::new(),
    }
}

fn values(
    context: &mut Context<'_>,
    args: &Inspect,
    manifest: &ShardManifest,
) -> Result<(), Failure> {
    let tree = match Value::decode(&manifest.tree) {
        Ok(tree) => tree,
        Err(e) => {
            say(&format!("warning: the values cannot be shown: {e}"));
            return Ok(());
        }
    };
    let lines = tree::values(&tree);
    let shown = if args.values { lines.len() } else { VALUES_MAX };
    for (path, text) in lines.iter().take(shown) {
        writeln!(context.out, "  {} = {}", show::safe(path), show::safe(text))?;
    }
    if lines.len() > shown {
        let more = show::count(lines.len() - shown, "more value");
        writeln!(context.out, "  ... {more} (--values shows all)")?;
    }
    Ok(())
}

fn data<'a>(info: &'a StepInfo, resume: bool, ranks: Vec<RankData<'a>>) -> Data<'a> {
    Data {
        step: info.key.step.0,
        attempt: info.key.attempt.number,
        attempt_id: &info.key.attempt.id_head,
        state: state_word(&info.reach),
        sealed: info.sealed,
        pinned: info.pinned,
        in_lineage: info.in_lineage,
        resume,
        bytes: info.bytes(),
        saved_unix_ms: info.saved_unix_ms,
        ranks,
    }
}

fn rank_data<'a>(
    args: &'a Inspect,
    look: &'a ShardLook,
    shard: Option<&'a Restorable>,
) -> RankData<'a> {
    let shard = shard.map(Restorable::manifest).map(|manifest| ShardData {
        run_id: manifest.identity.run_id.to_string(),
        payload: &manifest.payload.file,
        chunk_bytes: manifest.payload.chunk_bytes,
        chunks: manifest.payload.chunks.len(),
        crc32: format!("{:08x}", manifest.payload.crc),
        meta: &manifest.meta,
        tensors: tensors(args, manifest).map(tensor_data).collect(),
        stored_by_others: elsewhere(args, manifest)
            .map(|t| OtherData { name: &t.name, dtype: &t.dtype, shape: &t.shape, rank: t.saver })
            .collect(),
        tree: &manifest.tree,
    });
    RankData {
        rank: look.rank.0,
        tiers: look.good.iter().map(|t| tier_name(*t)).collect(),
        damaged: look.bad.iter().map(|b| (tier_name(b.tier), b.why.as_str())).collect(),
        bytes: look.bytes,
        shard,
    }
}

fn tensor_data(tensor: &TensorEntry) -> TensorData<'_> {
    TensorData {
        name: &tensor.name,
        dtype: &tensor.dtype,
        shape: &tensor.shape,
        global_shape: tensor.global_shape.as_deref(),
        offset: tensor.offset.as_deref(),
        bytes: tensor.at[1] - tensor.at[0],
        at: tensor.at,
    }
}
