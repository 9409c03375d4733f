//! `understudy node`: one node of a cluster. The one place that knows every part and puts them together.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use ractor::Actor;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use understudy_actors::admission::{Admissions, Defaults};
use understudy_actors::node::{GatewayParts, NodeArgs as SupervisorArgs, NodeMsg, NodeSupervisor};
use understudy_cluster::{
    Cluster, ClusterSettings, Cookie, DetectorSettings, NodeName, PeerAddress, new_incarnation,
};
use understudy_config::{ClusterConfig, LoadOptions, NodeSettings, PathCheck, Role, read_tokens};
use understudy_protocol::handshake::AccessTokens;
use understudy_telemetry::{LogFormat, LogOptions, record};

use crate::cli::env;
use crate::cli::exit::Exit;

/// Cluster events that wait for the cluster actor at most.
const MAX_CLUSTER_EVENTS: usize = 1024;

/// The engine program's name, beside this program.
const ENGINE_PROGRAM: &str = "understudy-engine";

/// The options of `understudy node`.
#[derive(Debug, clap::Args)]
pub struct NodeArgs {
    /// The cluster's configuration
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Name of the node in the configuration
    #[arg(long, value_name = "NODE")]
    pub name: String,
}

/// Runs the node until it is told to stop.
///
/// # Errors
/// Whatever keeps the node from starting. An actor of the node that fails later ends it with [`Exit::Failed`].
pub fn run(args: NodeArgs) -> anyhow::Result<ExitCode> {
    let options = LoadOptions {
        paths: PathCheck::Node(args.name.clone()),
    };
    let (config, warnings) = match ClusterConfig::load_with(&args.config, &options) {
        Ok(loaded) => loaded,
        Err(problems) => {
            eprintln!("{problems}");
            return Ok(Exit::Usage.into());
        }
    };
    let Some(settings) = config.node(&args.name).cloned() else {
        let known: Vec<&str> = config.nodes.iter().map(|node| node.name.as_str()).collect();
        bail!(
            "{} has no node {:?}; it has {}",
            args.config.display(),
            args.name,
            known.join(", ")
        );
    };
    // Kept to the end of this function: what waits to be written is written when it is dropped.
    let logs = understudy_telemetry::install_logging(&logging(&config, &args.name))?;
    understudy_telemetry::install_panic_hook(&logs);
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("tokio runtime")?;
    runtime.block_on(serve(Arc::new(config), settings))
}

