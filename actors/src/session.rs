//! One client connection: a reader, a writer, and the actor between them and the connection's requests.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use understudy_protocol::codec::{self, EncodeError};
use understudy_protocol::frame::FrameDecoder;
use understudy_protocol::handshake::{ConnectionRules, Step};
use understudy_protocol::message::{ClientMessage, ServerMessage, Submit};
use understudy_protocol::{ErrorBody, ErrorCode, Position, RequestId};
use understudy_telemetry::record;

use crate::gateway::GatewayShared;
use crate::hub::HubMsg;
use crate::keeper::KeeperMsg;
use crate::outbox::{Outbox, Outgoing, SharedRules};
use crate::request::{Audience, Origin, Request, RequestArgs, RequestMsg};
use crate::router::RouterMsg;

/// Messages of one client that wait for its session at most; its socket fills up behind them.
const MAX_INBOUND: usize = 16;

/// Bytes that the writer gathers before it writes them in one go.
const WRITE_BATCH_BYTES: usize = 64 * 1024;

/// How long a session waits for another actor of its node. Past it, something is badly wrong, and the client is told.
const ASK_DEADLINE: Duration = Duration::from_secs(5);

/// How often a resume looks again when a request ended just between two looks.
const RESUME_TRIES: u32 = 5;

/// What a session is told.
#[derive(Debug)]
pub enum SessionMsg {
    Inbound(Box<ClientMessage>, OwnedSemaphorePermit),
    /// Reader or writer ended.
    Closed,
    /// The terminal event of a stream is on its way.
    StreamEnded {
        stream: u32,
        request: RequestId,
    },
    /// The node stops.
    Shutdown,
}
local_message!(SessionMsg);

pub struct SessionArgs {
    pub socket: TcpStream,
    pub peer: SocketAddr,
    pub shared: Arc<GatewayShared>,
    /// Counts the connection for as long as it lives.
    pub permit: OwnedSemaphorePermit,
}

pub struct Session;

pub struct SessionState {
    me: ActorRef<SessionMsg>,
    shared: Arc<GatewayShared>,
    outbox: Outbox,
    streams: HashMap<u32, (RequestId, ActorRef<RequestMsg>)>,
    reader: JoinHandle<()>,
    /// Counts the connection.
    permit: Option<OwnedSemaphorePermit>,
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
        let (read, write) = args.socket.into_split();
        let rules = ConnectionRules::new(args.shared.tokens.clone(), &args.shared.limits);
        let rules: SharedRules = Arc::new(Mutex::new(rules));
        let (outbox, queue) = Outbox::new();
        let inbound = Inbound {
            me: me.clone(),
            shared: args.shared.clone(),
            outbox: outbox.clone(),
            rules: rules.clone(),
        };
        let reader = tokio::spawn(inbound.run(read));
        let writer = Writer {
            queue,
            rules,
            limit: args.shared.write_timeout,
        };
        tokio::spawn(writer.run(write, me.clone()));
        tracing::debug!(client = %args.peer, "client connected");
        Ok(SessionState {
            me,
            shared: args.shared,
            outbox,
            streams: HashMap::new(),
            reader,
            permit: Some(args.permit),
        })
    }

    async fn handle(
        &self,
        me: ActorRef<SessionMsg>,
        message: SessionMsg,
        state: &mut SessionState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            SessionMsg::Inbound(message, _permit) => state.inbound(&me, *message).await,
            SessionMsg::Closed => me.stop(None),
            SessionMsg::StreamEnded { stream, request } => {
                if state
                    .streams
                    .get(&stream)
                    .is_some_and(|(known, _)| *known == request)
                {
                    state.streams.remove(&stream);
                }
            }
            SessionMsg::Shutdown => {
                let error = ErrorBody::new(
                    ErrorCode::ShuttingDown,
                    "the gateway is stopping: connect to another one",
                );
                state.outbox.send(ServerMessage::Error {
                    stream: None,
                    request: None,
                    error,
                });
            }
        }
        Ok(())
    }
}

impl Drop for SessionState {
    /// However the session ends, a panic included, its requests learn that nobody reads any more.
    fn drop(&mut self) {
        self.reader.abort();
        for (stream, (_, request)) in self.streams.drain() {
            let session = self.me.clone();
            request.cast(RequestMsg::Detach { session, stream }).ok();
        }
        self.permit = None;
        self.shared.count_connections();
    }
}

