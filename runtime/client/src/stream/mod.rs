//! One request's stream of events, across however many connections it takes.
//!
//! ```text
//!             attach: submit, or resume where the id is known
//!   detached ─────────────────────────────────────────────────▶ attached ──▶ ended
//!      ▲                                                           │
//!      └──── connection lost, gateway shutting down, not known ────┘
//! ```
//!
//! Invariant: `next_position` is the number of tokens the caller has been given. A token below it is a repeat and
//! dropped; one above it is a gap, and an error.

mod attach;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tracing::debug;
use understudy_protocol::message::{ClientMessage, ServerMessage, TokenEvent};
use understudy_protocol::{CreditWindow, ErrorBody, ErrorCode, RequestId};

use crate::error::{Error, LostReason};
use crate::link::Attachment;
use crate::pool::Pool;
use crate::recovery::Recovery;
use crate::request::{Accepted, Event, Finished, Request};

/// What the client waits beyond a request's own deadline for the server to say so.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

/// How the stream came into being.
pub(crate) enum Opening {
    Submit(Box<Request>),
    Resume(RequestId),
}

/// The events of one request. Dropping it before its end cancels the request.
pub struct Stream {
    pool: Arc<Pool>,
    opening: Opening,
    /// What the server said at the first acceptance; a later one must agree.
    accepted: Option<Accepted>,
    next_position: u32,
    attached: Option<Attached>,
    credit: CreditWindow,
    /// Credit to give to the server before the next wait.
    owed: u32,
    recovery: Option<Recovery>,
    /// The attempt under way: not before when, and at which gateway.
    pending: Option<(Instant, usize)>,
    /// Why the last attempt failed.
    last_error: Option<Error>,
    recoveries: u32,
    cancelled: bool,
    ended: bool,
    /// When the server must have ended the request, where it has a deadline.
    overdue: Option<Instant>,
}

struct Attached {
    attachment: Attachment,
    gateway: usize,
    /// When this connection accepted the request.
    accepted_at: Option<Instant>,
}

impl Stream {
    pub(crate) async fn open(
        pool: Arc<Pool>,
        opening: Opening,
        next_position: u32,
    ) -> Result<Self, Error> {
        let deadline_ms = match &opening {
            Opening::Submit(request) => request.deadline_ms,
            Opening::Resume(_) => None,
        };
        let credit = CreditWindow::new(pool.options.window);
        let mut stream = Self {
            pool,
            opening,
            accepted: None,
            next_position,
            attached: None,
            credit,
            owed: 0,
            recovery: None,
            pending: None,
            last_error: None,
            recoveries: 0,
            cancelled: false,
            ended: false,
            overdue: deadline_ms.and_then(|ms| {
                Instant::now().checked_add(Duration::from_millis(ms) + DEADLINE_GRACE)
            }),
        };
        stream.attach().await?;
        Ok(stream)
    }

    /// The request's id, once it is accepted.
    pub fn request_id(&self) -> Option<RequestId> {
        match self.opening {
            Opening::Resume(id) => Some(id),
            Opening::Submit(_) => self.accepted.map(|accepted| accepted.request),
        }
    }

    /// The first position that has not been given to the caller.
    pub fn next_position(&self) -> u32 {
        self.next_position
    }

    /// How often the stream has got its request back on another connection.
    pub fn recoveries(&self) -> u32 {
        self.recoveries
    }

    /// Asks for the request to end. Events that are under way still come, then `Finished` with `cancelled`.
    pub fn cancel(&mut self) {
        self.cancelled = true;
        if let Some(Attached { attachment, .. }) = &self.attached {
            attachment.link.cancel(attachment.stream);
        }
    }

    /// The next event; `None` after the last one. May be dropped while it waits, without losing an event.
    ///
    /// # Errors
    /// Ends the stream: further calls give `None`.
    pub async fn next(&mut self) -> Result<Option<Event>, Error> {
        while !self.ended {
            match self.step().await {
                Ok(None) => {}
                Ok(Some(event)) => return Ok(Some(event)),
                Err(error) => {
                    self.end_early();
                    return Err(error);
                }
            }
        }
        Ok(None)
    }

    /// One message, or one turn of recovery; `None` where the caller learns nothing from it.
    async fn step(&mut self) -> Result<Option<Event>, Error> {
        if self.attached.is_none() {
            self.attach().await?;
        }
        self.pay_credit().await;
        match self.receive().await? {
            Some(message) => self.take(message),
            None => self.lost().map(|()| None),
        }
    }

    /// Grants what the caller has consumed. It stays owed until the command is queued. A connection that has ended needs
    /// no credit, but may still have left events to take.
    async fn pay_credit(&mut self) {
        let Some(Attached { attachment, .. }) = &self.attached else {
            return;
        };
        if self.owed > 0 {
            let _ = attachment.link.credit(attachment.stream, self.owed).await;
            self.owed = 0;
        }
    }

    /// The next message of the connection, `None` when the connection has ended.
    async fn receive(&mut self) -> Result<Option<ServerMessage>, Error> {
        let Some(Attached { attachment, .. }) = &mut self.attached else {
            return Ok(None);
        };
        match attachment.events.try_recv() {
            Ok(message) => return Ok(Some(message)),
            Err(mpsc::error::TryRecvError::Disconnected) => return Ok(None),
            Err(mpsc::error::TryRecvError::Empty) => {}
        }
        let limit = self.pool.options.event_timeout;
        let until = Instant::now() + limit;
        let until = self.overdue.map_or(until, |overdue| until.min(overdue));
        timeout_at(until, attachment.events.recv())
            .await
            .map_err(|_| Error::Timeout {
                what: "event of the request",
                after: limit,
            })
    }