async fn serve(config: Arc<ClusterConfig>, node: NodeSettings) -> anyhow::Result<ExitCode> {
    let version = env!("CARGO_PKG_VERSION");
    // Before anything is bound, so that a signal during the start is not lost.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let _metrics = match node.metrics_port.filter(|_| config.metrics.enabled) {
        Some(port) => {
            let metrics =
                understudy_telemetry::install_metrics(resolve(&node.listen_address(port))?).await;
            Some(metrics.with_context(|| format!("metrics_port of node {:?}", node.name))?)
        }
        None => None,
    };
    let codes = understudy_protocol::ErrorCode::ALL.map(|code| code.as_str());
    record::register_error_codes(&codes, &codes);
    let gateway = match node.has_role(Role::Gateway) {
        true => Some(gateway_parts(&config, &node).await?),
        false => None,
    };
    let engine = engine_program()?;
    let (events_in, events) = mpsc::channel(MAX_CLUSTER_EVENTS);
    let cluster = Arc::new(Cluster::start(cluster_settings(&config, &node)?, events_in).await?);
    let args = SupervisorArgs {
        config: config.clone(),
        node: node.name.clone(),
        version: version.to_owned(),
        engine,
        cluster: cluster.clone(),
        events,
        gateway,
    };
    let (supervisor, ended) = Actor::spawn(None, NodeSupervisor, args)
        .await
        .map_err(|e| anyhow::anyhow!("{e}"))?;
    tracing::info!(pid = std::process::id(), cluster = %cluster.local_addr(), "node started");
    let mut ended = ended;
    let asked = tokio::select! {
        _ = terminate.recv() => true,
        _ = interrupt.recv() => true,
        _ = &mut ended => false,
    };
    if asked {
        tracing::info!("node stops");
        supervisor.cast(NodeMsg::Shutdown).ok();
        // A second signal is a person's impatience: engines die with this process.
        tokio::select! {
            _ = ended => {}
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
    if let Some(cluster) = Arc::into_inner(cluster) {
        cluster.shutdown().await;
    }
    Ok(if asked { Exit::Ok } else { Exit::Failed }.into())
}

async fn gateway_parts(
    config: &ClusterConfig,
    node: &NodeSettings,
) -> anyhow::Result<GatewayParts> {
    // Role and port are checked together when the file is read.
    let port = node.client_port.context("a gateway needs client_port")?;
    let listen = resolve(&node.listen_address(port))?;
    let listener = TcpListener::bind(listen).await.with_context(|| {
        format!(
            "cannot listen for clients on {listen} (client_port of node {:?}); `ss -ltnp` shows who holds the port",
            node.name
        )
    })?;
    let settings = &config.gateway;
    let defaults = Defaults {
        deadline_ms: settings.default_deadline_ms,
        max_deadline_ms: settings.max_deadline_ms,
        max_tokens: settings.default_max_tokens,
        max_priority: settings.max_priority,
    };
    let admission = Admissions::load(&config.models, defaults)?;
    let tokens = match &settings.token_file {
        Some(file) => read_tokens(file)?,
        None => Vec::new(),
    };
    Ok(GatewayParts {
        listener,
        tokens: AccessTokens::new(tokens),
        admission,
    })
}

fn cluster_settings(
    config: &ClusterConfig,
    node: &NodeSettings,
) -> anyhow::Result<ClusterSettings> {
    let cookie = Cookie::read(&config.cluster.cookie_file)?;
    let listen = resolve(&node.listen_address(node.cluster_port))?;
    let others = config.nodes.iter().filter(|other| other.name != node.name);
    let peers = others.map(|other| {
        let name = NodeName::new(&other.name)?;
        Ok(PeerAddress {
            node: name,
            host: other.host.clone(),
            port: other.cluster_port,
        })
    });
    let millis = std::time::Duration::from_millis;
    let detector = &config.failure_detector;
    let name = NodeName::new(&node.name)?;
    Ok(ClusterSettings {
        peers: peers.collect::<anyhow::Result<_>>()?,
        config_checksum: config.checksum(),
        config_mismatch: config.cluster.config_mismatch,
        detector: DetectorSettings {
            heartbeat_interval: millis(detector.heartbeat_interval_ms),
            suspect_after: millis(detector.suspect_after_ms),
            dead_after: millis(detector.dead_after_ms),
        },
        ..ClusterSettings::new(
            &config.cluster.name,
            name,
            new_incarnation(),
            listen,
            cookie,
        )
    })
}

fn resolve(address: &str) -> anyhow::Result<SocketAddr> {
    let mut found = address
        .to_socket_addrs()
        .with_context(|| format!("cannot resolve {address}"))?;
    found
        .next()
        .with_context(|| format!("{address} has no address"))
}

fn engine_program() -> anyhow::Result<PathBuf> {
    if let Some(program) = std::env::var_os(env::ENGINE) {
        return Ok(program.into());
    }
    let here = std::env::current_exe().context("where this program lies")?;
    Ok(here.with_file_name(ENGINE_PROGRAM))
}

fn logging(config: &ClusterConfig, node: &str) -> LogOptions {
    let settings = &config.logging;
    LogOptions {
        format: match settings.format {
            understudy_config::LogFormat::Human => LogFormat::Human,
            understudy_config::LogFormat::Json => LogFormat::Json,
        },
        level: settings.level.to_string(),
        file: settings
            .directory
            .as_ref()
            .map(|directory| directory.join(format!("{node}.log"))),
        node: Some(node.to_owned()),
        ..LogOptions::default()
    }
    .with_environment()
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_cluster::ConfigMismatch;

    /// Node `a` of a cluster of two, with this in its file.
    fn settings(addition: &str) -> ClusterSettings {
        let folder = std::env::temp_dir().join(format!("understudy-node-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let cookie = folder.join("cookie");
        if !cookie.exists() {
            Cookie::generate().write_new(&cookie).expect("a cookie");
        }
        let text = format!(
            "[cluster]\ncookie_file = {cookie:?}\n[[node]]\nname = \"a\"\ncluster_port = 1\nclient_port = 2\n\
             [[node]]\nname = \"b\"\nroles = [\"host\"]\ncluster_port = 3\n[[model]]\nname = \"m\"\npath = \"m\"\n"
        );
        let text = text.replacen("[cluster]\n", &format!("[cluster]\n{addition}\n"), 1);
        let options = LoadOptions {
            paths: PathCheck::None,
        };
        let (config, _) = ClusterConfig::parse("/c.toml", &text, &options)
            .unwrap_or_else(|report| panic!("{report}"));
        let node = config.node("a").expect("it is there").clone();
        let settings = cluster_settings(&config, &node).expect("settings");
        assert_eq!(settings.config_checksum, config.checksum());
        settings
    }

    /// The configuration's crate knows no engine, so that its least value must be held to the engine's habit here.
    #[test]
    fn an_engine_may_miss_two_heartbeats() {
        let least = 3 * understudy_engine_core::frame::HEARTBEAT_INTERVAL_MS;
        let loads = |timeout_ms: u64| {
            let text = format!(
                "[[node]]\nname = \"a\"\ncluster_port = 1\nclient_port = 2\n[[model]]\nname = \"m\"\n\
                 path = \"m\"\n[failure_detector]\nengine_heartbeat_timeout_ms = {timeout_ms}\n"
            );
            let options = LoadOptions {
                paths: PathCheck::None,
            };
            ClusterConfig::parse("/c.toml", &text, &options).is_ok()
        };
        assert!(loads(least) && !loads(least - 1));
    }

    #[test]
    fn the_file_says_what_becomes_of_a_node_with_another_file() {
        assert_eq!(settings("").config_mismatch, ConfigMismatch::Refuse);
        let warn = settings("config_mismatch = \"warn\"");
        assert_eq!(warn.config_mismatch, ConfigMismatch::Warn);
        let names: Vec<&str> = warn.peers.iter().map(|peer| peer.node.as_str()).collect();
        assert_eq!(names, ["b"]);
        let folder = std::env::temp_dir().join(format!("understudy-node-{}", std::process::id()));
        std::fs::remove_dir_all(folder).expect("removed");
    }
}
