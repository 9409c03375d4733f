//! The task of a stream: holds the request on a connection, checks its events, and gets it back when it is lost.
//!
//! ```text
//!             attach: submit, or resume where the id is known
//!   detached ─────────────────────────────────────────────────▶ attached ──▶ ended
//!      ▲                                                           │
//!      └── connection lost, gateway shutting down, not known, ─────┘
//!          or given up there because the caller took nothing
//! ```
//!
//! Owner of everything but the handle. Bounds: the queue of events takes a window and the control events, and credit keeps
//! the gateway to that; each wait ends with the connection, with the recovery, or with the handle.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use understudy_protocol::message::{FinishReason, ServerMessage, TokenEvent};
use understudy_protocol::{ErrorBody, ErrorCode, RequestId};

use super::Opening;
use super::flow::Flow;
use super::progress::Progress;
use super::shared::Shared;
use crate::error::Error;
use crate::link::Attachment;
use crate::pool::Pool;
use crate::recovery::Recovery;
use crate::request::{Accepted, Event, Finished};
use crate::time::after;

/// Times that a request which nobody has accepted is submitted again after the connection with its `submit` was lost. It
/// may be what the gateways die of.
pub(super) const MAX_RESUBMISSIONS: u32 = 3;

pub(super) struct Driver {
    pub(super) pool: Arc<Pool>,
    pub(super) shared: Arc<Shared>,
    events: mpsc::Sender<Result<Event, Error>>,
    pub(super) opening: Opening,
    pub(super) progress: Progress,
    pub(super) flow: Flow,
    pub(super) attached: Option<Attached>,
    /// Whether the gateway gave the unread stream up: it is resumed when there is room for more.
    parked: bool,
    pub(super) recovery: Option<Recovery>,
    /// The attempt under way: not before when, and at which gateway.
    pub(super) pending: Option<(Instant, usize)>,
    /// Whether the attempt waits for a stream to end.
    pub(super) queued: bool,
    /// Why the last attempt failed.
    pub(super) last_error: Option<Error>,
    /// Connections lost with a submit that was not accepted.
    submits_lost: u32,
    /// Limit of the submission, where the request has a deadline, and when it passes.
    pub(super) deadline: Option<(Instant, Duration)>,
}

pub(super) struct Attached {
    pub attachment: Attachment,
    pub gateway: usize,
    /// When the request was sent to it.
    pub opened_at: Instant,
    /// When this connection accepted the request.
    pub accepted_at: Option<Instant>,
    cancel_sent: bool,
}

/// What a step has come to.
enum Turn {
    GoOn,
    /// The request has ended; its terminal event is delivered.
    Ended,
    /// The handle is gone.
    Left,
}

impl Attached {
    pub fn new(attachment: Attachment, gateway: usize) -> Self {
        Self {
            attachment,
            gateway,
            opened_at: Instant::now(),
            accepted_at: None,
            cancel_sent: false,
        }
    }
}

impl Driver {
    /// `limit` is what a request with a deadline may take.
    pub fn new(
        pool: Arc<Pool>,
        shared: Arc<Shared>,
        events: mpsc::Sender<Result<Event, Error>>,
        opening: Opening,
        next_position: u32,
        limit: Option<Duration>,
    ) -> Self {
        let flow = Flow::new(pool.options.window);
        Self {
            pool,
            shared,
            events,
            opening,
            progress: Progress::new(next_position),
            flow,
            attached: None,
            parked: false,
            recovery: None,
            pending: None,
            queued: false,
            last_error: None,
            submits_lost: 0,
            deadline: limit.map(|limit| (after(Instant::now(), limit), limit)),
        }
    }

    /// Runs until the request has ended or the handle is gone.
    pub async fn run(mut self) {
        loop {
            let turn = match self.attached {
                Some(_) => self.serve().await,
                None => self.recover().await,
            };
            match turn {
                Ok(Turn::GoOn) => {}
                Ok(Turn::Ended) => return,
                Ok(Turn::Left) => return self.leave().await,
                Err(error) => {
                    // Where the handle is gone nobody wants to know.
                    let _ = self.events.try_send(Err(error));
                    return self.give_up().await;
                }
            }
        }
    }

