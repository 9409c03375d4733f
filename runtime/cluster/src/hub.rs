//! Where everything of this layer meets: which sessions there are, what the consumer knows, what it gets next.
//!
//! Lock order: hub, then a session's outbox, then its inbox. Nothing waits while it holds a lock.
//!
//! Invariant: one session per peer, and events leave through [`Hub::next_event`] alone. A payload leaves only
//! while its session is open *and* the consumer has been told so; closing a session empties its inbox, and its number
//! is forgotten, so that whatever else arrives for it is dropped and counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use ractor::ActorRef;
use ractor_cluster::NodeSessionMessage;
use tokio::sync::Notify;

use crate::bridge::PortMessage;
use crate::clock::{Clock, Life};
use crate::cluster::SendError;
use crate::detector::Action;
use crate::event::{ClusterEvent, DownCause, PeerView};
use crate::handshake::{Agreed, Refusal};
use crate::identity::PeerId;
use crate::parcel::{self, Lane, Record, Records};
use crate::roster::{End, State};
use crate::session::{Phase, Session, lock};
use crate::settings::{ClusterSettings, Limits, MAX_PAYLOAD_BYTES};
use crate::telemetry::{self, SessionEvent};
use crate::transport::Breaker;

pub(crate) struct Hub {
    pub(crate) me: PeerId,
    pub(crate) clock: Clock,
    limits: Limits,
    state: Mutex<State>,
    /// Something may be there for the consumer.
    pub(crate) news: Notify,
    /// A peer has acknowledged something, or a session was closed.
    pub(crate) progress: Notify,
    fenced: AtomicU64,
}

impl Hub {
    pub(crate) fn new(settings: &ClusterSettings) -> Self {
        Self {
            me: PeerId::new(settings.node.clone(), settings.incarnation),
            clock: Clock::start(),
            limits: settings.limits,
            state: Mutex::new(State::new(settings)),
            news: Notify::new(),
            progress: Notify::new(),
            fenced: AtomicU64::new(0),
        }
    }

    // ---- sessions ----

    /// Makes room for a new session and registers it as opening; the session that it replaces is closed and gone
    /// first, so that the node server never has two of one peer to choose from.
    pub(crate) async fn admit(
        self: &Arc<Self>,
        agreed: &Agreed,
        breaker: Breaker,
    ) -> Result<Arc<Session>, Refusal> {
        let life = Life::begin(self.clock);
        let backlog = self.limits.send_backlog_bytes;
        let session = Arc::new(Session::new(
            agreed.session,
            agreed.peer.clone(),
            life,
            breaker,
            backlog,
        ));
        loop {
            let admitted = lock(&self.state).admit(&session, self.clock.now())?;
            let Some(other) = admitted else {
                break;
            };
            self.close(other.id, DownCause::Replaced);
            other.gone().await;
        }
        let (hub, watched) = (self.clone(), session.clone());
        tokio::spawn(async move {
            if tokio::time::timeout(hub.limits.handshake_timeout, watched.opened())
                .await
                .is_err()
            {
                hub.close(
                    watched.id,
                    DownCause::Protocol("session did not open in time".to_owned()),
                );
            }
        });
        Ok(session)
    }

    /// The node server has started to run the session.
    pub(crate) fn session_runs(&self, id: u64, actor: ActorRef<NodeSessionMessage>) {
        let state = lock(&self.state);
        let session = state
            .sessions
            .get(&id)
            .or_else(|| state.lingering.get(&id))
            .cloned();
        drop(state);
        match session {
            Some(session) => session.runs(actor),
            None => actor.stop(Some("fenced".to_owned())),
        }
    }

    /// The session carries messages as soon as `find_port` finds where to send them.
    pub(crate) fn session_ready(
        &self,
        id: u64,
        find_port: impl FnOnce(&PeerId) -> Result<ActorRef<PortMessage>, String>,
    ) {
        let Some(session) = lock(&self.state).sessions.get(&id).cloned() else {
            return;
        };
        match find_port(&session.peer) {
            Err(why) => self.close(id, DownCause::Protocol(why)),
            Ok(port) => self.open(&session, port),
        }
    }

