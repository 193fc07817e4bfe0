//! `tierkeep agent device-plugin`: the agent's socket for pods that may mount nothing of the host.
//!
//! Pods under the "restricted" standard have no hostPath. What a device plugin hands out is mounted by the
//! kubelet itself: a container that asks for one `tierkeep.dev/agent` gets the socket's directory, read-only,
//! and the variable that names the socket. A place is a number and nothing more; who a trainer is, its token
//! says.
//!
//! # Invariants
//!
//! - A kubelet that was started anew knows nobody, and has removed all sockets: it is told again.
//! - An agent that is being upgraded takes no place away: what is running goes on, and what starts waits for
//!   it.
//! - It touches two things: its own socket in the kubelet's directory, and the agent's, which it connects to.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    pin::Pin,
    time::Duration,
};

use tierkeep::{
    Error, Result,
    clock::{Clock, SystemClock},
};
use tierkeep_proto::deviceplugin::{
    AllocateRequest, AllocateResponse, ContainerAllocateResponse, Device, DevicePluginOptions,
    Empty, ListAndWatchResponse, Mount, RegisterRequest,
    device_plugin_server::{DevicePlugin, DevicePluginServer},
    registration_client::RegistrationClient,
};
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, transport::Server};

use crate::{
    cli,
    fail::{Failure, OK, USAGE},
    service::{self, control},
};

/// The kubelet's interface.
const VERSION: &str = "v1beta1";

/// The names of the two sockets in the kubelet's directory.
const KUBELET: &str = "kubelet.sock";
const OWN: &str = "tierkeep.sock";

/// Where a container has the socket's directory: the first place where a trainer looks.
const IN_POD: &str = "/run/tierkeep";

/// How often the kubelet and the agent are looked for.
const LOOK: Duration = Duration::from_secs(1);

/// An agent that nobody has reached for so long is not being upgraded.
const AWAY: Duration = Duration::from_secs(60);

const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Offers until it is told to end.
pub(crate) fn run(args: &cli::DevicePlugin) -> std::result::Result<i32, Failure> {
    let (Some(name), Some(_)) = (args.socket.file_name(), args.resource.split_once('/')) else {
        let why = "--socket names a file, and --resource a domain and a name";
        return Err(Failure::own(USAGE, why, "as in tierkeep.dev/agent"));
    };
    service::log();
    let failed = |e| Failure::from(failed("start", Path::new("an async runtime"), e));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(failed)?;
    let offer = Offer {
        in_pod: Path::new(IN_POD).join(name),
        host_dir: args.host_dir.clone(),
        places: args.places,
    };
    runtime.block_on(async {
        let mut terminated = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupted = signal(SignalKind::interrupt()).map_err(failed)?;
        let own = args.kubelet_dir.join(OWN);
        tokio::select! {
            _ = terminated.recv() => {}
            _ = interrupted.recv() => {}
            () = keep_offering(args, &offer) => {}
        }
        let _ = fs::remove_file(own); // The next one removes what is left.
        Ok(OK)
    })
}

async fn keep_offering(args: &cli::DevicePlugin, offer: &Offer) {
    let (health, healthy) = watch::channel(false);
    let mut said = String::new();
    tokio::join!(look_for_agent(&args.socket, &health), async {
        loop {
            match until_forgotten(args, offer, &healthy).await {
                Ok(()) => said.clear(),
                // A kubelet that is away for an hour is told once.
                Err(e) if e.chain() != said => {
                    said = e.chain();
                    tracing::warn!("{said}");
                }
                Err(_) => {}
            }
            sleep(LOOK).await;
        }
    });
}

/// Whether an agent listens, or did so a moment ago.
async fn look_for_agent(socket: &Path, health: &watch::Sender<bool>) {
    let mut seen = None;
    loop {
        let now = SystemClock.monotonic();
        if UnixStream::connect(socket).await.is_ok() {
            seen = Some(now);
        }
        let is_there = seen.is_some_and(|seen| now.saturating_sub(seen) < AWAY);
        health.send_if_modified(|known| {
            let news = *known != is_there;
            if news {
                let word = if is_there { "listens" } else { "does not listen" };
                tracing::info!("the agent {word} at {}", socket.display());
            }
            *known = is_there;
            news
        });
        sleep(LOOK).await;
    }
}

