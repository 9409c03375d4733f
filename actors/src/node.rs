//! The node supervisor: starts a node's actors according to its roles, and stops them in order.
//!
//! The actors that hold the node's only copy of something (router, hub, endpoint, cluster actor) are not restarted
//! one by one: without their state they would lie. If one of them fails, which only a fault of ours can cause, the
//! whole node ends, and whoever started it starts it anew; requests go on elsewhere, as with any lost node.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef, SpawnErr, SupervisionEvent};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use understudy_cluster::{Cluster, ClusterEvent};
use understudy_config::{ClusterConfig, KvMemory, ModelSettings, Placement, Role};
use understudy_journal::Retention;
use understudy_protocol::handshake::AccessTokens;
use understudy_protocol::message::Limits;
use understudy_telemetry::gauges::{NodeInfo, QueueBytes};
use understudy_telemetry::record;

use crate::admission::Admissions;
use crate::cluster::{ClusterActor, ClusterArgs, Listeners};
use crate::deployment::{DeploymentArgs, DeploymentMsg, DeploymentSupervisor};
use crate::endpoint::{Endpoint, EndpointMsg};
use crate::gateway::{Gateway, GatewayArgs, GatewayMsg, GatewayShared};
use crate::hub::{Hub, HubMsg};
use crate::keeper::Keeper;
use crate::peer::{Links, ReplicaId};
use crate::request::{MetricsCache, Surroundings, core::Settings};
use crate::restart::RestartSettings;
use crate::router::{Identity, Router, RouterArgs, core::Limits as RouterLimits};
use crate::worker::WorkerLimits;
use crate::worker::process::EngineSpec;

/// How often a stopping node looks whether its requests have ended.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// How long a stopping node waits for its last words to reach its clients.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long actors may take to stop before the node ends without them.
const STOP_DEADLINE: Duration = Duration::from_secs(4);

/// How many times the limit for a silent node a host may report nothing while its heartbeats go on: actors are late
/// more easily than the thread of the heartbeats.
const REPORT_PATIENCE: u64 = 3;

/// What a node supervisor is told.
#[derive(Debug)]
pub enum NodeMsg {
    /// Stop: let requests in flight end for the configured grace, then end them, then everything.
    Shutdown,
}
local_message!(NodeMsg);

/// What a gateway node brings along.
pub struct GatewayParts {
    pub listener: TcpListener,
    pub tokens: AccessTokens,
    pub admission: Admissions,
}

pub struct NodeArgs {
    pub config: Arc<ClusterConfig>,
    pub node: String,
    pub version: String,
    /// The engine program.
    pub engine: PathBuf,
    pub cluster: Arc<Cluster>,
    pub events: mpsc::Receiver<ClusterEvent>,
    /// With the role `gateway`.
    pub gateway: Option<GatewayParts>,
}

pub struct NodeSupervisor;

pub struct NodeState {
    grace: Duration,
    gateway: Option<ActorRef<GatewayMsg>>,
    hub: Option<ActorRef<HubMsg>>,
    deployments: Vec<ActorRef<DeploymentMsg>>,
}

impl Actor for NodeSupervisor {
    type Msg = NodeMsg;
    type State = NodeState;
    type Arguments = NodeArgs;

    async fn pre_start(
        &self,
        me: ActorRef<NodeMsg>,
        args: NodeArgs,
    ) -> Result<NodeState, ActorProcessingErr> {
        let NodeArgs {
            config,
            node,
            version,
            engine,
            cluster,
            events,
            gateway,
        } = args;
        let links = Links::new(cluster);
        let placed: Vec<Placement> = config
            .placement()
            .into_iter()
            .filter(|place| place.node == node)
            .collect();
        // A gateway serves no engine: its series says so.
        let info = NodeInfo::new(&node, &version);
        let is_host = config
            .node(&node)
            .is_some_and(|settings| settings.has_role(Role::Host));
        let endpoint = match is_host {
            true => Some(spawn(&me, Endpoint, (links.clone(), info)).await?),
            false => None,
        };
        let front = match gateway {
            Some(parts) => Some(Front::start(&me, &config, &node, &version, &links, parts).await?),
            None => None,
        };
        let listeners = Listeners {
            endpoint: endpoint.clone(),
            router: front
                .as_ref()
                .map(|front| front.surroundings.router.clone()),
            hub: front.as_ref().map(|front| front.surroundings.hub.clone()),
        };
        spawn(
            &me,
            ClusterActor,
            ClusterArgs {
                links: links.clone(),
                listeners,
                events,
            },
        )
        .await?;
        let mut supervisors = Vec::new();
        if let Some(endpoint) = endpoint {
            for deployment in deployments(&config, placed, &engine, &links, &endpoint) {
                supervisors.push(spawn(&me, DeploymentSupervisor, deployment).await?);
            }
        }
        let grace = Duration::from_millis(config.gateway.shutdown_grace_ms);
        let (gateway, hub) = front
            .map(|front| (front.gateway, front.surroundings.hub))
            .unzip();
        Ok(NodeState {
            grace,
            gateway,
            hub,
            deployments: supervisors,
        })
    }

