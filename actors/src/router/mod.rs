//! The router: picks the replica for every attempt of this gateway, and knows where each runs.
//!
//! The decisions are [`core::RouterCore`]'s; this actor only carries them out.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use understudy_cluster::{PeerId, PeerState, SendError};
use understudy_engine_core::frame::{AttemptError, AttemptId};
use understudy_protocol::message::{ClusterStatus, NodeStatus, ReplicaStatus};
use understudy_protocol::{ErrorCode, RequestId};

use understudy_telemetry::record;

use crate::peer::{Links, LossCause, PeerMessage, Refusal, ReplicaId, ReplicaReport};
use crate::request::RequestMsg;

pub mod core;
pub mod policy;

use self::core::{Effect, Limits, Route, RouterCore, Unroutable};

/// How often waiting attempts are looked at besides events.
const TICK: Duration = Duration::from_millis(100);

/// What the router is told.
#[derive(Debug)]
pub enum RouterMsg {
    Route(Box<Route<ActorRef<RequestMsg>>>),
    Release {
        attempt: AttemptId,
        cancel: bool,
    },
    Report {
        peer: PeerId,
        replicas: Vec<ReplicaReport>,
    },
    Suspect {
        peer: PeerId,
        suspect: bool,
    },
    PeerDown(PeerId),
    /// A host says that attempts of ours ended there.
    Lost {
        peer: PeerId,
        attempts: Vec<AttemptId>,
        cause: LossCause,
    },
    Refused {
        peer: PeerId,
        attempt: AttemptId,
        refusal: Refusal,
    },
    Status(RpcReplyPort<ClusterStatus>),
    Tick,
}
local_message!(RouterMsg);

/// What a status report needs to know besides the replicas.
#[derive(Debug, Clone)]
pub struct Identity {
    pub cluster: String,
    pub version: String,
    pub roles_of: Vec<(String, Vec<String>)>,
    /// Every replica that the configuration places, and its node.
    pub placed: Vec<(ReplicaId, String)>,
}

pub struct RouterArgs {
    pub links: Links,
    pub limits: Limits,
    pub identity: Identity,
}

pub struct Router;

pub struct RouterState {
    core: RouterCore<ActorRef<RequestMsg>>,
    links: Links,
    identity: Identity,
}

impl Actor for Router {
    type Msg = RouterMsg;
    type State = RouterState;
    type Arguments = RouterArgs;

    async fn pre_start(
        &self,
        me: ActorRef<RouterMsg>,
        args: RouterArgs,
    ) -> Result<RouterState, ActorProcessingErr> {
        me.send_interval(TICK, || RouterMsg::Tick);
        Ok(RouterState {
            core: RouterCore::new(args.limits),
            links: args.links,
            identity: args.identity,
        })
    }

    async fn handle(
        &self,
        _me: ActorRef<RouterMsg>,
        message: RouterMsg,
        state: &mut RouterState,
    ) -> Result<(), ActorProcessingErr> {
        let now = Instant::now();
        let effects = match message {
            RouterMsg::Route(route) => state.core.route(*route, now),
            RouterMsg::Release { attempt, cancel } => state.core.release(attempt, cancel, now),
            RouterMsg::Report { peer, replicas } => state.core.report(&peer, replicas, now),
            RouterMsg::Suspect { peer, suspect } => state.core.suspect(&peer, suspect, now),
            RouterMsg::PeerDown(peer) => state.core.peer_down(&peer, now),
            RouterMsg::Lost {
                peer,
                attempts,
                cause,
            } => {
                for attempt in attempts {
                    state.pass_on(&peer, attempt, || RequestMsg::Lost {
                        epoch: attempt.epoch,
                        cause,
                    });
                }
                Vec::new()
            }
            RouterMsg::Refused {
                peer,
                attempt,
                refusal,
            } => {
                state.pass_on(&peer, attempt, || RequestMsg::Refused {
                    epoch: attempt.epoch,
                    refusal,
                });
                Vec::new()
            }
            RouterMsg::Status(reply) => {
                reply.send(state.status()).ok();
                Vec::new()
            }
            RouterMsg::Tick => {
                state.measure();
                state.core.tick(now)
            }
        };
        state.carry_out(effects);
        Ok(())
    }
}

