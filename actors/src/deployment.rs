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
        let args = ReplicaArgs {
            id: state.id(index),
            spec: state.args.replicas[index].1.clone(),
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
        let id = state.id(index);
        tracing::error!(replica = %id, ?event, "replica supervisor ended");
        // It had no chance to say so itself, and gateways must not go on to count on it.
        state.args.endpoint.cast(EndpointMsg::Gone(id)).ok();
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

impl DeploymentState {
    /// The replica with this index in `replicas`.
    fn id(&self, index: usize) -> ReplicaId {
        ReplicaId {
            model: self.args.model.clone(),
            index: self.args.replicas[index].0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::testing::FakeNetwork;
    use crate::restart::testing::PATIENT;
    use crate::worker::testing::{LIMITS, Probe, StandIn, until};

    #[tokio::test]
    async fn the_endpoint_hears_of_a_replica_supervisors_end() {
        let engine = StandIn::new();
        let (endpoint, mut heard) = Probe::spawn().await;
        let args = DeploymentArgs {
            model: "m".into(),
            replicas: vec![(3, engine.spec())],
            limits: LIMITS,
            restart: PATIENT,
            links: FakeNetwork::new().links(),
            endpoint,
        };
        let (deployment, _) = Actor::spawn(None, DeploymentSupervisor, args)
            .await
            .unwrap();
        let child = until("a replica supervisor", || {
            deployment.get_cell().get_children().pop()
        })
        .await;
        let mut next = async |what: &str| until(what, || heard.try_recv().ok()).await;
        assert!(matches!(
            next("a report").await,
            EndpointMsg::Replica { .. }
        ));
        child.kill();
        let gone = loop {
            if let EndpointMsg::Gone(id) = next("the news").await {
                break id;
            }
        };
        assert_eq!(gone.to_string(), "m/3");
        let again = next("a report of the next one").await;
        assert!(matches!(again, EndpointMsg::Replica { .. }));
        deployment.stop(None);
    }
}
