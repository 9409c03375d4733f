//! Every key of the configuration file.
//!
//! `Cluster` keys enter the checksum that nodes compare when they meet: who is there and what is served, of which every
//! node must have the same idea. `Local` keys tell a node how to behave; they may differ from machine to machine, so that
//! nodes can be restarted one by one after an edit. Units stand last in a name; durations are milliseconds.

use std::path::PathBuf;

use crate::kind::{
    Kind as _, device, flag, host, kv_memory, list, model_name, name, one_of, optional, path, port,
    remote_path, size, ssh_destination, whole,
};
use crate::schema::{Section as _, SectionInfo, derived, preset, required, settings};
use crate::value::{
    ConfigMismatch, Device, Dtype, Durability, KvDtype, KvMemory, LogFormat, LogLevel, Numerics,
    Quantization, Role,
};

/// One day; no duration of the file may be longer.
const DAY_MS: u64 = 86_400_000;
const MIB: u64 = 1 << 20;
/// Three heartbeats of an engine, which sends one every 100 ms: a single late one must not kill it.
const LEAST_ENGINE_TIMEOUT_MS: u64 = 300;

settings! {
    /// The cluster as a whole.
    ClusterSettings = "cluster" {
        /// Name of the cluster; nodes of different clusters refuse each other.
        Cluster name: String = name(), preset("local".into());
        /// Directory for what a running cluster writes on a machine: cookie, process ids, logs. Created when missing.
        Local run_dir: PathBuf = path(), derived("`run/<cluster name>` beside this file");
        /// File with the secret that nodes show each other: one word of at least 128 bits (32 hexadecimal digits, 22 other characters), readable by its owner only. The launch script creates it; copy the same file to every machine.
        Local cookie_file: PathBuf = path(), derived("`cookie` in `run_dir`");
        /// What a node does with one that started from another configuration (a key without † differs): `refuse` it, or let it in and `warn`, as while nodes are restarted one by one after an edit. Both must be willing.
        Local config_mismatch: ConfigMismatch = one_of(), preset(ConfigMismatch::Refuse);
    }

    /// One machine, or one of several node processes on a machine. Give one `[[node]]` for each.
    NodeSettings = "node" {
        /// Name of the node, unique in the cluster; shown in status, logs and metrics.
        Cluster name: String = name(), required();
        /// Name or address under which other nodes and clients reach this one.
        Cluster host: String = host(), preset("127.0.0.1".into());
        /// Address on which this node listens.
        Local bind: String = host(), derived("the value of `host`");
        /// Port for the other nodes.
        Cluster cluster_port: u16 = port(), required();
        /// Port for clients; required for the role `gateway`, refused without it.
        Cluster client_port: Option<u16> = optional(port()), preset(None);
        /// Port on which `/metrics` is served; without it this node serves none.
        Local metrics_port: Option<u16> = optional(port()), preset(None);
        /// What the node does: `gateway` takes clients' connections, `host` runs engine processes.
        Cluster roles: Vec<Role> = list(one_of()), preset(vec![Role::Gateway, Role::Host]);
        /// Devices that this node's engines may use; replicas are dealt to them in turn.
        Cluster devices: Vec<Device> = list(device()), preset(vec![Device::Auto]);
        /// Failure domain of the node, such as a rack or an availability zone; shown in status.
        Cluster zone: Option<String> = optional(name()), preset(None);
        /// Where the launch script starts this node over ssh; without it the node starts on the launching machine.
        Local ssh: Option<String> = optional(ssh_destination()), preset(None);
        /// Directory of the installation on that machine.
        Local dir: Option<String> = optional(remote_path()), preset(None);
    }

    /// A model to serve. Give one `[[model]]` for each.
    ModelSettings = "model" {
        /// Name by which clients ask for it, unique in the cluster.
        Cluster name: String = model_name(), required();
        /// Checkpoint directory (`config.json`, safetensors, `tokenizer.json`), the same on every node that serves it.
        Local path: PathBuf = path(), required();
        /// Number of engine processes that serve it. Each goes to the eligible node with the fewest replicas so far, in file order.
        Cluster replicas: u32 = whole(1..=1024), preset(1);
        /// Type in which weights and activations are held.
        Cluster dtype: Dtype = one_of(), preset(Dtype::Auto);
        /// Whether weights are rounded to fewer bits when they are loaded; on CPUs with `numerics = "exact"`.
        Cluster quantization: Quantization = one_of(), preset(Quantization::None);
        /// Memory for keys and values: a share of what is available once the weights are loaded, split between the engines of a node, or a size for each engine. When it runs out, requests wait or are computed again later; none fails.
        Local kv_memory: KvMemory = kv_memory(), preset(KvMemory::Percent(50));
        /// Width in which keys and values are kept, on CPUs with `numerics = "exact"`; elsewhere it is that of `dtype`.
        Cluster kv_dtype: KvDtype = one_of(), preset(KvDtype::Auto);
        /// Device for every replica, in place of the nodes' `devices`.
        Cluster device: Option<Device> = optional(device()), preset(None);
        /// CPU threads of one engine process. With `numerics = "exact"` results do not depend on it.
        Cluster threads: u32 = whole(1..=1024), preset(1);
        /// Requests that one replica computes at the same time.
        Cluster max_sequences: u32 = whole(1..=4096), preset(16);
        /// Requests that may wait at one replica beyond `max_sequences`; more are refused as overloaded.
        Cluster max_waiting: u32 = whole(0..=65_536), preset(64);
        /// Longest prompt plus output in tokens, if less than the model's own.
        Cluster context_length: Option<u32> = optional(whole(16..=16_777_216)), preset(None);
        /// Names of the nodes that may serve it.
        Cluster nodes: Option<Vec<String>> = optional(list(name())), derived("every node with the role `host`");
        /// Tokens that one engine step computes at most; long prompts are cut into pieces of this size.
        Cluster step_token_budget: u32 = whole(1..=1_048_576), preset(256);
        /// Whether results are independent, to the bit, of what else runs (`exact`, needed for bit-exact recovery) or may differ in the last bits (`fast`).
        Cluster numerics: Numerics = one_of(), preset(Numerics::Exact);
    }

    /// What gateways grant to clients. The limits bound the memory that clients can take.
    GatewaySettings = "gateway" {
        /// File with the token that clients must show; without it every client is admitted.
        Local token_file: Option<PathBuf> = optional(path()), preset(None);
        /// Connections open at the same time; more are refused.
        Local max_connections: u32 = whole(1..=1_000_000), preset(1024);
        /// Requests in flight on one connection.
        Local max_streams_per_connection: u32 = whole(1..=65_536), preset(128);
        /// Largest frame that a client may send.
        Local max_frame_bytes: u64 = size(4096..=256 * MIB), preset(4 * MIB);
        /// Requests in flight at one gateway; more are refused as overloaded.
        Local max_requests_in_flight: u32 = whole(1..=1_000_000), preset(1024);
        /// Token events that a client may let itself be sent ahead of reading, per request.
        Local max_credit: u32 = whole(1..=1_048_576), preset(4_096);
        /// Time for a new connection to complete its handshake.
        Local handshake_timeout_ms: u64 = whole(10..=DAY_MS), preset(5_000);
        /// A connection without requests that says nothing for this long is closed.
        Local idle_timeout_ms: u64 = whole(100..=DAY_MS), preset(300_000);
        /// A connection that takes no byte for this long while there is something to send is closed.
        Local write_timeout_ms: u64 = whole(10..=DAY_MS), preset(10_000);
        /// Time for a request that sets no deadline.
        Local default_deadline_ms: u64 = whole(1..=DAY_MS), preset(600_000);
        /// Longest deadline that a request may set.
        Local max_deadline_ms: u64 = whole(1..=DAY_MS), preset(3_600_000);
        /// Highest `priority` that a request may ask for: whoever may raise theirs can hold up all others.
        Local max_priority: u32 = whole(0..=1000), preset(0);
        /// Output tokens of a request that sets no limit.
        Local default_max_tokens: u32 = whole(1..=16_777_216), preset(256);
        /// A request whose client is gone goes on for this long, waiting for the client to resume; then it is cancelled.
        Local resume_grace_ms: u64 = whole(0..=DAY_MS), preset(30_000);
        /// A finished request can be resumed (read again) for this long.
        Local keep_finished_ms: u64 = whole(0..=7 * DAY_MS), preset(3_600_000);
        /// Memory for finished requests; the oldest go first.
        Local keep_finished_bytes: u64 = size(0..=1 << 40), preset(256 * MIB);
        /// Time for requests in flight to end when the gateway is told to stop; then they end with a retriable error.
        Local shutdown_grace_ms: u64 = whole(0..=DAY_MS), preset(10_000);
    }

    /// Where a token must be before a client sees it.
    JournalSettings = "journal" {
        /// `memory`: in the gateway's memory, which survives the loss of engines and hosts, but not of the gateway.
        Cluster durability: Durability = one_of(), preset(Durability::Memory);
    }

    /// When a silent node or engine is given up. A killed process is seen at once, whatever stands here.
    FailureDetectorSettings = "failure_detector" {
        /// Interval between heartbeats of nodes.
        Local heartbeat_interval_ms: u64 = whole(10..=60_000), preset(200);
        /// A node that is silent for this long gets no new requests.
        Local suspect_after_ms: u64 = whole(20..=600_000), preset(600);
        /// A node that is silent for this long is declared dead; its requests go on elsewhere.
        Local dead_after_ms: u64 = whole(30..=3_600_000), preset(1_000);
        /// An engine process without a heartbeat for this long is killed and replaced. Engines send one every 100 ms, whatever stands above; with less than three of them a healthy engine on a busy machine would be killed.
        Local engine_heartbeat_timeout_ms: u64 = whole(LEAST_ENGINE_TIMEOUT_MS..=3_600_000), preset(800);
        /// An engine that has work, but finishes no step for this long, is killed and replaced. A step of a small model takes milliseconds, one of a large model on a CPU may take seconds.
        Local engine_step_timeout_ms: u64 = whole(50..=3_600_000), preset(5_000);
        /// Time for an engine to load its model.
        Local engine_start_timeout_ms: u64 = whole(100..=DAY_MS), preset(120_000);
    }

    /// How engines are restarted.
    RestartSettings = "restart" {
        /// Restarts of one replica within `period_ms`; one more takes the replica out of service.
        Local intensity: u32 = whole(0..=1_000), preset(5);
        /// The period over which `intensity` counts.
        Local period_ms: u64 = whole(100..=DAY_MS), preset(30_000);
        /// Wait before the second restart in a row (the first is immediate); doubled each time, with jitter.
        Local backoff_initial_ms: u64 = whole(1..=600_000), preset(50);
        /// Longest wait between restarts.
        Local backoff_max_ms: u64 = whole(1..=DAY_MS), preset(5_000);
        /// An engine that serves for this long has recovered: the next wait is the initial one again.
        Local reset_after_ms: u64 = whole(1..=DAY_MS), preset(10_000);
        /// A replica out of service gets one more try after this time.
        Local cooldown_ms: u64 = whole(100..=DAY_MS), preset(60_000);
    }

    /// How requests are taken over when what serves them is lost.
    RecoverySettings = "recovery" {
        /// Times a request is dispatched without getting a new token; then it ends with a retriable error.
        Local max_attempts: u32 = whole(1..=1_000), preset(16);
        /// Engines that may die on one request without a new token in between, of themselves or for want of memory: killed by somebody, they do not count. Then the request is taken to be the cause, and ends with an error that says so. At most `restart.intensity`, or such a request takes a replica out of service first.
        Local max_engine_deaths: u32 = whole(1..=1_000), preset(4);
        /// Time that a request waits for a replica when none is in service; then it ends with a retriable error.
        Local no_replica_timeout_ms: u64 = whole(0..=DAY_MS), preset(10_000);
    }

    /// Prometheus metrics.
    MetricsSettings = "metrics" {
        /// Whether nodes with a `metrics_port` serve `/metrics` there.
        Local enabled: bool = flag(), preset(true);
    }

    /// Logs. Prompts, tokens and secrets are never logged, at any level.
    LoggingSettings = "logging" {
        /// `human`: readable lines; `json`: one object a line.
        Local format: LogFormat = one_of(), preset(LogFormat::Human);
        /// Least severe level that is logged; the environment variable `RUST_LOG` overrides it.
        Local level: LogLevel = one_of(), preset(LogLevel::Info);
        /// Directory in which each node writes `<node name>.log`, instead of to standard error.
        Local directory: Option<PathBuf> = optional(path()), preset(None);
    }
}

