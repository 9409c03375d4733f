//! What a dialer needs to know: which address next, and how long to wait after a failure.
//!
//! A name may stand for several addresses, of which only some lead to the peer: a machine with IPv6 in the name service and
//! none on the wire, or one with an address in a network that is down. Each gets a share of the time, and each dial begins
//! with another one, so that a dead address costs a delay and never the connection.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

/// A session that lasted for this long was a good one: the next dial need not wait.
const STEADY: Duration = Duration::from_secs(1);

/// Connects to the first of the addresses that answers, beginning with number `turn` (modulo their count).
pub(crate) async fn connect(
    addresses: &[SocketAddr],
    turn: usize,
    limit: Duration,
) -> io::Result<TcpStream> {
    let end = Instant::now() + limit;
    let mut error = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for step in 0..addresses.len() {
        let address = addresses[(turn + step) % addresses.len()];
        let now = Instant::now();
        let untried = u32::try_from(addresses.len() - step).unwrap_or(u32::MAX);
        let share = end.saturating_duration_since(now) / untried;
        error = match timeout_at(now + share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => error,
            Err(_) => io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no answer from {address} in {} ms", share.as_millis()),
            ),
        };
    }
    Err(error)
}

/// Waits that double from the first to the longest, each jittered between its half and its whole.
#[derive(Debug)]
pub(crate) struct Backoff {
    bounds: (Duration, Duration),
    next: Duration,
}

impl Backoff {
    pub(crate) fn new(bounds: (Duration, Duration)) -> Self {
        Self {
            bounds,
            next: bounds.0,
        }
    }

    /// A session has ended. One that broke at once is no better than a dial that failed: two nodes that cannot keep a
    /// session must not try forty times a second.
    pub(crate) fn session_lasted(&mut self, time: Duration) {
        if time >= STEADY {
            self.next = self.bounds.0;
        }
    }

    pub(crate) fn next(&mut self) -> Duration {
        let wait = self.next.mul_f64(0.5 + fastrand::f64() / 2.0);
        self.next = (self.next * 2).min(self.bounds.1);
        wait
    }
}

#[cfg(test)]
mod tests {
    use socket2::{Domain, Socket, Type};
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn waits_grow_to_the_bound_and_start_again_after_a_good_session() {
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
            backoff.session_lasted(STEADY / 2);
        }
        assert_eq!(nominal, longest);
        backoff.session_lasted(STEADY);
        assert!(backoff.next() <= first);
    }

    /// An address that swallows what is sent to it: its queue of connections is full, and nobody takes them.
    struct BlackHole {
        address: SocketAddr,
        _listener: Socket,
        _waiting: Vec<Socket>,
    }

    impl BlackHole {
        fn new() -> Self {
            let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
            listener.bind(&any.into()).unwrap();
            listener.listen(0).unwrap();
            let address = listener.local_addr().unwrap().as_socket().unwrap();
            let mut waiting = Vec::new();
            loop {
                let stream = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                let limit = Duration::from_millis(300);
                if stream.connect_timeout(&address.into(), limit).is_err() {
                    return Self {
                        address,
                        _listener: listener,
                        _waiting: waiting,
                    };
                }
                waiting.push(stream);
                assert!(waiting.len() < 100, "the queue never fills");
            }
        }
    }

    #[tokio::test]
    async fn a_dead_address_does_not_take_the_time_of_the_others() {
        let hole = BlackHole::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = listener.local_addr().unwrap();
        let refusing: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let limit = Duration::from_secs(3);
        let addresses = [hole.address, refusing, good];
        for turn in 0..3 {
            let begin = Instant::now();
            let stream = connect(&addresses, turn, limit).await.unwrap();
            assert_eq!(stream.peer_addr().unwrap(), good, "turn {turn}");
            assert!(begin.elapsed() < limit, "turn {turn}");
            if turn == 2 {
                assert!(
                    begin.elapsed() < limit / 3,
                    "it comes first when it is its turn"
                );
            }
        }
        let begin = Instant::now();
        let error = connect(&[hole.address], 7, limit / 3).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(
            begin.elapsed() >= limit / 3,
            "one address gets all of the time"
        );
        assert!(connect(&[], 0, limit).await.is_err());
    }
}
