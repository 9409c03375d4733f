//! What a run measures: the course of each request, and the sums over all.
//!
//! A [`Course`] is a small state machine over one request's events that also checks the promise of the protocol:
//! positions 0, 1, 2 … without gap or repeat, and a usage that agrees with what arrived. It takes times as arguments,
//! so that tests need no clock.

use std::collections::BTreeMap;
use std::time::Duration;

use understudy_protocol::Position;
use understudy_protocol::message::{FinishReason, Usage};

use super::histogram::Histogram;

/// Names of the failures that the client side finds; server failures go by their error code.
pub mod client_error {
    /// A position was skipped, repeated or changed, or the usage disagrees with what arrived.
    pub const WRONG_SEQUENCE: &str = "wrong_sequence";
    /// Someone else cancelled the request.
    pub const CANCELLED: &str = "cancelled";
    /// The run asked for more requests in flight than it may hold.
    pub const CLIENT_LIMIT: &str = "client_limit";
}

/// One request, from its start to its end. Times count from the start of the run.
#[derive(Debug, Clone)]
pub struct Course {
    /// When the request was sent, or, with arrivals at a rate, when it should have been: time spent waiting for the
    /// generator itself counts as latency (no coordinated omission).
    started: Duration,
    next_position: Position,
    first_token: Option<Duration>,
    last_token: Duration,
    gaps: Vec<Duration>,
    fault: Option<String>,
}

impl Course {
    pub fn new(started: Duration) -> Self {
        Self {
            started,
            next_position: 0,
            first_token: None,
            last_token: started,
            gaps: Vec::new(),
            fault: None,
        }
    }

    /// A token event arrived.
    pub fn token(&mut self, position: Position, now: Duration) {
        if position != self.next_position {
            self.fault.get_or_insert_with(|| {
                format!(
                    "position {position} came where {} was due",
                    self.next_position
                )
            });
        }
        self.next_position = position.saturating_add(1);
        match self.first_token {
            None => self.first_token = Some(now),
            Some(_) => self.gaps.push(now.saturating_sub(self.last_token)),
        }
        self.last_token = now;
    }

    /// The request ended well; says how, after the last checks.
    pub fn finished(mut self, reason: FinishReason, usage: Usage, now: Duration) -> Outcome {
        let received = self.next_position;
        if reason == FinishReason::Cancelled {
            return self.failed(
                client_error::CANCELLED,
                "the request was cancelled, and not by this run",
            );
        }
        if usage.completion_tokens != received {
            self.fault.get_or_insert_with(|| {
                format!(
                    "usage says {} tokens, and {received} came",
                    usage.completion_tokens
                )
            });
        }
        match self.fault.take() {
            Some(detail) => Outcome::Failed {
                code: client_error::WRONG_SEQUENCE.to_owned(),
                detail,
                tokens: received,
            },
            None => Outcome::Finished {
                reason,
                usage,
                ttft: self.first_token.map(|at| at.saturating_sub(self.started)),
                gaps: self.gaps,
                e2e: now.saturating_sub(self.started),
            },
        }
    }

    /// The request ended with an error.
    pub fn failed(self, code: impl Into<String>, detail: impl Into<String>) -> Outcome {
        Outcome::Failed {
            code: code.into(),
            detail: detail.into(),
            tokens: self.next_position,
        }
    }
}

/// How one request went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Finished {
        reason: FinishReason,
        usage: Usage,
        /// Start to first token; `None` where there was no token.
        ttft: Option<Duration>,
        /// Between one token and the next; one fewer than there are tokens.
        gaps: Vec<Duration>,
        /// Start to the terminal event.
        e2e: Duration,
    },
    Failed {
        /// The server's error code, or one of [`client_error`].
        code: String,
        detail: String,
        /// Tokens that had arrived.
        tokens: u32,
    },
}

/// Kinds of error told apart; further ones are counted under [`OTHER_ERRORS`].
const MAX_ERROR_CODES: usize = 32;
const OTHER_ERRORS: &str = "other";

/// The failures of one code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failures {
    pub count: u64,
    /// What the first of them said.
    pub example: String,
}

/// The sums over a run. Memory does not grow with the number of requests.
#[derive(Clone, Default)]
pub struct Record {
    pub ttft: Histogram,
    pub inter_token: Histogram,
    pub e2e: Histogram,
    pub succeeded: u64,
    pub failed: u64,
    pub prompt_tokens: u64,
    /// Tokens of finished requests.
    pub output_tokens: u64,
    /// Tokens of requests that failed later.
    pub wasted_tokens: u64,
    pub finish_reasons: BTreeMap<&'static str, u64>,
    pub errors: BTreeMap<String, Failures>,
    /// Times a connection was lost and the streams went on over a new one.
    pub reconnects: u64,
}

