//! One request's stream of events, across however many connections it takes.
//!
//! A [`Stream`] is the caller's handle. Behind it a task, the [`Driver`], holds the request: it takes the events from the
//! connection as they come, checks them, and recovers by itself when the connection ends, whether the caller polls the
//! handle or not.
//!
//! ```text
//!   gateway ──▶ connection's task ──▶ driver ──▶ events, at most a window ──▶ handle ──▶ caller
//!                                       ▲                                        │
//!                                       └── what was taken, cancel, gone ────────┘
//! ```
//!
//! The driver ends with the request's terminal event, and soon after the handle is dropped.
//!
//! [`Driver`]: driver::Driver

mod attach;
mod driver;
mod flow;
mod leave;
mod progress;
mod shared;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use understudy_protocol::RequestId;

use self::driver::Driver;
use self::shared::Shared;
use crate::error::{Error, LostReason};
use crate::pool::Pool;
use crate::request::{Event, Request};
use crate::time::after;

/// What the client waits beyond a request's own deadline for the server to say so.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

/// Room in the queue of events beside the tokens: `Accepted` and the terminal outcome.
const CONTROL_EVENTS: usize = 2;

/// How the stream came into being.
pub(crate) enum Opening {
    Submit(Box<Request>),
    Resume(RequestId),
}

/// The events of one request.
///
/// Dropping it before its end cancels the request, unless it was resumed and has not been accepted yet;
/// [`detach`](Self::detach) leaves the request to go on. A stream recovers from lost connections by itself, whether it is
/// polled or not; what it has received waits in memory, at most [`window`](crate::Options::window) tokens.
pub struct Stream {
    shared: Arc<Shared>,
    events: mpsc::Receiver<Result<Event, Error>>,
    next_position: u32,
    event_timeout: Duration,
    /// When the server must have ended the request, where it has a deadline.
    overdue: Option<Instant>,
    ended: bool,
}

impl Stream {
    /// Gets the request to a gateway. A future that is dropped before it is done leaves the request alone.
    pub(crate) async fn open(
        pool: Arc<Pool>,
        opening: Opening,
        next_position: u32,
    ) -> Result<Self, Error> {
        let (request, deadline_ms) = match &opening {
            Opening::Submit(request) => (None, request.deadline_ms),
            &Opening::Resume(id) => (Some(id), None),
        };
        let limit = deadline_ms.map(|ms| Duration::from_millis(ms).saturating_add(DEADLINE_GRACE));
        let shared = Arc::new(Shared::new(request, next_position));
        let (sender, events) = mpsc::channel(pool.options.window as usize + CONTROL_EVENTS);
        let event_timeout = pool.options.event_timeout;
        let mut driver = Driver::new(pool, shared.clone(), sender, opening, next_position, limit);
        driver.attach().await?;
        tokio::spawn(driver.run());
        Ok(Self {
            shared,
            events,
            next_position,
            event_timeout,
            overdue: limit.map(|limit| after(Instant::now(), limit)),
            ended: false,
        })
    }

    /// The request's id, once it is accepted.
    pub fn request_id(&self) -> Option<RequestId> {
        self.shared.request()
    }

    /// The first position that has not been given to the caller.
    pub fn next_position(&self) -> u32 {
        self.next_position
    }

    /// How often the stream has got its request back on another connection.
    pub fn recoveries(&self) -> u32 {
        self.shared.recoveries()
    }

    /// Asks for the request to end. Events that are under way still come, then `Finished` with `cancelled`.
    pub fn cancel(&mut self) {
        self.shared.cancel();
    }

    /// Leaves the request to go on, and gives what [`Client::resume`](crate::Client::resume) needs to come back to it: its
    /// id, and the first position that has not been given to the caller. `None` where the request has not been accepted:
    /// nobody could come back to it, so it is cancelled.
    ///
    /// While this [`Client`](crate::Client) keeps its connection the request goes on to its end, and its tokens are thrown
    /// away here. Once the connection is closed the gateway waits for a `resume` for its `resume_grace_ms` (30 s by
    /// default), then cancels the request. With recovery switched off (`recovery_timeout` of zero) it does so at once.
    #[must_use = "without the id the request cannot be resumed"]
    pub fn detach(self) -> Option<(RequestId, u32)> {
        let request = self.request_id()?;
        self.shared.leave(true);
        Some((request, self.next_position))
    }

    /// The next event; `None` after the last one. May be dropped while it waits, without losing an event.
    ///
    /// # Errors
    /// [`Error::Timeout`] leaves the stream as it is: call again to wait longer, [`detach`](Self::detach) to come back
    /// later, or drop the stream to cancel the request. Every other error ends the stream: further calls give `None`.
    pub async fn next(&mut self) -> Result<Option<Event>, Error> {
        if self.ended {
            return Ok(None);
        }
        let outcome = match self.events.try_recv() {
            Ok(outcome) => outcome,
            Err(_) => self.wait().await?,
        };
        match &outcome {
            Ok(Event::Accepted(_)) => {}
            Ok(Event::Token(_)) => {
                self.next_position += 1;
                self.shared.take(self.next_position);
            }
            Ok(Event::Finished(_)) | Err(_) => self.ended = true,
        }
        outcome.map(Some)
    }