    pub(super) fn request_id(&self) -> Option<RequestId> {
        self.shared.request()
    }

    /// Takes what the connection brings until it brings no more for now, or does what the handle wants.
    async fn serve(&mut self) -> Result<Turn, Error> {
        if let Turn::Left = self.heed().await {
            return Ok(Turn::Left);
        }
        let Some(Attached { attachment, .. }) = &mut self.attached else {
            return Ok(Turn::GoOn);
        };
        let mut next = tokio::select! {
            () = self.shared.changed() => return Ok(Turn::GoOn),
            message = attachment.events.recv() => message,
        };
        loop {
            match next {
                Some(message) => match self.take(message)? {
                    Turn::GoOn => {}
                    turn => return Ok(turn),
                },
                None => return self.lost().map(|()| Turn::GoOn),
            }
            let Some(Attached { attachment, .. }) = &mut self.attached else {
                return Ok(Turn::GoOn);
            };
            next = match attachment.events.try_recv() {
                Ok(message) => Some(message),
                Err(mpsc::error::TryRecvError::Disconnected) => None,
                Err(mpsc::error::TryRecvError::Empty) => return Ok(Turn::GoOn),
            };
        }
    }

    /// Does what the handle wants: goes with it, cancels, or grants what the caller has taken. A connection that has ended
    /// takes no commands, but may still have left events to take.
    async fn heed(&mut self) -> Turn {
        if self.shared.is_left() {
            return Turn::Left;
        }
        let Some(attached) = &mut self.attached else {
            return Turn::GoOn;
        };
        let Attachment { link, stream, .. } = &attached.attachment;
        if self.shared.is_cancelled() && !attached.cancel_sent {
            attached.cancel_sent = true;
            let _ = link.cancel(*stream).await;
        }
        let received = self.progress.next_position();
        loop {
            let taken = self.shared.taken();
            if !self.flow.is_due(received, taken) {
                return Turn::GoOn;
            }
            let tokens = self.flow.grant(received, taken);
            self.shared.wake_at(taken.saturating_add(self.flow.half()));
            let _ = link.credit(*stream, tokens).await;
        }
    }

    /// Gets the request back. Begun anew when the handle wants something else; attempts go on where they were.
    async fn recover(&mut self) -> Result<Turn, Error> {
        let shared = self.shared.clone();
        if shared.is_left() {
            return Ok(Turn::Left);
        }
        let cancelled = shared.is_cancelled();
        if self.parked && !cancelled && !self.has_room() {
            shared.changed().await;
            return Ok(Turn::GoOn);
        }
        self.parked = false;
        tokio::select! {
            biased;
            () = shared.new_wish(cancelled) => Ok(Turn::GoOn),
            attached = self.attach() => attached.map(|()| Turn::GoOn),
        }
    }

    /// Whether the caller has taken enough for the gateway to send more. Has the task woken at the next token otherwise.
    fn has_room(&self) -> bool {
        let received = self.progress.next_position();
        self.shared.wake_at(self.shared.taken());
        self.flow.is_due(received, self.shared.taken())
    }

