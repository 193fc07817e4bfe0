//! `tierkeep agent`: the core's host, with settings, signals and a log around it, and what it offers
//! people and programs beside the trainers' socket.
//!
//! It owns words on the wire: gRPC for the command (`control`), pages for probes and for Prometheus
//! (`http`). It owns no checkpoint and decides nothing about one.

mod asking;
pub mod control;
mod departure;
mod history;
pub mod http;
mod identity;
mod looking;
mod metrics;
mod node;
mod page;
mod peers;
pub(crate) mod settings;
mod transport;

use std::{collections::BTreeMap, io, io::Write, path::Path, sync::Arc, time::Duration};

use tierkeep::{Error, host::Host};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use tracing_subscriber::EnvFilter;

use self::{departure::Departure, settings::Settings};
use crate::{
    cli::AgentArgs,
    cluster::{self, Cluster},
    fail::{Failure, OK},
    mesh::{self, Mesh},
};

/// Runs the agent, or checks what it is told.
pub(crate) fn run(
    args: &AgentArgs,
    ram_dir: Option<&Path>,
    json: bool,
    out: &mut dyn Write,
) -> Result<i32, Failure> {
    let settings = Settings::load(args, ram_dir)?;
    if args.check_config {
        settings.print(json, out)?;
        return Ok(OK);
    }
    log();
    serve(&settings)
}

/// Says what happens on stderr, as `TIERKEEP_LOG` has it.
pub(crate) fn log() {
    let filter = EnvFilter::try_from_env("TIERKEEP_LOG");
    let filter = filter.unwrap_or_else(|_| EnvFilter::new("info"));
    // Without colours: it goes to a journal.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
    // Whoever embeds this may have one already.
    let _ = log.with_writer(io::stderr).try_init();
}

fn serve(settings: &Settings) -> Result<i32, Failure> {
    let (host, listener) = Host::open(settings.host())?;
    let (used, limit) = host.memory()?;
    tracing::info!(
        "tierkeep {} serves trainers at {}; {used} of {limit} bytes of RAM are in use",
        env!("CARGO_PKG_VERSION"),
        settings.socket.display(),
    );
    let failed = |what: &str| {
        let what = what.to_owned();
        move |source: io::Error| Failure::from(Error::Io { what, source })
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(24) // More than all questions to the host at once.
        .enable_all()
        .build()
        .map_err(failed("start an async runtime"))?;
    let others =
        settings.mesh.is_some().then(others).transpose().map_err(failed("start threads"))?;
    let (end, ending) = watch::channel(false);
    // Before it looks around, which may take seconds: the first process of a pod has no signals without.
    let mut ends = {
        let _inside = runtime.enter();
        Ends::hear()?
    };
    let around = runtime.block_on(async {
        tokio::select! {
            around = arrive(&host, settings, others.as_ref(), &ending) => around.map(Some),
            () = ends.come() => Ok(None),
        }
    })?;
    let Some(around) = around else {
        host.end();
        return Ok(OK);
    };
    // Not before: an agent that knew of no others would let a trainer begin as if there were none.
    let serving = host.clone();
    let trainers = std::thread::Builder::new()
        .name("tierkeep-accept".into())
        .spawn(move || serving.serve(&listener))
        .map_err(failed("start a thread"))?;
    let ended = runtime.block_on(attend(&host, settings, around, &mut ends, (end, ending)));
    // What is in RAM stays for the next agent.
    host.end();
    let served = trainers.join();
    ended?;
    served
        .unwrap_or_else(|_| Err(Error::Bug("the thread that lets trainers in panicked".into())))?;
    tracing::info!("ended; what is in RAM stays for the next agent");
    Ok(OK)
}

/// What carries bytes between agents: apart from what answers people, which is to answer at any load.
fn others() -> io::Result<Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.div_ceil(2).clamp(1, 4))
        .max_blocking_threads(8)
        .thread_name("tierkeep-mesh")
        .enable_all()
        .build()
}

/// How somebody ends it: SIGTERM, or Ctrl-C.
struct Ends {
    terminated: Signal,
    interrupted: Signal,
}

impl Ends {
    fn hear() -> Result<Self, Failure> {
        let hear = |kind| -> Result<Signal, Failure> {
            Ok(signal(kind).map_err(|source| Error::Io { what: "hear signals".into(), source })?)
        };
        let (terminated, interrupted) =
            (hear(SignalKind::terminate())?, hear(SignalKind::interrupt())?);
        Ok(Self { terminated, interrupted })
    }

    async fn come(&mut self) {
        tokio::select! {
            _ = self.terminated.recv() => {}
            _ = self.interrupted.recv() => {}
        }
    }
}

/// What is around an agent: its Node, where it watches it, and the others, where it has some.
struct Around {
    departure: Option<Departure>,
    met: Option<(Arc<Cluster>, JoinHandle<()>)>,
}

/// Looks where this is, and goes among the others.
async fn arrive(
    host: &Arc<Host>,
    settings: &Settings,
    others: Option<&Runtime>,
    ending: &watch::Receiver<bool>,
) -> Result<Around, Failure> {
    let (departure, places) = match &settings.watching {
        Some(watching) => {
            let (departure, places) = Departure::begin(watching, &settings.ram_dir).await;
            (Some(departure), places)
        }
        None => (None, BTreeMap::new()),
    };
    let met = meet(host, settings, others, places, over(ending.clone())).await?;
    Ok(Around { departure, met })
}

