//! The actor of one request: carries out what [`core::RequestCore`] decides.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::OwnedSemaphorePermit;
use understudy_journal::{Admission, FinishedRequest};
use understudy_protocol::message::ServerMessage;
use understudy_protocol::{ErrorBody, ErrorCode, Position};

use crate::hub::HubMsg;
use crate::keeper::KeeperMsg;
use crate::router::RouterMsg;
use crate::router::core::Route;
use crate::session::SessionMsg;

pub mod core;
mod guard;
mod log;
mod message;
mod observe;
pub mod text;

pub use self::message::{Audience, RequestMsg};
pub use self::observe::MetricsCache;

use self::core::{Effect, RequestCore, Settings};
use self::guard::Guard;
use self::text::TextFold;

/// What a request says that cannot end before its gateway does.
const STOPPING: &str = "the gateway is stopping: submit the request again at another one";

/// What requests need from their gateway.
#[derive(Clone)]
pub struct Surroundings {
    pub router: ActorRef<RouterMsg>,
    pub hub: ActorRef<HubMsg>,
    pub keeper: ActorRef<KeeperMsg>,
    pub settings: Settings,
    pub metrics: MetricsCache,
    pub max_credit: u32,
    pub resume_grace: Duration,
}

/// What a request actor is made from.
pub enum Origin {
    /// Just admitted, with its place among the gateway's requests in flight.
    New {
        admission: Box<Admission>,
        place: OwnedSemaphorePermit,
    },
    Finished(Arc<FinishedRequest>),
}

pub struct RequestArgs {
    pub origin: Origin,
    pub text: TextFold,
    pub audience: Option<Audience>,
    pub surroundings: Surroundings,
}

pub struct Request;

pub struct RequestState {
    core: RequestCore,
    audience: Option<Audience>,
    /// Counts audiences, so that a timer of an earlier one does nothing.
    watch: u64,
    /// Whether the audience's connection is full, and will say when it is not.
    is_held: bool,
    surroundings: Surroundings,
    model: Arc<str>,
    /// Given back with the outcome: a client that reads slowly holds no place.
    place: Option<OwnedSemaphorePermit>,
    guard: Guard,
}

impl Actor for Request {
    type Msg = RequestMsg;
    type State = RequestState;
    type Arguments = RequestArgs;

    async fn pre_start(
        &self,
        me: ActorRef<RequestMsg>,
        args: RequestArgs,
    ) -> Result<RequestState, ActorProcessingErr> {
        let RequestArgs {
            origin,
            text,
            audience,
            surroundings,
        } = args;
        let now = Instant::now();
        let (core, place) = match origin {
            Origin::New { admission, place } => (
                RequestCore::new(*admission, text, surroundings.settings, now),
                Some(place),
            ),
            Origin::Finished(closed) => (
                RequestCore::finished((*closed).clone(), text, surroundings.settings, now),
                None,
            ),
        };
        let request = core.admission().request;
        surroundings.hub.cast(HubMsg::Register {
            request,
            actor: me.clone(),
        })?;
        let guard = Guard {
            me: me.clone(),
            request,
            surroundings: surroundings.clone(),
            attempt: None,
            audience: None,
            stopping: false,
            deadline: None,
        };
        let model = Arc::from(core.admission().model.as_str());
        let deadline = Duration::from_millis(core.admission().deadline_ms);
        let new = place.is_some();
        let mut state = RequestState {
            core,
            audience: None,
            watch: 0,
            is_held: false,
            surroundings,
            model,
            place,
            guard,
        };
        if let Some(audience) = audience {
            state
                .attach(&me, audience)
                .map_err(|error| error.to_string())?;
        }
        if new {
            state.guard.deadline = Some(tokio::spawn(remind(me.clone(), deadline)));
            let effects = state.core.start();
            state.carry_out(&me, effects);
        } else {
            // Whoever brought it back attaches to it next, or has gone away.
            let watch = state.watch;
            me.send_after(ATTACH_DEADLINE, move || RequestMsg::Abandoned { watch });
        }
        Ok(state)
    }

