//! The token hub: takes the tokens addressed to this gateway and hands each to its request.

use std::collections::HashMap;

use ractor::{Actor, ActorProcessingErr, ActorRef, ActorStatus, RpcReplyPort, SupervisionEvent};
use understudy_engine_core::frame::StepToken;
use understudy_protocol::RequestId;
use understudy_telemetry::record;

use crate::request::RequestMsg;

/// What the hub is told.
#[derive(Debug)]
pub enum HubMsg {
    Register {
        request: RequestId,
        actor: ActorRef<RequestMsg>,
    },
    Unregister {
        request: RequestId,
        actor: ActorRef<RequestMsg>,
    },
    Tokens(Vec<StepToken>),
    /// How many requests there are.
    Count(RpcReplyPort<usize>),
    /// The node stops: every request is told.
    Shutdown,
    Lookup {
        request: RequestId,
        reply: RpcReplyPort<Option<ActorRef<RequestMsg>>>,
    },
}
local_message!(HubMsg);

pub struct Hub;

impl Actor for Hub {
    type Msg = HubMsg;
    type State = HashMap<RequestId, ActorRef<RequestMsg>>;
    type Arguments = ();

    async fn pre_start(
        &self,
        _me: ActorRef<HubMsg>,
        (): (),
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(HashMap::new())
    }

    async fn handle(
        &self,
        _me: ActorRef<HubMsg>,
        message: HubMsg,
        requests: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            HubMsg::Register { request, actor } => {
                requests.insert(request, actor);
            }
            HubMsg::Unregister { request, actor } => {
                // A finished request may have been brought back by another actor in the meantime.
                if requests
                    .get(&request)
                    .is_some_and(|known| known.get_id() == actor.get_id())
                {
                    requests.remove(&request);
                }
            }
            HubMsg::Tokens(tokens) => hand_out(requests, tokens),
            HubMsg::Count(reply) => {
                reply.send(requests.len()).ok();
            }
            HubMsg::Shutdown => {
                for request in requests.values() {
                    request.cast(RequestMsg::Shutdown).ok();
                }
            }
            HubMsg::Lookup { request, reply } => {
                // One that is stopping takes no question any more, and its log is with the keeper by now. It unregisters
                // only after it has stopped.
                let actor = requests.get(&request).filter(|actor| is_alive(actor));
                reply.send(actor.cloned()).ok();
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _me: ActorRef<HubMsg>,
        event: SupervisionEvent,
        _requests: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        // Requests end by the thousand; one that fails has told its client and freed its place as it fell.
        if let SupervisionEvent::ActorFailed(actor, _) = event {
            // The error may be a panic's, and quote a prompt: where it was stands in the panic's own line.
            tracing::error!(actor = %actor.get_id(), "a request's actor failed");
        }
        Ok(())
    }
}

fn is_alive(actor: &ActorRef<RequestMsg>) -> bool {
    matches!(
        actor.get_status(),
        ActorStatus::Unstarted
            | ActorStatus::Starting
            | ActorStatus::Running
            | ActorStatus::Upgrading
    )
}

/// One message per request and step: an attempt's tokens of one step, several if it speculates, stand together.
fn hand_out(requests: &HashMap<RequestId, ActorRef<RequestMsg>>, tokens: Vec<StepToken>) {
    let mut fenced = 0;
    for run in tokens.chunk_by(|a, b| a.attempt.request == b.attempt.request) {
        let delivered = requests
            .get(&RequestId(run[0].attempt.request))
            .is_some_and(|actor| actor.cast(RequestMsg::Tokens(run.to_vec())).is_ok());
        if !delivered {
            fenced += run.len() as u64;
        }
    }
    if fenced > 0 {
        record::fenced_messages(record::FenceSource::Hub, fenced);
    }
}
