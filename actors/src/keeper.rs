//! The journal keeper: holds closed logs for clients that come back.

use std::sync::Arc;
use std::time::Instant;

use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use understudy_journal::{FinishedRequest, FinishedStore, Retention};
use understudy_protocol::RequestId;

/// What the keeper is told.
#[derive(Debug)]
pub enum KeeperMsg {
    Keep(Box<FinishedRequest>),
    Get {
        request: RequestId,
        reply: RpcReplyPort<Option<Arc<FinishedRequest>>>,
    },
    /// Number of logs and their bytes.
    Size(RpcReplyPort<(usize, usize)>),
}
local_message!(KeeperMsg);

pub struct Keeper;

impl Actor for Keeper {
    type Msg = KeeperMsg;
    type State = FinishedStore;
    type Arguments = Retention;

    async fn pre_start(
        &self,
        _me: ActorRef<KeeperMsg>,
        retention: Retention,
    ) -> Result<FinishedStore, ActorProcessingErr> {
        Ok(FinishedStore::new(retention))
    }

    async fn handle(
        &self,
        _me: ActorRef<KeeperMsg>,
        message: KeeperMsg,
        store: &mut FinishedStore,
    ) -> Result<(), ActorProcessingErr> {
        let now = Instant::now();
        match message {
            KeeperMsg::Keep(request) => store.insert(*request, now),
            KeeperMsg::Get { request, reply } => {
                reply.send(store.get(request, now)).ok();
            }
            KeeperMsg::Size(reply) => {
                store.expire(now);
                reply.send((store.len(), store.size_bytes())).ok();
            }
        }
        Ok(())
    }
}
