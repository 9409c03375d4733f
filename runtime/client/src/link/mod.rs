//! One connection to one gateway: a task that owns the socket and shares it among streams.
//!
//! The task never reconnects. When the connection ends it notes the reason and drops the streams' senders; each stream
//! first takes what was delivered, then sees the end, and recovers by itself.
//!
//! Bounds: as many streams as the gateway's `max_streams`, by a [`Slot`] each; commands wait in a channel of [`COMMANDS`],
//! a stream's events in one as long as the credit it gave, and calls in [`MAX_CALLS`] slots.

mod task;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tracing::debug;
use understudy_protocol::encode;
use understudy_protocol::message::{ClientMessage, ClusterStatus, Limits, ServerMessage};

use self::task::Task;
use crate::dial::Greeted;
use crate::error::{Error, LostReason};
use crate::options::Options;

/// Commands that wait for the task; senders wait beyond it.
const COMMANDS: usize = 1024;

/// Calls (`ping` and `status` each) without an answer; beyond it a call fails at once.
const MAX_CALLS: usize = 64;

/// Room in a stream's channel beside the tokens: `accepted` and the terminal event.
const CONTROL_EVENTS: usize = 2;

/// A handle to the task. The connection closes when the last one is dropped.
pub(crate) struct Link {
    commands: mpsc::Sender<Command>,
    address: String,
    limits: Limits,
    /// The streams that the gateway takes on this connection.
    slots: Arc<Semaphore>,
    freed: Arc<Notify>,
    /// Number of the next stream; the link takes no more streams when they have run out.
    next_stream: AtomicU32,
    /// Set once, when the connection has ended.
    end: Arc<OnceLock<LostReason>>,
}

/// The right to open one stream.
pub(crate) struct Reservation {
    pub link: Arc<Link>,
    slot: Slot,
}

/// A stream's place among those that the gateway takes at once. It comes free with the terminal event, and whoever waits
/// for one is told.
struct Slot {
    permit: Option<OwnedSemaphorePermit>,
    freed: Arc<Notify>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.permit = None;
        self.freed.notify_one();
    }
}

/// A stream's hold on a link.
pub(crate) struct Attachment {
    pub link: Arc<Link>,
    pub stream: u32,
    pub events: mpsc::Receiver<ServerMessage>,
}

enum Command {
    Open {
        stream: u32,
        frame: Bytes,
        credit: u32,
        events: mpsc::Sender<ServerMessage>,
        slot: Slot,
    },
    Credit {
        stream: u32,
        tokens: u32,
    },
    Cancel {
        stream: u32,
    },
    /// Nobody reads the stream any more.
    Leave {
        stream: u32,
        cancel: bool,
        /// Closed by the task: a receiver that goes before this command is taken looks like a stream without an owner.
        events: mpsc::Receiver<ServerMessage>,
        /// Takes the terminal event.
        ended: oneshot::Sender<ServerMessage>,
    },
    Ping(oneshot::Sender<()>),
    Status(oneshot::Sender<ClusterStatus>),
}

impl Link {
    /// Starts the task of a connection. `freed` is told of every stream that ends.
    pub fn start(
        address: String,
        greeted: Greeted,
        options: &Options,
        freed: Arc<Notify>,
    ) -> Arc<Self> {
        let (sender, receiver) = mpsc::channel(COMMANDS);
        let end = Arc::new(OnceLock::new());
        let slots = greeted.limits.max_streams.max(1) as usize;
        let link = Arc::new(Self {
            commands: sender,
            address,
            limits: greeted.limits,
            slots: Arc::new(Semaphore::new(slots.min(Semaphore::MAX_PERMITS))),
            freed,
            next_stream: AtomicU32::new(1),
            end: end.clone(),
        });
        debug!(address = link.address, node = greeted.node, "connected");
        let task = Task::new(greeted.decoder, options, link.limits.max_credit);
        tokio::spawn(async move {
            let reason = task.run(greeted.socket, receiver, &end).await;
            debug!(%reason, "connection ended");
        });
        link
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether new streams can be opened.
    pub fn is_open(&self) -> bool {
        !self.commands.is_closed() && self.next_stream.load(Ordering::Relaxed) < u32::MAX
    }

    /// Why the connection ended.
    pub fn reason(&self) -> LostReason {
        self.end.get().cloned().unwrap_or(LostReason::Closed)
    }

    /// Whether the connection has ended.
    pub fn is_ended(&self) -> bool {
        self.end.get().is_some()
    }

    /// The connection's end as an error.
    pub fn lost(&self) -> Error {
        Error::Lost {
            address: self.address.clone(),
            reason: self.reason(),
        }
    }

    /// A place for one more stream, unless the gateway takes no more on this connection.
    pub fn reserve(self: &Arc<Self>) -> Option<Reservation> {
        let permit = self.slots.clone().try_acquire_owned().ok()?;
        Some(Reservation {
            link: self.clone(),
            slot: Slot {
                permit: Some(permit),
                freed: self.freed.clone(),
            },
        })
    }

    /// Grants the server further token events.
    pub async fn credit(&self, stream: u32, tokens: u32) -> Result<(), Error> {
        self.send(Command::Credit { stream, tokens }).await
    }

    /// Asks for the end of a stream.
    pub async fn cancel(&self, stream: u32) -> Result<(), Error> {
        self.send(Command::Cancel { stream }).await
    }

    pub async fn ping(&self) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        self.call(Command::Ping(answer), answered).await
    }

