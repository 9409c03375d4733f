//! What a request is told, and who watches it.

use ractor::{ActorRef, RpcReplyPort};
use understudy_engine_core::frame::StepToken;
use understudy_protocol::{ErrorBody, ErrorCode, Position, RequestId};

use crate::outbox::Outbox;
use crate::peer::{LossCause, Refusal, ReplicaRef};
use crate::router::core::Route;
use crate::session::SessionMsg;

/// Who watches a request: a stream of a connection.
#[derive(Debug, Clone)]
pub struct Audience {
    pub outbox: Outbox,
    pub session: ActorRef<SessionMsg>,
    pub request: RequestId,
    pub stream: u32,
    pub next: Position,
    pub credit: u32,
}

/// What a request is told.
#[derive(Debug)]
pub enum RequestMsg {
    Dispatched {
        epoch: u32,
        at: ReplicaRef,
        fingerprint: String,
    },
    Tokens(Vec<StepToken>),
    Lost {
        epoch: u32,
        cause: LossCause,
    },
    Refused {
        epoch: u32,
        refusal: Refusal,
    },
    Unroutable {
        epoch: u32,
        code: ErrorCode,
        reason: String,
    },
    /// From the connection that watches; ignored from any other.
    Cancel {
        session: ActorRef<SessionMsg>,
        stream: u32,
    },
    Deadline,
    /// Looks whether the viewer of a request that has ended takes what is left.
    Unread {
        watch: u64,
        viewed: Position,
    },
    /// The grace period of a request without a client is over.
    Abandoned {
        watch: u64,
    },
    /// The pause before an attempt is over.
    RouteNow(Box<Route<ActorRef<RequestMsg>>>),
    Attach {
        audience: Box<Audience>,
        reply: RpcReplyPort<Result<(), ErrorBody>>,
    },
    /// A connection is gone; ignored if another one watches by now.
    Detach {
        session: ActorRef<SessionMsg>,
        stream: u32,
    },
    Credit {
        session: ActorRef<SessionMsg>,
        stream: u32,
        tokens: u32,
    },
    /// The connection of the audience with that number has room again.
    Room {
        watch: u64,
    },
    /// There is more that the viewer can be given at once.
    More,
    /// The node stops.
    Shutdown,
}
local_message!(RequestMsg);
