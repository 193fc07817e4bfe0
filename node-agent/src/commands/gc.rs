//! `tierkeep gc`

use serde::Serialize;
use tierkeep::{
    bucket::grace,
    retain::{Collected, Policy},
    upkeep::{Plan, collect, plan},
};

use super::Context;
use crate::{
    cli::Gc,
    fail::{FENCED, Failure, OK, say},
    show,
};

#[derive(Serialize)]
struct Data {
    dry_run: bool,
    live: bool,
    superseded: bool,
    bytes: u64,
    victims: Vec<VictimData>,
}

#[derive(Serialize)]
struct VictimData {
    step: u64,
    attempt: u32,
    bytes: u64,
    why: String,
}

pub(super) fn run(context: &mut Context<'_>, args: &Gc) -> Result<i32, Failure> {
    let reader = context.open()?;
    let policy = Policy {
        keep_last: args.keep_last.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX)),
        every: 1,
        keep_every: args.keep_every,
        keep_hours: args.keep_hours,
        abandoned: args.abandoned,
    };
    let plan = plan(&reader, &policy)?;
    let (collected, uploads) = if args.dry_run {
        (Collected::All, 0)
    } else {
        collect(&reader, &plan, args.grace.map_or_else(grace, Ok)?)?
    };
    let superseded = collected == Collected::Superseded;
    if context.json {
        show::json(context.out, &data(&plan, args.dry_run, superseded))?;
    } else if !superseded {
        let word = if args.dry_run { "would delete" } else { "deleted" };
        for (victim, bytes) in &plan.victims {
            let size = show::bytes(*bytes);
            writeln!(context.out, "{word} {} ({size}): {}", victim.key, victim.why)?;
        }
    }
    if uploads > 0 {
        say(&format!(
            "note: ended {} that dead processes had left",
            show::count(uploads, "upload")
        ));
    }
    if plan.live {
        say("note: a job is alive: what it has not finished is left to it");
    }
    if superseded {
        return Err(Failure::own(
            FENCED,
            "a newer attempt began while this was deleting: stopped",
            "run it again",
        ));
    }
    if plan.victims.is_empty() && uploads == 0 {
        say("note: there is nothing to delete");
    }
    Ok(OK)
}

fn data(plan: &Plan, dry_run: bool, superseded: bool) -> Data {
    Data {
        dry_run,
        live: plan.live,
        superseded,
        bytes: plan.victims.iter().fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes)),
        victims: plan
            .victims
            .iter()
            .map(|(victim, bytes)| VictimData {
                step: victim.key.step.0,
                attempt: victim.key.attempt.number,
                bytes: *bytes,
                why: victim.why.clone(),
            })
            .collect(),
    }
}
