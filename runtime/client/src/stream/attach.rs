//! How a stream gets its request to a gateway, the first time and again after a loss.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::debug;
use understudy_protocol::ErrorCode;
use understudy_protocol::message::ClientMessage;

use super::Opening;
use super::driver::{Attached, Driver};
use crate::error::Error;
use crate::link::Reservation;
use crate::recovery::{Attempt, Recovery};
use crate::time::after;

impl Driver {
    /// Leaves the connection and goes into recovery.
    pub(super) fn detach(&mut self, attached: Option<Attached>, error: Error) -> Result<(), Error> {
        debug!(request = ?self.request_id(), next_position = self.progress.next_position(), %error, "recovering");
        let now = Instant::now();
        self.shared.set_attached_at(None);
        let accepted_at = attached.as_ref().and_then(|attached| attached.accepted_at);
        if let (Some(recovery), Some(attached), None) = (&mut self.recovery, &attached, accepted_at)
        {
            // A gateway that was reached, and said nothing, is no time without one. MAX_RESUBMISSIONS bounds this.
            recovery.extend(now.saturating_duration_since(attached.opened_at));
        }
        let going_on = match (&mut self.recovery, accepted_at) {
            (Some(recovery), Some(at)) => recovery.fruitless(at, now),
            (Some(_), None) => true,
            (None, _) => {
                let first = self.first_gateway(attached.as_ref());
                let gateways = self.pool.len();
                self.recovery = Some(Recovery::new(first, gateways, &self.pool.options, now));
                true
            }
        };
        self.last_error = Some(error);
        if going_on {
            Ok(())
        } else {
            Err(self.not_recovered())
        }
    }

    /// The gateway that had the request knows it best, unless it fell silent or is about to go.
    fn first_gateway(&self, attached: Option<&Attached>) -> usize {
        let Some(Attached {
            gateway,
            attachment,
            ..
        }) = attached
        else {
            return self.pool.preferred();
        };
        let leave = !attachment.link.is_ended() || attachment.link.reason().is_silence();
        (gateway + usize::from(leave)) % self.pool.len()
    }

    /// Gets the request to a gateway: the first time, or again.
    pub(super) async fn attach(&mut self) -> Result<(), Error> {
        loop {
            // Kept across calls: a recovery that is begun anew must get there all the same.
            let (not_before, gateway) = match self.pending {
                Some(pending) => pending,
                None => {
                    let attempt = self.next_attempt()?;
                    (after(Instant::now(), attempt.pause), attempt.gateway)
                }
            };
            self.pending = Some((not_before, gateway));
            self.pause(not_before).await;
            let outcome = self.try_attach(gateway).await;
            self.pending = None;
            match outcome {
                Ok(()) => return Ok(()),
                Err(error) if !self.may_try_again(&error) => return Err(error),
                Err(error) => self.last_error = Some(error),
            }
        }
    }

    /// Waits until it is time for the next attempt, or until a stream has ended where the last one found no room.
    async fn pause(&self, not_before: Instant) {
        // A timer would take a millisecond to say that it is time already.
        if not_before <= Instant::now() {
            return;
        }
        tokio::select! {
            () = sleep_until(not_before) => {}
            () = self.pool.freed(), if self.queued => {}
        }
    }

    fn next_attempt(&mut self) -> Result<Attempt, Error> {
        let now = Instant::now();
        let pool = &self.pool;
        let recovery = self
            .recovery
            .get_or_insert_with(|| Recovery::new(pool.preferred(), pool.len(), &pool.options, now));
        let Some(attempt) = recovery.next(now, fastrand::f64()) else {
            return Err(self.not_recovered());
        };
        // An accepted request has a log that outlives its deadline; for one that nobody has there is nothing to get.
        if self.request_id().is_none() && self.last_error.is_some() {
            if self.shared.is_cancelled() {
                return Err(self.not_recovered());
            }
            if let Some((_, limit)) = self.deadline.filter(|&(at, _)| now >= at) {
                return Err(self.not_recovered_within(limit));
            }
        }
        Ok(attempt)
    }

    async fn try_attach(&mut self, gateway: usize) -> Result<(), Error> {
        let reservation = self.reserve(gateway).await?;
        let (options, limits) = (&self.pool.options, reservation.link.limits());
        let window = options.window.min(limits.max_credit).max(1);
        let taken = self.shared.taken();
        self.flow.restart(window);
        let credit = self.flow.grant(self.progress.next_position(), taken);
        self.shared.wake_at(taken.saturating_add(self.flow.half()));
        let attachment = reservation
            .open(window, credit, |stream| {
                self.opening_message(stream, credit)
            })
            .await?;
        self.attached = Some(Attached::new(attachment, gateway));
        self.shared.set_attached_at(Some(Instant::now()));
        Ok(())
    }

