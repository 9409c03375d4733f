//! Sessions over real sockets, with a real hub and keeper, and a router that is the test.

use std::sync::atomic::AtomicBool;

use bytes::BytesMut;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use understudy_config::ModelSettings;
use understudy_engine_core::frame::{AttemptId, OutputToken, StepToken};
use understudy_journal::Retention;
use understudy_protocol::handshake::AccessTokens;
use understudy_protocol::message::{Input, Limits, Sampling, ServerMessage};
use understudy_protocol::{FrameDecoder, decode_server, encode};
use understudy_telemetry::gauges::QueueBytes;
use understudy_telemetry::record;

use super::super::*;
use crate::admission::{Admissions, Defaults};
use crate::hub::{Hub, HubMsg};
use crate::keeper::Keeper;
use crate::request::{MetricsCache, Surroundings, core::Settings};
use crate::router::RouterMsg;

/// How long anything may take on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// An actor that hands every message to the test.
struct Tap<M>(std::marker::PhantomData<M>);

impl<M: ractor::Message + Sync> Actor for Tap<M> {
    type Msg = M;
    type State = mpsc::UnboundedSender<M>;
    type Arguments = mpsc::UnboundedSender<M>;

    async fn pre_start(
        &self,
        _me: ActorRef<M>,
        taps: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(taps)
    }

    async fn handle(
        &self,
        _me: ActorRef<M>,
        message: M,
        taps: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        taps.send(message).ok();
        Ok(())
    }
}

pub(super) async fn tap<M: ractor::Message + Sync>() -> (ActorRef<M>, mpsc::UnboundedReceiver<M>) {
    let (taps, messages) = mpsc::unbounded_channel();
    let (actor, _) = Actor::spawn(None, Tap(std::marker::PhantomData), taps)
        .await
        .expect("an actor");
    (actor, messages)
}

/// What sessions share, and what reaches the router.
pub(super) struct Gateway {
    pub shared: Arc<GatewayShared>,
    pub routed: mpsc::UnboundedReceiver<RouterMsg>,
}

impl Gateway {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut GatewayShared)) -> Self {
        let (router, routed) = tap().await;
        let retention = Retention {
            max_age: PATIENCE,
            max_bytes: 1 << 20,
        };
        let surroundings = Surroundings {
            router,
            hub: Actor::spawn(None, Hub, ()).await.expect("a hub").0,
            keeper: Actor::spawn(None, Keeper, retention)
                .await
                .expect("a keeper")
                .0,
            settings: Settings {
                max_attempts: 2,
                max_engine_deaths: 2,
                no_replica_timeout: PATIENCE,
            },
            metrics: MetricsCache::default(),
            max_credit: 100,
            resume_grace: PATIENCE,
        };
        let mut shared = GatewayShared {
            node: "a".into(),
            server: "understudy/1.2.3".into(),
            limits: Limits {
                max_frame_bytes: 1 << 20,
                max_streams: 4,
                max_credit: 100,
            },
            tokens: AccessTokens::default(),
            handshake_timeout: PATIENCE,
            idle_timeout: PATIENCE,
            write_timeout: PATIENCE,
            waiting: QueueBytes::new(record::Queue::ClientOut),
            admission: admissions(),
            surroundings,
            connections: Arc::new(Semaphore::new(8)),
            max_connections: 8,
            max_requests: 8,
            places: Arc::new(Semaphore::new(8)),
            stopping: AtomicBool::new(false),
        };
        change(&mut shared);
        let shared = Arc::new(shared);
        Self { shared, routed }
    }

    /// The session of a new connection, and the server's socket once more.
    pub async fn accept(&self) -> (Client, ActorRef<SessionMsg>, std::net::TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let (theirs, ours) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (ours, peer) = ours.expect("a connection");
        let ours = ours.into_std().expect("a socket");
        let again = ours.try_clone().expect("a second handle");
        let args = SessionArgs {
            socket: TcpStream::from_std(ours).expect("a socket"),
            peer,
            shared: self.shared.clone(),
            accepted_at: Instant::now(),
            place: ConnectionPlace::take(&self.shared).expect("a place"),
        };
        let (session, _) = Actor::spawn(None, Session, args).await.expect("a session");
        let client = Client {
            socket: theirs.expect("a connection"),
            decoder: FrameDecoder::new(1 << 24),
        };
        (client, session, again)
    }

    pub async fn connect(&self) -> Client {
        let (mut client, ..) = self.accept().await;
        client.greet().await;
        client
    }

    /// The next attempt that a request asks the router for.
    pub async fn attempt(&mut self) -> AttemptId {
        loop {
            match within(self.routed.recv()).await.expect("a router") {
                RouterMsg::Route(route) => return route.start.attempt,
                _ => continue,
            }
        }
    }

    pub fn token(&self, attempt: AttemptId, position: u32) {
        let token = StepToken {
            attempt,
            position,
            token: OutputToken {
                id: 5,
                logprob: -1.0,
                top: Vec::new(),
            },
            finish: None,
            waited_ms: None,
        };
        let hub = &self.shared.surroundings.hub;
        hub.cast(HubMsg::Tokens(vec![token])).expect("a hub");
    }
}