    fn take(&mut self, message: ServerMessage) -> Result<Turn, Error> {
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
            })?,
            ServerMessage::Token(event) => self.token(event)?,
            ServerMessage::Finished {
                finish_reason,
                usage,
                text,
                ..
            } => {
                self.finish(Finished {
                    finish_reason,
                    usage,
                    text,
                })?;
                return Ok(Turn::Ended);
            }
            ServerMessage::Error { error, .. } => self.refused(error)?,
            _ => {
                return Err(Error::Protocol(
                    "message that is no event on a stream".to_owned(),
                ));
            }
        }
        Ok(Turn::GoOn)
    }

    fn accept(&mut self, accepted: Accepted) -> Result<(), Error> {
        if let Some(attached) = &mut self.attached {
            if attached.accepted_at.replace(Instant::now()).is_some() {
                return Err(Error::Protocol(
                    "accepted came twice on one stream".to_owned(),
                ));
            }
            self.pool.prefer(attached.gateway);
        }
        let first = self.progress.accept(self.request_id(), accepted)?;
        if first {
            self.shared.set_request(accepted.request);
            return self.deliver(Event::Accepted(accepted));
        }
        self.shared.count_recovery();
        Ok(())
    }

    fn token(&mut self, event: TokenEvent) -> Result<(), Error> {
        self.flow.arrived();
        if !self.is_accepted_here() {
            return Err(Error::Protocol("a token came before accepted".to_owned()));
        }
        if self.progress.token(event.position)? {
            self.recovery = None;
            self.deliver(Event::Token(event.into()))?;
        }
        Ok(())
    }

    fn finish(&mut self, finished: Finished) -> Result<(), Error> {
        self.attached = None;
        if finished.finish_reason == FinishReason::Cancelled && !self.shared.is_cancelled() {
            return Err(match self.request_id() {
                Some(request) => Error::Cancelled {
                    request,
                    next_position: self.progress.next_position(),
                },
                None => Error::Protocol("a request finished that was not accepted".to_owned()),
            });
        }
        self.deliver(Event::Finished(finished))
    }

    /// Hands an event to the caller. A handle that is gone is noticed elsewhere.
    fn deliver(&mut self, event: Event) -> Result<(), Error> {
        match self.events.try_send(Ok(event)) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(Error::Protocol(
                "more events came than there was credit for".to_owned(),
            )),
        }
    }

    fn is_accepted_here(&self) -> bool {
        self.attached
            .as_ref()
            .is_some_and(|attached| attached.accepted_at.is_some())
    }

    /// A terminal error on the stream: of the request, or only of this attempt to reach it.
    fn refused(&mut self, error: ErrorBody) -> Result<(), Error> {
        let known = self.request_id().is_some();
        let resuming = known && !self.is_accepted_here();
        let attached = self.attached.take();
        let elsewhere = match error.code {
            ErrorCode::ShuttingDown => true,
            // Not the request has timed out, but the gateway's wait for the caller to read: its log is kept.
            ErrorCode::Timeout => known,
            ErrorCode::UnknownRequest => resuming,
            _ => resuming && error.retriable,
        };
        if !elsewhere || !self.pool.options.recovers() {
            return Err(Error::Server(error));
        }
        if error.code == ErrorCode::Timeout && self.flow.is_spent() {
            self.park();
            return Ok(());
        }
        let unknown = error.code == ErrorCode::UnknownRequest;
        let gateway = attached.as_ref().map(|attached| attached.gateway);
        self.detach(attached, Error::Server(error))?;
        if let (true, Some(gateway), Some(recovery)) = (unknown, gateway, &mut self.recovery) {
            recovery.unknown_at(gateway);
        }
        Ok(())
    }

    /// The gateway has waited for credit in vain. Resumed at once the request would only wait there again, so it is left
    /// in its log until the caller has read on, and the time until then is no time of recovery.
    fn park(&mut self) {
        self.parked = true;
        self.recovery = None;
        self.shared.set_attached_at(None);
    }

    /// The connection has ended under the stream.
    fn lost(&mut self) -> Result<(), Error> {
        let Some(attached) = self.attached.take() else {
            return Ok(());
        };
        let error = attached.attachment.link.lost();
        if self.request_id().is_none() {
            // A gateway that stops does so for reasons of its own.
            self.submits_lost += u32::from(error.code() != Some(ErrorCode::ShuttingDown));
            // Of what will not go away by itself the request may be the cause; and a cancelled one has nothing to keep.
            if !error.is_retriable() || self.shared.is_cancelled() {
                return Err(error);
            }
        }
        if !self.pool.options.recovers() {
            return Err(error);
        }
        if self.submits_lost > MAX_RESUBMISSIONS {
            return Err(Error::SubmitLost {
                times: self.submits_lost,
                last: Box::new(error),
            });
        }
        self.detach(Some(attached), error)
    }
}
