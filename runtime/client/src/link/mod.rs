//! One connection to one gateway: a task that owns the socket and shares it among streams.
//!
//! The task never reconnects. When the connection ends it notes the reason and drops the streams' senders; each stream
//! first takes what was delivered, then sees the end, and recovers by itself.
//!
//! Bounds: commands wait in a channel of [`COMMANDS`], a stream's events in one as long as the credit it gave, and calls
//! in [`MAX_CALLS`] slots.

mod task;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use tokio::sync::{mpsc, oneshot};
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
    /// Number of the next stream; the link takes no more streams when they have run out.
    next_stream: AtomicU32,
    /// Set once, when the connection has ended.
    end: Arc<OnceLock<LostReason>>,
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
        events: mpsc::Sender<ServerMessage>,
    },
    Credit {
        stream: u32,
        tokens: u32,
    },
    Cancel {
        stream: u32,
    },
    Ping(oneshot::Sender<()>),
    Status(oneshot::Sender<ClusterStatus>),
}

impl Link {
    /// Starts the task of a connection.
    pub fn start(address: String, greeted: Greeted, options: &Options) -> Arc<Self> {
        let (sender, receiver) = mpsc::channel(COMMANDS);
        let end = Arc::new(OnceLock::new());
        let link = Arc::new(Self {
            commands: sender,
            address,
            limits: greeted.limits,
            next_stream: AtomicU32::new(1),
            end: end.clone(),
        });
        debug!(address = link.address, node = greeted.node, "connected");
        let task = Task::new(greeted.decoder, options);
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

    /// Sends the opening message that `message` makes of a stream number, with room for `window` token events.
    pub async fn open(
        self: &Arc<Self>,
        window: u32,
        message: impl FnOnce(u32) -> ClientMessage,
    ) -> Result<Attachment, Error> {
        let stream = self.next_stream.fetch_add(1, Ordering::Relaxed);
        let frame = self.frame(&message(stream))?;
        let (sender, events) = mpsc::channel(window as usize + CONTROL_EVENTS);
        let command = Command::Open {
            stream,
            frame,
            events: sender,
        };
        self.commands.send(command).await.map_err(|_| self.lost())?;
        Ok(Attachment {
            link: self.clone(),
            stream,
            events,
        })
    }

    /// Grants the server further token events.
    pub async fn credit(&self, stream: u32, tokens: u32) -> Result<(), Error> {
        let command = Command::Credit { stream, tokens };
        self.commands.send(command).await.map_err(|_| self.lost())
    }

    /// Asks for the end of a stream. Where the queue is full the task finds the dropped receiver by itself.
    pub fn cancel(&self, stream: u32) {
        let _ = self.commands.try_send(Command::Cancel { stream });
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
        self.commands.send(command).await.map_err(|_| self.lost())?;
        answered.await.map_err(|_| match self.end.get() {
            Some(_) => self.lost(),
            None => Error::Busy { max: MAX_CALLS },
        })
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
