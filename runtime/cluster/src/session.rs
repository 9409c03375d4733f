//! One connection with one run of a peer, from the handshake to its end.
//!
//! A session goes through [`Phase`]s: it is *opening* from the handshake until `ractor_cluster` has exchanged its
//! own greetings, *open* while it carries messages, and *closed* for ever after. *Gone* is one step further: the
//! node server has forgotten it too, so that a new session of the same peer cannot be taken for its double.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use ractor::ActorRef;
use ractor_cluster::NodeSessionMessage;
use tokio::sync::watch;

use crate::bridge::PortMessage;
use crate::clock::Life;
use crate::identity::PeerId;
use crate::inbox::{Inbox, InboxError, Item};
use crate::outbox::{Full, Outbox, WrongAck};
use crate::parcel::{Header, Lane, Records};
use crate::transport::Breaker;

/// Longest wait for the node server to forget a closed session.
const GONE_TIMEOUT: Duration = Duration::from_secs(2);

/// Where a session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Opening,
    Open,
    Closed,
}

/// Why a session must be closed by us.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Violation {
    #[error(transparent)]
    Inbox(#[from] InboxError),
    #[error(transparent)]
    Ack(#[from] WrongAck),
}

pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) peer: PeerId,
    pub(crate) life: Life,
    breaker: Mutex<Option<Breaker>>,
    phase: watch::Sender<Phase>,
    gone: watch::Sender<bool>,
    outbox: Mutex<Outbox>,
    inbox: Mutex<Inbox>,
    /// The peer's port actor, once it is known.
    remote: OnceLock<ActorRef<PortMessage>>,
    /// The node session actor, once it runs.
    actor: OnceLock<ActorRef<NodeSessionMessage>>,
    /// Given to the node server, which will report its end.
    handed: AtomicBool,
    /// In the dispatcher's list of sessions with something to deliver. Changed under the hub's lock only.
    pub(crate) listed: AtomicBool,
    /// The peer has said goodbye.
    left: AtomicBool,
}

