//! A byte stream between two nodes, before it carries a session.
//!
//! Today it is plain TCP. TLS will wrap the stream in [`Transport::secure`], which runs under the handshake's
//! deadline and before its first byte; everything above reads and writes a [`Transport`] and will not notice.
//!
//! Invariant: every socket has `TCP_NODELAY`, keepalive and `TCP_USER_TIMEOUT` set, and a read that idles longer
//! than its limit fails. These are backstops: the failure detector is faster.

use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use ractor_cluster::{BoxRead, BoxWrite, ClusterBidiStream};
use socket2::{SockRef, Socket, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, Sleep};

use crate::clock::Life;

/// Least time after which unacknowledged data breaks a connection.
const MIN_USER_TIMEOUT: Duration = Duration::from_secs(5);
/// Probes of an idle connection that may stay unanswered.
const KEEPALIVE_PROBES: u32 = 3;
/// Connections waiting to be accepted.
pub(crate) const LISTEN_BACKLOG: u32 = 256;
/// Bytes read from a socket at once.
const READ_BUFFER_BYTES: usize = 64 << 10;

/// A connected stream.
#[derive(Debug)]
pub(crate) enum Transport {
    /// TCP as it is. The handshake authenticates the peer; the bytes after it are neither secret nor protected.
    Plain(TcpStream),
}

impl Transport {
    /// Sets the socket up and, when the settings will ask for it, puts TLS on it.
    pub(crate) async fn secure(stream: TcpStream, patience: Patience) -> io::Result<Self> {
        patience.set_up(&stream)?;
        Ok(Self::Plain(stream))
    }

    /// A way to close the connection from anywhere, whoever owns the stream.
    pub(crate) fn breaker(&self) -> io::Result<Breaker> {
        let Self::Plain(stream) = self;
        Ok(Breaker(SockRef::from(stream).try_clone()?))
    }

    fn split(self) -> (OwnedReadHalf, OwnedWriteHalf) {
        let Self::Plain(stream) = self;
        stream.into_split()
    }
}

