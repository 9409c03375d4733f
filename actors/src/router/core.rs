//! The router's state: every replica in the cluster, every attempt of this gateway, and the attempts that wait.
//!
//! Pure: events go in with the time, effects come out. Invariant: an attempt is in exactly one of `waiting` and
//! `running`, or nowhere; a replica's `outstanding` equals the number of its attempts in `running`.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use understudy_cluster::PeerId;
use understudy_engine_core::frame::AttemptId;

pub use self::effect::{Effect, Route, Unroutable};
use super::policy::{Candidate, least_outstanding};
use crate::peer::{LossCause, ReplicaRef, ReplicaReport, ReplicaState};

mod effect;

#[derive(Debug)]
struct Replica {
    report: ReplicaReport,
    outstanding: u32,
    suspect: bool,
}

#[derive(Debug)]
struct Waiting<R> {
    route: Route<R>,
    since: Instant,
}

#[derive(Debug)]
struct Running<R> {
    at: ReplicaRef,
    reply: R,
}

/// Limits of the router.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long an attempt waits for a replica.
    pub no_replica_timeout: Duration,
    /// How many may wait.
    pub max_waiting: usize,
    /// A host that reports nothing for this long, though its heartbeats may go on, serves nobody.
    pub report_timeout: Duration,
}

/// A tick that comes later than this after the one before says that this router was held up itself.
const LATE_TICK: Duration = Duration::from_millis(500);

/// See the module.
#[derive(Debug)]
pub struct RouterCore<R> {
    limits: Limits,
    replicas: BTreeMap<ReplicaRef, Replica>,
    waiting: VecDeque<Waiting<R>>,
    running: HashMap<AttemptId, Running<R>>,
    /// When each host last reported.
    heard: BTreeMap<PeerId, Instant>,
    last_tick: Option<Instant>,
}

