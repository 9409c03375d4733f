//! The attempts that are in the engine, and whose they are. Pure.

use std::collections::{BTreeMap, HashMap};

use understudy_cluster::PeerId;
use understudy_engine_core::frame::{AttemptId, StepToken};

/// See the module. Bounded by what the engine takes: it refuses what is beyond its slots and its queue.
#[derive(Debug, Default)]
pub struct InFlight {
    owners: HashMap<AttemptId, PeerId>,
}

impl InFlight {
    pub fn len(&self) -> usize {
        self.owners.len()
    }

    /// An attempt goes to the engine, in place of the earlier attempts at the same request that it returns.
    pub fn insert(&mut self, attempt: AttemptId, gateway: PeerId) -> Vec<AttemptId> {
        let earlier =
            |known: &AttemptId| known.request == attempt.request && known.epoch < attempt.epoch;
        let displaced: Vec<AttemptId> = self.owners.keys().copied().filter(earlier).collect();
        displaced.iter().for_each(|known| {
            self.owners.remove(known);
        });
        self.owners.insert(attempt, gateway);
        displaced
    }

    pub fn remove(&mut self, attempt: AttemptId) -> Option<PeerId> {
        self.owners.remove(&attempt)
    }

    pub fn of_gateway(&self, gateway: &PeerId) -> Vec<AttemptId> {
        let theirs = self.owners.iter().filter(|(_, owner)| *owner == gateway);
        theirs.map(|(attempt, _)| *attempt).collect()
    }

    /// Each gateway's part of a step. Tokens of attempts that are not here (any more) are dropped; attempts whose last
    /// token this is are here no more.
    pub fn split(&mut self, tokens: Vec<StepToken>) -> Vec<(PeerId, Vec<StepToken>)> {
        let mut parts: Vec<(PeerId, Vec<StepToken>)> = Vec::new();
        for token in tokens {
            let attempt = token.attempt;
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

    /// Takes everything out, in order.
    pub fn take(&mut self) -> BTreeMap<PeerId, Vec<AttemptId>> {
        let mut by_gateway: BTreeMap<PeerId, Vec<AttemptId>> = BTreeMap::new();
        for (attempt, gateway) in self.owners.drain() {
            by_gateway.entry(gateway).or_default().push(attempt);
        }
        by_gateway.values_mut().for_each(|all| all.sort_unstable());
        by_gateway
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
            in_flight.insert(attempt(request, epoch), peer(gateway));
        }
        in_flight
    }

    #[test]
    fn a_later_attempt_takes_the_place_of_an_earlier_one() {
        let mut in_flight = filled(&[(1, 1, "a"), (2, 5, "a"), (1, 2, "a"), (2, 4, "a")]);
        let left = vec![attempt(1, 2), attempt(2, 4), attempt(2, 5)];
        assert_eq!(
            in_flight.take(),
            BTreeMap::from([(peer("a"), left)]),
            "a late command of an earlier attempt ends no later one"
        );
        assert_eq!(in_flight.len(), 0);
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
