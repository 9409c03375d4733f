//! The attempts that are in the engine, and whose they are. Pure.

use std::collections::{BTreeMap, HashMap, HashSet};

use understudy_cluster::PeerId;
use understudy_engine_core::frame::{AttemptId, StepToken};

/// See the module. Bounded by what the engine takes: it refuses what is beyond its slots and its queue.
#[derive(Debug, Default)]
pub struct InFlight {
    owners: HashMap<AttemptId, PeerId>,
    /// Those that the engine computes in steps of their own, until their first token.
    suspects: HashSet<AttemptId>,
    /// The suspect whose step has begun.
    alone: Option<AttemptId>,
}

/// Attempts that an engine left behind, by gateway.
pub type Left = BTreeMap<PeerId, Vec<AttemptId>>;

impl InFlight {
    pub fn len(&self) -> usize {
        self.owners.len()
    }

    /// An attempt goes to the engine, in place of the earlier attempts at the same request that it returns.
    pub fn insert(&mut self, attempt: AttemptId, suspect: bool, gateway: PeerId) -> Vec<AttemptId> {
        let earlier =
            |known: &AttemptId| known.request == attempt.request && known.epoch < attempt.epoch;
        let displaced: Vec<AttemptId> = self.owners.keys().copied().filter(earlier).collect();
        displaced.iter().for_each(|known| {
            self.remove(*known);
        });
        self.owners.insert(attempt, gateway);
        if suspect {
            self.suspects.insert(attempt);
        }
        displaced
    }

    pub fn remove(&mut self, attempt: AttemptId) -> Option<PeerId> {
        self.suspects.remove(&attempt);
        self.owners.remove(&attempt)
    }

    pub fn of_gateway(&self, gateway: &PeerId) -> Vec<AttemptId> {
        let theirs = self.owners.iter().filter(|(_, owner)| *owner == gateway);
        theirs.map(|(attempt, _)| *attempt).collect()
    }

    /// A step begins that computes this attempt and no other.
    pub fn begins_alone(&mut self, attempt: AttemptId) {
        self.alone = Some(attempt);
    }

    /// Each gateway's part of a step that is done. Tokens of attempts that are not here (any more) are dropped; attempts whose last
    /// token this is are here no more.
    pub fn split(&mut self, tokens: Vec<StepToken>) -> Vec<(PeerId, Vec<StepToken>)> {
        let mut parts: Vec<(PeerId, Vec<StepToken>)> = Vec::new();
        self.alone = None;
        for token in tokens {
            let attempt = token.attempt;
            self.suspects.remove(&attempt);
            let Some(gateway) = self.owners.get(&attempt).cloned() else {
                continue;
            };
            if token.finish.is_some() {
                self.owners.remove(&attempt);
            }
            match parts.iter_mut().find(|(peer, _)| *peer == gateway) {
                Some((_, part)) => part.push(token),
                None => parts.push((gateway, vec![token])),
            }
        }
        parts
    }

    /// Takes everything out, in order: first what the engine may have been computing, then what it certainly was not.
    pub fn take(&mut self) -> (Left, Left) {
        let (mut computed, mut beside) = (Left::new(), Left::new());
        let (alone, suspects) = (self.alone.take(), std::mem::take(&mut self.suspects));
        // An engine that died between steps, with nothing else in it, died of one of them.
        let only_suspects = suspects.len() == self.owners.len();
        for (attempt, gateway) in self.owners.drain() {
            let is_computed = match alone {
                // A later attempt at the same request may have come in since.
                Some(alone) => attempt.request == alone.request,
                None => only_suspects || !suspects.contains(&attempt),
            };
            let part = match is_computed {
                true => &mut computed,
                false => &mut beside,
            };
            part.entry(gateway).or_default().push(attempt);
        }
        for attempts in computed.values_mut().chain(beside.values_mut()) {
            attempts.sort_unstable();
        }
        (computed, beside)
    }
}

