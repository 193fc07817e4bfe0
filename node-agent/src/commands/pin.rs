//! `tierkeep pin`

use serde::Serialize;
use tierkeep::{names::Step, retain};

use super::{Context, choose};
use crate::{
    cli::{Pin, Which},
    fail::{Failure, NOT_FOUND, OK},
    show,
};

#[derive(Serialize)]
struct Data {
    step: u64,
    attempt: u32,
    pinned: bool,
}

pub(super) fn run(context: &mut Context<'_>, args: &Pin) -> Result<i32, Failure> {
    let reader = context.open()?;
    let keys = if args.remove {
        let meant = |key: &tierkeep::names::CheckpointKey| {
            key.step == Step(args.step) && args.attempt.is_none_or(|n| key.attempt.number == n)
        };
        let keys: Vec<_> = retain::pins(reader.home())?.into_iter().filter(meant).collect();
        if keys.is_empty() {
            return Err(Failure::own(
                NOT_FOUND,
                format!("step {} is not pinned", args.step),
                format!("`tierkeep ls {}` shows which steps are", context.dest.display()),
            ));
        }
        for key in &keys {
            retain::unpin(reader.home(), key)?;
        }
        keys
    } else {
        let which = Which { step: Some(args.step), attempt: args.attempt };
        let (key, _) = choose(&reader, &which)?;
        retain::pin(reader.home(), &key)?;
        vec![key]
    };
    let pinned = !args.remove;
    if context.json {
        let data = |k: &tierkeep::names::CheckpointKey| Data {
            step: k.step.0,
            attempt: k.attempt.number,
            pinned,
        };
        show::json(context.out, &keys.iter().map(data).collect::<Vec<_>>())?;
    } else {
        for key in &keys {
            let word = if pinned { "is pinned" } else { "is pinned no more" };
            writeln!(context.out, "{key} {word}")?;
        }
    }
    Ok(OK)
}