/// Every section in the order of the documentation.
pub fn sections() -> Vec<SectionInfo> {
    vec![
        ClusterSettings::info(false),
        NodeSettings::info(true),
        ModelSettings::info(true),
        GatewaySettings::info(false),
        JournalSettings::info(false),
        FailureDetectorSettings::info(false),
        RestartSettings::info(false),
        RecoverySettings::info(false),
        MetricsSettings::info(false),
        LoggingSettings::info(false),
    ]
}

impl NodeSettings {
    /// Whether the node has a role.
    pub fn has_role(&self, role: Role) -> bool {
        self.roles.contains(&role)
    }

    /// `host:cluster_port`, where other nodes reach this one.
    pub fn cluster_address(&self) -> String {
        join_port(&self.host, self.cluster_port)
    }

    /// `host:client_port`, where clients reach this one; `None` for nodes that are no gateway.
    pub fn client_address(&self) -> Option<String> {
        self.client_port.map(|port| join_port(&self.host, port))
    }

    /// `host:metrics_port`; `None` for nodes that serve no metrics.
    pub fn metrics_address(&self) -> Option<String> {
        self.metrics_port.map(|port| join_port(&self.host, port))
    }

    /// `bind:port`, where this node listens for `port`.
    pub fn listen_address(&self, port: u16) -> String {
        join_port(&self.bind, port)
    }
}

/// IPv6 addresses need brackets before a port.
fn join_port(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}
