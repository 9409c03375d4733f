//! The gateway: accepts client connections and starts a session for each.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use understudy_protocol::handshake::AccessTokens;
use understudy_protocol::message::Limits;
use understudy_protocol::{ErrorBody, ErrorCode};
use understudy_telemetry::gauges::QueueBytes;
use understudy_telemetry::record;

use crate::admission::Admissions;
use crate::request::Surroundings;
use crate::session::{Session, SessionArgs, SessionMsg, turn_away};

/// Pause after the system refused to give us a connection (it ran out of file descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections beyond `max_connections` that are being told so. Further ones are closed without a word.
const MAX_TURNED_AWAY: usize = 64;

/// How long the sessions may take to stop, all together.
const STOP_DEADLINE: Duration = Duration::from_secs(3);

/// What a client should wait before it tries a full gateway again, in milliseconds.
const RETRY_AFTER_MS: u64 = 500;

/// What all sessions of a gateway share.
pub struct GatewayShared {
    pub node: String,
    /// Name and version of this program.
    pub server: String,
    pub limits: Limits,
    pub tokens: AccessTokens,
    pub handshake_timeout: Duration,
    pub idle_timeout: Duration,
    pub write_timeout: Duration,
    /// The gauge of what waits to be written to clients.
    pub waiting: QueueBytes,
    pub admission: Admissions,
    pub surroundings: Surroundings,
    /// One permit a connection.
    pub connections: Arc<Semaphore>,
    pub max_connections: usize,
    pub max_requests: usize,
    /// One permit a request in flight.
    pub places: Arc<Semaphore>,
    /// Set once, when the node begins to stop.
    pub stopping: AtomicBool,
}

impl GatewayShared {
    /// A place for one more request.
    ///
    /// # Errors
    /// `overloaded` if all are taken, `shutting_down` if the node is about to stop.
    pub fn take_place(&self) -> Result<OwnedSemaphorePermit, ErrorBody> {
        if self.stopping.load(Ordering::Relaxed) {
            let message = "the gateway is stopping: submit the request at another one";
            return Err(ErrorBody::new(ErrorCode::ShuttingDown, message));
        }
        self.places.clone().try_acquire_owned().map_err(|_| {
            let message = format!(
                "{} requests are in flight at this gateway, which is its limit",
                self.max_requests
            );
            ErrorBody {
                retry_after_ms: Some(RETRY_AFTER_MS),
                ..ErrorBody::new(ErrorCode::Overloaded, message)
            }
        })
    }

    /// Tells metrics how many connections there are.
    fn count_connections(&self) {
        let free = self.connections.available_permits();
        record::connections(self.max_connections.saturating_sub(free));
    }

    fn full(&self) -> ErrorBody {
        let message = format!(
            "{} connections are open at this gateway, which is its limit; use another one, or fewer connections",
            self.max_connections
        );
        ErrorBody {
            retry_after_ms: Some(RETRY_AFTER_MS),
            ..ErrorBody::new(ErrorCode::Overloaded, message)
        }
    }

    pub fn in_flight(&self) -> usize {
        self.max_requests
            .saturating_sub(self.places.available_permits())
    }
}

/// A connection's place among those of its gateway, until it is dropped.
pub struct ConnectionPlace {
    permit: Option<OwnedSemaphorePermit>,
    shared: Arc<GatewayShared>,
}

impl ConnectionPlace {
    /// None if all are taken.
    pub fn take(shared: &Arc<GatewayShared>) -> Option<Self> {
        let permit = shared.connections.clone().try_acquire_owned().ok()?;
        shared.count_connections();
        Some(Self {
            permit: Some(permit),
            shared: shared.clone(),
        })
    }
}

impl Drop for ConnectionPlace {
    fn drop(&mut self) {
        // First free, then counted.
        self.permit = None;
        self.shared.count_connections();
    }
}

/// A connection that has just been accepted.
pub struct Accepted {
    socket: TcpStream,
    peer: std::net::SocketAddr,
    at: Instant,
    place: ConnectionPlace,
}

impl std::fmt::Debug for Accepted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Accepted({})", self.peer)
    }
}

/// What a gateway is told.
#[derive(Debug)]
pub enum GatewayMsg {
    Accepted(Accepted),
    /// Accept nobody and nothing more; what runs goes on.
    Close,
    /// Tell the clients that the node stops.
    Shutdown,
}
local_message!(GatewayMsg);

pub struct GatewayArgs {
    pub listener: TcpListener,
    pub shared: Arc<GatewayShared>,
}

pub struct Gateway;

pub struct GatewayState {
    shared: Arc<GatewayShared>,
    acceptor: tokio::task::JoinHandle<()>,
}

impl Actor for Gateway {
    type Msg = GatewayMsg;
    type State = GatewayState;
    type Arguments = GatewayArgs;

    async fn pre_start(
        &self,
        me: ActorRef<GatewayMsg>,
        args: GatewayArgs,
    ) -> Result<GatewayState, ActorProcessingErr> {
        let acceptor = tokio::spawn(accept(args.listener, args.shared.clone(), me));
        Ok(GatewayState {
            shared: args.shared,
            acceptor,
        })
    }

    async fn handle(
        &self,
        me: ActorRef<GatewayMsg>,
        message: GatewayMsg,
        state: &mut GatewayState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            GatewayMsg::Accepted(Accepted {
                socket,
                peer,
                at,
                place,
            }) => {
                let args = SessionArgs {
                    socket,
                    peer,
                    shared: state.shared.clone(),
                    accepted_at: at,
                    place,
                };
                if let Err(error) = Actor::spawn_linked(None, Session, args, me.get_cell()).await {
                    tracing::debug!(client = %peer, %error, "session could not be started");
                }
            }
            GatewayMsg::Close => {
                state.shared.stopping.store(true, Ordering::Relaxed);
                state.acceptor.abort();
            }
            GatewayMsg::Shutdown => {
                for child in me.get_children() {
                    child.send_message::<SessionMsg>(SessionMsg::Shutdown).ok();
                }
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _me: ActorRef<GatewayMsg>,
        event: SupervisionEvent,
        _state: &mut GatewayState,
    ) -> Result<(), ActorProcessingErr> {
        // Sessions come and go; one that failed has taken its connection with it, and its requests were told.
        if let SupervisionEvent::ActorFailed(_, error) = event {
            tracing::error!(%error, "session failed");
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        me: ActorRef<GatewayMsg>,
        state: &mut GatewayState,
    ) -> Result<(), ActorProcessingErr> {
        state.acceptor.abort();
        me.stop_children_and_wait(None, Some(STOP_DEADLINE)).await;
        Ok(())
    }
}

/// Accepts connections. Those beyond the limit are told so, a bounded number of them at a time.
async fn accept(listener: TcpListener, shared: Arc<GatewayShared>, gateway: ActorRef<GatewayMsg>) {
    let turned_away = Arc::new(Semaphore::new(MAX_TURNED_AWAY));
    loop {
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let at = Instant::now();
        match ConnectionPlace::take(&shared) {
            Some(place) => {
                let accepted = Accepted {
                    socket,
                    peer,
                    at,
                    place,
                };
                if gateway.cast(GatewayMsg::Accepted(accepted)).is_err() {
                    return;
                }
            }
            None => {
                record::protocol_error(ErrorCode::Overloaded.as_str());
                if let Ok(turn) = turned_away.clone().try_acquire_owned() {
                    let (error, limit) = (shared.full(), shared.write_timeout);
                    tokio::spawn(async move {
                        turn_away(socket, error, limit).await;
                        drop(turn);
                    });
                }
            }
        }
    }
}