impl RouterState {
    /// Tells a request what its host said, if the attempt still runs at that very host: late words of another
    /// incarnation are nobody's business.
    fn pass_on(&self, peer: &PeerId, attempt: AttemptId, message: impl FnOnce() -> RequestMsg) {
        if let Some((at, request)) = self.core.running(attempt)
            && at.peer == *peer
        {
            request.cast(message()).ok();
        }
    }

    fn carry_out(&mut self, effects: Vec<Effect<ActorRef<RequestMsg>>>) {
        // Requests that are gone by now have released their attempts themselves: a failed cast needs no answer.
        let mut queue = VecDeque::from(effects);
        while let Some(effect) = queue.pop_front() {
            match effect {
                Effect::Dispatch {
                    to,
                    fingerprint,
                    start,
                    reply,
                } => {
                    let attempt = start.attempt;
                    let message = PeerMessage::Dispatch {
                        replica: to.replica.clone(),
                        start,
                    };
                    let peer = to.peer.clone();
                    tracing::debug!(request = %RequestId(attempt.request), epoch = attempt.epoch, worker = %format_args!("{}@{}", to.replica, peer.node), "attempt dispatched");
                    // Before the attempt is sent: its first token must not overtake this message.
                    reply
                        .cast(RequestMsg::Dispatched {
                            epoch: attempt.epoch,
                            at: to,
                            fingerprint,
                        })
                        .ok();
                    if let Err(error) = self.links.send(&peer, message) {
                        let request = RequestId(attempt.request);
                        tracing::warn!(%request, epoch = attempt.epoch, %peer, %error, "dispatch failed");
                        queue.extend(self.unsent(&peer, attempt, &reply, error));
                    }
                }
                Effect::Cancel { at, attempt } => {
                    // A host that cannot be reached drops the attempts of a lost gateway by itself.
                    self.links
                        .send(
                            &at.peer,
                            PeerMessage::Cancel {
                                replica: at.replica,
                                attempt,
                            },
                        )
                        .ok();
                }
                Effect::Silent(peer) => {
                    tracing::warn!(%peer, "a host has stopped reporting, though its connection lives: its requests go on elsewhere");
                }
                Effect::Lost {
                    attempt,
                    cause,
                    reply,
                } => {
                    reply
                        .cast(RequestMsg::Lost {
                            epoch: attempt.epoch,
                            cause,
                        })
                        .ok();
                }
                Effect::Unroutable {
                    attempt,
                    reason,
                    reply,
                } => {
                    let code = match &reason {
                        Unroutable::AllFull { .. } | Unroutable::TooManyWaiting { .. } => {
                            ErrorCode::Overloaded
                        }
                        Unroutable::AllDown { .. }
                        | Unroutable::NoneReady { .. }
                        | Unroutable::NoneMatches { .. }
                        | Unroutable::AllRefused { .. } => ErrorCode::Unavailable,
                    };
                    let reason = reason.to_string();
                    reply
                        .cast(RequestMsg::Unroutable {
                            epoch: attempt.epoch,
                            code,
                            reason,
                        })
                        .ok();
                }
            }
        }
    }

    /// An attempt that could not be sent to its host.
    fn unsent(
        &mut self,
        peer: &PeerId,
        attempt: AttemptId,
        request: &ActorRef<RequestMsg>,
        error: SendError,
    ) -> Vec<Effect<ActorRef<RequestMsg>>> {
        let refusal = match error {
            // The news of the host's end is on its way to us. Until it comes, nothing more must be sent there; the
            // attempt itself is among those that are lost with it.
            SendError::NotConnected(_) => return self.core.peer_down(peer, Instant::now()),
            SendError::Backlog { .. } => Refusal::NotReady,
            SendError::TooLarge { .. } => Refusal::Engine(AttemptError::Invalid(error.to_string())),
        };
        let epoch = attempt.epoch;
        request.cast(RequestMsg::Refused { epoch, refusal }).ok();
        Vec::new()
    }