    async fn handle(
        &self,
        me: ActorRef<NodeMsg>,
        NodeMsg::Shutdown: NodeMsg,
        state: &mut NodeState,
    ) -> Result<(), ActorProcessingErr> {
        if let (Some(gateway), Some(hub)) = (&state.gateway, &state.hub) {
            gateway.cast(GatewayMsg::Close).ok();
            wait_until_empty(hub, state.grace).await;
            hub.cast(HubMsg::Shutdown).ok();
            gateway.cast(GatewayMsg::Shutdown).ok();
            wait_until_empty(hub, LAST_WORDS).await;
        }
        me.stop(None);
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _me: ActorRef<NodeMsg>,
        event: SupervisionEvent,
        _state: &mut NodeState,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(actor, error) => {
                // The error may be a panic's, and quote what it was about: where it was stands in the panic's own line.
                tracing::error!(actor = %actor.get_id(), "an actor of the node failed, the node ends");
                Err(error)
            }
            SupervisionEvent::ActorTerminated(actor, _, reason) => {
                let reason = reason.unwrap_or_default();
                tracing::error!(actor = %actor.get_id(), reason, "an actor of the node ended, the node ends");
                Err(format!("actor {} ended: {reason}", actor.get_id()).into())
            }
            _ => Ok(()),
        }
    }

    async fn post_stop(
        &self,
        me: ActorRef<NodeMsg>,
        state: &mut NodeState,
    ) -> Result<(), ActorProcessingErr> {
        // Hosts first: their replicas' last reports and losses go out while the way to the gateways is open.
        for deployment in &state.deployments {
            deployment
                .stop_and_wait(None, Some(STOP_DEADLINE))
                .await
                .ok();
        }
        me.stop_children_and_wait(None, Some(STOP_DEADLINE)).await;
        Ok(())
    }
}

/// The actors of a gateway.
struct Front {
    gateway: ActorRef<GatewayMsg>,
    surroundings: Surroundings,
}

impl Front {
    async fn start(
        me: &ActorRef<NodeMsg>,
        config: &ClusterConfig,
        node: &str,
        version: &str,
        links: &Links,
        parts: GatewayParts,
    ) -> Result<Self, SpawnErr> {
        let settings = &config.gateway;
        let router = RouterArgs {
            links: links.clone(),
            limits: RouterLimits {
                no_replica_timeout: Duration::from_millis(config.recovery.no_replica_timeout_ms),
                max_waiting: settings.max_requests_in_flight as usize,
                report_timeout: Duration::from_millis(
                    REPORT_PATIENCE * config.failure_detector.dead_after_ms,
                ),
            },
            identity: identity(config, version),
        };
        let retention = Retention {
            max_age: Duration::from_millis(settings.keep_finished_ms),
            max_bytes: usize::try_from(settings.keep_finished_bytes).unwrap_or(usize::MAX),
        };
        let surroundings = Surroundings {
            router: spawn(me, Router, router).await?,
            hub: spawn(me, Hub, ()).await?,
            keeper: spawn(me, Keeper, retention).await?,
            settings: Settings {
                max_attempts: config.recovery.max_attempts,
                max_engine_deaths: config.recovery.max_engine_deaths,
                no_replica_timeout: Duration::from_millis(config.recovery.no_replica_timeout_ms),
            },
            metrics: MetricsCache::default(),
            max_credit: settings.max_credit,
            resume_grace: Duration::from_millis(settings.resume_grace_ms),
        };
        let shared = GatewayShared {
            node: node.to_owned(),
            server: format!("understudy/{version}"),
            limits: Limits {
                max_frame_bytes: u32::try_from(settings.max_frame_bytes).unwrap_or(u32::MAX),
                max_streams: settings.max_streams_per_connection,
                max_credit: settings.max_credit,
            },
            tokens: parts.tokens,
            handshake_timeout: Duration::from_millis(settings.handshake_timeout_ms),
            idle_timeout: Duration::from_millis(settings.idle_timeout_ms),
            write_timeout: Duration::from_millis(settings.write_timeout_ms),
            waiting: QueueBytes::new(record::Queue::ClientOut),
            admission: parts.admission,
            surroundings: surroundings.clone(),
            connections: Arc::new(Semaphore::new(settings.max_connections as usize)),
            max_connections: settings.max_connections as usize,
            max_requests: settings.max_requests_in_flight as usize,
            places: Arc::new(Semaphore::new(settings.max_requests_in_flight as usize)),
            stopping: AtomicBool::new(false),
        };
        let args = GatewayArgs {
            listener: parts.listener,
            shared: Arc::new(shared),
        };
        let gateway = spawn(me, Gateway, args).await?;
        Ok(Self {
            gateway,
            surroundings,
        })
    }
}