    /// Reads the stream to its end, and gives the output's text.
    ///
    /// # Errors
    /// As [`next`](Self::next), but the stream is dropped with every error.
    pub async fn text(mut self) -> Result<String, Error> {
        let mut text = String::new();
        while let Some(event) = self.next().await? {
            match event {
                Event::Accepted(_) => {}
                Event::Token(token) => text.push_str(&token.text),
                Event::Finished(finished) => text.push_str(&finished.text),
            }
        }
        Ok(text)
    }

    /// The next outcome, when none is there: waits for as long as the connection may take. Recovery has limits of its own.
    async fn wait(&mut self) -> Result<Result<Event, Error>, Error> {
        let asked = Instant::now();
        loop {
            let (until, limit) = self.limit(asked);
            match timeout_at(until, self.events.recv()).await {
                Ok(Some(outcome)) => return Ok(outcome),
                Ok(None) => return Ok(Err(stopped())),
                // Recovery was under way for a part of the time.
                Err(_) if self.limit(asked).0 > Instant::now() => {}
                Err(_) => {
                    return Err(Error::Timeout {
                        what: "event of the request",
                        after: limit,
                    });
                }
            }
        }
    }

    /// Until when to wait for an event that was asked for at `asked`, and how long that is. A request's own deadline
    /// counts from its submission, but a caller who comes late gets [`DEADLINE_GRACE`] all the same: the server may have
    /// ended the request in time.
    fn limit(&self, asked: Instant) -> (Instant, Duration) {
        let now = Instant::now();
        let since = self.shared.attached_at().map_or(now, |at| at.max(asked));
        let quiet = after(since, self.event_timeout);
        let until = match self.overdue {
            Some(overdue) => quiet.min(overdue.max(after(since, DEADLINE_GRACE))),
            None => quiet,
        };
        (until, until - since)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.leave(false);
    }
}

/// The driver has ended without an outcome: its runtime has, or it has panicked.
fn stopped() -> Error {
    Error::Lost {
        address: "the gateway".to_owned(),
        reason: LostReason::Io("the stream's task was stopped with its runtime".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{Accepted, Token};

    type Sender = mpsc::Sender<Result<Event, Error>>;

    /// A handle without a driver.
    fn handle(event_timeout: Duration, overdue: Option<Instant>) -> (Sender, Stream) {
        let (sender, events) = mpsc::channel(4);
        let shared = Arc::new(Shared::new(None, 0));
        shared.set_attached_at(Some(Instant::now()));
        let stream = Stream {
            shared,
            events,
            next_position: 0,
            event_timeout,
            overdue,
            ended: false,
        };
        (sender, stream)
    }

    fn token(position: u32) -> Result<Event, Error> {
        Ok(Event::Token(Token {
            position,
            id: 1,
            text: String::new(),
            logprob: None,
            top_logprobs: Vec::new(),
        }))
    }

    #[tokio::test]
    async fn a_caller_who_comes_after_the_deadline_still_gets_what_comes() {
        let overdue = Instant::now();
        let (sender, mut stream) = handle(Duration::from_secs(600), Some(overdue));
        let late = tokio::spawn(async move {
            tokio::task::yield_now().await;
            sender.send(token(0)).await.unwrap();
        });
        assert_eq!(stream.next().await, token(0).map(Some));
        late.await.unwrap();
        // The limit that is reported is the one that applied.
        let asked = Instant::now();
        assert_eq!(
            stream.limit(asked),
            (asked + DEADLINE_GRACE, DEADLINE_GRACE)
        );
    }

    #[tokio::test]
    async fn the_time_of_a_recovery_does_not_count() {
        let (_sender, stream) = handle(Duration::from_secs(10), None);
        let asked = Instant::now();
        stream.shared.set_attached_at(None);
        assert!(stream.limit(asked).0 >= asked + Duration::from_secs(10));
        let back = asked + Duration::from_secs(60);
        stream.shared.set_attached_at(Some(back));
        let ten = Duration::from_secs(10);
        assert_eq!(stream.limit(asked), (back + ten, ten));
    }

    #[tokio::test]
    async fn a_wait_that_is_over_leaves_the_stream_as_it_is() {
        let limit = Duration::from_millis(5);
        let (sender, mut stream) = handle(limit, None);
        match stream.next().await {
            Err(Error::Timeout { after, .. }) => assert_eq!(after, limit),
            other => panic!("{other:?}"),
        }
        assert!(!stream.shared.is_left() && !stream.shared.is_cancelled());
        sender.send(token(0)).await.unwrap();
        assert_eq!(stream.next().await, token(0).map(Some));
        assert_eq!(stream.next_position(), 1);
    }

    #[tokio::test]
    async fn a_driver_that_goes_without_a_word_is_an_error() {
        let (sender, mut stream) = handle(Duration::from_secs(10), None);
        let accepted = Accepted {
            request: RequestId(1),
            prompt_tokens: 1,
            seed: 1,
        };
        sender.send(Ok(Event::Accepted(accepted))).await.unwrap();
        drop(sender);
        assert!(stream.next().await.is_ok());
        assert!(matches!(stream.next().await, Err(Error::Lost { .. })));
        assert_eq!(stream.next().await, Ok(None));
    }
}
