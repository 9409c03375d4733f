//! How a stream gets its request to a gateway, the first time and again after a loss.

use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::debug;
use understudy_protocol::CreditWindow;
use understudy_protocol::message::ClientMessage;

use super::{Attached, Opening, Stream};
use crate::error::Error;
use crate::recovery::{Attempt, Recovery};

impl Stream {
    /// Leaves the connection and goes into recovery.
    pub(super) fn detach(&mut self, error: Error) -> Result<(), Error> {
        debug!(request = ?self.request_id(), next_position = self.next_position, %error, "recovering");
        let now = Instant::now();
        let attached = self.attached.take();
        let going_on = match (&mut self.recovery, &attached) {
            (
                Some(recovery),
                Some(Attached {
                    accepted_at: Some(at),
                    ..
                }),
            ) => recovery.fruitless(*at, now),
            (Some(_), _) => true,
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
            // Kept across calls: a caller that polls and drops `next` again and again must get there all the same.
            let (not_before, gateway) = match self.pending {
                Some(pending) => pending,
                None => {
                    let attempt = self.next_attempt()?;
                    (Instant::now() + attempt.pause, attempt.gateway)
                }
            };
            self.pending = Some((not_before, gateway));
            sleep_until(not_before).await;
            let outcome = self.try_attach(gateway).await;
            self.pending = None;
            match outcome {
                Ok(()) => return Ok(()),
                Err(error) if !self.may_try_again(&error) => return Err(error),
                Err(error) => self.last_error = Some(error),
            }
        }
    }

    fn next_attempt(&mut self) -> Result<Attempt, Error> {
        let now = Instant::now();
        let pool = &self.pool;
        let recovery = self
            .recovery
            .get_or_insert_with(|| Recovery::new(pool.preferred(), pool.len(), &pool.options, now));
        let overdue = self.overdue.is_some_and(|overdue| now >= overdue);
        let attempt = recovery.next(now, fastrand::f64());
        match attempt {
            Some(attempt) if !overdue => Ok(attempt),
            _ => Err(self.not_recovered()),
        }
    }

    async fn try_attach(&mut self, gateway: usize) -> Result<(), Error> {
        let options = &self.pool.options;
        let link = match &self.recovery {
            Some(recovery) => timeout_at(recovery.deadline(), self.pool.link(gateway))
                .await
                .unwrap_or(Err(Error::Timeout {
                    what: "connection",
                    after: options.recovery_timeout,
                }))?,
            None => self.pool.link(gateway).await?,
        };
        let window = options.window.min(link.limits().max_credit).max(1);
        let attachment = link
            .open(window, |stream| self.opening_message(stream, window))
            .await?;
        self.credit = CreditWindow::new(window);
        self.owed = 0;
        if self.cancelled {
            attachment.link.cancel(attachment.stream);
        }
        self.attached = Some(Attached {
            attachment,
            gateway,
            accepted_at: None,
        });
        Ok(())
    }

    fn opening_message(&self, stream: u32, credit: u32) -> ClientMessage {
        match (&self.opening, self.request_id()) {
            (Opening::Submit(request), None) => ClientMessage::Submit(request.to_submit(
                stream,
                credit,
                self.pool.options.recovers(),
            )),
            (Opening::Submit(_), Some(request)) | (&Opening::Resume(request), _) => {
                ClientMessage::Resume {
                    stream,
                    request,
                    next_position: self.next_position,
                    credit,
                }
            }
        }
    }

    /// Before the first acceptance an error that will not go away by itself is told at once. After it, another gateway
    /// may still have the request.
    fn may_try_again(&self, error: &Error) -> bool {
        match error {
            Error::TooLarge { .. } | Error::Protocol(_) => false,
            error => error.is_retriable() || self.accepted.is_some(),
        }
    }

    fn not_recovered(&mut self) -> Error {
        let options = &self.pool.options;
        let last = self.last_error.take().unwrap_or(Error::NoAddress);
        let unknown = self
            .recovery
            .as_ref()
            .is_some_and(Recovery::is_unknown_everywhere);
        if unknown || !options.recovers() {
            return last;
        }
        Error::NotRecovered {
            request: self.request_id(),
            next_position: self.next_position,
            after: options.recovery_timeout,
            last: Box::new(last),
        }
    }
}
