//! The task of a connection: reads, writes, keeps alive, and deals out the events.
//!
//! Invariants: whatever the peer does, each turn of the loop ends by a timer; the streams' senders are dropped only after
//! the reason of the end is noted; bytes to send wait in a buffer that takes no further command above
//! [`OUT_HIGH_BYTES`].

use std::collections::{HashMap, VecDeque};
use std::sync::OnceLock;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::ReadHalf;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};
use tracing::debug;
use understudy_protocol::message::{ClientMessage, ClusterStatus, ServerMessage};
use understudy_protocol::{FrameDecoder, decode_server, encode};

use super::{Command, MAX_CALLS, Slot};
use crate::error::LostReason;
use crate::options::Options;
use crate::time::after;

/// Bytes to send above which no command is taken.
const OUT_HIGH_BYTES: usize = 1024 * 1024;

/// When the last handle goes, the streams that still run must be cancelled within this time.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) struct Task {
    decoder: FrameDecoder,
    out: BytesMut,
    /// Streams whose terminal event has not come.
    streams: HashMap<u32, Entry>,
    pings: HashMap<u64, oneshot::Sender<()>>,
    next_nonce: u64,
    /// Answers come in the order of the questions.
    statuses: VecDeque<oneshot::Sender<ClusterStatus>>,
    /// The most credit that one stream can hold.
    max_credit: u32,
    interval: Duration,
    timeout: Duration,
    last_received: Instant,
    /// Last write; the server closes a connection that says nothing, however much it is sent.
    last_sent: Instant,
    last_ping: Instant,
    /// Since when the peer has taken none of the bytes to send.
    stalled_since: Option<Instant>,
}

struct Entry {
    events: mpsc::Sender<ServerMessage>,
    /// Token events that may still come.
    credit: u32,
    cancelled: bool,
    /// Nobody reads it any more: what comes is thrown away, but for the terminal event, which who left may want to know.
    left: Option<oneshot::Sender<ServerMessage>>,
    /// Comes free with the entry.
    _slot: Slot,
}

impl Task {
    pub fn new(decoder: FrameDecoder, options: &Options, max_credit: u32) -> Self {
        let now = Instant::now();
        Self {
            decoder,
            out: BytesMut::new(),
            streams: HashMap::new(),
            pings: HashMap::new(),
            next_nonce: 0,
            statuses: VecDeque::new(),
            max_credit,
            interval: options.keepalive_interval,
            timeout: options.keepalive_timeout,
            last_received: now,
            last_sent: now,
            last_ping: now,
            stalled_since: None,
        }
    }

    /// Runs until the connection ends or the last handle is dropped.
    pub async fn run(
        mut self,
        mut socket: TcpStream,
        mut commands: mpsc::Receiver<Command>,
        end: &OnceLock<LostReason>,
    ) -> LostReason {
        let reason = match self.serve(&mut socket, &mut commands).await {
            Ok(()) => {
                self.drain(&mut socket).await;
                LostReason::Closed
            }
            Err(reason) => reason,
        };
        // The reason must be there before the streams see their senders go.
        let _ = end.set(reason.clone());
        drop(commands);
        drop(self);
        reason
    }

    async fn serve(
        &mut self,
        socket: &mut TcpStream,
        commands: &mut mpsc::Receiver<Command>,
    ) -> Result<(), LostReason> {
        let (mut reader, mut writer) = socket.split();
        self.take_frames()?;
        loop {
            let timer = self.next_timer();
            tokio::select! {
                read = reader.read_buf(self.decoder.buffer_mut()) => {
                    if read? == 0 {
                        return Err(LostReason::Closed);
                    }
                    self.last_received = Instant::now();
                    self.take_frames()?;
                }
                command = commands.recv(), if self.out.len() < OUT_HIGH_BYTES => {
                    let Some(command) = command else { return Ok(()) };
                    self.obey(command)?;
                    // What else is there goes out with the same write.
                    while self.out.len() < OUT_HIGH_BYTES {
                        let Ok(command) = commands.try_recv() else { break };
                        self.obey(command)?;
                    }
                }
                written = writer.write_buf(&mut self.out), if !self.out.is_empty() => {
                    if let Err(error) = written {
                        return Err(self.last_words(&mut reader).await.unwrap_or(error.into()));
                    }
                    self.last_sent = Instant::now();
                    self.stalled_since = None;
                }
                () = sleep_until(timer) => self.tick(Instant::now())?,
            }
            if self.out.is_empty() {
                self.stalled_since = None;
            } else {
                self.stalled_since.get_or_insert_with(Instant::now);
            }
        }
    }

