//! What waits to be written to one client.
//!
//! The queue itself has no limit; what may enter it has. Token events need the client's credit (at most `max_credit`
//! per stream, `max_streams` streams), each stream has one terminal event, and answers to the client's own questions
//! take one of [`MAX_ANSWERS`] permits, so that a client that asks but does not read stops being heard.

use std::sync::{Arc, Mutex};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
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
pub type SharedRules = Arc<Mutex<ConnectionRules>>;

/// The sending end. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Outbox {
    queue: mpsc::UnboundedSender<Outgoing>,
    answers: Arc<Semaphore>,
}

impl Outbox {
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Outgoing>) {
        let (queue, receiver) = mpsc::unbounded_channel();
        (
            Self {
                queue,
                answers: Arc::new(Semaphore::new(MAX_ANSWERS)),
            },
            receiver,
        )
    }

    /// For events that the client's credit, or a stream's end, already pays for. Returns whether the connection lives.
    pub fn send(&self, message: ServerMessage) -> bool {
        let permit = None;
        self.queue.send(Outgoing { message, permit }).is_ok()
    }

    /// For answers: waits for a permit. Returns whether the connection lives.
    pub async fn answer(&self, message: ServerMessage) -> bool {
        let permit = self.answers.clone().acquire_owned().await.ok();
        self.queue.send(Outgoing { message, permit }).is_ok()
    }
}
