//! The client: gateways, options, and the calls that begin something.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use understudy_protocol::RequestId;
use understudy_protocol::message::ClusterStatus;

use crate::error::Error;
use crate::options::Options;
use crate::pool::Pool;
use crate::request::Request;
use crate::stream::{Opening, Stream};

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
    /// [`Error::NoAddress`].
    pub fn new(
        addresses: impl IntoIterator<Item = impl Into<String>>,
        options: Options,
    ) -> Result<Self, Error> {
        let addresses: Vec<String> = addresses.into_iter().map(Into::into).collect();
        if addresses.is_empty() {
            return Err(Error::NoAddress);
        }
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

    /// Goes on with a request that was submitted before, by this client or another, from `next_position` on.
    ///
    /// # Errors
    /// As [`submit`](Self::submit); `unknown_request` comes from [`Stream::next`].
    pub async fn resume(&self, request: RequestId, next_position: u32) -> Result<Stream, Error> {
        Stream::open(self.pool.clone(), Opening::Resume(request), next_position).await
    }

    /// The cluster as the gateway in use sees it.
    pub async fn status(&self) -> Result<ClusterStatus, Error> {
        let limit = self.pool.options.call_timeout;
        let call = async { self.pool.any_link().await?.status().await };
        within(limit, "status", call).await
    }

    /// Time to the gateway in use and back, its message loop included.
    pub async fn ping(&self) -> Result<Duration, Error> {
        let limit = self.pool.options.call_timeout;
        let call = async {
            let link = self.pool.any_link().await?;
            let start = Instant::now();
            link.ping().await?;
            Ok(start.elapsed())
        };
        within(limit, "pong", call).await
    }
}

async fn within<T>(
    limit: Duration,
    what: &'static str,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::time::timeout(limit, call)
        .await
        .unwrap_or(Err(Error::Timeout { what, after: limit }))
}
