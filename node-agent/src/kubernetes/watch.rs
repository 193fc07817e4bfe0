//! This node's Node, as it is now: asked for, then watched, then asked for again.
//!
//! # Invariants
//!
//! - What is told was the Node's state at some moment, and no older one follows a newer one.
//! - A server that is away changes nothing: the last that was heard counts, and it is tried again, less and
//!   less often.
//! - A thousand agents that lost the server at once do not come back at once.

use std::time::Duration;

use tokio::{sync::watch, time::sleep};

use super::{Api, Change, node::Node};

/// Between two tries, at first; then twice as long each time.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(60);

/// What was heard.
#[derive(Clone, Debug, Default)]
pub(crate) enum Heard {
    /// Nothing yet.
    #[default]
    Nothing,
    /// The server was asked, and has said nothing of it yet.
    Away,
    /// It is so.
    Is(Box<Node>),
    /// It was there, and was deleted.
    Deleted,
}

/// Tells what becomes of the Node `name`, for as long as somebody listens.
pub(crate) async fn follow(api: Api, name: String, told: watch::Sender<Heard>) {
    let (mut pause, mut trouble) = (AGAIN, None);
    while !told.is_closed() {
        match follow_once(&api, &name, &told).await {
            Ok(()) => {
                if trouble.take().is_some() {
                    tracing::info!("the API server tells of this node again");
                }
                pause = AGAIN;
                sleep(AGAIN + spread(AGAIN)).await;
            }
            Err(e) => {
                told.send_if_modified(|heard| {
                    let first = matches!(heard, Heard::Nothing);
                    if first {
                        *heard = Heard::Away;
                    }
                    first
                });
                let why = format!("{e:#}");
                if trouble.as_ref() != Some(&why) {
                    tracing::warn!(
                        "the API server does not tell whether this node is to go: {why}"
                    );
                    trouble = Some(why);
                }
                sleep(pause + spread(pause)).await;
                pause = (2 * pause).min(AGAIN_MAX);
            }
        }
    }
}

/// Until the server ends the watch.
async fn follow_once(api: &Api, name: &str, told: &watch::Sender<Heard>) -> anyhow::Result<()> {
    let Some(node) = api.node(name).await? else {
        // One that was never there is a wrong name, or comes later.
        if matches!(*told.borrow(), Heard::Nothing | Heard::Away) {
            anyhow::bail!("there is no Node {name:?} (`node`)");
        }
        told.send_replace(Heard::Deleted);
        sleep(AGAIN_MAX / 4).await; // It comes back, or the machine goes.
        return Ok(());
    };
    let version = node.metadata.resource_version.clone();
    told.send_replace(Heard::Is(Box::new(node)));
    let mut changes = api.changes(name, &version).await?;
    loop {
        let change = tokio::select! {
            change = changes.next() => change?,
            () = told.closed() => return Ok(()),
        };
        match change {
            Some(Change::Is(node)) => told.send_replace(Heard::Is(node)),
            Some(Change::Deleted) => told.send_replace(Heard::Deleted),
            None => return Ok(()),
        };
    }
}

/// Up to as long again.
fn spread(pause: Duration) -> Duration {
    let mut drawn = [0; 2];
    let _ = getrandom::fill(&mut drawn); // Then there is no spread.
    pause.mul_f64(f64::from(u16::from_ne_bytes(drawn)) / f64::from(u16::MAX))
}
