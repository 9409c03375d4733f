//! What the core decides, in words that the actor carries out.

use std::time::Duration;

use understudy_engine_core::frame::{AttemptId, StartAttempt};
use understudy_journal::FinishedRequest;
use understudy_protocol::message::ServerMessage;

use crate::peer::{LossCause, ReplicaRef};

/// What the configuration says about a request's life.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Attempts without a new token at most, the first one included.
    pub max_attempts: u32,
    /// Engines that may die on a request without a new token in between; then it is taken to be what kills them.
    pub max_engine_deaths: u32,
    /// How long replicas may go on refusing a request for want of room.
    pub no_replica_timeout: Duration,
}

/// Where a request is, for errors, logs and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// No replica has it yet.
    Queued,
    /// A replica has it; no token came yet.
    Dispatched,
    Generating,
    /// Its attempt was lost; the next one has produced nothing yet.
    Recovering,
    Done,
}

impl Stage {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Dispatched => "dispatched",
            Self::Generating => "generating",
            Self::Recovering => "recovering",
            Self::Done => "done",
        }
    }
}

/// What the actor has to do, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Ask the router for a replica, after the pause.
    Route {
        start: StartAttempt,
        fingerprint: Option<String>,
        /// Replicas that must not have it: their numbers are others.
        avoid: Vec<ReplicaRef>,
        /// The replica that has just had no room for it: any other is better.
        shun: Option<ReplicaRef>,
        after: Duration,
    },
    /// The attempt is over for this request: give its place back, and with `cancel` stop it.
    Release {
        attempt: AttemptId,
        cancel: bool,
    },
    /// For the viewer's connection.
    Emit(ServerMessage),
    /// The viewer can be given more at once: ask [`RequestCore::more`](super::RequestCore::more).
    More,
    /// The viewer has everything, terminal event included.
    StreamEnded {
        stream: u32,
    },
    /// The log is closed: keep it for clients that come back.
    Keep(Box<FinishedRequest>),
    Observe(Observation),
}

/// What metrics and logs want to know.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Observation {
    FirstToken(Duration),
    InterToken(Duration),
    /// A lost attempt was made good: the pause that its client saw, detection included.
    Recovered {
        cause: LossCause,
        stage: Stage,
        stall: Duration,
    },
    /// Messages of attempts that are not current any more.
    Fenced(u64),
    /// Committed tokens that a new attempt has to run through the model again.
    Replayed(u64),
    /// Too many engines died on the request.
    Quarantined,
    Ended(Summary),
}

/// How a request went, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// From admission to the end.
    pub elapsed: Duration,
    /// From admission to the first step of an engine, if there was one.
    pub queued: Option<Duration>,
    /// From there to the first token, if there was one.
    pub prefill: Option<Duration>,
    /// From the first token to the last, if there was one.
    pub decode: Option<Duration>,
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
}
