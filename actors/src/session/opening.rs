//! How a stream begins: from a `submit` or `resume` to the request that serves it, in a task of its own.
//!
//! Invariants: every opening ends with exactly one [`SessionMsg::Opened`], after an error on the stream if it failed, a
//! panic included; and a request that was reached learns of it when nobody reads it, whatever becomes of the session in
//! the meantime ([`Reading`]).

use std::sync::Arc;
use std::time::Duration;

use ractor::rpc::CallResult;
use ractor::{Actor, ActorRef};
use tokio::sync::OwnedSemaphorePermit;
use understudy_protocol::message::{ServerMessage, Submit};
use understudy_protocol::{ErrorBody, ErrorCode, Position, RequestId};
use understudy_telemetry::record;

use super::SessionMsg;
use crate::gateway::GatewayShared;
use crate::hub::HubMsg;
use crate::keeper::KeeperMsg;
use crate::outbox::Outbox;
use crate::request::{Audience, Origin, Request, RequestArgs, RequestMsg};

/// How long a session waits for another actor of its node. Past it, something is badly wrong, and the client is told.
const ASK_DEADLINE: Duration = Duration::from_secs(5);

/// How often a resume looks again when a request ended just between two looks.
const RESUME_TRIES: u32 = 5;

/// A request that is read on a stream. Dropping it tells the request that nobody reads any more.
#[derive(Debug)]
pub struct Reading {
    request: ActorRef<RequestMsg>,
    session: ActorRef<SessionMsg>,
    stream: u32,
    outbox: Outbox,
}

impl Reading {
    pub(super) fn new(
        request: ActorRef<RequestMsg>,
        session: ActorRef<SessionMsg>,
        stream: u32,
        outbox: Outbox,
    ) -> Self {
        Self {
            request,
            session,
            stream,
            outbox,
        }
    }

    pub(super) fn credit(&self, tokens: u32) {
        let (session, stream) = (self.session.clone(), self.stream);
        let message = RequestMsg::Credit {
            session,
            stream,
            tokens,
        };
        self.request.cast(message).ok();
    }

    pub(super) fn cancel(&self) {
        let (session, stream) = (self.session.clone(), self.stream);
        self.request
            .cast(RequestMsg::Cancel { session, stream })
            .ok();
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if !self.outbox.has_ended() {
            detach(&self.request, &self.session, self.stream);
        }
    }
}

fn detach(request: &ActorRef<RequestMsg>, session: &ActorRef<SessionMsg>, stream: u32) {
    let session = session.clone();
    request.cast(RequestMsg::Detach { session, stream }).ok();
}

/// A stream that begins.
pub(super) struct Opening {
    session: ActorRef<SessionMsg>,
    shared: Arc<GatewayShared>,
    outbox: Outbox,
    stream: u32,
    is_concluded: bool,
}

impl Opening {
    pub fn new(
        session: ActorRef<SessionMsg>,
        shared: Arc<GatewayShared>,
        outbox: Outbox,
        stream: u32,
    ) -> Self {
        Self {
            session,
            shared,
            outbox,
            stream,
            is_concluded: false,
        }
    }

    /// Admits a new request, and starts it. `bytes` are given back when its text has become tokens.
    pub async fn submit(mut self, submit: Submit, bytes: OwnedSemaphorePermit) {
        let outcome = self.start(submit, bytes).await;
        self.conclude(None, outcome);
    }

    /// Goes on with a request that was submitted before.
    pub async fn resume(mut self, id: RequestId, next: Position, credit: u32) {
        let outcome = self.attach(id, next, credit).await;
        self.conclude(Some(id), outcome);
    }

    fn conclude(&mut self, request: Option<RequestId>, outcome: Result<Reading, ErrorBody>) {
        self.is_concluded = true;
        let reading = match outcome {
            Ok(reading) => Some(reading),
            Err(error) => {
                record::request_error(error.code.as_str());
                let stream = Some(self.stream);
                self.outbox.send(ServerMessage::Error {
                    stream,
                    request,
                    error,
                });
                None
            }
        };
        // If the session is gone, the reading is dropped here, and the request hears of it.
        let opened = SessionMsg::Opened {
            stream: self.stream,
            outbox: self.outbox.clone(),
            reading,
        };
        self.session.cast(opened).ok();
    }