    async fn handle(
        &self,
        me: ActorRef<RequestMsg>,
        message: RequestMsg,
        state: &mut RequestState,
    ) -> Result<(), ActorProcessingErr> {
        let now = Instant::now();
        let effects = match message {
            RequestMsg::Tokens(tokens) => {
                let effects = state.core.tokens(tokens, now);
                state.surroundings.metrics.committed(now.elapsed());
                effects
            }
            RequestMsg::Dispatched {
                epoch,
                at,
                fingerprint,
            } => {
                state.core.dispatched(epoch, at, fingerprint, now);
                Vec::new()
            }
            RequestMsg::Lost { epoch, cause } => {
                let effects = state.core.lost(epoch, cause, now);
                state.log_loss(epoch, cause, &effects);
                effects
            }
            RequestMsg::Refused { epoch, refusal } => {
                state.log_refusal(epoch, &refusal);
                state.core.refused(epoch, refusal, now)
            }
            RequestMsg::Unroutable {
                epoch,
                code,
                reason,
            } => state.core.unroutable(epoch, code, reason, now),
            RequestMsg::Cancel { session, stream } if state.is_watched_by(&session, stream) => {
                state.core.cancel(now)
            }
            RequestMsg::Cancel { .. } => Vec::new(),
            RequestMsg::Unread { watch, viewed } => state.look_at_viewer(&me, watch, viewed),
            RequestMsg::Deadline => state.core.deadline(now),
            RequestMsg::Abandoned { watch } if watch == state.watch && state.audience.is_none() => {
                state.core.cancel(now)
            }
            RequestMsg::Abandoned { .. } => Vec::new(),
            RequestMsg::RouteNow(route) => {
                if route.start.attempt.epoch == state.core.epoch() && state.core.outcome().is_none()
                {
                    state.route(*route);
                }
                Vec::new()
            }
            RequestMsg::Attach { audience, reply } => {
                reply.send(state.attach(&me, *audience)).ok();
                Vec::new()
            }
            RequestMsg::Detach { session, stream } => state.detach(&me, &session, stream, now),
            RequestMsg::Credit {
                session,
                stream,
                tokens,
            } if state.is_watched_by(&session, stream) => {
                state.core.credit(tokens, state.surroundings.max_credit)
            }
            RequestMsg::Credit { .. } => Vec::new(),
            RequestMsg::More => state.core.more(),
            RequestMsg::Room { watch } if watch == state.watch => {
                state.is_held = false;
                state.core.hold(false)
            }
            RequestMsg::Room { .. } => Vec::new(),
            RequestMsg::Shutdown => {
                state.guard.stopping = true;
                let error = ErrorBody::new(ErrorCode::ShuttingDown, STOPPING);
                state.core.fail(error, now)
            }
        };
        let was_open = state.place.is_some();
        state.carry_out(&me, effects);
        state.hold_if_full(&me);
        if was_open && state.place.is_none() {
            state.remind_of_viewer(&me);
        }
        state.stop_if_over(&me);
        Ok(())
    }
}

