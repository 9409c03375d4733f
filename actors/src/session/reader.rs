//! The reading side of a connection.
//!
//! The reader answers what needs nobody else (`hello`, `ping`, refusals by the rules) itself, and hands everything else
//! to the session, which never waits. So nothing that a client asks for is held up by another of its requests, however
//! long that one's admission takes.
//!
//! What it hands over is bounded: openings by their bytes, questions for the cluster's state by the permits of their
//! answers, all else by [`MAX_INBOUND`].

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ractor::ActorRef;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};
use understudy_protocol::codec;
use understudy_protocol::frame::FrameDecoder;
use understudy_protocol::handshake::{HANDSHAKE_FRAME_BYTES, Step};
use understudy_protocol::message::{ClientMessage, Limits, ServerMessage};
use understudy_protocol::{ErrorBody, ErrorCode};
use understudy_telemetry::record;

use super::SessionMsg;
use crate::gateway::GatewayShared;
use crate::outbox::{Answers, SharedRules};

/// `cancel` and `credit` messages of one client that wait for its session at most; its socket fills up behind them.
const MAX_INBOUND: usize = 16;

/// Submissions whose admission is under way may hold this many frames of the largest size, all together.
const OPENING_FRAMES: usize = 2;

/// How the reading ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadEnd {
    /// The client will send nothing more. It may still want to read.
    InputEnded,
    /// The client broke the rules; the connection's last word is on its way.
    Refused,
    /// The client, or the session, is gone.
    Broken,
}

/// Goes on reading, or does not.
type Going = Result<(), Stop>;

enum Stop {
    /// Said to the client; closes the connection.
    Refuse(ErrorBody),
    Gone,
}

impl From<ErrorBody> for Stop {
    fn from(error: ErrorBody) -> Self {
        Self::Refuse(error)
    }
}

pub(super) struct Reader {
    session: ActorRef<SessionMsg>,
    shared: Arc<GatewayShared>,
    answers: Answers,
    rules: SharedRules,
    accepted_at: Instant,
    inbound: Arc<Semaphore>,
    opening_bytes: Arc<Semaphore>,
}

impl Reader {
    pub fn new(
        session: ActorRef<SessionMsg>,
        shared: Arc<GatewayShared>,
        answers: Answers,
        rules: SharedRules,
        accepted_at: Instant,
    ) -> Self {
        let bytes = OPENING_FRAMES * max_frame_bytes(&shared.limits);
        Self {
            session,
            shared,
            answers,
            rules,
            accepted_at,
            inbound: Arc::new(Semaphore::new(MAX_INBOUND)),
            opening_bytes: Arc::new(Semaphore::new(bytes)),
        }
    }

    /// Reads until the client closes its side, breaks the rules, or is gone.
    pub async fn run(self, socket: &mut (impl AsyncRead + Unpin)) -> ReadEnd {
        match self.read(socket).await {
            Ok(()) => ReadEnd::InputEnded,
            Err(Stop::Gone) => ReadEnd::Broken,
            Err(Stop::Refuse(error)) => {
                record::protocol_error(error.code.as_str());
                tracing::debug!(code = error.code.as_str(), %error, "closing a client connection");
                self.answers.close(error);
                ReadEnd::Refused
            }
        }
    }

    async fn read(&self, socket: &mut (impl AsyncRead + Unpin)) -> Going {
        let limit = max_frame_bytes(&self.shared.limits);
        let mut decoder = FrameDecoder::new(limit.min(HANDSHAKE_FRAME_BYTES));
        loop {
            while let Some(frame) = decoder.next_frame().map_err(ErrorBody::from)? {
                self.take(&frame).await?;
                if self.rules.lock().is_greeted() {
                    decoder.set_max_frame_bytes(limit);
                }
            }
            if self.receive(socket, &mut decoder).await? == 0 {
                return Ok(decoder.finish().map_err(ErrorBody::from)?);
            }
        }
    }