    fn measure(&self) {
        record::requests_in_flight(self.core.running_count() + self.core.waiting_count());
        let peers = self.links.cluster().peers();
        let count = |state: PeerState| peers.iter().filter(|peer| peer.state == state).count();
        record::peers(record::PeerState::Alive, count(PeerState::Alive));
        record::peers(record::PeerState::Suspect, count(PeerState::Suspect));
        let lost = count(PeerState::Dead) + count(PeerState::NeverSeen);
        record::peers(record::PeerState::Dead, lost);
    }

    fn status(&self) -> ClusterStatus {
        ClusterStatus {
            cluster: self.identity.cluster.clone(),
            node: self.links.me().node.to_string(),
            version: self.identity.version.clone(),
            nodes: self.nodes(),
            replicas: self.replicas(),
            requests_in_flight: (self.core.running_count() + self.core.waiting_count()) as u32,
            ..ClusterStatus::default()
        }
    }

    /// What the hosts report, and what they should report and do not.
    fn replicas(&self) -> Vec<ReplicaStatus> {
        let known = self.core.replicas();
        let mut shown: Vec<ReplicaStatus> = known
            .map(|(_, report, suspect, outstanding)| shown(report, suspect, outstanding))
            .collect();
        for (id, node) in &self.identity.placed {
            if !self.core.replicas().any(|(at, ..)| at.replica == *id) {
                shown.push(unreachable(id, node));
            }
        }
        shown.sort_by(|a, b| (&a.model, a.replica).cmp(&(&b.model, b.replica)));
        shown
    }

    fn nodes(&self) -> Vec<NodeStatus> {
        let roles = |name: &str| {
            self.identity
                .roles_of
                .iter()
                .find(|(node, _)| node == name)
                .map_or(Vec::new(), |(_, roles)| roles.clone())
        };
        let me = self.links.me();
        let mut nodes = vec![NodeStatus {
            name: me.node.to_string(),
            incarnation: format!("{:x}", me.incarnation),
            state: "self".into(),
            roles: roles(me.node.as_ref()),
            address: self.links.cluster().local_addr().to_string(),
            last_heard_ms: None,
        }];
        nodes.extend(self.links.cluster().peers().into_iter().map(|peer| {
            let name = peer.address.node.to_string();
            NodeStatus {
                roles: roles(&name),
                name,
                incarnation: peer
                    .id
                    .map(|id| format!("{:x}", id.incarnation))
                    .unwrap_or_default(),
                state: match peer.state {
                    PeerState::NeverSeen => "never_seen",
                    PeerState::Alive => "alive",
                    PeerState::Suspect => "suspect",
                    PeerState::Dead => "dead",
                }
                .into(),
                address: format!("{}:{}", peer.address.host, peer.address.port),
                last_heard_ms: peer.last_heard.map(|age| age.as_millis() as u64),
            }
        }));
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        nodes
    }
}

/// Reports are up to an interval old: what this gateway has there, it knows better.
fn shown(report: &ReplicaReport, suspect: bool, outstanding: u32) -> ReplicaStatus {
    let mut status = report.status.clone();
    status.in_flight = status.in_flight.max(outstanding);
    if suspect {
        status.state = "suspect".into();
    }
    status
}

/// A replica of which no host speaks.
fn unreachable(id: &ReplicaId, node: &str) -> ReplicaStatus {
    ReplicaStatus {
        model: id.model.to_string(),
        node: node.to_owned(),
        replica: id.index,
        state: "unreachable".into(),
        in_flight: 0,
        workers: Vec::new(),
    }
}