    pub async fn status(&self) -> Result<ClusterStatus, Error> {
        let (answer, answered) = oneshot::channel();
        self.call(Command::Status(answer), answered).await
    }

    async fn call<T>(&self, command: Command, answered: oneshot::Receiver<T>) -> Result<T, Error> {
        self.send(command).await?;
        answered.await.map_err(|_| match self.end.get() {
            Some(_) => self.lost(),
            None => Error::Busy { max: MAX_CALLS },
        })
    }

    /// Waits for room in the queue: the task ends a connection whose peer takes nothing, and the queue with it.
    async fn send(&self, command: Command) -> Result<(), Error> {
        self.commands.send(command).await.map_err(|_| self.lost())
    }

    fn frame(&self, message: &ClientMessage) -> Result<Bytes, Error> {
        let mut out = BytesMut::new();
        let size = encode(message, &mut out).map_err(|error| Error::Protocol(error.to_string()))?;
        let len = size - understudy_protocol::frame::HEADER_BYTES;
        let max = self.limits.max_frame_bytes as usize;
        if len > max {
            return Err(Error::TooLarge { len, max });
        }
        Ok(out.freeze())
    }
}

impl Reservation {
    /// Sends the opening message that `message` makes of a stream number. The message gives `credit`; there may be
    /// `window` token events under way later.
    pub async fn open(
        self,
        window: u32,
        credit: u32,
        message: impl FnOnce(u32) -> ClientMessage,
    ) -> Result<Attachment, Error> {
        let Self { link, slot } = self;
        let stream = link.next_stream.fetch_add(1, Ordering::Relaxed);
        let frame = link.frame(&message(stream))?;
        let (sender, events) = mpsc::channel(window as usize + CONTROL_EVENTS);
        link.send(Command::Open {
            stream,
            frame,
            credit,
            events: sender,
            slot,
        })
        .await?;
        Ok(Attachment {
            link,
            stream,
            events,
        })
    }
}

impl Attachment {
    /// Gives the stream up, and lets its request go on: what still comes is thrown away, with credit for all of it, so that
    /// the stream reaches its terminal event and its number comes free.
    pub async fn leave(self) -> Result<(), Error> {
        self.depart(false).await.map(|_| ())
    }

    /// As [`leave`](Self::leave), but cancels the request, and waits for the terminal event.
    pub async fn cancel(self) -> Result<ServerMessage, Error> {
        let link = self.link.clone();
        let ended = self.depart(true).await?;
        ended.await.map_err(|_| link.lost())
    }

    async fn depart(self, cancel: bool) -> Result<oneshot::Receiver<ServerMessage>, Error> {
        let Self {
            link,
            stream,
            events,
        } = self;
        let (ended, has_ended) = oneshot::channel();
        link.send(Command::Leave {
            stream,
            cancel,
            events,
            ended,
        })
        .await?;
        Ok(has_ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_cancel_waits_for_room_in_a_full_queue() {
        let (commands, mut queue) = mpsc::channel(1);
        let link = Arc::new(Link {
            commands,
            address: "a:1".to_owned(),
            limits: Limits {
                max_frame_bytes: 100,
                max_streams: 1,
                max_credit: 1,
            },
            slots: Arc::new(Semaphore::new(1)),
            freed: Arc::default(),
            next_stream: AtomicU32::new(1),
            end: Arc::default(),
        });
        link.credit(1, 1).await.unwrap();
        let mut cancel = tokio::spawn({
            let link = link.clone();
            async move { link.cancel(1).await }
        });
        tokio::task::yield_now().await;
        assert!(!cancel.is_finished());
        assert!(matches!(queue.recv().await, Some(Command::Credit { .. })));
        (&mut cancel).await.unwrap().unwrap();
        assert!(matches!(
            queue.try_recv(),
            Ok(Command::Cancel { stream: 1 })
        ));
    }
}
