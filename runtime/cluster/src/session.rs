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
use crate::settings::DIAL_TIMEOUT;
use crate::transport::Breaker;

/// Longest wait for the node server to forget a closed session; then it counts as forgotten.
const GONE_TIMEOUT: Duration = Duration::from_secs(1);
// A dial waits for the session before it, under a limit of its own. If that ended first, a node server that is stuck would
// keep the peer out for good.
const _: () = assert!(GONE_TIMEOUT.as_millis() * 2 <= DIAL_TIMEOUT.as_millis());

/// Where a session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Opening,
    Open,
    Closed,
}

/// What follows from a parcel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) is_deliverable: bool,
    pub(crate) is_ack_due: bool,
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

    /// Waits until it is closed.
    pub(crate) async fn closed(&self) {
        let mut phase = self.phase.subscribe();
        let _ = phase.wait_for(|phase| *phase == Phase::Closed).await;
    }

    /// Waits until it is closed and gone. The second wait has a limit, because the node server is not ours; when it runs
    /// out the session counts as gone for everybody.
    pub(crate) async fn gone(&self) {
        self.closed().await;
        let mut gone = self.gone.subscribe();
        let waited = tokio::time::timeout(GONE_TIMEOUT, gone.wait_for(|gone| *gone))
            .await
            .is_ok();
        if !waited {
            self.set_gone();
        }
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

    /// Takes in a parcel. Says whether there is something to deliver, and whether the peer should hear at once that it may
    /// send more: parts of a large payload are released as they arrive, long before the consumer can take anything.
    pub(crate) fn receive(&self, header: &Header, records: Records) -> Result<Received, Violation> {
        {
            let mut outbox = lock(&self.outbox);
            outbox.acknowledge(header.acked)?;
            self.pump(&mut outbox);
        }
        let mut inbox = lock(&self.inbox);
        inbox.accept(header, records)?;
        Ok(Received {
            is_deliverable: !inbox.is_empty(),
            is_ack_due: inbox.ack_due(),
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::identity::NodeName;
    use crate::parcel::{PART_BYTES, read};
    use crate::settings::SEND_BACKLOG_BYTES;

    fn session() -> Session {
        let peer = PeerId::new(NodeName::new("p").unwrap(), 1);
        let life = Life::begin(Clock::start());
        Session::new(1, peer, life, Breaker::of_nothing(), SEND_BACKLOG_BYTES)
    }

    #[tokio::test]
    async fn a_session_that_the_node_server_never_forgets_is_gone_after_its_time() {
        let session = session();
        session.hand_over();
        session.close(false);
        assert!(session.is_lingering());
        let begin = std::time::Instant::now();
        tokio::time::timeout(DIAL_TIMEOUT, session.gone())
            .await
            .expect("before a dial gives up");
        assert!(begin.elapsed() >= GONE_TIMEOUT);
        assert!(!session.is_lingering(), "it is in nobody's way any more");
    }

    #[test]
    fn parts_are_acknowledged_long_before_the_payload_is_whole() {
        let (sender, receiver) = (session(), session());
        let mut outbox = lock(&sender.outbox);
        outbox
            .offer(Lane::Ordered, Bytes::from(vec![0; 16 * PART_BYTES]))
            .unwrap();
        let mut received = Vec::new();
        while let Some(parcel) = outbox.next_parcel(|| [0, 0]) {
            let (header, records) = read(parcel.into()).unwrap();
            received.push(receiver.receive(&header, records).unwrap());
        }
        assert!(received.iter().all(|parcel| !parcel.is_deliverable));
        let first_due = received.iter().position(|parcel| parcel.is_ack_due);
        assert!(first_due.is_some_and(|at| at < 5), "{received:?}");
    }
}
