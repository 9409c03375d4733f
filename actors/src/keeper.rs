//! The journal keeper: holds closed logs for clients that come back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use understudy_journal::{FinishedRequest, FinishedStore, Retention};
use understudy_protocol::RequestId;
use understudy_telemetry::gauges::{QueueBytes, QueueShare};
use understudy_telemetry::record::Queue;

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
    /// Drops what is too old, though nobody asks.
    Tick,
}
local_message!(KeeperMsg);

/// How often logs that are too old are dropped: prompts are not kept longer than the configuration says, and a little.
const TICK: Duration = Duration::from_secs(1);

pub struct Keeper;

pub struct KeeperState {
    store: FinishedStore,
    bytes: QueueShare,
}

impl Actor for Keeper {
    type Msg = KeeperMsg;
    type State = KeeperState;
    type Arguments = Retention;

    async fn pre_start(
        &self,
        me: ActorRef<KeeperMsg>,
        retention: Retention,
    ) -> Result<KeeperState, ActorProcessingErr> {
        me.send_interval(TICK, || KeeperMsg::Tick);
        Ok(KeeperState {
            store: FinishedStore::new(retention),
            bytes: QueueBytes::new(Queue::Finished).share(),
        })
    }

    async fn handle(
        &self,
        _me: ActorRef<KeeperMsg>,
        message: KeeperMsg,
        KeeperState { store, bytes }: &mut KeeperState,
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
            KeeperMsg::Tick => store.expire(now),
        }
        bytes.set(store.size_bytes() as u64);
        Ok(())
    }
}
