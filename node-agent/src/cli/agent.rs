//! The arguments of `tierkeep agent`: one of each setting.

use std::{ffi::OsString, path::PathBuf};

use clap::Args;

use super::AgentCommand;

#[derive(Debug, Args)]
#[command(subcommand_negates_reqs = true)]
pub(crate) struct AgentArgs {
    #[command(subcommand)]
    pub(crate) command: Option<AgentCommand>,
    /// The settings' file, TOML [default: TIERKEEP_AGENT_CONFIG, else /etc/tierkeep/agent.toml]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Check the settings, print those in force and where each was given, and end
    #[arg(long)]
    pub(crate) check_config: bool,
    /// The socket that trainers find [default: /run/tierkeep/agent.sock for root, else agent.sock in
    /// the ram tier's directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<OsString>,
    /// The socket where this command asks a running agent; only its user and root may
    /// [default: control.sock beside the other]
    #[arg(long, value_name = "PATH")]
    control: Option<OsString>,
    /// Limit of the ram tier, as in 160GiB [default: 80 % of its tmpfs, or of what the memory control
    /// group allows]
    #[arg(long, value_name = "SIZE")]
    ram_bytes_max: Option<OsString>,
    /// Limit of one run's slots on this node [default: none but the ram tier's]
    #[arg(long, value_name = "SIZE")]
    run_bytes_max: Option<OsString>,
    /// Places in buckets, as in s3://bucket/team, where checkpoints of users other than the agent's own may
    /// go, with the agent's credentials; several with commas [default: none]
    #[arg(long, value_name = "URLS")]
    buckets: Option<OsString>,
    /// How trainers are told apart: by the kernel's word for their user, or by the token of a
    /// Kubernetes service account [default: kernel]
    #[arg(long, value_name = "kernel|kubernetes")]
    identity: Option<OsString>,
    /// With --identity kubernetes: where all destinations lie, each tenant's below NAMESPACE/ACCOUNT
    /// [default: /var/lib/tierkeep]
    #[arg(long, value_name = "PATH")]
    disk_dir: Option<OsString>,
    /// The keys that tokens are signed with, as an https:// address or a file [default: the API server's]
    #[arg(long, value_name = "URL|FILE")]
    token_keys: Option<OsString>,
    /// The audience that tokens must be for [default: tierkeep]
    #[arg(long, value_name = "NAME")]
    token_audience: Option<OsString>,
    /// Serve a page for people (/), /status.json, /metrics, /healthz and /readyz here, as in 127.0.0.1:9177
    /// [default: off]
    #[arg(long, value_name = "ADDRESS:PORT")]
    http: Option<OsString>,
    /// Trainers that are connected at once [default: 256]
    #[arg(long, value_name = "N")]
    trainers_max: Option<OsString>,
    /// A rank whose trainer has been gone for this long goes to disk, whatever disk_every says, and then
    /// gives its memory back [default: 1h]
    #[arg(long, value_name = "TIME")]
    idle: Option<OsString>,
    /// On SIGTERM, first carry what is only in RAM to disk, for at most this long: for hosts that go
    /// away [default: 0s, an upgrade needs none]
    #[arg(long, value_name = "TIME")]
    drain_on_sigterm: Option<OsString>,
    /// Find other agents, and be found by them, by UDP at this address [default: off]
    #[arg(long, value_name = "ADDRESS:PORT")]
    gossip: Option<OsString>,
    /// Where others reach this host [default: the address of --gossip, where that is one]
    #[arg(long, value_name = "ADDRESS")]
    advertise: Option<OsString>,
    /// Agents to begin with, as in gpu-1:9178,gpu-2:9178; a name with many addresses is all of them
    #[arg(long, value_name = "HOST:PORT,...")]
    seeds: Option<OsString>,
    /// This agent's name among the others [default: the host's]
    #[arg(long, value_name = "NAME")]
    node: Option<OsString>,
    /// Where this host is, and what else others shall know of it, as in zone=a,rack=r7
    #[arg(long, value_name = "KEY=VALUE,...")]
    labels: Option<OsString>,
    /// The cluster's name: agents of others are not listened to [default: tierkeep]
    #[arg(long, value_name = "NAME")]
    cluster: Option<OsString>,
    /// The file with the key that all agents of the cluster have, and nobody else
    #[arg(long, value_name = "FILE")]
    cluster_key: Option<OsString>,
    /// This agent's certificate for the others, in PEM
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<OsString>,
    /// The certificate's key
    #[arg(long, value_name = "FILE")]
    tls_key: Option<OsString>,
    /// The authority that signs the certificates of all agents
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<OsString>,
    /// The name that all certificates are for [default: tierkeep]
    #[arg(long, value_name = "NAME")]
    tls_name: Option<OsString>,
    /// Talk to other agents in plain text, where whoever reaches the port may read and write
    #[arg(long, value_name = "true|false", num_args = 0..=1, default_missing_value = "true")]
    insecure: Option<OsString>,
    /// What goes out to other nodes at most, in bytes a second, as in 1GiB
    #[arg(long, value_name = "SIZE")]
    peer_rate: Option<OsString>,
    /// Connections of one transfer [default: 4]
    #[arg(long, value_name = "N")]
    peer_connections: Option<OsString>,
    /// Watch this node's Node, and let what is newest go on from here where the node is to go away
    /// [default: off]
    #[arg(long, value_name = "off|kubernetes")]
    node_watch: Option<OsString>,
    /// With --node-watch: labels for --labels, and the Node's labels that they are taken from
    /// [default: zone=topology.kubernetes.io/zone]
    #[arg(long, value_name = "KEY=LABEL,...")]
    node_labels: Option<OsString>,
    /// With --node-watch: more taints by which a node is to go away; those of autoscalers and clouds are
    /// known
    #[arg(long, value_name = "KEY,...")]
    node_taints: Option<OsString>,
    /// With --node-watch: ask autoscalers to leave the node while it has what no bucket has, for so long at
    /// most once nothing moves; 0s asks for nothing [default: 15m]
    #[arg(long, value_name = "TIME")]
    node_hold: Option<OsString>,
    /// The API server of this node's cluster [default: https://kubernetes.default.svc]
    #[arg(long, value_name = "URL")]
    kubernetes_api: Option<OsString>,
    /// Where the files token and ca.crt are, for it
    /// [default: /var/run/secrets/kubernetes.io/serviceaccount]
    #[arg(long, value_name = "DIR")]
    kubernetes_dir: Option<OsString>,
}