async fn spawn<A: Actor>(
    me: &ActorRef<NodeMsg>,
    actor: A,
    args: A::Arguments,
) -> Result<ActorRef<A::Msg>, SpawnErr> {
    Actor::spawn_linked(None, actor, args, me.get_cell())
        .await
        .map(|(actor, _)| actor)
}

async fn wait_until_empty(hub: &ActorRef<HubMsg>, limit: Duration) {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        match hub.call(HubMsg::Count, Some(LAST_WORDS)).await {
            Ok(ractor::rpc::CallResult::Success(0)) | Err(_) => return,
            _ => tokio::time::sleep(DRAIN_POLL).await,
        }
    }
}

fn identity(config: &ClusterConfig, version: &str) -> Identity {
    let roles = |roles: &[Role]| roles.iter().map(|role| role.to_string()).collect();
    let placed = config.placement().into_iter().map(|place| {
        let id = ReplicaId {
            model: Arc::from(place.model.as_str()),
            index: place.replica,
        };
        (id, place.node)
    });
    Identity {
        placed: placed.collect(),
        cluster: config.cluster.name.clone(),
        version: version.to_owned(),
        roles_of: config
            .nodes
            .iter()
            .map(|node| (node.name.clone(), roles(&node.roles)))
            .collect(),
    }
}

/// One deployment per model that has replicas here.
fn deployments(
    config: &ClusterConfig,
    placed: Vec<Placement>,
    engine: &std::path::Path,
    links: &Links,
    endpoint: &ActorRef<EndpointMsg>,
) -> Vec<DeploymentArgs> {
    let mut by_model: BTreeMap<String, Vec<Placement>> = BTreeMap::new();
    let engines = placed.len().max(1);
    for place in placed {
        by_model.entry(place.model.clone()).or_default().push(place);
    }
    let detector = &config.failure_detector;
    let limits = WorkerLimits {
        silence: Duration::from_millis(detector.engine_heartbeat_timeout_ms),
        stall: Duration::from_millis(detector.engine_step_timeout_ms),
        start: Duration::from_millis(detector.engine_start_timeout_ms),
    };
    let restart = RestartSettings {
        intensity: config.restart.intensity,
        period: Duration::from_millis(config.restart.period_ms),
        backoff_initial: Duration::from_millis(config.restart.backoff_initial_ms),
        backoff_max: Duration::from_millis(config.restart.backoff_max_ms),
        reset_after: Duration::from_millis(config.restart.reset_after_ms),
        cooldown: Duration::from_millis(config.restart.cooldown_ms),
    };
    let models = config
        .models
        .iter()
        .filter_map(|model| Some((model, by_model.remove(&model.name)?)));
    models
        .map(|(model, places)| DeploymentArgs {
            model: Arc::from(model.name.as_str()),
            replicas: places
                .into_iter()
                .map(|place| {
                    (
                        place.replica,
                        Arc::new(engine_spec(model, &place, engine, engines)),
                    )
                })
                .collect(),
            limits,
            restart,
            links: links.clone(),
            endpoint: endpoint.clone(),
        })
        .collect()
}

/// `engines` is how many this node has in all: a share of memory is theirs together.
fn engine_spec(
    model: &ModelSettings,
    place: &Placement,
    engine: &std::path::Path,
    engines: usize,
) -> EngineSpec {
    let kv_memory = match model.kv_memory {
        KvMemory::Percent(percent) => (f64::from(percent) / 100.0 / engines as f64).to_string(),
        KvMemory::Bytes(bytes) => format!("{}MiB", bytes >> 20),
    };
    EngineSpec {
        quantization: model.quantization.to_string(),
        kv_dtype: model.kv_dtype.to_string(),
        kv_memory,
        program: engine.to_owned(),
        model_dir: model.path.clone(),
        dtype: model.dtype.to_string(),
        device: place.device.to_string(),
        numerics: model.numerics.to_string(),
        threads: model.threads,
        max_sequences: model.max_sequences,
        max_waiting: model.max_waiting,
        step_token_budget: model.step_token_budget,
        context_length: model.context_length,
    }
}
