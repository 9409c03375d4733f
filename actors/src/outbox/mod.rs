//! What waits to be written to one client.
//!
//! The queue itself has no limit; what may enter it has. Token events need the client's credit (at most `max_credit`
//! per stream, `max_streams` streams) and room on the connection ([`FULL_BYTES`]), each stream has one terminal event, and
//! answers to the client's own questions take one of [`MAX_ANSWERS`] permits, so that a client that asks but does not read
//! stops being heard.
//!
//! Invariant: an [`Outbox`] lets nothing through after its stream's terminal event, whoever holds a copy of it, and
//! whatever comes late.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use understudy_protocol::ErrorBody;
use understudy_protocol::handshake::ConnectionRules;
use understudy_protocol::message::ServerMessage;

mod room;

pub use self::room::FULL_BYTES;

use self::room::{Room, weight};

/// Answers (pong, status, refusals) that wait on one connection at most.
pub const MAX_ANSWERS: usize = 64;

/// A message on its way to the client, with the permit that it gives back when it is written.
#[derive(Debug)]
pub struct Outgoing {
    pub message: ServerMessage,
    pub permit: Option<OwnedSemaphorePermit>,
}

/// The receiving end, for the writer. Counts what waits.
#[derive(Debug)]
pub struct Queue {
    receiver: mpsc::UnboundedReceiver<Outgoing>,
    room: Arc<Room>,
}

impl Queue {
    /// The next message, with its weight: to be given back by [`Queue::written`]. `None` when nobody can send any more.
    pub async fn next(&mut self) -> Option<(Outgoing, usize)> {
        let next = self.receiver.recv().await?;
        let weight = weight(&next.message);
        Some((next, weight))
    }

    /// As [`Queue::next`], if there is one now.
    pub fn next_now(&mut self) -> Option<(Outgoing, usize)> {
        let next = self.receiver.try_recv().ok()?;
        let weight = weight(&next.message);
        Some((next, weight))
    }

    /// That much is on its way to the client.
    pub fn written(&self, weight: usize) {
        self.room.free(weight);
    }

    /// Bytes that wait.
    pub fn queued(&self) -> usize {
        self.room.queued()
    }
}

/// The rules of a connection, shared between its reader, which asks them, and its writer, which tells them of streams
/// that ended.
#[derive(Debug, Clone)]
pub struct SharedRules(Arc<Mutex<ConnectionRules>>);

impl SharedRules {
    pub fn new(rules: ConnectionRules) -> Self {
        Self(Arc::new(Mutex::new(rules)))
    }

    pub fn lock(&self) -> MutexGuard<'_, ConnectionRules> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The connection's own sending end: answers to what the client asks, and the connection's last word. Cheap to clone.
/// When the last copy and the last outbox are gone, the writer has nothing more to wait for.
#[derive(Debug, Clone)]
pub struct Answers {
    queue: Sender,
    permits: Arc<Semaphore>,
}

#[derive(Debug, Clone)]
struct Sender {
    sender: mpsc::UnboundedSender<Outgoing>,
    room: Arc<Room>,
}

impl Sender {
    /// Returns whether the connection lives.
    fn send(&self, message: ServerMessage, permit: Option<OwnedSemaphorePermit>) -> bool {
        self.room.add(weight(&message));
        self.sender.send(Outgoing { message, permit }).is_ok()
    }
}

impl Answers {
    pub fn new() -> (Self, Queue) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let room = Arc::new(Room::default());
        let queue = Sender {
            sender,
            room: room.clone(),
        };
        let permits = Arc::new(Semaphore::new(MAX_ANSWERS));
        (Self { queue, permits }, Queue { receiver, room })
    }

    /// Waits until one more answer may wait. The writer, which gives up a client that takes nothing, bounds this.
    pub async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        self.permits.clone().acquire_owned().await.ok()
    }

    /// Sends an answer whose permit was taken before. Returns whether the connection lives.
    pub fn send(&self, message: ServerMessage, permit: OwnedSemaphorePermit) -> bool {
        self.queue.send(message, Some(permit))
    }

    /// Waits for a permit, and sends. Returns whether the connection lives.
    pub async fn answer(&self, message: ServerMessage) -> bool {
        match self.permit().await {
            Some(permit) => self.send(message, permit),
            None => false,
        }
    }

    /// The connection ends with `error`: the writer drops whatever is sent after it.
    pub fn close(&self, error: ErrorBody) {
        let (stream, request) = (None, None);
        let message = ServerMessage::Error {
            stream,
            request,
            error,
        };
        self.queue.send(message, None);
    }

    /// The sending end of a stream that begins.
    pub fn stream(&self) -> Outbox {
        Outbox {
            queue: self.queue.clone(),
            ended: Arc::default(),
        }
    }
}

/// The sending end of one stream, from its beginning to its terminal event. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Outbox {
    queue: Sender,
    /// Held while sending, so that nothing overtakes the terminal event.
    ended: Arc<Mutex<bool>>,
}

impl Outbox {
    /// Sends an event of this stream, unless the terminal one has been sent. Returns whether the connection lives.
    pub fn send(&self, message: ServerMessage) -> bool {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if *ended {
            return self.is_connected();
        }
        *ended = matches!(
            message,
            ServerMessage::Finished { .. } | ServerMessage::Error { .. }
        );
        self.queue.send(message, None)
    }

    /// Whether so much waits on the connection that no more should be sent before there is room.
    pub fn is_full(&self) -> bool {
        self.queue.room.is_full()
    }

    /// Calls `wake` when there is room again: at once if there is. Never, if the connection ends before.
    pub fn when_free(&self, wake: impl FnOnce() + Send + 'static) {
        self.queue.room.when_free(wake);
    }

    /// Whether anybody may still read what is sent.
    pub fn is_connected(&self) -> bool {
        !self.queue.sender.is_closed()
    }

    /// Whether the terminal event has been sent.
    pub fn has_ended(&self) -> bool {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether both belong to the same stream, and not only to the same number.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.ended, &other.ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_protocol::ErrorCode;

    fn error(stream: u32) -> ServerMessage {
        ServerMessage::Error {
            stream: Some(stream),
            request: None,
            error: ErrorBody::new(ErrorCode::Internal, "x"),
        }
    }

    #[test]
    fn nothing_follows_a_terminal_event_on_its_stream() {
        let (answers, mut queue) = Answers::new();
        let (one, two) = (answers.stream(), answers.stream());
        let late = one.clone();
        assert!(one.send(error(1)));
        assert!(late.has_ended() && !two.has_ended());
        assert!(late.send(error(1)), "the connection lives");
        assert!(two.send(error(2)));
        assert!(one.is_same(&late) && !one.is_same(&two));
        let sent: Vec<_> = std::iter::from_fn(|| queue.next_now())
            .map(|(outgoing, _)| outgoing.message)
            .collect();
        assert_eq!(sent, [error(1), error(2)]);
    }
}
