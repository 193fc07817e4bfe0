//! A kubelet of a test's own, started, stopped and started anew.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests: real sockets, real time.

use tierkeep_proto::deviceplugin::{
    ContainerAllocateRequest,
    device_plugin_client::DevicePluginClient,
    registration_server::{Registration, RegistrationServer},
};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

struct Kubelet {
    heard: mpsc::Sender<RegisterRequest>,
}

#[tonic::async_trait]
impl Registration for Kubelet {
    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> std::result::Result<Response<Empty>, Status> {
        self.heard.send(request.into_inner()).await.unwrap();
        Ok(Response::new(Empty {}))
    }
}

/// Begins as a kubelet does: all sockets in its directory go.
fn start(dir: &Path) -> (tokio::task::JoinHandle<()>, mpsc::Receiver<RegisterRequest>) {
    for entry in fs::read_dir(dir).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let listener = UnixListener::bind(dir.join(KUBELET)).unwrap();
    let (heard, hears) = mpsc::channel(8);
    let (sender, incoming) = mpsc::channel(1);
    let serving = tokio::spawn(async move {
        let accepting = async {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                sender.send(Ok::<_, io::Error>(stream)).await.unwrap();
            }
        };
        let service = RegistrationServer::new(Kubelet { heard });
        let server = Server::builder().serve_with_incoming(service, ReceiverStream::new(incoming));
        tokio::select! {
            () = accepting => {}
            served = server => served.unwrap(),
        }
    });
    (serving, hears)
}

async fn registered(hears: &mut mpsc::Receiver<RegisterRequest>) -> RegisterRequest {
    timeout(PATIENCE, hears.recv()).await.expect("nobody registers").unwrap()
}

async fn next(listings: &mut tonic::Streaming<ListAndWatchResponse>) -> ListAndWatchResponse {
    timeout(PATIENCE, listings.message()).await.expect("no listing").unwrap().unwrap()
}

fn args(dir: &Path) -> cli::DevicePlugin {
    cli::DevicePlugin {
        socket: dir.join("agent.sock"),
        host_dir: "/run/tierkeep".into(),
        kubelet_dir: dir.join("plugins"),
        resource: "tierkeep.dev/agent".into(),
        places: 3,
    }
}

fn offer(args: &cli::DevicePlugin) -> Offer {
    let in_pod = Path::new(IN_POD).join("agent.sock");
    Offer { in_pod, host_dir: args.host_dir.clone(), places: args.places }
}

#[tokio::test]
async fn a_pod_gets_the_agents_socket_and_a_kubelet_that_begins_anew_is_told_again() {
    let dir = tempfile::tempdir().unwrap();
    let args = args(dir.path());
    fs::create_dir(&args.kubelet_dir).unwrap();
    let (kubelet, mut hears) = start(&args.kubelet_dir);
    let (given, offer) = (args.clone(), offer(&args));
    let offering = tokio::spawn(async move { keep_offering(&given, &offer).await });
    let request = registered(&mut hears).await;
    assert_eq!((&*request.version, &*request.endpoint), (VERSION, OWN));
    assert_eq!(request.resource_name, "tierkeep.dev/agent");

    let channel = control::channel(&args.kubelet_dir.join(OWN)).await.unwrap();
    let mut plugin = DevicePluginClient::new(channel);
    let mut listings = plugin.list_and_watch(Empty {}).await.unwrap().into_inner();
    // Nobody listens yet.
    let listing = next(&mut listings).await;
    assert_eq!(listing.devices.len(), 3);
    assert!(listing.devices.iter().all(|device| device.health == "Unhealthy"), "{listing:?}");
    let agent = UnixListener::bind(&args.socket).unwrap();
    let listing = next(&mut listings).await;
    assert!(listing.devices.iter().all(|device| device.health == "Healthy"), "{listing:?}");

    let two = AllocateRequest {
        container_requests: vec![
            ContainerAllocateRequest { devices_ids: vec!["place-0".into()] },
            ContainerAllocateRequest { devices_ids: vec!["place-2".into()] },
        ],
    };
    let answer = plugin.allocate(two).await.unwrap().into_inner();
    assert_eq!(answer.container_responses.len(), 2);
    let container = &answer.container_responses[1];
    assert_eq!(container.envs["TIERKEEP_AGENT"], "/run/tierkeep/agent.sock");
    let mount = &container.mounts[0];
    assert_eq!((&*mount.container_path, &*mount.host_path), ("/run/tierkeep", "/run/tierkeep"));
    assert!(mount.read_only);

    kubelet.abort();
    drop(kubelet.await);
    let (_kubelet, mut hears) = start(&args.kubelet_dir);
    registered(&mut hears).await;
    // The new one asks at a new socket; the agent, that it has been there all the time.
    let channel = control::channel(&args.kubelet_dir.join(OWN)).await.unwrap();
    let mut plugin = DevicePluginClient::new(channel);
    let mut listings = plugin.list_and_watch(Empty {}).await.unwrap().into_inner();
    assert_eq!(next(&mut listings).await.devices[0].health, "Healthy");
    drop(agent);
    offering.abort();
}

#[tokio::test]
async fn a_kubelet_that_comes_late_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let args = args(dir.path());
    fs::create_dir(&args.kubelet_dir).unwrap();
    let (given, offer) = (args.clone(), offer(&args));
    let offering = tokio::spawn(async move { keep_offering(&given, &offer).await });
    sleep(Duration::from_millis(100)).await;
    let (_kubelet, mut hears) = start(&args.kubelet_dir);
    registered(&mut hears).await;
    offering.abort();
}
