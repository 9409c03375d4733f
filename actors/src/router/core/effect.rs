//! What the router is asked for, and what it decides, in words that the actor carries out.

use std::sync::Arc;

use understudy_cluster::PeerId;
use understudy_engine_core::frame::{AttemptId, StartAttempt};

use crate::peer::{LossCause, ReplicaRef};

/// An attempt that looks for a replica.
#[derive(Debug, Clone)]
pub struct Route<R> {
    pub model: Arc<str>,
    pub start: StartAttempt,
    /// Where the log's numbers come from: only an engine with the same fingerprint may go on with it.
    pub fingerprint: Option<String>,
    /// Replicas that refused this log.
    pub avoid: Vec<ReplicaRef>,
    /// The replica that has just had no room for it: taken only if no other has any.
    pub shun: Option<ReplicaRef>,
    /// Whom to tell.
    pub reply: R,
}

/// Why no replica was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unroutable {
    #[error("every replica of {model} is down: see `understudy status` and the logs of its nodes")]
    AllDown { model: Arc<str> },
    #[error("no replica of {model} became ready within {waited_ms} ms")]
    NoneReady { model: Arc<str>, waited_ms: u64 },
    #[error("all replicas of {model} are full, and stayed so for {waited_ms} ms")]
    AllFull { model: Arc<str>, waited_ms: u64 },
    #[error(
        "no ready replica of {model} computes the same numbers (fingerprint {fingerprint}) as the one that served the tokens so far, for {waited_ms} ms"
    )]
    NoneMatches {
        model: Arc<str>,
        fingerprint: String,
        waited_ms: u64,
    },
    #[error(
        "every ready replica of {model} computes other numbers than the one that served the tokens so far: see the logs"
    )]
    AllRefused { model: Arc<str> },
    #[error("too many attempts wait for a replica: {waiting}, and the limit is {limit}")]
    TooManyWaiting { waiting: usize, limit: usize },
}

/// What the actor has to do.
#[derive(Debug)]
pub enum Effect<R> {
    /// Send the attempt there, and tell the request.
    Dispatch {
        to: ReplicaRef,
        fingerprint: String,
        start: StartAttempt,
        reply: R,
    },
    Cancel {
        at: ReplicaRef,
        attempt: AttemptId,
    },
    /// A host has stopped reporting: what ran there is lost, as the effects that follow say.
    Silent(PeerId),
    /// The attempt's host is gone.
    Lost {
        attempt: AttemptId,
        cause: LossCause,
        reply: R,
    },
    Unroutable {
        attempt: AttemptId,
        reason: Unroutable,
        reply: R,
    },
}
