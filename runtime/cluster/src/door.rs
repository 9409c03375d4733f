//! How connections come about: our listener, and a dialer for every peer whose turn it is to be dialed.
//!
//! Invariants: a stranger can hold one of a bounded number of handshakes for a bounded time, and when there are too
//! many, the oldest gives way, so that silent connections do not keep peers out. A dialer never gives up and never has
//! more than one connection; its waits grow to a bound, with jitter.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::bridge::{Bridge, label};
use crate::handshake::{Agreed, HandshakeError, Local};
use crate::hub::Hub;
use crate::identity::PeerAddress;
use crate::session::{Phase, Session};
use crate::settings::{DIAL_TIMEOUT, Limits};
use crate::telemetry;
use crate::transport::{Link, Transport};

/// Wait after an error of `accept`, which is nearly always a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the listener and the dialers share.
pub(crate) struct Door {
    pub(crate) hub: Arc<Hub>,
    pub(crate) bridge: Bridge,
    pub(crate) local: Local,
    pub(crate) limits: Limits,
    /// A connection that is silent for longer is broken, whatever the detector thinks.
    pub(crate) idle_limit: Duration,
}

impl Door {
    /// Accepts connections for ever.
    pub(crate) async fn listen(self: Arc<Self>, listener: TcpListener) {
        let mut pending: VecDeque<AbortHandle> = VecDeque::new();
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections from peers");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            pending.retain(|handshake| !handshake.is_finished());
            if pending.len() >= self.limits.max_pending_handshakes
                && let Some(oldest) = pending.pop_front()
            {
                tracing::warn!(
                    pending = pending.len(),
                    "too many handshakes at once: the oldest is dropped"
                );
                oldest.abort();
            }
            let door = self.clone();
            pending
                .push_back(tokio::spawn(async move { door.answer(stream).await }).abort_handle());
        }
    }

    async fn answer(&self, stream: TcpStream) {
        let from = stream
            .peer_addr()
            .map_or_else(|_| "unknown".to_owned(), |address| address.to_string());
        match timeout(self.limits.handshake_timeout, self.let_in(stream)).await {
            Ok(Ok(())) => {}
            Ok(Err(HandshakeError::Refuse(refusal))) => {
                telemetry::refused(refusal);
                tracing::warn!(%from, reason = refusal.as_str(), "connection refused: {}", refusal.advice());
            }
            Ok(Err(error)) => tracing::debug!(%from, %error, "connection ended in the handshake"),
            Err(_) => tracing::debug!(%from, "connection silent in the handshake: dropped"),
        }
    }

    async fn let_in(&self, stream: TcpStream) -> Result<(), HandshakeError> {
        let mut transport = Transport::secure(stream).await?;
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
        let mut last_error = String::new();
        loop {
            match self.call(&peer).await {
                Ok(session) => {
                    if session.opened().await == Phase::Open {
                        backoff.reset();
                        last_error.clear();
                    }
                    session.gone().await;
                }
                Err(error) => {
                    if let HandshakeError::Refuse(refusal) = &error {
                        telemetry::refused(*refusal);
                    }
                    report(&peer, &error, &mut last_error);
                }
            }
            tokio::time::sleep(backoff.next()).await;
        }
    }

    async fn call(&self, peer: &PeerAddress) -> Result<Arc<Session>, HandshakeError> {
        let late = || io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
        timeout(DIAL_TIMEOUT, async {
            let stream = TcpStream::connect((peer.host.as_str(), peer.port)).await?;
            let mut transport = Transport::secure(stream).await?;
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

/// Says the same thing once.
fn report(peer: &PeerAddress, error: &HandshakeError, last: &mut String) {
    let error = error.to_string();
    if error == *last {
        tracing::debug!(%peer, %error, "cannot reach peer, still");
    } else {
        tracing::warn!(%peer, %error, "cannot reach peer");
        *last = error;
    }
}

/// Waits that double from the first to the longest, each jittered between its half and its whole.
#[derive(Debug)]
struct Backoff {
    bounds: (Duration, Duration),
    next: Duration,
}

impl Backoff {
    fn new(bounds: (Duration, Duration)) -> Self {
        Self {
            bounds,
            next: bounds.0,
        }
    }

    fn reset(&mut self) {
        self.next = self.bounds.0;
    }

    fn next(&mut self) -> Duration {
        let wait = self.next.mul_f64(0.5 + fastrand::f64() / 2.0);
        self.next = (self.next * 2).min(self.bounds.1);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_bound_and_start_again() {
        let (first, longest) = (Duration::from_millis(25), Duration::from_secs(1));
        let mut backoff = Backoff::new((first, longest));
        let mut nominal = first;
        for _ in 0..20 {
            let wait = backoff.next();
            assert!(
                wait >= nominal / 2 && wait <= nominal,
                "{wait:?} of {nominal:?}"
            );
            nominal = (nominal * 2).min(longest);
        }
        assert_eq!(nominal, longest);
        backoff.reset();
        assert!(backoff.next() <= first);
    }
}