impl SessionState {
    async fn inbound(&mut self, me: &ActorRef<SessionMsg>, message: ClientMessage) {
        match message {
            ClientMessage::Submit(submit) => {
                let stream = submit.stream;
                if let Err(error) = self.submit(me, submit).await {
                    self.refuse(stream, None, error).await;
                }
            }
            ClientMessage::Resume {
                stream,
                request,
                next_position,
                credit,
            } => {
                if let Err(error) = self
                    .resume(me, stream, request, next_position, credit)
                    .await
                {
                    self.refuse(stream, Some(request), error).await;
                }
            }
            ClientMessage::Cancel { stream } => {
                let session = me.clone();
                self.tell(stream, || RequestMsg::Cancel { session, stream });
            }
            ClientMessage::Credit { stream, tokens } => {
                self.tell(stream, || RequestMsg::Credit {
                    session: me.clone(),
                    stream,
                    tokens,
                });
            }
            ClientMessage::Ping { nonce } => {
                self.outbox.answer(ServerMessage::Pong { nonce }).await;
            }
            ClientMessage::Status {} => self.status(me).await,
            // The reader answers it.
            ClientMessage::Hello { .. } => {}
        }
    }

    fn tell(&self, stream: u32, message: impl FnOnce() -> RequestMsg) {
        if let Some((_, request)) = self.streams.get(&stream) {
            request.cast(message()).ok();
        }
    }

    async fn submit(&mut self, me: &ActorRef<SessionMsg>, submit: Submit) -> Result<(), ErrorBody> {
        let place = self.shared.take_place()?;
        let (stream, credit) = (submit.stream, submit.credit);
        let (admission, text) = self.shared.admission.admit(submit).await?;
        let id = admission.request;
        let audience = Audience {
            outbox: self.outbox.clone(),
            session: me.clone(),
            request: id,
            stream,
            next: 0,
            credit,
        };
        let args = RequestArgs {
            origin: Origin::New {
                admission: Box::new(admission),
                place,
            },
            text,
            audience: Some(audience),
            surroundings: self.shared.surroundings.clone(),
        };
        let request = self.spawn(args).await?;
        self.streams.insert(stream, (id, request));
        Ok(())
    }

    async fn resume(
        &mut self,
        me: &ActorRef<SessionMsg>,
        stream: u32,
        id: RequestId,
        next: Position,
        credit: u32,
    ) -> Result<(), ErrorBody> {
        for _ in 0..RESUME_TRIES {
            let request = match self.find(id).await? {
                Some(request) => request,
                None => self.bring_back(id).await?,
            };
            let audience = Audience {
                outbox: self.outbox.clone(),
                session: me.clone(),
                request: id,
                stream,
                next,
                credit,
            };
            // Known before it is attached, so that the end of a short stream finds it.
            self.streams.insert(stream, (id, request.clone()));
            let attach = |reply| RequestMsg::Attach {
                audience: Box::new(audience),
                reply,
            };
            match request.call(attach, Some(ASK_DEADLINE)).await {
                Ok(ractor::rpc::CallResult::Success(answer)) => {
                    if answer.is_err() {
                        self.streams.remove(&stream);
                    }
                    return answer;
                }
                // It ended between the look and the question: its log is with the keeper by now.
                _ => self.streams.remove(&stream),
            };
        }
        Err(internal("the request could not be reached"))
    }

    /// The actor of a request that is in flight, or is being read again.
    async fn find(&self, request: RequestId) -> Result<Option<ActorRef<RequestMsg>>, ErrorBody> {
        ask(&self.shared.surroundings.hub, |reply| HubMsg::Lookup {
            request,
            reply,
        })
        .await
    }