impl RequestState {
    fn carry_out(&mut self, me: &ActorRef<RequestMsg>, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Route {
                    start,
                    fingerprint,
                    avoid,
                    shun,
                    after,
                } => {
                    let route = Route {
                        model: self.model.clone(),
                        start,
                        fingerprint,
                        avoid,
                        shun,
                        reply: me.clone(),
                    };
                    if after.is_zero() {
                        self.route(route);
                    } else {
                        me.send_after(after, move || RequestMsg::RouteNow(Box::new(route)));
                    }
                }
                Effect::Release { attempt, cancel } => {
                    self.guard.attempt = None;
                    self.surroundings
                        .router
                        .cast(RouterMsg::Release { attempt, cancel })
                        .ok();
                }
                Effect::Emit(message) => {
                    if let Some(audience) = &self.audience {
                        // A closed connection is reported by its session, as a detach.
                        audience.outbox.send(message);
                    }
                }
                Effect::More => {
                    me.cast(RequestMsg::More).ok();
                }
                Effect::StreamEnded { stream } => {
                    self.guard.audience = None;
                    if let Some(audience) = self.audience.take() {
                        let request = audience.request;
                        audience
                            .session
                            .cast(SessionMsg::StreamEnded { stream, request })
                            .ok();
                    }
                }
                Effect::Keep(finished) => {
                    self.place = None;
                    self.surroundings
                        .keeper
                        .cast(KeeperMsg::Keep(finished))
                        .ok();
                }
                Effect::Observe(observation) => {
                    self.log(&observation);
                    self.surroundings.metrics.observe(&self.core, observation)
                }
            }
        }
    }

    /// Shows nothing more to a connection that has too much to write already, until it has room.
    fn hold_if_full(&mut self, me: &ActorRef<RequestMsg>) {
        let Some(audience) = self.audience.as_ref().filter(|_| !self.is_held) else {
            return;
        };
        if audience.outbox.is_full() {
            self.is_held = true;
            self.core.hold(true);
            let (me, watch) = (me.clone(), self.watch);
            audience.outbox.when_free(move || {
                me.cast(RequestMsg::Room { watch }).ok();
            });
        }
    }

    fn route(&mut self, route: Route<ActorRef<RequestMsg>>) {
        self.guard.attempt = Some(route.start.attempt);
        self.surroundings
            .router
            .cast(RouterMsg::Route(Box::new(route)))
            .ok();
    }

    fn attach(&mut self, me: &ActorRef<RequestMsg>, audience: Audience) -> Result<(), ErrorBody> {
        let credit = audience.credit.min(self.surroundings.max_credit);
        let effects = self.core.attach(audience.stream, audience.next, credit)?;
        self.watch += 1;
        self.is_held = false;
        if let Some(before) = self.audience.replace(audience.clone()) {
            // A stream has one reader: the latest. The earlier one is told, and its place on its connection is freed.
            let message = "the request is being read on another connection now";
            let error = ErrorBody::new(ErrorCode::OutOfOrder, message);
            let request = Some(before.request);
            before.outbox.send(ServerMessage::Error {
                stream: Some(before.stream),
                request,
                error,
            });
            let ended = SessionMsg::StreamEnded {
                stream: before.stream,
                request: before.request,
            };
            before.session.cast(ended).ok();
        }
        self.guard.audience = Some(audience);
        self.carry_out(me, effects);
        if self.core.outcome().is_some() {
            self.remind_of_viewer(me);
        }
        Ok(())
    }

    fn is_watched_by(&self, session: &ActorRef<SessionMsg>, stream: u32) -> bool {
        self.audience.as_ref().is_some_and(|audience| {
            audience.session.get_id() == session.get_id() && audience.stream == stream
        })
    }

    fn detach(
        &mut self,
        me: &ActorRef<RequestMsg>,
        session: &ActorRef<SessionMsg>,
        stream: u32,
        now: Instant,
    ) -> Vec<Effect> {
        if !self.is_watched_by(session, stream) {
            return Vec::new();
        }
        self.audience = None;
        self.guard.audience = None;
        self.core.detach();
        if !self.core.admission().resumable {
            return self.core.cancel(now);
        }
        if self.core.outcome().is_some() {
            return Vec::new();
        }
        let watch = self.watch;
        me.send_after(self.surroundings.resume_grace, move || {
            RequestMsg::Abandoned { watch }
        });
        Vec::new()
    }

    fn stop_if_over(&self, me: &ActorRef<RequestMsg>) {
        if self.core.is_over() {
            me.stop(None);
        }
    }

    /// A request that has ended holds no place and has no deadline any more: a viewer that stops reading must not pin it.
    fn remind_of_viewer(&self, me: &ActorRef<RequestMsg>) {
        if let Some(viewed) = self.core.viewed() {
            let watch = self.watch;
            me.send_after(UNREAD_LIMIT, move || RequestMsg::Unread { watch, viewed });
        }
    }

    fn look_at_viewer(
        &mut self,
        me: &ActorRef<RequestMsg>,
        watch: u64,
        viewed: Position,
    ) -> Vec<Effect> {
        if watch != self.watch {
            // Whoever watches now has a reminder of its own.
            return Vec::new();
        }
        if self.core.viewed() == Some(viewed) {
            return self.core.give_viewer_up(UNREAD_LIMIT);
        }
        self.remind_of_viewer(me);
        Vec::new()
    }
}

/// How long a viewer of a request that has ended may take nothing of what is left for it.
const UNREAD_LIMIT: Duration = Duration::from_secs(300);

/// How long a closed log that was brought back waits for its reader.
const ATTACH_DEADLINE: Duration = Duration::from_secs(10);

async fn remind(request: ActorRef<RequestMsg>, deadline: Duration) {
    tokio::time::sleep(deadline).await;
    request.cast(RequestMsg::Deadline).ok();
}
