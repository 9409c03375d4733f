//! Questions for the state of the cluster.

use std::sync::Arc;

use ractor::ActorRef;
use tokio::sync::OwnedSemaphorePermit;
use understudy_protocol::message::{ClusterStatus, ServerMessage};

use super::SessionMsg;
use super::opening::ask;
use crate::gateway::GatewayShared;
use crate::keeper::KeeperMsg;
use crate::outbox::Answers;
use crate::router::RouterMsg;

/// A question, with what its answer needs.
pub(super) struct Question {
    pub answers: Answers,
    pub permit: OwnedSemaphorePermit,
}

/// The questions of one client. One look answers all that were asked before it began.
#[derive(Default)]
pub(super) struct Questions {
    waiting: Vec<Question>,
    is_looking: bool,
}

impl Questions {
    pub fn ask(
        &mut self,
        question: Question,
        shared: &Arc<GatewayShared>,
        session: &ActorRef<SessionMsg>,
    ) {
        self.waiting.push(question);
        self.look(shared, session);
    }

    /// A look is done.
    pub fn answered(&mut self, shared: &Arc<GatewayShared>, session: &ActorRef<SessionMsg>) {
        self.is_looking = false;
        self.look(shared, session);
    }

    fn look(&mut self, shared: &Arc<GatewayShared>, session: &ActorRef<SessionMsg>) {
        if self.is_looking || self.waiting.is_empty() {
            return;
        }
        self.is_looking = true;
        let questions = std::mem::take(&mut self.waiting);
        let (shared, session) = (shared.clone(), session.clone());
        tokio::spawn(async move {
            let status = shared.status().await;
            for Question { answers, permit } in questions {
                answers.send(ServerMessage::Status(status.clone()), permit);
            }
            session.cast(SessionMsg::Answered).ok();
        });
    }
}

impl GatewayShared {
    /// The cluster as this gateway sees it. An actor of this node that does not answer in time leaves its part empty:
    /// a client that asks how a cluster in trouble is should learn what can be learned, and keep its connection.
    pub async fn status(&self) -> ClusterStatus {
        let surroundings = &self.surroundings;
        let (cluster, kept) = tokio::join!(
            ask(&surroundings.router, RouterMsg::Status),
            ask(&surroundings.keeper, KeeperMsg::Size)
        );
        let (requests_kept, bytes) = kept.unwrap_or_default();
        ClusterStatus {
            requests_kept: requests_kept as u32,
            requests_kept_bytes: bytes as u64,
            requests_in_flight: self.in_flight() as u32,
            ..cluster.unwrap_or_else(|_| self.unknown_status())
        }
    }

    fn unknown_status(&self) -> ClusterStatus {
        let (_, version) = self.server.rsplit_once('/').unwrap_or_default();
        ClusterStatus {
            node: self.node.clone(),
            version: version.to_owned(),
            ..ClusterStatus::default()
        }
    }
}
