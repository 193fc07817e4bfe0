//! `tierkeep export`: the whole tensors of a checkpoint in a file of somebody else's format.
//!
//! plan (which bytes of which rank make which tensor) -> layout of the file -> assemble (read,
//! check, write to their place) -> the file appears
//!
//! # Invariants
//!
//! - Memory is bounded by a few chunks, whatever the size of the tensors.
//! - The file appears whole or not at all.
//! - Ranks that hold one name with different bytes are never merged.

mod assemble;
mod names;
mod pickle;
mod plan;
mod torch;
mod weights;

use std::{fs::File, io, path::Path};

use serde::Serialize;
use tierkeep::{
    error::Error, names::Rank, reader::Reader, restore::read::Restorable, tier::publish::Staged,
};

use self::plan::{Output, Wanted, plan};
use crate::{
    cli,
    commands::{Context, choose},
    fail::{FAILED, Failure, NOT_FOUND, OK, USAGE, say},
    show,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Safetensors,
    Torch,
}

#[derive(Serialize)]
struct Data<'a> {
    step: u64,
    attempt: u32,
    to: String,
    format: &'static str,
    bytes: u64,
    ranks: Vec<u32>,
    tensors: Vec<TensorData<'a>>,
}

#[derive(Serialize)]
struct TensorData<'a> {
    name: &'a str,
    dtype: &'static str,
    shape: &'a [u64],
    bytes: u64,
}

pub(crate) fn run(context: &mut Context<'_>, args: &cli::Export) -> Result<i32, Failure> {
    let format = format_of(&args.to)?;
    let reader = context.open()?;
    let (key, savers) = choose(&reader, &args.which)?;
    let sources = sources(context, args, &reader, &key, &savers)?;
    let wanted = Wanted { include: &args.include, prefix: args.prefix.as_deref(), rank: args.rank };
    let outputs = plan(&sources, &wanted)?;
    if outputs.is_empty() {
        return Err(Failure::own(
            NOT_FOUND,
            format!("{key} has no tensor that is asked for"),
            format!(
                "`tierkeep inspect {} --step {}` lists them",
                context.dest.display(),
                key.step.0
            ),
        ));
    }
    let staged = Staged::beside(&args.to)?;
    let place = Place { file: staged.file()?, path: staged.path() };
    match format {
        Format::Safetensors => weights::write(&sources, &outputs, &place)?,
        Format::Torch => torch::write(&sources, &outputs, &place)?,
    }
    staged.appear()?;
    let ranks = sources.iter().map(|s| s.rank.0).collect();
    let tensors = outputs.iter().map(tensor_data).collect();
    let format = if format == Format::Torch { "torch" } else { "safetensors" };
    let to = args.to.display().to_string();
    let bytes = outputs.iter().map(|o| o.bytes).sum();
    let (step, attempt) = (key.step.0, key.attempt.number);
    if context.json {
        let data = Data { step, attempt, to, format, bytes, ranks, tensors };
        show::json(context.out, &data)?;
    } else {
        let count = show::count(outputs.len(), "tensor");
        writeln!(context.out, "{key}: {count}, {} written to {to}", show::bytes(bytes))?;
    }
    say("note: only tensors are in it; `tierkeep inspect` shows the other values");
    Ok(OK)
}

fn tensor_data(output: &Output) -> TensorData<'_> {
    TensorData {
        name: &output.name,
        dtype: output.dtype.name(),
        shape: &output.shape,
        bytes: output.bytes,
    }
}

fn format_of(to: &Path) -> Result<Format, Failure> {
    match to.extension().and_then(|e| e.to_str()) {
        Some("safetensors") => Ok(Format::Safetensors),
        Some("pt" | "pth") => Ok(Format::Torch),
        _ => Err(Failure::own(
            USAGE,
            format!("{}: the name says no format", to.display()),
            "end it in .safetensors, or in .pt or .pth for torch.load",
        )),
    }
}

fn sources(
    context: &Context<'_>,
    args: &cli::Export,
    reader: &Reader,
    key: &tierkeep::names::CheckpointKey,
    savers: &[u32],
) -> Result<Vec<Restorable>, Failure> {
    let ranks = match args.rank {
        Some(rank) if !savers.contains(&rank) => {
            return Err(Failure::own(
                NOT_FOUND,
                format!("{key} has no rank {rank}"),
                format!(
                    "its ranks are {}: `tierkeep ls {} --step {}`",
                    show::ranges(savers),
                    context.dest.display(),
                    key.step.0
                ),
            ));
        }
        Some(rank) => {
            let mut own = reader.state(key, Rank(rank))?;
            let others = std::mem::take(&mut own.others);
            return Ok(std::iter::once(own).chain(others).collect());
        }
        None => savers,
    };
    let ranks: Vec<Rank> = ranks.iter().copied().map(Rank).collect();
    Ok(reader.shards(key, &ranks)?)
}

/// The file that is being written, and its name for messages.
struct Place<'a> {
    file: &'a File,
    path: &'a Path,
}

impl Place<'_> {
    fn write(&self, bytes: &[u8], at: u64) -> Result<(), Failure> {
        use std::os::unix::fs::FileExt;
        self.file.write_all_at(bytes, at).map_err(|e| self.error("write", e))
    }

    fn read(&self, into: &mut [u8], at: u64) -> Result<(), Failure> {
        use std::os::unix::fs::FileExt;
        self.file.read_exact_at(into, at).map_err(|e| self.error("read back", e))
    }

    fn set_len(&self, len: u64) -> Result<(), Failure> {
        self.file.set_len(len).map_err(|e| self.error("set the length of", e))
    }

    fn error(&self, verb: &str, source: io::Error) -> Failure {
        Error::Io { what: format!("{verb} {}", self.path.display()), source }.into()
    }
}

/// Ranks, or places of the tree, that contradict each other.
fn conflict(why: String) -> Failure {
    Failure::own(
        FAILED,
        why,
        "say --rank N for one rank's tensors, or leave it out: --prefix model, --include 'model/*'",
    )
}