/// Offers to the kubelet that is there, until another one is or it has forgotten.
async fn until_forgotten(
    args: &cli::DevicePlugin,
    offer: &Offer,
    healthy: &watch::Receiver<bool>,
) -> Result<()> {
    let (kubelet, own) = (args.kubelet_dir.join(KUBELET), args.kubelet_dir.join(OWN));
    let there = inode(&kubelet)?;
    match fs::remove_file(&own) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &own, e)),
        _ => {}
    }
    let listener = UnixListener::bind(&own).map_err(|e| failed("listen at", &own, e))?;
    let ours = inode(&own)?;
    let (sender, incoming) = mpsc::channel(1);
    let accepting = async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => drop(sender.send(Ok::<_, io::Error>(stream)).await),
                Err(e) => {
                    tracing::error!("the kubelet could not be let in: {e}");
                    sleep(LOOK).await;
                }
            }
        }
    };
    let plugin = Plugin { offer: offer.clone(), healthy: healthy.clone() };
    let (service, incoming) = (DevicePluginServer::new(plugin), ReceiverStream::new(incoming));
    let serving = Server::builder().serve_with_incoming(service, incoming);
    let watching = async {
        register(&kubelet, &args.resource).await?;
        tracing::info!("the kubelet offers {} of {} to pods", args.places, args.resource);
        while inode(&kubelet).is_ok_and(|now| now == there)
            && inode(&own).is_ok_and(|now| now == ours)
        {
            sleep(LOOK).await;
        }
        tracing::info!("the kubelet begins anew: it is told again");
        Ok(())
    };
    tokio::select! {
        () = accepting => Ok(()),
        served = serving => served.map_err(|e| failed("serve at", &own, io::Error::other(e))),
        watched = watching => watched,
    }
}

async fn register(kubelet: &Path, resource: &str) -> Result<()> {
    let away = |e: String| failed("register at", kubelet, io::Error::other(e));
    let channel = control::channel(kubelet).await?;
    let request = RegisterRequest {
        version: VERSION.into(),
        endpoint: OWN.into(),
        resource_name: resource.into(),
        options: Some(DevicePluginOptions::default()),
    };
    let mut client = RegistrationClient::new(channel);
    let registered = timeout(ANSWER_WITHIN, client.register(request)).await;
    let registered = registered.map_err(|_| away("it did not answer".into()))?;
    registered.map(drop).map_err(|status| away(status.message().into()))
}

fn inode(path: &Path) -> Result<(u64, u64)> {
    let meta = fs::symlink_metadata(path).map_err(|e| failed("find", path, e))?;
    Ok((meta.dev(), meta.ino()))
}

fn failed(verb: &str, path: &Path, source: io::Error) -> Error {
    Error::Io { what: format!("{verb} {}", path.display()), source }
}

/// What a container gets, and how many may.
#[derive(Clone, Debug)]
struct Offer {
    in_pod: PathBuf,
    host_dir: PathBuf,
    places: u16,
}

struct Plugin {
    offer: Offer,
    healthy: watch::Receiver<bool>,
}

type Listing = std::result::Result<ListAndWatchResponse, Status>;

#[tonic::async_trait]
impl DevicePlugin for Plugin {
    async fn get_device_plugin_options(
        &self,
        _: Request<Empty>,
    ) -> std::result::Result<Response<DevicePluginOptions>, Status> {
        Ok(Response::new(DevicePluginOptions::default()))
    }

    type ListAndWatchStream = Pin<Box<dyn Stream<Item = Listing> + Send>>;

    async fn list_and_watch(
        &self,
        _: Request<Empty>,
    ) -> std::result::Result<Response<Self::ListAndWatchStream>, Status> {
        let (sender, listings) = mpsc::channel(1);
        let (mut healthy, places) = (self.healthy.clone(), self.offer.places);
        tokio::spawn(async move {
            loop {
                let health = if *healthy.borrow_and_update() { "Healthy" } else { "Unhealthy" };
                let device = |place| Device { id: format!("place-{place}"), health: health.into() };
                let devices = (0..places).map(device).collect();
                let sent = sender.send(Ok(ListAndWatchResponse { devices })).await;
                if sent.is_err() || healthy.changed().await.is_err() {
                    return; // The kubelet hung up, or this process ends.
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(listings))))
    }

    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> std::result::Result<Response<AllocateResponse>, Status> {
        let container = || ContainerAllocateResponse {
            envs: [("TIERKEEP_AGENT".to_owned(), self.offer.in_pod.display().to_string())].into(),
            mounts: vec![Mount {
                container_path: IN_POD.into(),
                host_path: self.offer.host_dir.display().to_string(),
                read_only: true,
            }],
        };
        let containers = request.into_inner().container_requests;
        let container_responses = containers.iter().map(|_| container()).collect();
        Ok(Response::new(AllocateResponse { container_responses }))
    }
}

#[cfg(test)]
mod tests;