    fn open(&self, session: &Arc<Session>, port: ActorRef<PortMessage>) {
        let mut state = lock(&self.state);
        if state.leaving {
            // Nobody would say goodbye to it any more.
            drop(state);
            return self.close(session.id, DownCause::Left);
        }
        if !state.sessions.contains_key(&session.id) || !session.open(port) {
            return;
        }
        state.open(session, self.clock.now());
        drop(state);
        session.beat();
        telemetry::session(&session.peer.node, SessionEvent::Up);
        tracing::info!(peer = %session.peer, "peer is up");
        self.news.notify_one();
    }

    /// The node server has forgotten the session: its connection is closed.
    pub(crate) fn session_gone(&self, id: u64) {
        self.close(id, DownCause::ConnectionLost);
        if let Some(session) = lock(&self.state).lingering.remove(&id) {
            session.set_gone();
        }
    }

    /// Ends a session. What it had for the consumer is dropped; the consumer hears `Down` if it had heard `Up`.
    pub(crate) fn close(&self, id: u64, cause: DownCause) {
        let Some(end) = lock(&self.state).close(id, cause, self.clock.now()) else {
            return;
        };
        let End {
            session,
            cause,
            was_open,
            undelivered,
        } = end;
        self.fence(undelivered as u64);
        if was_open {
            telemetry::session(&session.peer.node, SessionEvent::Down);
            tracing::info!(peer = %session.peer, %cause, undelivered, "peer is down");
        } else {
            tracing::debug!(peer = %session.peer, %cause, "session ended before it was open");
        }
        self.news.notify_one();
        self.progress.notify_waiters();
    }

    // ---- messages ----