impl AgentArgs {
    /// The settings among them, by key.
    pub(crate) fn given(&self) -> [(&'static str, Option<OsString>); 33] {
        [
            ("socket", self.socket.clone()),
            ("control", self.control.clone()),
            ("ram_bytes_max", self.ram_bytes_max.clone()),
            ("run_bytes_max", self.run_bytes_max.clone()),
            ("buckets", self.buckets.clone()),
            ("identity", self.identity.clone()),
            ("disk_dir", self.disk_dir.clone()),
            ("token_keys", self.token_keys.clone()),
            ("token_audience", self.token_audience.clone()),
            ("http", self.http.clone()),
            ("trainers_max", self.trainers_max.clone()),
            ("idle", self.idle.clone()),
            ("drain_on_sigterm", self.drain_on_sigterm.clone()),
            ("gossip", self.gossip.clone()),
            ("advertise", self.advertise.clone()),
            ("seeds", self.seeds.clone()),
            ("node", self.node.clone()),
            ("labels", self.labels.clone()),
            ("cluster", self.cluster.clone()),
            ("cluster_key", self.cluster_key.clone()),
            ("tls_cert", self.tls_cert.clone()),
            ("tls_key", self.tls_key.clone()),
            ("tls_ca", self.tls_ca.clone()),
            ("tls_name", self.tls_name.clone()),
            ("insecure", self.insecure.clone()),
            ("peer_rate", self.peer_rate.clone()),
            ("peer_connections", self.peer_connections.clone()),
            ("node_watch", self.node_watch.clone()),
            ("node_labels", self.node_labels.clone()),
            ("node_taints", self.node_taints.clone()),
            ("node_hold", self.node_hold.clone()),
            ("kubernetes_api", self.kubernetes_api.clone()),
            ("kubernetes_dir", self.kubernetes_dir.clone()),
        ]
    }
}
