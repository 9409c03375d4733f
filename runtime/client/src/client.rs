//! The client: gateways, options, and the calls that begin something.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};
use understudy_protocol::RequestId;
use understudy_protocol::message::ClusterStatus;

use crate::error::Error;
use crate::link::Link;
use crate::options::Options;
use crate::pool::Pool;
use crate::request::Request;
use crate::stream::{Opening, Stream};
use crate::time::after;

/// A client of one cluster. Cheap to clone; the clones share their connections, which close when the last clone and the
/// last stream are dropped.
#[derive(Clone)]
pub struct Client {
    pool: Arc<Pool>,
}

impl Client {
    /// Connects to the first of `addresses` (`host:port` each, gateways of one cluster) that can be reached.
    ///
    /// # Errors
    /// The last gateway's error, when none can be reached.
    pub async fn connect(
        addresses: impl IntoIterator<Item = impl Into<String>>,
        options: Options,
    ) -> Result<Self, Error> {
        let client = Self::new(addresses, options)?;
        client.pool.any_link().await?;
        Ok(client)
    }

    /// A client that connects when it is first used.
    ///
    /// # Errors
    /// [`Error::NoAddress`], [`Error::InvalidOptions`].
    pub fn new(
        addresses: impl IntoIterator<Item = impl Into<String>>,
        options: Options,
    ) -> Result<Self, Error> {
        let addresses: Vec<String> = addresses.into_iter().map(Into::into).collect();
        if addresses.is_empty() {
            return Err(Error::NoAddress);
        }
        options.check()?;
        Ok(Self {
            pool: Arc::new(Pool::new(addresses, options)),
        })
    }

    /// Submits a request.
    ///
    /// # Errors
    /// When no gateway can be reached, or the request does not fit a frame. What the server says about the request
    /// comes from [`Stream::next`].
    pub async fn submit(&self, request: Request) -> Result<Stream, Error> {
        Stream::open(self.pool.clone(), Opening::Submit(Box::new(request)), 0).await
    }

    /// Goes on with a request that was submitted before, by this client or another, from `next_position` on. A resume that
    /// fails, or is dropped before the request is accepted, leaves the request as it was.
    ///
    /// # Errors
    /// As [`submit`](Self::submit); `unknown_request` comes from [`Stream::next`].
    pub async fn resume(&self, request: RequestId, next_position: u32) -> Result<Stream, Error> {
        Stream::open(self.pool.clone(), Opening::Resume(request), next_position).await
    }

    /// The cluster as the gateway in use sees it.
    ///
    /// # Errors
    /// The last gateway's error, when none has answered within `call_timeout`.
    pub async fn status(&self) -> Result<ClusterStatus, Error> {
        self.call("status", async |link| link.status().await).await
    }

    /// Time to the gateway in use and back, its message loop included.
    ///
    /// # Errors
    /// As [`status`](Self::status).
    pub async fn ping(&self) -> Result<Duration, Error> {
        self.call("pong", async |link| {
            let start = Instant::now();
            link.ping().await?;
            Ok(start.elapsed())
        })
        .await
    }

    /// Asks the gateway in use and, where it does not answer, the others. Each gets its share of the time that is left:
    /// one that has fallen silent must leave some for the next.
    async fn call<T>(
        &self,
        what: &'static str,
        ask: impl AsyncFn(Arc<Link>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let pool = &self.pool;
        let limit = pool.options.call_timeout;
        let end = after(Instant::now(), limit);
        let mut last = Error::NoAddress;
        for (asked, gateway) in (0..).zip(pool.by_preference()) {
            let left = end.saturating_duration_since(Instant::now());
            let share = left / (pool.len() as u32 - asked);
            let answer = async { ask(pool.link(gateway).await?).await };
            match timeout(share, answer).await {
                Ok(Ok(answer)) => {
                    pool.prefer(gateway);
                    return Ok(answer);
                }
                Ok(Err(error)) => last = error,
                Err(_) => last = Error::Timeout { what, after: limit },
            }
        }
        Err(last)
    }
}
