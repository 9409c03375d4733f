//! Whatever happens to a request's actor, its place in the cluster is freed and its client is told.

use ractor::ActorRef;
use ractor::concurrency::JoinHandle;
use understudy_engine_core::frame::AttemptId;
use understudy_protocol::message::ServerMessage;
use understudy_protocol::{ErrorBody, ErrorCode, RequestId};

use super::message::{Audience, RequestMsg};
use super::{STOPPING, Surroundings};
use crate::hub::HubMsg;
use crate::router::RouterMsg;
use crate::session::SessionMsg;

/// Dropped with the actor's state.
pub(super) struct Guard {
    pub(super) me: ActorRef<RequestMsg>,
    pub(super) request: RequestId,
    pub(super) surroundings: Surroundings,
    pub(super) attempt: Option<AttemptId>,
    pub(super) audience: Option<Audience>,
    /// The node stops: that the actor ends early is no fault then.
    pub(super) stopping: bool,
    /// Would otherwise outlive the actor by up to the deadline, and hold its memory.
    pub(super) deadline: Option<JoinHandle<()>>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(deadline) = self.deadline.take() {
            deadline.abort();
        }
        if let Some(attempt) = self.attempt.take() {
            self.surroundings
                .router
                .cast(RouterMsg::Release {
                    attempt,
                    cancel: true,
                })
                .ok();
        }
        if let Some(Audience {
            outbox,
            session,
            stream,
            ..
        }) = self.audience.take()
        {
            let error = match self.stopping {
                true => ErrorBody::new(ErrorCode::ShuttingDown, STOPPING),
                false => ErrorBody::new(
                    ErrorCode::Internal,
                    "the request's actor ended unexpectedly; please report it",
                ),
            };
            outbox.send(ServerMessage::Error {
                stream: Some(stream),
                request: Some(self.request),
                error,
            });
            session
                .cast(SessionMsg::StreamEnded {
                    stream,
                    request: self.request,
                })
                .ok();
        }
        let unregister = HubMsg::Unregister {
            request: self.request,
            actor: self.me.clone(),
        };
        self.surroundings.hub.cast(unregister).ok();
    }
}
