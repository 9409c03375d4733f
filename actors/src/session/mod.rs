//! One client connection: the actor between its socket and its requests.
//!
//! ```text
//!            ┌──────────── Reader ──▶ Session ──▶ Opening (a task for each submit or resume)
//!   socket ──┤ Connection     │ pong     │ credit, cancel      │
//!            └──────────── Writer ◀── Outbox ◀── Request ◀─────┘
//! ```
//!
//! The session itself never waits: what takes long (admission, other actors' answers) is done in tasks, so that a
//! stream's `credit` or `cancel` is never behind another stream's admission.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use understudy_protocol::handshake::ConnectionRules;
use understudy_protocol::message::{ClientMessage, Submit};
use understudy_protocol::{ErrorBody, ErrorCode, RequestId};

mod connection;
mod opening;
mod reader;
mod status;
#[cfg(test)]
mod tests;
mod writer;

pub use self::opening::Reading;

pub(crate) use self::connection::turn_away;

use self::connection::{Connection, LINGER};
use self::opening::Opening;
use self::reader::Reader;
use self::status::{Question, Questions};
use self::writer::Writer;
use crate::gateway::{ConnectionPlace, GatewayShared};
use crate::outbox::{Answers, Outbox, SharedRules};

/// How long a session waits for the terminal events of its streams when the node stops.
const SHUTDOWN_GRACE: Duration = Duration::from_millis(500);

/// What a session is told.
#[derive(Debug)]
pub enum SessionMsg {
    /// A `submit` or `resume`, with the permit for its bytes.
    Open(Box<ClientMessage>, OwnedSemaphorePermit),
    /// A `cancel` or `credit`.
    Inbound(ClientMessage, OwnedSemaphorePermit),
    /// A question for the state of the cluster, with the permit for its answer.
    Status(OwnedSemaphorePermit),
    /// Such questions have been answered.
    Answered,
    /// An opening is done. Without a reading it failed, which the client has been told.
    Opened {
        stream: u32,
        outbox: Outbox,
        reading: Option<Reading>,
    },
    /// The terminal event of a stream is on its way.
    StreamEnded { stream: u32, request: RequestId },
    /// The client sends nothing more.
    InputEnded,
    /// The connection has ended.
    Closed,
    /// The node stops.
    Shutdown,
    /// The node stops, and streams had time to end.
    GraceOver,
}
local_message!(SessionMsg);

pub struct SessionArgs {
    pub socket: TcpStream,
    pub peer: SocketAddr,
    pub shared: Arc<GatewayShared>,
    pub accepted_at: Instant,
    pub place: ConnectionPlace,
}

pub struct Session;

pub struct SessionState {
    me: ActorRef<SessionMsg>,
    shared: Arc<GatewayShared>,
    /// Given up when the client sends nothing more: then the writer ends with the last stream.
    answers: Option<Answers>,
    streams: HashMap<u32, Stream>,
    questions: Questions,
    is_stopping: bool,
    connection: JoinHandle<()>,
    /// Its other end resolves when this state is dropped.
    stopped: Option<oneshot::Sender<()>>,
}

/// A stream in flight.
struct Stream {
    outbox: Outbox,
    /// None while the opening is under way. What the client says about the stream until then is kept here.
    reading: Option<Reading>,
    early_credit: u32,
    is_cancelled: bool,
}

impl Actor for Session {
    type Msg = SessionMsg;
    type State = SessionState;
    type Arguments = SessionArgs;

    async fn pre_start(
        &self,
        me: ActorRef<SessionMsg>,
        args: SessionArgs,
    ) -> Result<SessionState, ActorProcessingErr> {
        args.socket.set_nodelay(true)?;
        let shared = args.shared;
        let rules = ConnectionRules::new(shared.tokens.clone(), &shared.limits);
        let rules = SharedRules::new(rules);
        let (answers, queue) = Answers::new();
        let (stopped, stop) = oneshot::channel();
        let connection = Connection {
            socket: args.socket,
            reader: Reader::new(
                me.clone(),
                shared.clone(),
                answers.clone(),
                rules.clone(),
                args.accepted_at,
            ),
            writer: Writer {
                queue,
                rules,
                limit: shared.write_timeout,
                waiting: shared.waiting.clone(),
            },
            session: me.clone(),
            stopped: stop,
            place: args.place,
        };
        tracing::debug!(client = %args.peer, "client connected");
        Ok(SessionState {
            me,
            shared,
            answers: Some(answers),
            streams: HashMap::new(),
            questions: Questions::default(),
            is_stopping: false,
            connection: tokio::spawn(connection.run()),
            stopped: Some(stopped),
        })
    }