    /// An actor for a request whose log is closed.
    async fn bring_back(&self, id: RequestId) -> Result<ActorRef<RequestMsg>, ErrorBody> {
        let kept = ask(&self.shared.surroundings.keeper, |reply| KeeperMsg::Get {
            request: id,
            reply,
        })
        .await?;
        let Some(finished) = kept else {
            let message = format!(
                "request {id} is not known at this gateway: it never was, or it ended too long ago"
            );
            return Err(ErrorBody::new(ErrorCode::UnknownRequest, message));
        };
        let args = RequestArgs {
            text: self.shared.admission.text_fold(&finished.admission)?,
            origin: Origin::Finished(finished),
            audience: None,
            surroundings: self.shared.surroundings.clone(),
        };
        self.spawn(args).await
    }

    async fn spawn(&self, args: RequestArgs) -> Result<ActorRef<RequestMsg>, ErrorBody> {
        let supervisor = self.shared.surroundings.hub.get_cell();
        match Actor::spawn_linked(None, Request, args, supervisor).await {
            Ok((request, _)) => Ok(request),
            Err(error) => {
                tracing::error!(%error, "request actor could not be started");
                Err(internal("the request could not be started"))
            }
        }
    }

    async fn status(&self, me: &ActorRef<SessionMsg>) {
        match self.shared.status().await {
            Ok(status) => {
                self.outbox.answer(ServerMessage::Status(status)).await;
            }
            Err(error) => {
                // An error without a stream is the connection's end.
                let (stream, request) = (None, None);
                let message = ServerMessage::Error {
                    stream,
                    request,
                    error,
                };
                self.outbox.answer(message).await;
                me.stop(None);
            }
        }
    }

    async fn refuse(&self, stream: u32, request: Option<RequestId>, error: ErrorBody) {
        record::request_error(error.code.as_str());
        self.outbox
            .answer(ServerMessage::Error {
                stream: Some(stream),
                request,
                error,
            })
            .await;
    }
}

impl GatewayShared {
    /// The cluster as this gateway sees it.
    ///
    /// # Errors
    /// `internal` if an actor of this node does not answer.
    pub async fn status(&self) -> Result<understudy_protocol::message::ClusterStatus, ErrorBody> {
        let mut status = ask(&self.surroundings.router, RouterMsg::Status).await?;
        let (kept, bytes) = ask(&self.surroundings.keeper, KeeperMsg::Size).await?;
        status.requests_kept = kept as u32;
        status.requests_kept_bytes = bytes as u64;
        status.requests_in_flight = self.in_flight() as u32;
        Ok(status)
    }
}

async fn ask<M: ractor::Message, T: Send + 'static>(
    actor: &ActorRef<M>,
    question: impl FnOnce(ractor::RpcReplyPort<T>) -> M,
) -> Result<T, ErrorBody> {
    match actor.call(question, Some(ASK_DEADLINE)).await {
        Ok(ractor::rpc::CallResult::Success(answer)) => Ok(answer),
        _ => Err(internal("the gateway is overloaded or stopping")),
    }
}

fn internal(what: &str) -> ErrorBody {
    ErrorBody::new(
        ErrorCode::Internal,
        format!("{what}; try again, and see the node's log if it stays so"),
    )
}

/// The reading side of a connection.
struct Inbound {
    me: ActorRef<SessionMsg>,
    shared: Arc<GatewayShared>,
    outbox: Outbox,
    rules: SharedRules,
}

impl Inbound {
    async fn run(self, socket: OwnedReadHalf) {
        if let Err(error) = self.read(socket).await {
            record::protocol_error(error.code.as_str());
            tracing::debug!(code = error.code.as_str(), %error, "closing a client connection");
            self.outbox
                .answer(ServerMessage::Error {
                    stream: None,
                    request: None,
                    error,
                })
                .await;
        }
        self.me.cast(SessionMsg::Closed).ok();
    }

