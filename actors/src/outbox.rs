//! What waits to be written to one client.
//!
//! The queue itself has no limit; what may enter it has. Token events need the client's credit (at most `max_credit`
//! per stream, `max_streams` streams), each stream has one terminal event, and answers to the client's own questions
//! take one of [`MAX_ANSWERS`] permits, so that a client that asks but does not read stops being heard.
//!
//! Invariant: an [`Outbox`] lets nothing through after its stream's terminal event, whoever holds a copy of it, and
//! whatever comes late.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use understudy_protocol::ErrorBody;
use understudy_protocol::handshake::ConnectionRules;
use understudy_protocol::message::ServerMessage;

/// Answers (pong, status, refusals) that wait on one connection at most.
pub const MAX_ANSWERS: usize = 64;

/// A message on its way to the client, with the permit that it gives back when it is written.
#[derive(Debug)]
pub struct Outgoing {
    pub message: ServerMessage,
    pub permit: Option<OwnedSemaphorePermit>,
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
    queue: mpsc::UnboundedSender<Outgoing>,
    permits: Arc<Semaphore>,
}

impl Answers {
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Outgoing>) {
        let (queue, receiver) = mpsc::unbounded_channel();
        let permits = Arc::new(Semaphore::new(MAX_ANSWERS));
        (Self { queue, permits }, receiver)
    }

    /// Waits until one more answer may wait. The writer, which gives up a client that takes nothing, bounds this.
    pub async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        self.permits.clone().acquire_owned().await.ok()
    }

    /// Sends an answer whose permit was taken before. Returns whether the connection lives.
    pub fn send(&self, message: ServerMessage, permit: OwnedSemaphorePermit) -> bool {
        let permit = Some(permit);
        self.queue.send(Outgoing { message, permit }).is_ok()
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
        let (stream, request, permit) = (None, None, None);
        let message = ServerMessage::Error {
            stream,
            request,
            error,
        };
        self.queue.send(Outgoing { message, permit }).ok();
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
    queue: mpsc::UnboundedSender<Outgoing>,
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
        let permit = None;
        self.queue.send(Outgoing { message, permit }).is_ok()
    }

    /// Whether anybody may still read what is sent.
    pub fn is_connected(&self) -> bool {
        !self.queue.is_closed()
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
        let sent: Vec<_> = std::iter::from_fn(|| queue.try_recv().ok())
            .map(|outgoing| outgoing.message)
            .collect();
        assert_eq!(sent, [error(1), error(2)]);
    }
}
