//! The small HTTP/1.1 server behind `/metrics`.
//!
//! It answers `GET` and `HEAD` of `/metrics` and `/health`, and nothing else. Each answer closes its connection, so
//! there is no state to keep. Invariant: at most [`MAX_CONNECTIONS`] requests, each with at most [`MAX_HEAD_BYTES`] and for
//! at most [`CONNECTION_TIMEOUT`], and [`MAX_LINGERING`] answered connections for at most [`LINGER_TIMEOUT`], so that a port
//! scanner or a stuck scraper costs a node next to nothing, and keeps no other scraper waiting.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Scrapes answered at the same time; further connections wait in the kernel's queue.
pub const MAX_CONNECTIONS: usize = 16;
/// Longest request line plus headers.
pub const MAX_HEAD_BYTES: usize = 8 * 1024;
/// Time for the request to arrive, so that silent connections do not hold their places for long.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest time from accept to the last byte of the answer.
pub const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Wait for a client to close its side of an answered connection.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
/// Answered connections that are waited for; further ones are closed at once.
const MAX_LINGERING: usize = 64;
/// Wait after a failed accept (out of file descriptors, most likely), so that the loop does not spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// What `/metrics` answers, made afresh for each scrape.
pub type Render = Arc<dyn Fn() -> String + Send + Sync>;