    /// What the server said before it closed, when a write has found out that it did.
    async fn last_words(&mut self, reader: &mut ReadHalf<'_>) -> Option<LostReason> {
        let words = async {
            loop {
                self.take_frames()?;
                if !matches!(reader.read_buf(self.decoder.buffer_mut()).await, Ok(1..)) {
                    return Ok(());
                }
            }
        };
        let heard: Result<(), LostReason> =
            tokio::time::timeout(DRAIN_TIMEOUT, words).await.ok()?;
        heard.err()
    }

    /// The earliest moment at which [`tick`](Self::tick) has something to do.
    fn next_timer(&self) -> Instant {
        let ping = self.next_ping();
        let silent = after(self.last_received, self.timeout);
        let stalled = self.stalled_since.map(|since| after(since, self.timeout));
        ping.min(silent).min(stalled.unwrap_or(silent))
    }

    /// A ping is due when one side has said nothing for an interval, and not more often than once an interval.
    fn next_ping(&self) -> Instant {
        let quiet_since = self.last_received.min(self.last_sent);
        after(quiet_since.max(self.last_ping), self.interval)
    }

    fn tick(&mut self, now: Instant) -> Result<(), LostReason> {
        let stalled = self
            .stalled_since
            .is_some_and(|since| now >= after(since, self.timeout));
        if stalled || now >= after(self.last_received, self.timeout) {
            return Err(LostReason::Silent(self.timeout));
        }
        if now >= self.next_ping() {
            self.last_ping = now;
            let nonce = self.nonce();
            self.send(&ClientMessage::Ping { nonce })?;
            self.cancel_abandoned()?;
        }
        Ok(())
    }

    fn obey(&mut self, command: Command) -> Result<(), LostReason> {
        match command {
            Command::Open {
                stream,
                frame,
                credit,
                events,
                slot,
            } => {
                self.out.extend_from_slice(&frame);
                let entry = Entry {
                    events,
                    credit,
                    cancelled: false,
                    left: None,
                    _slot: slot,
                };
                self.streams.insert(stream, entry);
                Ok(())
            }
            Command::Credit { stream, tokens } => self.credit(stream, tokens),
            Command::Cancel { stream } => self.cancel(stream),
            Command::Leave {
                stream,
                cancel,
                events,
                ended,
            } => {
                let left = self.leave(stream, cancel, ended);
                drop(events);
                left
            }
            Command::Ping(answer) => {
                if self.pings.len() >= MAX_CALLS {
                    return Ok(());
                }
                let nonce = self.nonce();
                self.pings.insert(nonce, answer);
                self.send(&ClientMessage::Ping { nonce })
            }
            Command::Status(answer) => {
                if self.statuses.len() >= MAX_CALLS {
                    return Ok(());
                }
                self.statuses.push_back(answer);
                self.send(&ClientMessage::Status {})
            }
        }
    }

    fn take_frames(&mut self) -> Result<(), LostReason> {
        while let Some(payload) = self.decoder.next_frame().map_err(broken)? {
            let message = decode_server(&payload).map_err(broken)?;
            self.take(message)?;
        }
        Ok(())
    }

    fn take(&mut self, message: ServerMessage) -> Result<(), LostReason> {
        match message {
            ServerMessage::Accepted { stream, .. } => self.deliver(stream, message, false),
            ServerMessage::Token(ref event) => self.deliver(event.stream, message, false),
            ServerMessage::Finished { stream, .. } => self.deliver(stream, message, true),
            ServerMessage::Error {
                stream: Some(stream),
                ..
            } => self.deliver(stream, message, true),
            ServerMessage::Error {
                stream: None,
                error,
                ..
            } => Err(LostReason::Refused(error)),
            ServerMessage::Pong { nonce } => {
                if let Some(answer) = self.pings.remove(&nonce) {
                    let _ = answer.send(());
                }
                Ok(())
            }
            ServerMessage::Status(status) => {
                if let Some(answer) = self.statuses.pop_front() {
                    let _ = answer.send(status);
                }
                Ok(())
            }
            ServerMessage::Welcome { .. } => {
                Err(LostReason::Protocol("a second welcome".to_owned()))
            }
        }
    }

