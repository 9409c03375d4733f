//! How connections come about: our listener, and a dialer for every peer whose turn it is to be dialed.
//!
//! Invariants: a stranger can hold one of a bounded number of handshakes for a bounded time, and when there are too
//! many, the oldest gives way, so that silent connections do not keep peers out. Nor can it fill the log. A dialer never
//! gives up and never has more than one connection; its waits grow to a bound, with jitter.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::bridge::{Bridge, label};
use crate::dial::{Backoff, connect};
use crate::handshake::{Agreed, HandshakeError, Local};
use crate::hub::Hub;
use crate::identity::PeerAddress;
use crate::quiet::Quiet;
use crate::session::{Phase, Session, lock};
use crate::settings::{DIAL_TIMEOUT, Limits};
use crate::telemetry;
use crate::transport::{Link, Patience, Transport};

/// Wait after an error of `accept`, which is nearly always a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// The part of a dial in which the addresses of the peer are tried: the answer to a first packet that was lost comes after
/// a second. The rest is for the handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// Ways in which a peer may fail to be reached, each of which is logged once.
const MAX_COMPLAINTS: usize = 8;
/// For what concerns no address in particular.
const ANYONE: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// What the listener and the dialers share.
pub(crate) struct Door {
    pub(crate) hub: Arc<Hub>,
    pub(crate) bridge: Bridge,
    pub(crate) local: Local,
    pub(crate) limits: Limits,
    /// A connection that is silent for longer is broken, whatever the detector thinks.
    pub(crate) idle_limit: Duration,
    pub(crate) patience: Patience,
    pub(crate) quiet: Mutex<Quiet>,
}

impl Door {
    /// Accepts connections for ever.
    pub(crate) async fn listen(self: Arc<Self>, listener: TcpListener) {
        let mut pending: VecDeque<AbortHandle> = VecDeque::new();
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    if let Some(more) = self.may_say(ANYONE, "accept") {
                        tracing::warn!(%error, more, "cannot accept connections from peers");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            pending.retain(|handshake| !handshake.is_finished());
            if pending.len() >= self.limits.max_pending_handshakes
                && let Some(oldest) = pending.pop_front()
            {
                if let Some(more) = self.may_say(ANYONE, "crowd") {
                    let pending = pending.len();
                    tracing::warn!(
                        pending,
                        more,
                        "too many handshakes at once: the oldest is dropped"
                    );
                }
                oldest.abort();
            }
            let door = self.clone();
            pending
                .push_back(tokio::spawn(async move { door.answer(stream).await }).abort_handle());
        }
    }

    async fn answer(&self, stream: TcpStream) {
        let from = stream.peer_addr().map_or(ANYONE, |address| address.ip());
        match timeout(self.limits.handshake_timeout, self.let_in(stream)).await {
            Ok(Ok(())) => {}
            Ok(Err(HandshakeError::Refuse(refusal))) => {
                telemetry::refused(refusal);
                let reason = refusal.as_str();
                if let Some(more) = self.may_say(from, reason) {
                    tracing::warn!(%from, reason, more, "connection refused: {}", refusal.advice());
                }
            }
            Ok(Err(error)) => tracing::debug!(%from, %error, "connection ended in the handshake"),
            Err(_) => tracing::debug!(%from, "connection silent in the handshake: dropped"),
        }
    }

    /// Whether a line about this may be written, and how many were not since the last one.
    fn may_say(&self, from: IpAddr, reason: &'static str) -> Option<u64> {
        lock(&self.quiet).may_say(from, reason, self.hub.clock.now())
    }

    async fn let_in(&self, stream: TcpStream) -> Result<(), HandshakeError> {
        let mut transport = Transport::secure(stream, self.patience).await?;
        let proven = self.local.accept(&mut transport).await?;
        let session = match self.hub.admit(&proven.agreed, transport.breaker()?).await {
            Ok(session) => session,
            Err(refusal) => return Err(proven.refuse(&mut transport, refusal).await),
        };
        proven.confirm(&mut transport).await?;
        self.hand_over(&session, &proven.agreed, transport, true);
        Ok(())
    }

    /// Keeps a session with one peer, for ever.
    pub(crate) async fn dial(self: Arc<Self>, peer: PeerAddress) {
        let mut backoff = Backoff::new(self.limits.dial_backoff);
        let mut said = Vec::new();
        let mut turn = 0;
        loop {
            match self.call(&peer, turn).await {
                Ok(session) => {
                    let begin = Instant::now();
                    if session.opened().await == Phase::Open {
                        said.clear();
                        session.closed().await;
                        backoff.session_lasted(begin.elapsed());
                    }
                    session.gone().await;
                }
                Err(error) => {
                    if let HandshakeError::Refuse(refusal) = &error {
                        telemetry::refused(*refusal);
                    }
                    report(&peer, &error, &mut said);
                    turn = turn.wrapping_add(1);
                }
            }
            tokio::time::sleep(backoff.next()).await;
        }
    }

    async fn call(&self, peer: &PeerAddress, turn: usize) -> Result<Arc<Session>, HandshakeError> {
        let late = || io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
        timeout(DIAL_TIMEOUT, async {
            let found = lookup_host((peer.host.as_str(), peer.port)).await?;
            let addresses: Vec<_> = found.collect();
            let stream = connect(&addresses, turn, CONNECT_TIMEOUT).await?;
            let mut transport = Transport::secure(stream, self.patience).await?;
            let agreed = self.local.dial(&mut transport, &peer.node).await?;
            let admitted = self.hub.admit(&agreed, transport.breaker()?).await;
            let session = admitted.map_err(HandshakeError::Refuse)?;
            self.hand_over(&session, &agreed, transport, false);
            Ok(session)
        })
        .await
        .unwrap_or_else(|_| Err(late().into()))
    }

    fn hand_over(
        &self,
        session: &Arc<Session>,
        agreed: &Agreed,
        transport: Transport,
        is_server: bool,
    ) {
        if agreed.config_differs {
            tracing::warn!(peer = %session.peer, "the peer's configuration differs from ours");
        }
        let life = session.life.clone();
        let link = Link {
            transport,
            life,
            idle_limit: self.idle_limit,
            label: label(session.id),
        };
        session.hand_over();
        if session.phase() == Phase::Closed || !self.bridge.open(link, is_server) {
            session.set_gone();
        }
    }
}

/// Says each thing once, until the peer is reached. A peer with several addresses may fail in a few ways in turn.
fn report(peer: &PeerAddress, error: &HandshakeError, said: &mut Vec<String>) {
    let error = error.to_string();
    if said.contains(&error) || said.len() >= MAX_COMPLAINTS {
        tracing::debug!(%peer, %error, "cannot reach peer, still");
    } else {
        tracing::warn!(%peer, %error, "cannot reach peer");
        said.push(error);
    }
}
