//! How a stream leaves its request, when nobody reads it any more.

use tokio::time::{Instant, sleep, timeout};
use tracing::debug;
use understudy_protocol::message::{ClientMessage, ServerMessage};
use understudy_protocol::{ErrorCode, RequestId};

use super::Opening;
use super::driver::Driver;
use crate::error::Error;
use crate::pool::Pool;
use crate::recovery::{Attempt, Recovery};

impl Driver {
    /// The handle is gone: cancels the request, unless it was left to go on. The cancel may be lost with its connection, and
    /// then goes another way.
    pub(super) async fn leave(mut self) {
        let cancel = !self.shared.is_detached() && self.is_ours();
        let done = match self.attached.take() {
            Some(attached) if cancel => self.within(attached.attachment.cancel()).await,
            Some(attached) => self.within(attached.attachment.leave()).await,
            None => false,
        };
        if let (false, true, Some(request)) = (done, cancel, self.request_id())
            && !self.within(cancel_anywhere(&self.pool, request)).await
        {
            // It ends by its deadline, or for want of a reader.
            debug!(%request, "dropped request was not cancelled");
        }
    }

    /// The stream has ended with an error: takes the request along where a connection still holds it. One that is lost
    /// already may be resumed later.
    pub(super) async fn give_up(mut self) {
        let cancel = self.is_ours();
        match self.attached.take() {
            Some(attached) if cancel => self.within(attached.attachment.cancel()).await,
            Some(attached) => self.within(attached.attachment.leave()).await,
            None => true,
        };
    }

    /// Whether the request is this stream's to cancel: a resumed one is somebody else's until it is accepted here.
    fn is_ours(&self) -> bool {
        matches!(self.opening, Opening::Submit(_)) || self.progress.accepted().is_some()
    }

    /// Whether `farewell` went well, and in time.
    async fn within<T>(&self, farewell: impl Future<Output = Result<T, Error>>) -> bool {
        let limit = self.pool.options.call_timeout;
        matches!(timeout(limit, farewell).await, Ok(Ok(_)))
    }
}

/// Cancels a request that no connection holds: resumes it for that alone, at the first gateway that knows it. Goes round
/// them as a recovery does, for one may be about to come back.
async fn cancel_anywhere(pool: &Pool, request: RequestId) -> Result<(), Error> {
    let now = Instant::now();
    let mut recovery = Recovery::new(pool.preferred(), pool.len(), &pool.options, now);
    let mut last = Error::NoAddress;
    while let Some(Attempt { gateway, pause }) = recovery.next(Instant::now(), fastrand::f64()) {
        sleep(pause).await;
        match cancel_at(pool, gateway, request).await {
            Ok(()) => return Ok(()),
            Err(error) => {
                if error.code() == Some(ErrorCode::UnknownRequest) {
                    recovery.unknown_at(gateway);
                }
                last = error;
            }
        }
    }
    Err(last)
}

async fn cancel_at(pool: &Pool, gateway: usize, request: RequestId) -> Result<(), Error> {
    let reservation = pool.reserve(gateway).await?;
    let reservation = reservation.ok_or_else(|| pool.full(gateway))?;
    // No credit before the cancel: no token is wanted.
    let message = |stream| ClientMessage::Resume {
        stream,
        request,
        next_position: 0,
        credit: 0,
    };
    let attachment = reservation.open(0, 0, message).await?;
    match attachment.cancel().await? {
        ServerMessage::Error { error, .. } => Err(Error::Server(error)),
        _ => Ok(()),
    }
}