    /// Hands an event to its stream; one whose owner has gone without a word is cancelled.
    fn deliver(
        &mut self,
        stream: u32,
        message: ServerMessage,
        terminal: bool,
    ) -> Result<(), LostReason> {
        let Some(entry) = self.streams.get_mut(&stream) else {
            return Err(LostReason::Protocol(format!(
                "event for stream {stream}, which is not open"
            )));
        };
        if matches!(message, ServerMessage::Token(_)) {
            entry.credit = entry.credit.checked_sub(1).ok_or_else(|| {
                LostReason::Protocol(format!(
                    "more events for stream {stream} than it gave credit for"
                ))
            })?;
        }
        if entry.left.is_some() {
            if terminal && let Some(ended) = self.streams.remove(&stream).and_then(|e| e.left) {
                let _ = ended.send(message);
            }
            return Ok(());
        }
        let sent = entry.events.try_send(message);
        if terminal {
            self.streams.remove(&stream);
        }
        match sent {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) if terminal => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => self.abandon(stream),
            Err(mpsc::error::TrySendError::Full(_)) => Err(LostReason::Protocol(format!(
                "more messages for stream {stream} than it has events"
            ))),
        }
    }

    fn credit(&mut self, stream: u32, tokens: u32) -> Result<(), LostReason> {
        match self.streams.get_mut(&stream) {
            Some(entry) => {
                entry.credit = entry.credit.saturating_add(tokens);
                self.send(&ClientMessage::Credit { stream, tokens })
            }
            None => Ok(()),
        }
    }

    fn cancel(&mut self, stream: u32) -> Result<(), LostReason> {
        match self.streams.get_mut(&stream) {
            Some(entry) if !entry.cancelled => {
                entry.cancelled = true;
                self.send(&ClientMessage::Cancel { stream })
            }
            _ => Ok(()),
        }
    }

    /// Nobody reads the stream any more. Its terminal event waits for credit for the tokens before it, and its number for
    /// the terminal event, so it gets all the credit that there is; after the cancel, for no more tokens than needed.
    fn leave(
        &mut self,
        stream: u32,
        cancel: bool,
        ended: oneshot::Sender<ServerMessage>,
    ) -> Result<(), LostReason> {
        let Some(entry) = self.streams.get_mut(&stream) else {
            // Its end has been delivered already, to a queue that nobody has read.
            return Ok(());
        };
        entry.left = Some(ended);
        if cancel {
            self.cancel(stream)?;
        }
        self.credit(stream, self.max_credit)
    }

    /// Its owner went without a word, as a task that has panicked does.
    fn abandon(&mut self, stream: u32) -> Result<(), LostReason> {
        self.leave(stream, true, oneshot::channel().0)
    }

    fn cancel_abandoned(&mut self) -> Result<(), LostReason> {
        let abandoned: Vec<u32> = self
            .streams
            .iter()
            .filter(|(_, entry)| entry.events.is_closed() && entry.left.is_none())
            .map(|(&stream, _)| stream)
            .collect();
        abandoned
            .into_iter()
            .try_for_each(|stream| self.abandon(stream))
    }

    fn nonce(&mut self) -> u64 {
        self.next_nonce += 1;
        self.next_nonce
    }

    fn send(&mut self, message: &ClientMessage) -> Result<(), LostReason> {
        encode(message, &mut self.out).map(|_| ()).map_err(broken)
    }

    /// The last handle is gone: waits for the answers to what was cancelled. A socket that is closed with received bytes
    /// in it is reset, and the reset could overtake the cancel. What was left to go on does so without this connection.
    async fn drain(&mut self, socket: &mut TcpStream) {
        let drained = async {
            self.cancel_abandoned()?;
            socket.write_all_buf(&mut self.out).await?;
            while self.streams.values().any(|entry| entry.cancelled) {
                if socket.read_buf(self.decoder.buffer_mut()).await? == 0 {
                    return Err(LostReason::Closed);
                }
                self.take_frames()?;
            }
            Ok(socket.shutdown().await?)
        };
        if let Ok(Err(reason)) = tokio::time::timeout(DRAIN_TIMEOUT, drained).await {
            debug!(%reason, "connection ended before its streams");
        }
    }
}

fn broken(error: impl std::fmt::Display) -> LostReason {
    LostReason::Protocol(error.to_string())
}