    /// Reads until the client closes. An error is said to the client, and closes the connection.
    async fn read(&self, mut socket: OwnedReadHalf) -> Result<(), ErrorBody> {
        let permits = Arc::new(Semaphore::new(MAX_INBOUND));
        let mut decoder = FrameDecoder::new(self.shared.limits.max_frame_bytes as usize);
        loop {
            while let Some(frame) = decoder
                .next_frame()
                .map_err(|e| ErrorBody::new(e.code(), e.to_string()))?
            {
                let message = match codec::decode_client(&frame) {
                    Ok(message) => message,
                    Err(error) => {
                        self.undecodable(&frame, error).await?;
                        continue;
                    }
                };
                let step = self
                    .rules
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .receive(&message);
                match step {
                    Step::Welcome { version } => {
                        let (node, server) = (self.shared.node.clone(), self.shared.server.clone());
                        let limits = self.shared.limits;
                        self.outbox
                            .answer(ServerMessage::Welcome {
                                version,
                                node,
                                server,
                                limits,
                            })
                            .await;
                    }
                    Step::Deliver => {
                        let Ok(permit) = permits.clone().acquire_owned().await else {
                            return Ok(());
                        };
                        if self
                            .me
                            .cast(SessionMsg::Inbound(Box::new(message), permit))
                            .is_err()
                        {
                            return Ok(());
                        }
                    }
                    Step::Ignore => {}
                    Step::Refuse { stream, error } => {
                        self.outbox
                            .answer(ServerMessage::Error {
                                stream: Some(stream),
                                request: None,
                                error,
                            })
                            .await;
                    }
                    Step::Close(error) => return Err(error),
                }
            }
            let greeted = self
                .rules
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .is_greeted();
            let limit = if greeted {
                self.shared.idle_timeout
            } else {
                self.shared.handshake_timeout
            };
            match timeout(limit, socket.read_buf(decoder.buffer_mut())).await {
                Ok(Ok(0) | Err(_)) => return Ok(()),
                Ok(Ok(_)) => {}
                Err(_) => {
                    let message = format!(
                        "nothing was received for {} ms; send pings",
                        limit.as_millis()
                    );
                    return Err(ErrorBody::new(ErrorCode::Timeout, message));
                }
            }
        }
    }
}

impl Inbound {
    /// A message whose fields are wrong ends its own stream only, if it names a new one; anything else is an error of
    /// the connection.
    async fn undecodable(&self, frame: &[u8], error: ErrorBody) -> Result<(), ErrorBody> {
        if error.code != ErrorCode::InvalidRequest {
            return Err(error);
        }
        let Some(stream) = codec::stream_of(frame) else {
            return Err(error);
        };
        let (greeted, in_flight) = {
            let rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
            (rules.is_greeted(), rules.is_in_flight(stream))
        };
        if !greeted || in_flight {
            return Err(ErrorBody {
                code: ErrorCode::OutOfOrder,
                ..error
            });
        }
        record::request_error(error.code.as_str());
        let message = ServerMessage::Error {
            stream: Some(stream),
            request: None,
            error,
        };
        self.outbox.answer(message).await;
        Ok(())
    }
}

/// The writing side of a connection.
struct Writer {
    queue: mpsc::UnboundedReceiver<Outgoing>,
    rules: SharedRules,
    /// How long the client may take nothing.
    limit: Duration,
}

impl Writer {
    /// Writes what the outbox holds, in batches, until everybody who could send is gone or the client takes nothing
    /// for too long.
    async fn run(mut self, mut socket: OwnedWriteHalf, session: ActorRef<SessionMsg>) {
        let mut bytes = BytesMut::new();
        while let Some(first) = self.queue.recv().await {
            bytes.clear();
            if let Err(error) = self.gather(first, &mut bytes) {
                // A message of ours that the protocol cannot carry: the stream would have a gap, so it ends here.
                tracing::error!(%error, "message to a client could not be encoded");
                break;
            }
            match timeout(self.limit, socket.write_all(&bytes)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => break,
            }
        }
        session.cast(SessionMsg::Closed).ok();
    }

    /// Encodes `next` and what waits behind it, up to a batch.
    fn gather(&mut self, first: Outgoing, bytes: &mut BytesMut) -> Result<(), EncodeError> {
        let mut next = Some(first);
        while let Some(Outgoing { message, .. }) = next {
            // The number of a stream is free again when its end is written: not sooner, or a client that does not read
            // could begin streams without limit; not later, or it could use the number before we know that it may.
            if let ServerMessage::Finished { stream, .. }
            | ServerMessage::Error {
                stream: Some(stream),
                ..
            } = message
            {
                let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
                rules.ended(stream);
            }
            codec::encode(&message, bytes)?;
            next = match bytes.len() {
                0..WRITE_BATCH_BYTES => self.queue.try_recv().ok(),
                _ => None,
            };
        }
        Ok(())
    }
}
