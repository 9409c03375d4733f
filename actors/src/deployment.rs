//! A deployment's supervisor: the replicas of one model on this host, one_for_one.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};

use crate::endpoint::EndpointMsg;
use crate::peer::{Links, ReplicaId};
use crate::replica::{ReplicaArgs, ReplicaSupervisor};
use crate::restart::{Decision, RestartPolicy, RestartSettings};
use crate::worker::WorkerLimits;
use crate::worker::process::EngineSpec;

/// How long the replicas may take to stop, all together.
const STOP_DEADLINE: Duration = Duration::from_secs(3);

/// What a deployment supervisor is told.
#[derive(Debug)]
pub enum DeploymentMsg {
    /// Starts the supervisor of the replica with this index in `replicas`.
    Start(usize),
}
local_message!(DeploymentMsg);

/// The replicas of one model that are placed on this host.
#[derive(Clone)]
pub struct DeploymentArgs {
    pub model: Arc<str>,
    /// Number of each replica, and how to start its engine.
    pub replicas: Vec<(u32, Arc<EngineSpec>)>,
    pub limits: WorkerLimits,
    pub restart: RestartSettings,
    pub links: Links,
    pub endpoint: ActorRef<EndpointMsg>,
}

pub struct DeploymentSupervisor;

pub struct DeploymentState {
    args: DeploymentArgs,
    policies: Vec<RestartPolicy>,
    children: HashMap<ActorId, usize>,
}

impl Actor for DeploymentSupervisor {
    type Msg = DeploymentMsg;
    type State = DeploymentState;
    type Arguments = DeploymentArgs;

    async fn pre_start(
        &self,
        me: ActorRef<DeploymentMsg>,
        args: DeploymentArgs,
    ) -> Result<DeploymentState, ActorProcessingErr> {
        for index in 0..args.replicas.len() {
            me.cast(DeploymentMsg::Start(index))?;
        }
        let policies = args
            .replicas
            .iter()
            .map(|_| RestartPolicy::new(args.restart))
            .collect();
        Ok(DeploymentState {
            args,
            policies,
            children: HashMap::new(),
        })
    }

    async fn handle(
        &self,
        me: ActorRef<DeploymentMsg>,
        DeploymentMsg::Start(index): DeploymentMsg,
        state: &mut DeploymentState,
    ) -> Result<(), ActorProcessingErr> {
        let (number, spec) = state.args.replicas[index].clone();
        let args = ReplicaArgs {
            id: ReplicaId {
                model: state.args.model.clone(),
                index: number,
            },
            spec,
            limits: state.args.limits,
            restart: state.args.restart,
            links: state.args.links.clone(),
            endpoint: state.args.endpoint.clone(),
        };
        let (child, _) = Actor::spawn_linked(None, ReplicaSupervisor, args, me.get_cell()).await?;
        state.policies[index].running(Instant::now());
        state.children.insert(child.get_id(), index);
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        me: ActorRef<DeploymentMsg>,
        event: SupervisionEvent,
        state: &mut DeploymentState,
    ) -> Result<(), ActorProcessingErr> {
        // Only a fault of our own ends a replica supervisor: its engines' ends are its daily business.
        let (SupervisionEvent::ActorFailed(cell, _) | SupervisionEvent::ActorTerminated(cell, ..)) =
            &event
        else {
            return Ok(());
        };
        let Some(index) = state.children.remove(&cell.get_id()) else {
            return Ok(());
        };
        tracing::error!(model = %state.args.model, replica = state.args.replicas[index].0, ?event, "replica supervisor ended");
        let (Decision::RestartAfter(pause) | Decision::GiveUpFor(pause)) =
            state.policies[index].ended(Instant::now(), fastrand::f64());
        me.send_after(pause, move || DeploymentMsg::Start(index));
        Ok(())
    }

    async fn post_stop(
        &self,
        me: ActorRef<DeploymentMsg>,
        _state: &mut DeploymentState,
    ) -> Result<(), ActorProcessingErr> {
        me.stop_children_and_wait(None, Some(STOP_DEADLINE)).await;
        Ok(())
    }
}