impl Record {
    /// Adds one request.
    pub fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Finished {
                reason,
                usage,
                ttft,
                gaps,
                e2e,
            } => {
                self.succeeded += 1;
                self.prompt_tokens += u64::from(usage.prompt_tokens);
                self.output_tokens += u64::from(usage.completion_tokens);
                *self.finish_reasons.entry(reason_name(reason)).or_default() += 1;
                ttft.into_iter().for_each(|time| self.ttft.record(time));
                gaps.into_iter()
                    .for_each(|time| self.inter_token.record(time));
                self.e2e.record(e2e);
            }
            Outcome::Failed {
                code,
                detail,
                tokens,
            } => {
                self.failed += 1;
                self.wasted_tokens += u64::from(tokens);
                let known = self.errors.contains_key(&code) || self.errors.len() < MAX_ERROR_CODES;
                let code = if known { code } else { OTHER_ERRORS.to_owned() };
                self.errors
                    .entry(code)
                    .or_insert(Failures {
                        count: 0,
                        example: detail,
                    })
                    .count += 1;
            }
        }
    }

    /// Requests that have ended.
    pub fn ended(&self) -> u64 {
        self.succeeded + self.failed
    }
}

/// A finish reason as the protocol spells it.
pub fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn usage(completion_tokens: u32) -> Usage {
        Usage {
            prompt_tokens: 7,
            completion_tokens,
        }
    }

    #[test]
    fn times_count_from_the_intended_start() {
        let mut course = Course::new(ms(100));
        course.token(0, ms(130));
        course.token(1, ms(135));
        course.token(2, ms(145));
        let outcome = course.finished(FinishReason::Length, usage(3), ms(150));
        assert_eq!(
            outcome,
            Outcome::Finished {
                reason: FinishReason::Length,
                usage: usage(3),
                ttft: Some(ms(30)),
                gaps: vec![ms(5), ms(10)],
                e2e: ms(50),
            }
        );
    }

    #[test]
    fn gaps_and_repeats_and_wrong_counts_are_failures() {
        let run = |positions: &[u32], completion_tokens| {
            let mut course = Course::new(ms(0));
            for position in positions {
                course.token(*position, ms(1));
            }
            course.finished(FinishReason::Stop, usage(completion_tokens), ms(2))
        };
        let fault = |outcome| match outcome {
            Outcome::Failed { code, detail, .. } if code == client_error::WRONG_SEQUENCE => detail,
            other => panic!("{other:?}"),
        };
        assert!(matches!(run(&[0, 1, 2], 3), Outcome::Finished { .. }));
        assert_eq!(fault(run(&[0, 2, 3], 4)), "position 2 came where 1 was due");
        assert_eq!(fault(run(&[0, 1, 1], 2)), "position 1 came where 2 was due");
        assert_eq!(fault(run(&[1], 1)), "position 1 came where 0 was due");
        assert_eq!(fault(run(&[0, 1], 3)), "usage says 3 tokens, and 2 came");
    }

    #[test]
    fn sums_and_errors_by_code() {
        let mut record = Record::default();
        let mut course = Course::new(ms(0));
        course.token(0, ms(4));
        record.add(course.finished(FinishReason::Stop, usage(1), ms(5)));
        let mut lost = Course::new(ms(0));
        lost.token(0, ms(4));
        record.add(lost.failed("overloaded", "first"));
        record.add(Course::new(ms(0)).failed("overloaded", "second"));
        assert_eq!((record.succeeded, record.failed, record.ended()), (1, 2, 3));
        assert_eq!(
            (
                record.output_tokens,
                record.wasted_tokens,
                record.prompt_tokens
            ),
            (1, 1, 7)
        );
        let overloaded = Failures {
            count: 2,
            example: "first".to_owned(),
        };
        assert_eq!(record.errors.get("overloaded"), Some(&overloaded));
        assert_eq!(record.inter_token.count(), 0);
        assert_eq!(record.ttft.count(), 1);
    }

    #[test]
    fn error_codes_are_bounded() {
        let mut record = Record::default();
        for code in 0..100 {
            record.add(Course::new(ms(0)).failed(format!("code{code:03}"), ""));
        }
        assert_eq!(record.errors.len(), MAX_ERROR_CODES + 1);
        assert_eq!(
            record.errors[OTHER_ERRORS].count,
            100 - MAX_ERROR_CODES as u64
        );
    }
}