    /// The next bytes, as many as there are.
    async fn receive(
        &self,
        socket: &mut (impl AsyncRead + Unpin),
        decoder: &mut FrameDecoder,
    ) -> Result<usize, Stop> {
        loop {
            let reading = socket.read_buf(decoder.buffer_mut());
            let read = if self.rules.lock().is_greeted() {
                timeout(self.shared.idle_timeout, reading).await
            } else {
                // One deadline for the whole handshake: a byte now and then does not buy more time.
                timeout_at(self.accepted_at + self.shared.handshake_timeout, reading).await
            };
            let rules = self.rules.lock();
            match read {
                Ok(read) => return read.map_err(|_| Stop::Gone),
                // A client that only reads may be silent: its requests have deadlines.
                Err(_) if rules.streams() > 0 => {}
                Err(_) if rules.is_greeted() => {
                    let waited = self.shared.idle_timeout;
                    return Err(timed_out("nothing was received for", waited, "send pings"));
                }
                Err(_) => {
                    let (waited, what) = (self.shared.handshake_timeout, "no whole hello came in");
                    return Err(timed_out(what, waited, "send it at once"));
                }
            }
        }
    }

    async fn take(&self, frame: &Bytes) -> Going {
        match codec::decode_client(frame) {
            Ok(message) => {
                let step = self.rules.lock().receive(&message);
                match step {
                    Step::Deliver => self.deliver(message, frame.len()).await,
                    step => self.act(step).await,
                }
            }
            // Wrong fields end their own stream only; whatever else cannot be read is an error of the connection.
            Err(error) if error.code == ErrorCode::InvalidRequest => {
                match codec::stream_of(frame) {
                    Some(stream) => {
                        let step = self.rules.lock().refuse(stream, error);
                        self.act(step).await
                    }
                    None => Err(error.into()),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What the rules say about a message that the session need not see.
    async fn act(&self, step: Step) -> Going {
        let message = match step {
            Step::Welcome { version } => ServerMessage::Welcome {
                version,
                node: self.shared.node.clone(),
                server: self.shared.server.clone(),
                limits: self.shared.limits,
            },
            Step::Refuse { stream, error } => {
                record::request_error(error.code.as_str());
                ServerMessage::Error {
                    stream: Some(stream),
                    request: None,
                    error,
                }
            }
            Step::Close(error) => return Err(error.into()),
            Step::Ignore | Step::Deliver => return Ok(()),
        };
        self.answer(message).await
    }

    async fn deliver(&self, message: ClientMessage, frame_bytes: usize) -> Going {
        let message = match message {
            ClientMessage::Ping { nonce } => {
                return self.answer(ServerMessage::Pong { nonce }).await;
            }
            ClientMessage::Status {} => {
                SessionMsg::Status(self.answers.permit().await.ok_or(Stop::Gone)?)
            }
            ClientMessage::Submit(_) | ClientMessage::Resume { .. } => {
                let bytes = u32::try_from(frame_bytes).unwrap_or(u32::MAX);
                let waiting = self.opening_bytes.clone().acquire_many_owned(bytes);
                let permit = waiting.await.map_err(|_| Stop::Gone)?;
                SessionMsg::Open(Box::new(message), permit)
            }
            ClientMessage::Cancel { .. }
            | ClientMessage::Credit { .. }
            | ClientMessage::Hello { .. } => {
                let waiting = self.inbound.clone().acquire_owned();
                let permit = waiting.await.map_err(|_| Stop::Gone)?;
                SessionMsg::Inbound(message, permit)
            }
        };
        self.session.cast(message).map_err(|_| Stop::Gone)
    }

    async fn answer(&self, message: ServerMessage) -> Going {
        match self.answers.answer(message).await {
            true => Ok(()),
            false => Err(Stop::Gone),
        }
    }
}

fn max_frame_bytes(limits: &Limits) -> usize {
    limits.max_frame_bytes as usize
}

fn timed_out(what: &str, waited: Duration, advice: &str) -> Stop {
    let message = format!("{what} {} ms; {advice}", waited.as_millis());
    ErrorBody::new(ErrorCode::Timeout, message).into()
}