    /// See [`crate::ClusterHandle::send`].
    pub(crate) fn send(&self, to: &PeerId, lane: Lane, payload: Bytes) -> Result<(), SendError> {
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(SendError::TooLarge {
                size_bytes: payload.len(),
            });
        }
        let session = {
            let state = lock(&self.state);
            let slot = state.peers.get(&to.node);
            let current =
                slot.and_then(|slot| slot.current.as_ref().map(|current| (slot, current)));
            match current {
                Some((slot, current))
                    if current.peer == *to && slot.membership.is_told(current.id) =>
                {
                    current.clone()
                }
                _ => return Err(SendError::NotConnected(to.clone())),
            }
        };
        match session.offer(lane, payload) {
            Ok(()) => Ok(()),
            Err(_) if session.phase() == Phase::Closed => Err(SendError::NotConnected(to.clone())),
            Err(full) => Err(SendError::Backlog {
                to: to.clone(),
                queued_bytes: usize::try_from(full.0).unwrap_or(usize::MAX),
            }),
        }
    }

    /// A parcel has arrived from a peer.
    pub(crate) fn receive(&self, parcel: Bytes) {
        let (header, records) = match parcel::read(parcel) {
            Ok(parcel) => parcel,
            Err(error) => {
                tracing::warn!(%error, "a peer sent something that is not a parcel: dropped");
                return self.fence(1);
            }
        };
        let Some(session) = lock(&self.state).sessions.get(&header.session).cloned() else {
            return self.fence(payloads(records));
        };
        match session.receive(&header, records) {
            Ok(received) => {
                if received.is_deliverable {
                    lock(&self.state).list(&session);
                    self.news.notify_one();
                }
                if received.is_ack_due {
                    session.beat();
                }
                self.progress.notify_waiters();
            }
            Err(violation) => self.close(session.id, DownCause::Protocol(violation.to_string())),
        }
    }

    /// The next event for the consumer, if there is one. Changes come before messages.
    pub(crate) fn next_event(&self) -> Option<ClusterEvent> {
        let (event, acknowledge) = lock(&self.state).next_event()?;
        if let Some(session) = acknowledge {
            session.beat();
        }
        Some(event)
    }

    fn fence(&self, messages: u64) {
        self.fenced.fetch_add(messages, Ordering::Relaxed);
        telemetry::fenced(messages);
    }

    /// Payloads dropped because their session was closed, ever.
    pub(crate) fn fenced(&self) -> u64 {
        self.fenced.load(Ordering::Relaxed)
    }

    // ---- time ----

    /// Lets the detector look at the clock; returns when it wants to look again.
    pub(crate) fn tick(&self) -> Duration {
        let (actions, due) = {
            let mut state = lock(&self.state);
            let State {
                detector, sessions, ..
            } = &mut *state;
            sessions
                .values()
                .for_each(|session| detector.hear(session.id, session.life.heard()));
            (detector.tick(self.clock.now()), detector.due())
        };
        for action in actions {
            match action {
                Action::Beat => self.beat(),
                Action::Suspect(id) => self.suspect(id, true),
                Action::Alive(id) => self.suspect(id, false),
                Action::Dead(id, silence) => self.close(id, DownCause::Silent(silence)),
            }
        }
        due
    }

    fn beat(&self) {
        self.open_sessions()
            .iter()
            .for_each(|session| session.beat());
        let views = self.peers();
        let sum = |bytes: fn(&PeerView) -> usize| views.iter().map(|view| bytes(view) as u64).sum();
        telemetry::queued(
            sum(|view| view.send_queue_bytes),
            sum(|view| view.receive_queue_bytes),
        );
        for view in views {
            telemetry::peer(
                &view.address.node,
                view.state,
                view.last_heard.map(|time| time.as_secs_f64()),
            );
        }
    }

    fn suspect(&self, id: u64, suspected: bool) {
        let mut state = lock(&self.state);
        let Some(session) = state.sessions.get(&id).cloned() else {
            return;
        };
        if let Some(slot) = state.peers.get_mut(&session.peer.node) {
            slot.membership.suspect(id, suspected);
        }
        state.changed = true;
        drop(state);
        match suspected {
            true => {
                tracing::warn!(peer = %session.peer, silence_ms = session.life.silence().as_millis(), "peer is silent")
            }
            false => tracing::info!(peer = %session.peer, "peer is heard again"),
        }
        self.news.notify_one();
    }

    // ---- looking and leaving ----

    /// See [`crate::ClusterHandle::peers`].
    pub(crate) fn peers(&self) -> Vec<PeerView> {
        lock(&self.state).views(self.clock.now())
    }

    /// Lets nobody in from now on, and says goodbye to everybody.
    pub(crate) fn leave(&self) {
        lock(&self.state).leaving = true;
        self.open_sessions()
            .iter()
            .for_each(|session| session.goodbye());
    }

    /// Whether the peers have taken everything.
    pub(crate) fn is_flushed(&self) -> bool {
        self.open_sessions()
            .iter()
            .all(|session| session.backlog() == 0)
    }

    /// Closes every session.
    pub(crate) fn close_all(&self) {
        let mut state = lock(&self.state);
        state.leaving = true;
        let ids: Vec<u64> = state.sessions.keys().copied().collect();
        drop(state);
        ids.into_iter()
            .for_each(|id| self.close(id, DownCause::Left));
    }

    fn open_sessions(&self) -> Vec<Arc<Session>> {
        let state = lock(&self.state);
        state
            .sessions
            .values()
            .filter(|session| session.phase() == Phase::Open)
            .cloned()
            .collect()
    }
}

/// How many payloads end in these records.
fn payloads(records: Records) -> u64 {
    let ends = |record: &Record| matches!(record, Record::Whole(_) | Record::Last(_));
    records.map_while(Result::ok).filter(ends).count() as u64
}

#[cfg(test)]
#[path = "hub_tests.rs"]
mod tests;