/// Locks; a panic elsewhere does not make the data unusable here.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    pub(crate) fn new(
        id: u64,
        peer: PeerId,
        life: Life,
        breaker: Breaker,
        backlog_bytes: usize,
    ) -> Self {
        Self {
            id,
            peer,
            life,
            breaker: Mutex::new(Some(breaker)),
            phase: watch::Sender::new(Phase::Opening),
            gone: watch::Sender::new(false),
            outbox: Mutex::new(Outbox::new(id, backlog_bytes)),
            inbox: Mutex::default(),
            remote: OnceLock::new(),
            actor: OnceLock::new(),
            handed: AtomicBool::new(false),
            listed: AtomicBool::new(false),
            left: AtomicBool::new(false),
        }
    }

    /// Where it stands.
    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// The peer's port is known: messages can go. False when it is closed already.
    pub(crate) fn open(&self, remote: ActorRef<PortMessage>) -> bool {
        let _ = self.remote.set(remote);
        self.phase.send_if_modified(|phase| {
            let opening = *phase == Phase::Opening;
            if opening {
                *phase = Phase::Open;
            }
            opening
        })
    }

    /// Cuts the connection and stops the actor; returns how many payloads were in the inbox, undelivered.
    /// With `abort`, what the peer has not received yet is thrown away instead of sent.
    pub(crate) fn close(&self, abort: bool) -> usize {
        self.phase.send_replace(Phase::Closed);
        if let Some(breaker) = lock(&self.breaker).take() {
            breaker.cut(abort);
        }
        if let Some(actor) = self.actor.get() {
            actor.stop(Some("fenced".to_owned()));
        }
        if !self.handed.load(Ordering::Acquire) {
            self.gone.send_replace(true);
        }
        // The queues may be large, and the session is remembered until the next one comes.
        *lock(&self.outbox) = Outbox::new(self.id, 0);
        std::mem::take(&mut *lock(&self.inbox)).len()
    }

    /// About to be given to the node server.
    pub(crate) fn hand_over(&self) {
        self.handed.store(true, Ordering::Release);
    }

    /// The node server runs it. A session that was closed in the meantime is stopped.
    pub(crate) fn runs(&self, actor: ActorRef<NodeSessionMessage>) {
        let _ = self.actor.set(actor);
        if let (Phase::Closed, Some(actor)) = (self.phase(), self.actor.get()) {
            actor.stop(Some("fenced".to_owned()));
        }
    }

    /// The node server has forgotten it.
    pub(crate) fn set_gone(&self) {
        self.gone.send_replace(true);
    }

    /// Whether the node server may still know it.
    pub(crate) fn is_lingering(&self) -> bool {
        self.handed.load(Ordering::Acquire) && !*self.gone.borrow()
    }

    /// Waits until it has left the opening phase.
    pub(crate) async fn opened(&self) -> Phase {
        let mut phase = self.phase.subscribe();
        phase
            .wait_for(|phase| *phase != Phase::Opening)
            .await
            .map_or(Phase::Closed, |phase| *phase)
    }

    /// Waits until it is closed and gone. The second wait has a limit, because the node server is not ours.
    pub(crate) async fn gone(&self) {
        let _ = self
            .phase
            .subscribe()
            .wait_for(|phase| *phase == Phase::Closed)
            .await;
        let mut gone = self.gone.subscribe();
        let _ = tokio::time::timeout(GONE_TIMEOUT, gone.wait_for(|gone| *gone)).await;
    }

    /// Takes a payload and sends what the window allows.
    pub(crate) fn offer(&self, lane: Lane, payload: Bytes) -> Result<(), Full> {
        let mut outbox = lock(&self.outbox);
        outbox.offer(lane, payload)?;
        self.pump(&mut outbox);
        Ok(())
    }

    /// Says goodbye after everything that was taken.
    pub(crate) fn goodbye(&self) {
        let mut outbox = lock(&self.outbox);
        outbox.goodbye();
        self.pump(&mut outbox);
    }

    /// A sign of life, with what we have released.
    pub(crate) fn beat(&self) {
        let mut outbox = lock(&self.outbox);
        if self.remote.get().is_some() && !self.pump(&mut outbox) {
            let parcel = outbox.empty_parcel(lock(&self.inbox).take_acks());
            self.cast(parcel);
        }
    }

    /// Takes in a parcel. True when there is something to deliver.
    pub(crate) fn receive(&self, header: &Header, records: Records) -> Result<bool, Violation> {
        {
            let mut outbox = lock(&self.outbox);
            outbox.acknowledge(header.acked)?;
            self.pump(&mut outbox);
        }
        let mut inbox = lock(&self.inbox);
        inbox.accept(header, records)?;
        Ok(!inbox.is_empty())
    }

    /// The next payload for the consumer, and whether the peer should hear that it was taken.
    pub(crate) fn take(&self) -> Option<(Bytes, bool)> {
        let mut inbox = lock(&self.inbox);
        loop {
            match inbox.pop()? {
                Item::Payload(payload) => return Some((payload, inbox.ack_due())),
                Item::Goodbye => {
                    self.left.store(true, Ordering::Release);
                    drop(inbox);
                    self.beat();
                    inbox = lock(&self.inbox);
                }
            }
        }
    }

    /// Whether the consumer has nothing to take.
    pub(crate) fn is_drained(&self) -> bool {
        lock(&self.inbox).is_empty()
    }

    /// Whether the peer has said goodbye.
    pub(crate) fn has_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }

    /// Bytes that wait for the peer.
    pub(crate) fn backlog(&self) -> u64 {
        lock(&self.outbox).backlog()
    }

    /// Bytes that wait for our consumer.
    pub(crate) fn untaken(&self) -> usize {
        lock(&self.inbox).bytes()
    }

    /// Sends all that may leave now. The outbox stays locked, so that parcels leave in the order of their numbers.
    fn pump(&self, outbox: &mut Outbox) -> bool {
        let mut sent = false;
        if self.remote.get().is_some() {
            while let Some(parcel) = outbox.next_parcel(|| lock(&self.inbox).take_acks()) {
                self.cast(parcel);
                sent = true;
            }
        }
        sent
    }

    fn cast(&self, parcel: Vec<u8>) {
        if let Some(remote) = self.remote.get() {
            // When the actor is gone, so is the session; its end is reported on its own way.
            let _ = remote.cast(PortMessage(parcel));
        }
    }
}