    async fn start(
        &self,
        submit: Submit,
        bytes: OwnedSemaphorePermit,
    ) -> Result<Reading, ErrorBody> {
        let place = self.shared.take_place()?;
        let credit = submit.credit;
        let (admission, text) = self.shared.admission.admit(submit).await?;
        drop(bytes);
        if !self.outbox.is_connected() {
            // Nobody knows of this request, so nobody can ever ask for it.
            return Err(internal("the client is gone"));
        }
        let audience = self.audience(admission.request, 0, credit);
        let request = self
            .spawn(RequestArgs {
                origin: Origin::New {
                    admission: Box::new(admission),
                    place,
                },
                text,
                audience: Some(audience),
                surroundings: self.shared.surroundings.clone(),
            })
            .await?;
        Ok(self.reading(request))
    }

    async fn attach(
        &self,
        id: RequestId,
        next: Position,
        credit: u32,
    ) -> Result<Reading, ErrorBody> {
        for _ in 0..RESUME_TRIES {
            let request = match self.find(id).await? {
                Some(request) => request,
                None => self.bring_back(id).await?,
            };
            let audience = Box::new(self.audience(id, next, credit));
            let attach = |reply| RequestMsg::Attach { audience, reply };
            match request.call(attach, Some(ASK_DEADLINE)).await {
                Ok(CallResult::Success(Ok(()))) => return Ok(self.reading(request)),
                Ok(CallResult::Success(Err(error))) => return Err(error),
                Ok(CallResult::Timeout) => {
                    // It may still take the question up, after this stream has ended.
                    detach(&request, &self.session, self.stream);
                    return Err(internal("the request does not answer"));
                }
                // It ended between the look and the question: its log is with the keeper by now.
                Ok(CallResult::SenderError) | Err(_) => {}
            }
        }
        Err(internal("the request could not be reached"))
    }

    fn audience(&self, request: RequestId, next: Position, credit: u32) -> Audience {
        Audience {
            outbox: self.outbox.clone(),
            session: self.session.clone(),
            request,
            stream: self.stream,
            next,
            credit,
        }
    }

    fn reading(&self, request: ActorRef<RequestMsg>) -> Reading {
        let (session, outbox) = (self.session.clone(), self.outbox.clone());
        Reading::new(request, session, self.stream, outbox)
    }

    /// The actor of a request that is in flight, or is being read again.
    async fn find(&self, request: RequestId) -> Result<Option<ActorRef<RequestMsg>>, ErrorBody> {
        let look = |reply| HubMsg::Lookup { request, reply };
        ask(&self.shared.surroundings.hub, look).await
    }

    /// An actor for a request whose log is closed.
    async fn bring_back(&self, id: RequestId) -> Result<ActorRef<RequestMsg>, ErrorBody> {
        let get = |reply| KeeperMsg::Get { request: id, reply };
        let Some(finished) = ask(&self.shared.surroundings.keeper, get).await? else {
            let message = format!(
                "request {id} is not known at this gateway: it never was, or it ended too long ago"
            );
            return Err(ErrorBody::new(ErrorCode::UnknownRequest, message));
        };
        self.spawn(RequestArgs {
            text: self.shared.admission.text_fold(&finished.admission)?,
            origin: Origin::Finished(finished),
            audience: None,
            surroundings: self.shared.surroundings.clone(),
        })
        .await
    }

    async fn spawn(&self, args: RequestArgs) -> Result<ActorRef<RequestMsg>, ErrorBody> {
        let supervisor = self.shared.surroundings.hub.get_cell();
        match Actor::spawn_linked(None, Request, args, supervisor).await {
            Ok((request, _)) => Ok(request),
            Err(error) => {
                tracing::error!(%error, "request actor could not be started");
                Err(internal("the request could not be started"))
            }
        }
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if !self.is_concluded {
            self.conclude(None, Err(internal("the request could not be admitted")));
        }
    }
}

/// The answer of another actor of this node.
pub(super) async fn ask<M: ractor::Message, T: Send + 'static>(
    actor: &ActorRef<M>,
    question: impl FnOnce(ractor::RpcReplyPort<T>) -> M,
) -> Result<T, ErrorBody> {
    match actor.call(question, Some(ASK_DEADLINE)).await {
        Ok(CallResult::Success(answer)) => Ok(answer),
        _ => Err(internal("the gateway is overloaded or stopping")),
    }
}

fn internal(what: &str) -> ErrorBody {
    let message = format!("{what}; try again, and see the node's log if it stays so");
    ErrorBody::new(ErrorCode::Internal, message)
}