impl<R: Clone> RouterCore<R> {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            replicas: BTreeMap::new(),
            waiting: VecDeque::new(),
            running: HashMap::new(),
            heard: BTreeMap::new(),
            last_tick: None,
        }
    }

    /// An attempt asks for a replica.
    pub fn route(&mut self, route: Route<R>, now: Instant) -> Vec<Effect<R>> {
        if self.waiting.len() >= self.limits.max_waiting {
            let reason = Unroutable::TooManyWaiting {
                waiting: self.waiting.len(),
                limit: self.limits.max_waiting,
            };
            return vec![Effect::Unroutable {
                attempt: route.start.attempt,
                reason,
                reply: route.reply,
            }];
        }
        self.waiting.push_back(Waiting { route, since: now });
        self.settle(now)
    }

    /// An attempt is over, however it ended: its place is free. With `cancel`, its host is told too.
    pub fn release(&mut self, attempt: AttemptId, cancel: bool, now: Instant) -> Vec<Effect<R>> {
        self.waiting
            .retain(|waiting| waiting.route.start.attempt != attempt);
        let mut effects = Vec::new();
        if let Some(running) = self.running.remove(&attempt) {
            self.free_place(&running.at);
            if cancel {
                effects.push(Effect::Cancel {
                    at: running.at,
                    attempt,
                });
            }
        }
        effects.extend(self.settle(now));
        effects
    }

    /// The place that an attempt runs at and whom to tell about it, without releasing it.
    pub fn running(&self, attempt: AttemptId) -> Option<(&ReplicaRef, &R)> {
        self.running
            .get(&attempt)
            .map(|running| (&running.at, &running.reply))
    }

    /// A host's new view of its replicas.
    pub fn report(
        &mut self,
        peer: &PeerId,
        reports: Vec<ReplicaReport>,
        now: Instant,
    ) -> Vec<Effect<R>> {
        let mut fresh: BTreeMap<ReplicaRef, Replica> = BTreeMap::new();
        for report in reports {
            let at = ReplicaRef {
                peer: peer.clone(),
                replica: report.replica.clone(),
            };
            let (outstanding, suspect) = self
                .replicas
                .get(&at)
                .map_or((0, false), |known| (known.outstanding, known.suspect));
            fresh.insert(
                at,
                Replica {
                    report,
                    outstanding,
                    suspect,
                },
            );
        }
        self.replicas.retain(|at, _| at.peer != *peer);
        self.replicas.append(&mut fresh);
        self.heard.insert(peer.clone(), now);
        self.settle(now)
    }

    /// A node missed heartbeats, or is heard again: suspects get no new work.
    pub fn suspect(&mut self, peer: &PeerId, suspect: bool, now: Instant) -> Vec<Effect<R>> {
        for (at, replica) in &mut self.replicas {
            if at.peer == *peer {
                replica.suspect = suspect;
            }
        }
        self.settle(now)
    }

    /// A node is gone, and with it every attempt there. Should it be reachable after all, it is told to stop them.
    pub fn peer_down(&mut self, peer: &PeerId, now: Instant) -> Vec<Effect<R>> {
        self.heard.remove(peer);
        self.replicas.retain(|at, _| at.peer != *peer);
        let lost: Vec<AttemptId> = self
            .running
            .iter()
            .filter(|(_, running)| running.at.peer == *peer)
            .map(|(id, _)| *id)
            .collect();
        let mut effects = Vec::new();
        for attempt in lost {
            let Some(Running { at, reply }) = self.running.remove(&attempt) else {
                continue;
            };
            effects.push(Effect::Cancel { at, attempt });
            effects.push(Effect::Lost {
                attempt,
                cause: LossCause::NodeDown,
                reply,
            });
        }
        effects.extend(self.settle(now));
        effects
    }

    /// Time passes: attempts that waited too long are told, and hosts that report no more are taken for gone. (Heartbeats
    /// have a thread of their own: they go on where a host's actors are stuck.)
    pub fn tick(&mut self, now: Instant) -> Vec<Effect<R>> {
        let last = self.last_tick.replace(now);
        if last.is_some_and(|last| now.saturating_duration_since(last) > LATE_TICK) {
            // Reports may wait behind this very tick.
            self.heard.values_mut().for_each(|heard| *heard = now);
        }
        let timeout = self.limits.report_timeout;
        let silent = |heard: &Instant| now.saturating_duration_since(*heard) >= timeout;
        let silent: Vec<PeerId> = self
            .heard
            .iter()
            .filter(|(_, heard)| silent(heard))
            .map(|(peer, _)| peer.clone())
            .collect();
        let mut effects = Vec::new();
        for peer in silent {
            effects.push(Effect::Silent(peer.clone()));
            effects.extend(self.peer_down(&peer, now));
        }
        effects.extend(self.settle(now));
        effects
    }

    /// All replicas known, with the load this gateway gives them.
    pub fn replicas(&self) -> impl Iterator<Item = (&ReplicaRef, &ReplicaReport, bool, u32)> {
        self.replicas
            .iter()
            .map(|(at, replica)| (at, &replica.report, replica.suspect, replica.outstanding))
    }

    pub fn waiting_count(&self) -> usize {
        self.waiting.len()
    }

    pub fn running_count(&self) -> usize {
        self.running.len()
    }

    fn free_place(&mut self, at: &ReplicaRef) {
        if let Some(replica) = self.replicas.get_mut(at) {
            replica.outstanding = replica.outstanding.saturating_sub(1);
        }
    }

    /// Places every waiting attempt that can be placed, in order of arrival, and ends those that waited too long.
    fn settle(&mut self, now: Instant) -> Vec<Effect<R>> {
        let mut effects = Vec::new();
        // What found no place in this pass: the next one that asks for the same need not look.
        let mut full: Vec<(Arc<str>, Option<String>)> = Vec::new();
        for _ in 0..self.waiting.len() {
            let Some(waiting) = self.waiting.pop_front() else {
                break;
            };
            let route = &waiting.route;
            let wanted = (route.model.clone(), route.fingerprint.clone());
            let placed = if full.contains(&wanted) {
                None
            } else {
                self.place(route)
            };
            if placed.is_none() && route.avoid.is_empty() && !full.contains(&wanted) {
                full.push(wanted);
            }
            if let Some((to, fingerprint)) = placed {
                let Route { start, reply, .. } = waiting.route;
                self.running.insert(
                    start.attempt,
                    Running {
                        at: to.clone(),
                        reply: reply.clone(),
                    },
                );
                effects.push(Effect::Dispatch {
                    to,
                    fingerprint,
                    start,
                    reply,
                });
            } else if let Some(reason) = self.hopeless(&waiting, now) {
                let Route { start, reply, .. } = waiting.route;
                effects.push(Effect::Unroutable {
                    attempt: start.attempt,
                    reason,
                    reply,
                });
            } else {
                self.waiting.push_back(waiting);
            }
        }
        effects
    }

    fn place(&mut self, route: &Route<R>) -> Option<(ReplicaRef, String)> {
        self.place_at(route, |at| route.shun.as_ref() != Some(at))
            .or_else(|| self.place_at(route, |at| route.shun.as_ref() == Some(at)))
    }

    fn place_at(
        &mut self,
        route: &Route<R>,
        allowed: impl Fn(&ReplicaRef) -> bool,
    ) -> Option<(ReplicaRef, String)> {
        let (refs, candidates): (Vec<ReplicaRef>, Vec<Candidate>) = self
            .replicas
            .iter()
            .filter(|(at, replica)| usable(at, replica, route) && matches(replica, route))
            .filter(|(_, replica)| replica.outstanding < replica.report.capacity)
            .filter(|(at, _)| allowed(at))
            .map(|(at, replica)| (at.clone(), candidate(replica)))
            .unzip();
        let request = route.start.attempt.request;
        let salt = (request as u64) ^ ((request >> 64) as u64);
        let at = refs[least_outstanding(&candidates, salt)?].clone();
        let replica = self.replicas.get_mut(&at)?;
        replica.outstanding += 1;
        Some((at, replica.report.fingerprint.clone()))
    }

    /// Why waiting longer is of no use, if so.
    fn hopeless(&self, waiting: &Waiting<R>, now: Instant) -> Option<Unroutable> {
        let route = &waiting.route;
        let model = route.model.clone();
        let mut of_model = self
            .replicas
            .iter()
            .filter(|(at, _)| at.replica.model == model)
            .peekable();
        if route.start.committed.is_empty()
            && of_model.peek().is_some()
            && of_model.all(|(_, r)| r.report.state == ReplicaState::Down)
        {
            return Some(Unroutable::AllDown { model });
        }
        let waited = now.saturating_duration_since(waiting.since);
        if waited < self.limits.no_replica_timeout {
            return None;
        }
        let waited_ms = waited.as_millis() as u64;
        let ready = || {
            self.replicas
                .iter()
                .filter(|(at, replica)| usable(at, replica, route))
        };
        if ready().next().is_none() {
            if !route.avoid.is_empty() && self.replicas.keys().any(|at| route.avoid.contains(at)) {
                return Some(Unroutable::AllRefused { model });
            }
            return Some(Unroutable::NoneReady { model, waited_ms });
        }
        match &route.fingerprint {
            Some(fingerprint) if !ready().any(|(_, replica)| matches(replica, route)) => {
                Some(Unroutable::NoneMatches {
                    model,
                    fingerprint: fingerprint.clone(),
                    waited_ms,
                })
            }
            _ => Some(Unroutable::AllFull { model, waited_ms }),
        }
    }
}

fn usable<R>(at: &ReplicaRef, replica: &Replica, route: &Route<R>) -> bool {
    at.replica.model == route.model
        && replica.report.state == ReplicaState::Ready
        && !replica.suspect
        && !route.avoid.contains(at)
}

/// Invariant 9: a log goes on only where the same numbers come out.
fn matches<R>(replica: &Replica, route: &Route<R>) -> bool {
    route
        .fingerprint
        .as_ref()
        .is_none_or(|wanted| *wanted == replica.report.fingerprint)
}

fn candidate(replica: &Replica) -> Candidate {
    Candidate {
        outstanding: replica.outstanding,
        reported: replica.report.status.in_flight,
        capacity: replica.report.capacity,
    }
}

#[cfg(test)]
mod tests;