/// Until somebody ends it, or a server fails.
async fn attend(
    host: &Arc<Host>,
    settings: &Settings,
    Around { departure, met }: Around,
    ends: &mut Ends,
    (end, ending): (watch::Sender<bool>, watch::Receiver<bool>),
) -> Result<(), Failure> {
    let mut servers = JoinSet::new();
    let control = settings.control.clone();
    let cluster = met.as_ref().map(|(cluster, _)| cluster.clone());
    if let Some(departure) = departure {
        let serving = departure.serve(host.clone(), cluster.clone(), over(ending.clone()));
        servers.spawn(async move {
            serving.await;
            Ok(())
        });
    }
    let (its_host, its_end) = (host.clone(), over(ending.clone()));
    let its_cluster = cluster.clone();
    servers.spawn(async move { control::serve(its_host, its_cluster, &control, its_end).await });
    if let Some(address) = settings.http {
        let listener: TcpListener = http::listen(address).await?;
        let socket = settings.socket.clone();
        let seen = http::Seen { host: host.clone(), cluster: cluster.clone(), socket };
        let its_end = over(ending);
        servers.spawn(async move {
            http::serve(seen, listener, its_end).await;
            Ok(())
        });
    }
    tokio::select! {
        () = ends.come() => {}
        served = servers.join_next() => {
            let ended = || Error::Bug("a server of the agent ended by itself".into());
            served.and_then(Result::ok).unwrap_or_else(|| Err(ended()))?;
            return Err(ended().into());
        }
    }
    if !settings.drain_on_sigterm.is_zero() {
        drain(host, settings.drain_on_sigterm).await;
    }
    let _ = end.send(true); // Nobody listens: nobody serves.
    while servers.join_next().await.is_some() {}
    if let Some((cluster, serving)) = met {
        cluster.leave();
        let _ = serving.await; // It has ended, one way or the other.
    }
    Ok(())
}

/// Goes among the other agents, where it is told to, and answers them.
async fn meet(
    host: &Arc<Host>,
    settings: &Settings,
    others: Option<&Runtime>,
    places: BTreeMap<String, String>,
    ending: impl Future<Output = ()> + Send + 'static,
) -> Result<Option<(Arc<Cluster>, JoinHandle<()>)>, Failure> {
    let (Some(cluster), Some(mesh), Some(runtime)) = (&settings.cluster, &settings.mesh, others)
    else {
        return Ok(None);
    };
    // Before anybody hears of this agent: whoever does may ask it at once.
    let listener = http::listen(cluster.listen).await?;
    let cluster = join(cluster, places).await?;
    host.meet(Arc::new(Mesh::new(cluster.clone(), mesh, runtime.handle().clone())));
    let plain = if mesh.tls.is_none() { ", in plain text (insecure)" } else { "" };
    tracing::info!("other agents reach this one at {}/tcp{plain}", listener_at(&listener));
    let (host, tls) = (host.clone(), mesh.tls.clone());
    let listener = listener.into_std().and_then(|listener| {
        let _inside = runtime.enter();
        TcpListener::from_std(listener)
    });
    let listener =
        listener.map_err(|source| Error::Io { what: "hand a socket over".into(), source })?;
    let serving = runtime.spawn(mesh::serve(host, listener, tls, ending));
    Ok(Some((cluster, serving)))
}

fn listener_at(listener: &TcpListener) -> String {
    listener.local_addr().map_or_else(|e| e.to_string(), |at| at.to_string())
}

async fn join(
    settings: &cluster::Settings,
    places: BTreeMap<String, String>,
) -> Result<Arc<Cluster>, Failure> {
    let (listen, name) = (settings.listen, settings.name.clone());
    let joined = Cluster::join(settings.clone(), places).await.map_err(|e| Error::Io {
        what: format!("find other agents by gossip at {listen}/udp"),
        source: io::Error::other(format!("{e:#}")),
    })?;
    tracing::info!(
        "this is {name} among the agents of {}, by gossip at {listen}",
        settings.cluster
    );
    Ok(Arc::new(joined))
}

/// Ready when the agent ends.
async fn over(mut ending: watch::Receiver<bool>) {
    // An error: whoever would say so is gone, which is an end as well.
    let _ = ending.wait_for(|over| *over).await;
}

/// This host goes away: what is only in RAM goes to disk first.
async fn drain(host: &Arc<Host>, within: Duration) {
    tracing::info!("asked to end: what is only in RAM goes to disk, for at most {within:?}");
    let host = host.clone();
    let drained = tokio::task::spawn_blocking(move || host.drain(within)).await;
    for rank in drained.unwrap_or_default() {
        let name = format!("rank {} of {}", rank.rank, rank.destination.display());
        match (rank.durable, rank.in_ram) {
            (true, _) => tracing::info!("{name}: nothing is in RAM only"),
            (false, Some(step)) => tracing::error!("{name}: step {step} is in RAM only"),
            (false, None) => tracing::error!("{name}: what is in RAM is not on disk"),
        }
    }
}