/// Serves until the task is aborted.
pub async fn serve(listener: TcpListener, render: Render) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let lingering = Arc::new(Semaphore::new(MAX_LINGERING));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let render = Arc::clone(&render);
                let lingering = Arc::clone(&lingering);
                tokio::spawn(async move {
                    let answered =
                        tokio::time::timeout(CONNECTION_TIMEOUT, answer(stream, render)).await;
                    // What is left is the client's affair; the next scrape need not wait for it.
                    drop(permit);
                    // A scraper that is slow or gone is its own problem: nothing to report.
                    if let (Ok(Ok(Some(stream))), Ok(_place)) = (answered, lingering.try_acquire())
                    {
                        let _ = tokio::time::timeout(LINGER_TIMEOUT, linger(stream)).await;
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a metrics connection");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// Answers one request; gives the connection back if there was one.
async fn answer(mut stream: TcpStream, render: Render) -> std::io::Result<Option<TcpStream>> {
    stream.set_nodelay(true)?;
    let Some(head) = tokio::time::timeout(HEAD_TIMEOUT, read_head(&mut stream)).await?? else {
        return Ok(None);
    };
    let reply = match route(&head) {
        Route::Metrics { head_only } => {
            // Rendering walks every series; it must not hold up the runtime's workers.
            let body = tokio::task::spawn_blocking(move || render())
                .await
                .unwrap_or_default();
            reply(
                "200 OK",
                "text/plain; version=0.0.4; charset=utf-8",
                "",
                &body,
                head_only,
            )
        }
        Route::Health { head_only } => reply("200 OK", "text/plain", "", "ok\n", head_only),
        Route::NotFound => reply(
            "404 Not Found",
            "text/plain",
            "",
            "only /metrics and /health are here\n",
            false,
        ),
        Route::NotAllowed => reply(
            "405 Method Not Allowed",
            "text/plain",
            "Allow: GET, HEAD\r\n",
            "only GET and HEAD\n",
            false,
        ),
        Route::TooLarge => reply(
            "431 Request Header Fields Too Large",
            "text/plain",
            "",
            "too large\n",
            false,
        ),
        Route::Bad => reply(
            "400 Bad Request",
            "text/plain",
            "",
            "not an HTTP/1 request\n",
            false,
        ),
    };
    stream.write_all(reply.as_bytes()).await?;
    stream.shutdown().await?;
    Ok(Some(stream))
}

/// Waits for the peer's close: closing with unread bytes would send a reset that may overtake the answer.
async fn linger(mut stream: TcpStream) -> std::io::Result<()> {
    let mut rest = [0; 512];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

/// Reads up to the empty line; `None` if the peer closes before it.
async fn read_head(stream: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut head = Vec::with_capacity(1024);
    let mut chunk = [0; 1024];
    while !head.windows(4).any(|four| four == b"\r\n\r\n") && head.len() <= MAX_HEAD_BYTES {
        match stream.read(&mut chunk).await? {
            0 => return Ok(None),
            count => head.extend_from_slice(&chunk[..count]),
        }
    }
    Ok(Some(head))
}

#[derive(Debug, PartialEq, Eq)]
enum Route {
    Metrics { head_only: bool },
    Health { head_only: bool },
    NotFound,
    NotAllowed,
    TooLarge,
    Bad,
}

fn route(head: &[u8]) -> Route {
    if head.len() > MAX_HEAD_BYTES {
        return Route::TooLarge;
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let words: Vec<&str> = std::str::from_utf8(line)
        .unwrap_or_default()
        .split(' ')
        .collect();
    let [method, target, version] = words[..] else {
        return Route::Bad;
    };
    if !version.starts_with("HTTP/1.") || !target.starts_with('/') {
        return Route::Bad;
    }
    if method != "GET" && method != "HEAD" {
        return Route::NotAllowed;
    }
    let head_only = method == "HEAD";
    match target.split('?').next() {
        Some("/metrics") => Route::Metrics { head_only },
        Some("/health") => Route::Health { head_only },
        _ => Route::NotFound,
    }
}

fn reply(status: &str, content_type: &str, headers: &str, body: &str, head_only: bool) -> String {
    let length = body.len();
    let sent = if head_only { "" } else { body };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n{headers}Connection: close\r\n\r\n{sent}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    #[test]
    fn requests_are_routed() {
        for (head, wanted) in [
            (
                "GET /metrics HTTP/1.1\r\n\r\n",
                Route::Metrics { head_only: false },
            ),
            (
                "GET /metrics?x=1 HTTP/1.0\r\n\r\n",
                Route::Metrics { head_only: false },
            ),
            (
                "HEAD /metrics HTTP/1.1\r\n\r\n",
                Route::Metrics { head_only: true },
            ),
            (
                "GET /health HTTP/1.1\r\n\r\n",
                Route::Health { head_only: false },
            ),
            ("GET / HTTP/1.1\r\n\r\n", Route::NotFound),
            ("GET /metricsx HTTP/1.1\r\n\r\n", Route::NotFound),
            ("POST /metrics HTTP/1.1\r\n\r\n", Route::NotAllowed),
            ("GET /metrics\r\n\r\n", Route::Bad),
            ("GET metrics HTTP/1.1\r\n\r\n", Route::Bad),
            ("GET /metrics HTTP/2\r\n\r\n", Route::Bad),
            ("\r\n\r\n", Route::Bad),
        ] {
            assert_eq!(route(head.as_bytes()), wanted, "{head:?}");
        }
        assert_eq!(route(&[0xff; 20]), Route::Bad);
        assert_eq!(route(&vec![b'a'; MAX_HEAD_BYTES + 1]), Route::TooLarge);
    }

    async fn ask(address: SocketAddr) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.expect("a connection");
        let request = b"GET /health HTTP/1.1\r\n\r\n";
        stream.write_all(request).await.expect("sent");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("an answer");
        assert!(answer.starts_with(b"HTTP/1.1 200 OK"), "{answer:?}");
        stream
    }

    /// Our side is closed with the answer, theirs stays open: twice as many of these as there are places.
    #[tokio::test]
    async fn answered_connections_that_stay_open_keep_no_scrape_waiting() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let server = tokio::spawn(serve(listener, Arc::new(String::new)));
        let all = async {
            let mut open = Vec::new();
            for _ in 0..2 * MAX_CONNECTIONS {
                open.push(ask(address).await);
            }
            let begin = std::time::Instant::now();
            ask(address).await;
            (begin.elapsed(), open)
        };
        let (took, _open) = tokio::time::timeout(CONNECTION_TIMEOUT / 2, all)
            .await
            .expect("no place is held for its longest time");
        assert!(took < Duration::from_secs(2), "{took:?}");
        server.abort();
    }
}