    async fn handle(
        &self,
        me: ActorRef<SessionMsg>,
        message: SessionMsg,
        state: &mut SessionState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            SessionMsg::Open(message, bytes) => state.open(*message, bytes),
            SessionMsg::Inbound(message, _permit) => state.inbound(&message),
            SessionMsg::Status(permit) => state.status(permit),
            SessionMsg::Answered => state.questions.answered(&state.shared, &state.me),
            SessionMsg::Opened {
                stream,
                outbox,
                reading,
            } => state.opened(stream, &outbox, reading),
            SessionMsg::StreamEnded { stream, .. } => state.ended(stream),
            SessionMsg::InputEnded => state.answers = None,
            SessionMsg::Closed => me.stop(None),
            SessionMsg::Shutdown => {
                state.is_stopping = true;
                state.close_if_idle();
                me.send_after(SHUTDOWN_GRACE, || SessionMsg::GraceOver);
            }
            SessionMsg::GraceOver => state.close(),
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _me: ActorRef<SessionMsg>,
        state: &mut SessionState,
    ) -> Result<(), ActorProcessingErr> {
        state.let_go();
        // What is queued may still go out.
        timeout(2 * LINGER, &mut state.connection).await.ok();
        Ok(())
    }
}

impl SessionState {
    fn open(&mut self, message: ClientMessage, bytes: OwnedSemaphorePermit) {
        let (ClientMessage::Submit(Submit { stream, .. }) | ClientMessage::Resume { stream, .. }) =
            message
        else {
            return;
        };
        let Some(answers) = &self.answers else {
            return;
        };
        let outbox = answers.stream();
        let opening = Opening::new(self.me.clone(), self.shared.clone(), outbox.clone(), stream);
        let entry = Stream {
            outbox,
            reading: None,
            early_credit: 0,
            is_cancelled: false,
        };
        // An entry of the number's last use may be left, if the client was faster than the request's own word.
        self.streams.insert(stream, entry);
        match message {
            ClientMessage::Submit(submit) => drop(tokio::spawn(opening.submit(submit, bytes))),
            ClientMessage::Resume {
                request,
                next_position,
                credit,
                ..
            } => drop(tokio::spawn(opening.resume(request, next_position, credit))),
            _ => {}
        }
    }

    /// The request of a stream is known, or there will be none.
    fn opened(&mut self, number: u32, outbox: &Outbox, reading: Option<Reading>) {
        // A short stream may have ended, and its number be in use again.
        let Some(stream) = self
            .streams
            .get_mut(&number)
            .filter(|stream| stream.outbox.is_same(outbox))
        else {
            return;
        };
        let Some(reading) = reading else {
            return self.ended(number);
        };
        if stream.early_credit > 0 {
            reading.credit(stream.early_credit);
        }
        if stream.is_cancelled {
            reading.cancel();
        }
        stream.reading = Some(reading);
    }

    fn inbound(&mut self, message: &ClientMessage) {
        let (ClientMessage::Cancel { stream } | ClientMessage::Credit { stream, .. }) = message
        else {
            return;
        };
        let Some(stream) = self.streams.get_mut(stream) else {
            return;
        };
        match (message, &stream.reading) {
            (ClientMessage::Credit { tokens, .. }, Some(reading)) => reading.credit(*tokens),
            (ClientMessage::Credit { tokens, .. }, None) => {
                stream.early_credit = stream.early_credit.saturating_add(*tokens);
            }
            (_, Some(reading)) => reading.cancel(),
            (_, None) => stream.is_cancelled = true,
        }
    }

    fn status(&mut self, permit: OwnedSemaphorePermit) {
        if let Some(answers) = self.answers.clone() {
            let question = Question { answers, permit };
            self.questions.ask(question, &self.shared, &self.me);
        }
    }

    /// Forgets a stream, if it is this one that has ended: the word about the number's last use may come late.
    fn ended(&mut self, number: u32) {
        let is_over = |stream: &Stream| stream.outbox.has_ended();
        if self.streams.get(&number).is_some_and(is_over) {
            self.streams.remove(&number);
        }
        self.close_if_idle();
    }

    fn close_if_idle(&mut self) {
        if self.is_stopping && self.streams.is_empty() {
            self.close();
        }
    }

    fn close(&mut self) {
        match self.answers.take() {
            Some(answers) => answers.close(ErrorBody::new(
                ErrorCode::ShuttingDown,
                "the gateway is stopping: connect to another one",
            )),
            // The client had closed its side; if streams are left, there is no more time for them.
            None => self.me.stop(None),
        }
    }

    /// Its requests learn that nobody reads any more.
    fn let_go(&mut self) {
        self.streams.clear();
        self.answers = None;
        self.stopped = None;
    }
}

impl Drop for SessionState {
    /// However the session ends, a panic included.
    fn drop(&mut self) {
        self.let_go();
    }
}