impl AsyncRead for Transport {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self::Plain(stream) = self.get_mut();
        Pin::new(stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Transport {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Self::Plain(stream) = self.get_mut();
        Pin::new(stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self::Plain(stream) = self.get_mut();
        Pin::new(stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self::Plain(stream) = self.get_mut();
        Pin::new(stream).poll_shutdown(cx)
    }
}

/// How long the system keeps a connection whose other end does not answer: longer than the failure detector, which must
/// be the one to decide, however patient it is told to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Patience {
    user_timeout: Duration,
    keepalive_after: Duration,
    keepalive_every: Duration,
}

impl Patience {
    /// For a detector that declares a silent peer dead after this time.
    pub(crate) fn beyond(dead_after: Duration) -> Self {
        let user_timeout = MIN_USER_TIMEOUT.max(dead_after * 2);
        // The system counts whole seconds here; 2 + 3 × 1 s in 5 s, the same shares of longer times.
        let share = |fifths: u32| {
            let exact = user_timeout * fifths / 5;
            Duration::from_secs(exact.as_millis().div_ceil(1000) as u64)
        };
        Self {
            user_timeout,
            keepalive_after: share(2),
            keepalive_every: share(1),
        }
    }

    fn set_up(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let socket = SockRef::from(stream);
        let keepalive = TcpKeepalive::new()
            .with_time(self.keepalive_after)
            .with_interval(self.keepalive_every)
            .with_retries(KEEPALIVE_PROBES);
        socket.set_tcp_keepalive(&keepalive)?;
        socket.set_tcp_user_timeout(Some(self.user_timeout))
    }
}

/// Closes a connection at once, both ways. The peer sees the end of the stream.
#[derive(Debug)]
pub(crate) struct Breaker(Socket);

impl Breaker {
    /// One that breaks nothing.
    #[cfg(test)]
    pub(crate) fn of_nothing() -> Self {
        Self(Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap())
    }

    /// With `abort`, what the peer has not received yet is thrown away: a stopped process that is continued later
    /// should not find old messages in its socket.
    pub(crate) fn cut(self, abort: bool) {
        if abort {
            let _ = self.0.set_linger(Some(Duration::ZERO));
        }
        // An error means that it is closed already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// A stream on its way to `ractor_cluster`.
pub(crate) struct Link {
    pub(crate) transport: Transport,
    pub(crate) life: Life,
    pub(crate) idle_limit: Duration,
    /// How the node server's events name this connection.
    pub(crate) label: String,
}

impl ClusterBidiStream for Link {
    fn split(self: Box<Self>) -> (BoxRead, BoxWrite) {
        let (read, write) = self.transport.split();
        let watched = Watched::new(read, self.life, self.idle_limit);
        (
            Box::new(BufReader::with_capacity(READ_BUFFER_BYTES, watched)),
            Box::new(write),
        )
    }

    fn peer_label(&self) -> Option<String> {
        Some(self.label.clone())
    }
}

/// A reader that notes every sign of life, and fails when there is none for too long.
struct Watched<R> {
    inner: R,
    life: Life,
    idle_limit: Duration,
    timer: Pin<Box<Sleep>>,
}

impl<R> Watched<R> {
    fn new(inner: R, life: Life, idle_limit: Duration) -> Self {
        life.sign();
        Self {
            inner,
            life,
            idle_limit,
            timer: Box::pin(tokio::time::sleep(idle_limit)),
        }
    }

    /// Ready when the limit is passed. The timer is moved only when it rings, not at every read.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let left = self.idle_limit.saturating_sub(self.life.silence());
            if left.is_zero() {
                let message = format!("nothing received for {} ms", self.idle_limit.as_millis());
                return Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, message));
            }
            self.timer.as_mut().reset(Instant::now() + left);
        }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Watched<R> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        match Pin::new(&mut this.inner).poll_read(cx, buf) {
            Poll::Ready(outcome) => {
                if buf.filled().len() > before {
                    this.life.sign();
                }
                Poll::Ready(outcome)
            }
            Poll::Pending => this.poll_idle(cx).map(Err),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::net::TcpListener;

    use super::*;
    use crate::clock::Clock;

    async fn pair(patience: Patience) -> (Transport, Transport) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (dialed, accepted) = tokio::join!(
            TcpStream::connect(listener.local_addr().unwrap()),
            listener.accept()
        );
        let dialed = Transport::secure(dialed.unwrap(), patience).await.unwrap();
        let accepted = Transport::secure(accepted.unwrap().0, patience).await;
        (dialed, accepted.unwrap())
    }

    #[tokio::test]
    async fn sockets_are_set_up_to_outlast_the_detector() {
        for (dead_after_ms, user_timeout_ms, after_s, every_s) in [
            (1_000, 5_000, 2, 1),
            (2_500, 5_000, 2, 1),
            (8_000, 16_000, 7, 4),
            (3_600_000, 7_200_000, 2880, 1440),
        ] {
            let patience = Patience::beyond(Duration::from_millis(dead_after_ms));
            let (dialed, accepted) = pair(patience).await;
            for Transport::Plain(stream) in [dialed, accepted] {
                let socket = SockRef::from(&stream);
                assert!(stream.nodelay().unwrap());
                assert!(socket.keepalive().unwrap());
                let seen = (
                    socket.tcp_user_timeout().unwrap(),
                    socket.tcp_keepalive_time().unwrap().as_secs(),
                    socket.tcp_keepalive_interval().unwrap().as_secs(),
                );
                let user_timeout = Duration::from_millis(user_timeout_ms);
                assert_eq!(seen, (Some(user_timeout), after_s, every_s));
            }
        }
    }

    #[tokio::test]
    async fn a_breaker_ends_both_sides() {
        let (dialed, mut accepted) = pair(Patience::beyond(Duration::ZERO)).await;
        let breaker = dialed.breaker().unwrap();
        let (mut read, _write) = dialed.split();
        breaker.cut(false);
        assert_eq!(read.read(&mut [0; 8]).await.unwrap(), 0);
        assert_eq!(accepted.read(&mut [0; 8]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn reads_sign_life_and_idling_fails() {
        let life = Life::begin(Clock::start());
        let (mut left, right) = duplex(64);
        let mut watched = Watched::new(right, life.clone(), Duration::from_millis(60));
        let begin = life.heard();
        tokio::time::sleep(Duration::from_millis(40)).await;
        left.write_all(b"x").await.unwrap();
        watched.read_u8().await.unwrap();
        assert!(life.heard() >= begin + Duration::from_millis(40));
        let read_at = std::time::Instant::now();
        let error = watched.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(
            read_at.elapsed() >= Duration::from_millis(55),
            "the limit counts from the last byte"
        );
    }
}
