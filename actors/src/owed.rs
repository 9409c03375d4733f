//! What gateways could not be told: attempts that are over on this host, and whose gateway does not know.
//!
//! A message to a gateway that is too far behind is dropped. If it was about an attempt, the gateway would wait for that
//! attempt until its request's deadline; so the attempt is noted here, and told as lost as soon as there is room. The
//! notes belong to the node and not to a worker: they outlive the engine that they are about.
//!
//! Invariant: a noted attempt is told, or its gateway is gone, or has said that it does not wait for it any more.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use understudy_cluster::PeerId;
use understudy_engine_core::frame::AttemptId;

/// Notes kept for one gateway at most. It has no more attempts here than the replicas' capacities add up to, and what it
/// gives up it cancels, so this is only reached if it does neither; then attempts end by their deadlines. All of them
/// fit into one message (about 40 bytes each).
pub const MAX_OWED_PER_PEER: usize = 65_536;

/// See the module. Cheap to clone; all clones share the notes.
#[derive(Debug, Clone, Default)]
pub struct Owed {
    notes: Arc<Mutex<HashMap<PeerId, BTreeSet<AttemptId>>>>,
}

impl Owed {
    /// Notes attempts that `peer` has to be told about. Returns how many found no place.
    pub fn note(&self, peer: &PeerId, attempts: impl IntoIterator<Item = AttemptId>) -> usize {
        let mut notes = self.lock();
        let of_peer = notes.entry(peer.clone()).or_default();
        let mut left_out = 0;
        for attempt in attempts {
            forget_earlier_epochs(of_peer, attempt);
            if of_peer.len() < MAX_OWED_PER_PEER || of_peer.contains(&attempt) {
                of_peer.insert(attempt);
            } else {
                left_out += 1;
            }
        }
        left_out
    }

    /// Takes all notes out, to try again to tell them.
    pub fn take(&self) -> Vec<(PeerId, Vec<AttemptId>)> {
        let taken = std::mem::take(&mut *self.lock());
        taken
            .into_iter()
            .map(|(peer, attempts)| (peer, attempts.into_iter().collect()))
            .collect()
    }

    /// The gateway is gone, and its requests with it.
    pub fn forget(&self, peer: &PeerId) {
        self.lock().remove(peer);
    }

    /// The attempt's gateway does not wait for it any more.
    pub fn settle(&self, attempt: AttemptId) {
        self.lock().retain(|_, attempts| {
            attempts.remove(&attempt);
            !attempts.is_empty()
        });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PeerId, BTreeSet<AttemptId>>> {
        // The map is whole between any two operations, whatever else panicked.
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A gateway that has started a later attempt at a request does not listen to an earlier one.
fn forget_earlier_epochs(noted: &mut BTreeSet<AttemptId>, attempt: AttemptId) {
    let first = AttemptId {
        epoch: 0,
        ..attempt
    };
    while let Some(earlier) = noted.range(first..attempt).next().copied() {
        noted.remove(&earlier);
    }
}

#[cfg(test)]
mod tests {
    use understudy_cluster::NodeName;

    use super::*;

    fn peer(name: &str) -> PeerId {
        PeerId::new(NodeName::new(name).unwrap(), 1)
    }

    fn attempt(request: u128, epoch: u32) -> AttemptId {
        AttemptId { request, epoch }
    }

    #[test]
    fn notes_are_taken_once_and_forgotten_with_their_gateway() {
        let owed = Owed::default();
        owed.note(&peer("a"), [attempt(2, 1), attempt(1, 1), attempt(2, 1)]);
        owed.clone().note(&peer("b"), [attempt(3, 1)]);
        owed.forget(&peer("b"));
        let expected = vec![(peer("a"), vec![attempt(1, 1), attempt(2, 1)])];
        assert_eq!(owed.take(), expected);
        assert_eq!(owed.take(), vec![]);
    }

    #[test]
    fn what_nobody_waits_for_is_not_kept() {
        let owed = Owed::default();
        owed.note(&peer("a"), [attempt(1, 1), attempt(1, 2), attempt(2, 4)]);
        owed.settle(attempt(2, 4));
        owed.settle(attempt(9, 9));
        assert_eq!(owed.take(), vec![(peer("a"), vec![attempt(1, 2)])]);
        owed.note(&peer("a"), [attempt(1, 1)]);
        owed.settle(attempt(1, 1));
        assert_eq!(owed.take(), vec![]);
    }

    #[test]
    fn a_gateway_that_never_hears_is_bounded() {
        let owed = Owed::default();
        let requests = MAX_OWED_PER_PEER as u128;
        let all = |epoch| (0..requests).map(move |request| attempt(request, epoch));
        assert_eq!(owed.note(&peer("a"), all(1)), 0);
        assert_eq!(owed.note(&peer("a"), [attempt(requests, 1)]), 1);
        assert_eq!(
            owed.note(&peer("a"), all(2)),
            0,
            "a later epoch takes the place of an earlier one"
        );
        assert_eq!(owed.note(&peer("b"), [attempt(requests, 1)]), 0);
        let noted: usize = owed.take().iter().map(|(_, attempts)| attempts.len()).sum();
        assert_eq!(noted, MAX_OWED_PER_PEER + 1);
    }
}