fn admissions() -> Admissions {
    let settings = ModelSettings {
        name: "demo".into(),
        path: concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo").into(),
        ..ModelSettings::default()
    };
    let defaults = Defaults {
        deadline_ms: 60_000,
        max_deadline_ms: 60_000,
        max_priority: 0,
        max_tokens: 100,
    };
    Admissions::load(&[settings], defaults).expect("the demo model")
}

pub(super) struct Client {
    pub socket: TcpStream,
    pub decoder: FrameDecoder,
}

impl Client {
    pub async fn send(&mut self, messages: &[ClientMessage]) {
        self.socket
            .write_all(&frames(messages))
            .await
            .expect("sent");
    }

    /// The next message, or None at the end. A connection that is reset fails the test.
    pub async fn next(&mut self) -> Option<ServerMessage> {
        loop {
            if let Some(frame) = self.decoder.next_frame().expect("frames") {
                return Some(decode_server(&frame).expect("a message"));
            }
            let read = within(self.socket.read_buf(self.decoder.buffer_mut())).await;
            if read.expect("no reset") == 0 {
                self.decoder.finish().expect("whole frames");
                return None;
            }
        }
    }

    pub async fn greet(&mut self) {
        self.send(&[hello()]).await;
        let welcome = self.next().await;
        assert!(matches!(welcome, Some(ServerMessage::Welcome { .. })));
    }

    pub async fn pong(&mut self, nonce: u64) {
        self.send(&[ClientMessage::Ping { nonce }]).await;
        assert_eq!(self.next().await, Some(ServerMessage::Pong { nonce }));
    }

    /// The connection's last word, and then its end.
    pub async fn last_word(&mut self) -> ErrorBody {
        let Some(ServerMessage::Error {
            stream: None,
            error,
            ..
        }) = self.next().await
        else {
            panic!("no error of the connection");
        };
        assert_eq!(self.next().await, None);
        error
    }
}

pub(super) async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("in time")
}

pub(super) fn frames(messages: &[impl Serialize]) -> BytesMut {
    let mut bytes = BytesMut::new();
    for message in messages {
        encode(message, &mut bytes).expect("a frame");
    }
    bytes
}

pub(super) fn hello() -> ClientMessage {
    ClientMessage::Hello {
        version: 1,
        client: None,
        token: None,
    }
}

pub(super) fn submit(stream: u32, prompt: &str, credit: u32) -> ClientMessage {
    ClientMessage::Submit(Submit {
        stream,
        model: None,
        input: Input::Prompt(prompt.into()),
        sampling: Sampling::default(),
        stop: Vec::new(),
        include_stop: false,
        deadline_ms: None,
        resumable: false,
        priority: 0,
        credit,
    })
}

pub(super) fn credit(stream: u32, tokens: u32) -> ClientMessage {
    ClientMessage::Credit { stream, tokens }
}

/// The kind of event, and its stream.
pub(super) fn shape(message: Option<ServerMessage>) -> (&'static str, u32) {
    match message.expect("a message") {
        ServerMessage::Accepted { stream, .. } => ("accepted", stream),
        ServerMessage::Token(token) => ("token", token.stream),
        ServerMessage::Finished { stream, .. } => ("finished", stream),
        ServerMessage::Error {
            stream: Some(stream),
            error,
            ..
        } => (error.code.as_str(), stream),
        message => panic!("{message:?}"),
    }
}