    fn take(&mut self, message: ServerMessage) -> Result<Option<Event>, Error> {
        match message {
            ServerMessage::Accepted {
                request,
                prompt_tokens,
                seed,
                ..
            } => self.accept(Accepted {
                request,
                prompt_tokens,
                seed,
            }),
            ServerMessage::Token(event) => self.token(event),
            ServerMessage::Finished {
                finish_reason,
                usage,
                text,
                ..
            } => {
                self.ended = true;
                self.attached = None;
                Ok(Some(Event::Finished(Finished {
                    finish_reason,
                    usage,
                    text,
                })))
            }
            ServerMessage::Error { error, .. } => self.refused(error).map(|()| None),
            _ => Err(Error::Protocol(
                "message that is no event on a stream".to_owned(),
            )),
        }
    }

    fn accept(&mut self, accepted: Accepted) -> Result<Option<Event>, Error> {
        if let Some(attached) = &mut self.attached {
            attached.accepted_at = Some(Instant::now());
            self.pool.prefer(attached.gateway);
        }
        self.recoveries += u32::from(self.accepted.is_some());
        if self.request_id().is_some_and(|id| id != accepted.request) {
            return Err(Error::Protocol(
                "another request was resumed than the one asked for".to_owned(),
            ));
        }
        match self.accepted {
            None => {
                self.accepted = Some(accepted);
                Ok(Some(Event::Accepted(accepted)))
            }
            Some(first) if first == accepted => Ok(None),
            Some(_) => Err(Error::Protocol(
                "the resumed request has another seed or prompt length".to_owned(),
            )),
        }
    }

    fn token(&mut self, event: TokenEvent) -> Result<Option<Event>, Error> {
        self.owed += self.credit.consume().unwrap_or(0);
        if self.accepted.is_none() {
            return Err(Error::Protocol("a token came before accepted".to_owned()));
        }
        if event.position > self.next_position {
            return Err(Error::Protocol(format!(
                "token {} came where {} was due",
                event.position, self.next_position
            )));
        }
        if event.position < self.next_position {
            return Ok(None);
        }
        self.next_position += 1;
        self.recovery = None;
        Ok(Some(Event::Token(event.into())))
    }

    /// A terminal error on the stream: of the request, or only of this attempt to reach it.
    fn refused(&mut self, error: ErrorBody) -> Result<(), Error> {
        let gateway = self.attached.as_ref().map(|attached| attached.gateway);
        let was_accepted = self
            .attached
            .as_ref()
            .is_some_and(|attached| attached.accepted_at.is_some());
        let resuming = self.request_id().is_some() && !was_accepted;
        let elsewhere = match error.code {
            ErrorCode::ShuttingDown => true,
            ErrorCode::UnknownRequest => resuming,
            _ => resuming && error.retriable,
        };
        if !elsewhere || !self.pool.options.recovers() {
            return Err(Error::Server(error));
        }
        let unknown = error.code == ErrorCode::UnknownRequest;
        self.detach(Error::Server(error))?;
        if let (true, Some(gateway), Some(recovery)) = (unknown, gateway, &mut self.recovery) {
            recovery.unknown_at(gateway);
        }
        Ok(())
    }

    /// The connection has ended under the stream.
    fn lost(&mut self) -> Result<(), Error> {
        let Some(Attached { attachment, .. }) = &self.attached else {
            return Ok(());
        };
        let error = attachment.link.lost();
        let refused = matches!(
            &error,
            Error::Lost {
                reason: LostReason::Refused(_),
                ..
            }
        );
        // A connection that the server closed over what was said on it: an unaccepted request may be the culprit.
        let culprit = refused && !error.is_retriable() && self.request_id().is_none();
        let nothing_to_keep = self.cancelled && self.request_id().is_none();
        if culprit || nothing_to_keep || !self.pool.options.recovers() {
            return Err(error);
        }
        self.detach(error)
    }

    /// Ends the stream from this side.
    fn end_early(&mut self) {
        self.ended = true;
        if let Some(Attached { attachment, .. }) = self.attached.take() {
            attachment.link.cancel(attachment.stream);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let in_recovery = self.attached.is_none();
        self.end_early();
        if let (true, Some(request), Ok(runtime)) = (
            in_recovery,
            self.request_id(),
            tokio::runtime::Handle::try_current(),
        ) {
            runtime.spawn(cancel_elsewhere(self.pool.clone(), request));
        }
    }
}

/// Cancels a request that no connection holds: resumes it for that alone. Where that fails the request ends by its
/// deadline.
async fn cancel_elsewhere(pool: Arc<Pool>, request: RequestId) {
    let limit = pool.options.call_timeout;
    let cancel = async {
        let link = pool.any_link().await?;
        let message = |stream| ClientMessage::Resume {
            stream,
            request,
            next_position: 0,
            credit: 1,
        };
        let mut attachment = link.open(1, message).await?;
        link.cancel(attachment.stream);
        while attachment.events.recv().await.is_some() {}
        Ok::<(), Error>(())
    };
    if !matches!(tokio::time::timeout(limit, cancel).await, Ok(Ok(()))) {
        debug!(%request, "dropped request was not cancelled");
    }
}
