//! The small HTTP/1.1 server behind `/metrics`.
//!
//! It answers `GET` and `HEAD` of `/metrics` and `/health`, and nothing else. Each answer closes its connection, so
//! there is no state to keep. Invariant: at most [`MAX_CONNECTIONS`] connections, each with at most
//! [`MAX_HEAD_BYTES`] of request and for at most [`CONNECTION_TIMEOUT`], so that a port scanner or a stuck scraper costs a
//! node next to nothing.

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
/// Longest life of a connection, from accept to close.
pub const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Wait after a failed accept (out of file descriptors, most likely), so that the loop does not spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// What `/metrics` answers, made afresh for each scrape.
pub type Render = Arc<dyn Fn() -> String + Send + Sync>;

/// Serves until the task is aborted.
pub async fn serve(listener: TcpListener, render: Render) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let render = Arc::clone(&render);
                tokio::spawn(async move {
                    // A scraper that is slow or gone is its own problem: nothing to report.
                    let _ = tokio::time::timeout(CONNECTION_TIMEOUT, answer(stream, render)).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a metrics connection");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, render: Render) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let Some(head) = tokio::time::timeout(HEAD_TIMEOUT, read_head(&mut stream)).await?? else {
        return Ok(());
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
    // Wait for the peer's close: closing with unread bytes would send a reset that may overtake the answer.
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
}