    async fn reserve(&mut self, gateway: usize) -> Result<Reservation, Error> {
        // Until it is known better: where a further connection cannot be had, a place on another may come free.
        self.queued = true;
        let reserve = self.pool.reserve(gateway);
        let reserved = match &self.recovery {
            Some(recovery) => timeout_at(recovery.deadline(), reserve)
                .await
                .unwrap_or(Err(Error::Timeout {
                    what: "connection",
                    after: recovery.limit(),
                })),
            None => reserve.await,
        }?;
        self.queued = reserved.is_none();
        reserved.ok_or_else(|| self.pool.full(gateway))
    }

    fn opening_message(&self, stream: u32, credit: u32) -> ClientMessage {
        match (&self.opening, self.request_id()) {
            (Opening::Submit(request), None) => {
                let mut submit = request.to_submit(stream, credit, self.pool.options.recovers());
                submit.deadline_ms = submit.deadline_ms.map(|ms| ms.min(self.deadline_left()));
                ClientMessage::Submit(submit)
            }
            (Opening::Submit(_), Some(request)) | (&Opening::Resume(request), _) => {
                ClientMessage::Resume {
                    stream,
                    request,
                    next_position: self.progress.next_position(),
                    credit,
                }
            }
        }
    }

    /// Milliseconds that are left of the request's own deadline: submitting it again does not begin it anew.
    fn deadline_left(&self) -> u64 {
        let Some((at, _)) = self.deadline.filter(|_| self.last_error.is_some()) else {
            return u64::MAX;
        };
        let left = at
            .saturating_duration_since(Instant::now())
            .saturating_sub(super::DEADLINE_GRACE);
        u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1)
    }

    /// Before the first acceptance an error that will not go away by itself is told at once. After it, another gateway
    /// may still have the request.
    fn may_try_again(&self, error: &Error) -> bool {
        match error {
            Error::TooLarge { .. } | Error::Protocol(_) => false,
            error => error.is_retriable() || self.progress.accepted().is_some(),
        }
    }

    fn not_recovered(&mut self) -> Error {
        self.not_recovered_within(self.pool.options.recovery_timeout)
    }

    fn not_recovered_within(&mut self, after: Duration) -> Error {
        let mut last = self.last_error.take().unwrap_or(Error::NoAddress);
        let unknown = self
            .recovery
            .as_ref()
            .is_some_and(Recovery::is_unknown_everywhere);
        if let (true, Opening::Submit(_), Error::Server(body)) = (unknown, &self.opening, &mut last)
            && body.code == ErrorCode::UnknownRequest
        {
            // It was known once: its log went with its gateway. The same request may well succeed.
            body.retriable = true;
            body.message.push_str(
                "; the gateway that had it is gone, and its log with it: submit it again",
            );
        }
        if unknown || !self.pool.options.recovers() {
            return last;
        }
        Error::NotRecovered {
            request: self.request_id(),
            next_position: self.progress.next_position(),
            after,
            last: Box::new(last),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::mpsc;
    use understudy_protocol::RequestId;

    use super::super::shared::Shared;
    use super::*;
    use crate::options::Options;
    use crate::pool::Pool;
    use crate::request::Request;

    /// A driver in recovery whose request should have ended already.
    fn overdue(request: Option<RequestId>) -> Driver {
        let pool = Arc::new(Pool::new(vec!["a:1".to_owned()], Options::default()));
        let shared = Arc::new(Shared::new(request, 0));
        let (sender, _) = mpsc::channel(1);
        let opening = Opening::Submit(Box::new(Request::prompt("x")));
        let limit = Some(Duration::ZERO);
        let mut driver = Driver::new(pool, shared, sender, opening, 0, limit);
        driver.last_error = Some(Error::NoAddress);
        driver
    }

    #[test]
    fn a_passed_deadline_ends_the_recovery_of_what_nobody_has_accepted() {
        match overdue(None).next_attempt() {
            Err(Error::NotRecovered { after, .. }) => assert_eq!(after, Duration::ZERO),
            other => panic!("{other:?}"),
        }
        assert!(overdue(Some(RequestId(1))).next_attempt().is_ok());
    }
}
