//! `tierkeep agent`: the core's host, with settings, signals and a log around it.
//!
//! It owns no checkpoint and decides nothing about one.

pub(crate) mod settings;
mod control {
    use std::{path::Path, sync::Arc};
    pub(crate) async fn serve(
        _h: Arc<tierkeep::host::Host>,
        _p: &Path,
        e: impl Future<Output = ()>,
    ) -> Result<(), crate::fail::Failure> {
        e.await;
        Ok(())
    }
}
mod http {
    use std::sync::Arc;
    pub(crate) async fn serve(
        _h: Arc<tierkeep::host::Host>,
        _p: std::net::SocketAddr,
        e: impl Future<Output = ()>,
    ) -> Result<(), crate::fail::Failure> {
        e.await;
        Ok(())
    }
}

use std::{io::Write, path::Path, sync::Arc};

use tierkeep::host::Host;
use tracing_subscriber::EnvFilter;

use self::settings::Settings;
use crate::{
    cli::{AgentArgs, AgentCommand},
    fail::{FAILED, Failure, OK},
};

/// Runs the agent, or what else is asked of the word.
pub(crate) fn run(
    args: &AgentArgs,
    ram_dir: Option<&Path>,
    json: bool,
    out: &mut dyn Write,
) -> Result<i32, Failure> {
    let settings = Settings::load(args, ram_dir)?;
    match &args.command {
        None if args.check_config => {
            settings.print(json, out)?;
            Ok(OK)
        }
        None => serve(&settings),
        Some(AgentCommand::Drain(_)) => Ok(1),
    }
}

fn serve(settings: &Settings) -> Result<i32, Failure> {
    let filter = EnvFilter::try_from_env("TIERKEEP_LOG");
    let filter = filter.unwrap_or_else(|_| EnvFilter::new("info"));
    // Without colours: it goes to a journal.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
    // Somebody who embeds this may have one.
    let _ = log.with_writer(std::io::stderr).try_init();
    let (host, listener) = Host::open(settings.host())?;
    let (used, limit) = host.memory()?;
    tracing::info!(
        "{} serves trainers at {}; ram tier {}, {used} of {limit} bytes in use",
        env!("CARGO_PKG_VERSION"),
        settings.socket.display(),
        settings.ram_dir.display()
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(4)
        .enable_all()
        .build()
        .map_err(|e| Failure::own(FAILED, format!("could not start: {e}"), ""))?;
    let serving = host.clone();
    let trainers = std::thread::Builder::new()
        .name("tierkeep-accept".into())
        .spawn(move || serving.serve(&listener))
        .map_err(|e| Failure::own(FAILED, format!("could not start a thread: {e}"), ""))?;
    let ended = runtime.block_on(attend(&host, settings));
    // What is in RAM stays for the next agent.
    host.end();
    let served = trainers.join();
    ended?;
    match served {
        Ok(served) => served.map(|()| OK).map_err(Failure::from),
        Err(_) => Err(Failure::own(FAILED, "the thread that lets trainers in panicked", "")),
    }
}

/// Until somebody ends it.
async fn attend(host: &Arc<Host>, settings: &Settings) -> Result<(), Failure> {
    let (end, ending) = tokio::sync::watch::channel(false);
    let over = |mut ending: tokio::sync::watch::Receiver<bool>| async move {
        // An error: the sender is gone, which is an end as well.
        let _ = ending.wait_for(|over| *over).await;
    };
    let mut servers = tokio::task::JoinSet::new();
    let (control, its_host) = (settings.control(), host.clone());
    let its_end = over(ending.clone());
    servers.spawn(async move { control::serve(its_host, &control, its_end).await });
    if let Some(address) = settings.http {
        let (its_host, its_end) = (host.clone(), over(ending.clone()));
        servers.spawn(async move { http::serve(its_host, address, its_end).await });
    }
    let mut terminated = signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut interrupted = signal(tokio::signal::unix::SignalKind::interrupt())?;
    let ended = tokio::select! {
        _ = terminated.recv() => Ok(()),
        _ = interrupted.recv() => Ok(()),
        served = servers.join_next() => match served {
            Some(Ok(served)) => served,
            _ => Err(Failure::own(FAILED, "a server of the agent ended", "")),
        },
    };
    if ended.is_ok() && !settings.drain_on_sigterm.is_zero() {
        drain(host, settings).await;
    }
    let _ = end.send(true);
    while servers.join_next().await.is_some() {}
    ended
}

fn signal(kind: tokio::signal::unix::SignalKind) -> Result<tokio::signal::unix::Signal, Failure> {
    tokio::signal::unix::signal(kind)
        .map_err(|e| Failure::own(FAILED, format!("could not listen for signals: {e}"), ""))
}

/// This host goes away: what is only in RAM goes to disk first.
async fn drain(host: &Arc<Host>, settings: &Settings) {
    let (host, within) = (host.clone(), settings.drain_on_sigterm);
    tracing::info!("asked to end: what is only in RAM goes to disk, for at most {within:?}");
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