#[cfg(test)]
mod tests {
    use understudy_cluster::NodeName;
    use understudy_engine_core::frame::FinishReason;

    use super::*;
    use crate::worker::testing::token;

    fn peer(name: &str) -> PeerId {
        PeerId::new(NodeName::new(name).unwrap(), 1)
    }

    fn attempt(request: u128, epoch: u32) -> AttemptId {
        AttemptId { request, epoch }
    }

    fn filled(attempts: &[(u128, u32, &str)]) -> InFlight {
        let mut in_flight = InFlight::default();
        for &(request, epoch, gateway) in attempts {
            in_flight.insert(attempt(request, epoch), false, peer(gateway));
        }
        in_flight
    }

    #[test]
    fn a_later_attempt_takes_the_place_of_an_earlier_one() {
        let mut in_flight = filled(&[(1, 1, "a"), (2, 5, "a"), (1, 2, "a"), (2, 4, "a")]);
        let left = vec![attempt(1, 2), attempt(2, 4), attempt(2, 5)];
        assert_eq!(
            in_flight.take(),
            (Left::from([(peer("a"), left)]), Left::new()),
            "a late command of an earlier attempt ends no later one"
        );
        assert_eq!(in_flight.len(), 0);
    }

    #[test]
    fn a_death_is_laid_at_the_door_of_what_was_computed() {
        let left = |all: &[(&str, u128)]| {
            let mut left = Left::new();
            for &(gateway, request) in all {
                let of_gateway = left.entry(peer(gateway)).or_default();
                of_gateway.push(attempt(request, 1));
            }
            left
        };
        let filled = || {
            let mut in_flight = filled(&[(1, 1, "a"), (2, 1, "b")]);
            in_flight.insert(attempt(3, 1), true, peer("a"));
            in_flight.insert(attempt(4, 1), true, peer("a"));
            in_flight
        };
        // Suspects have no part in the others' steps.
        let mut in_flight = filled();
        let (others, suspects) = (left(&[("a", 1), ("b", 2)]), left(&[("a", 3), ("a", 4)]));
        assert_eq!(in_flight.take(), (others.clone(), suspects));
        // One of them alone.
        let mut in_flight = filled();
        in_flight.begins_alone(attempt(4, 1));
        let rest = left(&[("a", 1), ("a", 3), ("b", 2)]);
        assert_eq!(in_flight.take(), (left(&[("a", 4)]), rest));
        // Nobody else was there.
        let mut in_flight = InFlight::default();
        in_flight.insert(attempt(3, 1), true, peer("a"));
        assert_eq!(in_flight.take(), (left(&[("a", 3)]), Left::new()));
        // Its step is over, and its token clears it.
        let mut in_flight = filled();
        in_flight.begins_alone(attempt(4, 1));
        in_flight.split(vec![token(attempt(4, 1), 0)]);
        let others = left(&[("a", 1), ("a", 4), ("b", 2)]);
        assert_eq!(in_flight.take(), (others, left(&[("a", 3)])));
    }

    #[test]
    fn a_step_is_split_by_gateway_and_finished_attempts_leave() {
        let mut in_flight = filled(&[(1, 1, "a"), (2, 1, "b"), (3, 1, "a")]);
        let last = StepToken {
            finish: Some(FinishReason::Stop),
            ..token(attempt(3, 1), 8)
        };
        let unknown = token(attempt(2, 7), 0);
        let (first, second) = (token(attempt(1, 1), 4), token(attempt(2, 1), 0));
        let step = vec![first.clone(), second.clone(), unknown, last.clone()];
        assert_eq!(
            in_flight.split(step),
            [
                (peer("a"), vec![first, last]),
                (peer("b"), vec![second.clone()])
            ]
        );
        assert_eq!(in_flight.of_gateway(&peer("a")), [attempt(1, 1)]);
        assert_eq!(in_flight.remove(attempt(2, 1)), Some(peer("b")));
        assert_eq!(in_flight.split(vec![second]), []);
    }
}
