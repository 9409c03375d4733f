//! What the hub knows, behind its lock: the configured peers, their sessions, and who has something to tell.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::detector::Detector;
use crate::event::{ClusterEvent, PeerState, PeerView};
use crate::identity::{NodeName, PeerAddress, PeerId};
use crate::membership::{Change, Latest, Membership};
use crate::session::Session;
use crate::settings::ClusterSettings;

pub(crate) struct State {
    pub(crate) peers: BTreeMap<NodeName, Slot>,
    pub(crate) sessions: HashMap<u64, Arc<Session>>,
    /// Closed sessions that the node server may still know.
    pub(crate) lingering: HashMap<u64, Arc<Session>>,
    pub(crate) detector: Detector,
    /// Some membership may have something to tell.
    pub(crate) changed: bool,
    /// Open sessions with something to deliver, each once.
    pub(crate) deliverable: VecDeque<u64>,
    pub(crate) leaving: bool,
}

pub(crate) struct Slot {
    pub(crate) address: PeerAddress,
    pub(crate) membership: Membership,
    /// The session that is opening or open.
    pub(crate) current: Option<Arc<Session>>,
    /// The one before it.
    pub(crate) previous: Option<Arc<Session>>,
    pub(crate) latest: Option<Latest>,
    /// The last run that was in session.
    pub(crate) last: Option<PeerId>,
    pub(crate) last_heard: Option<Duration>,
}

impl State {
    /// Knows the configured peers, and has met none.
    pub(crate) fn new(settings: &ClusterSettings) -> Self {
        let others = settings
            .peers
            .iter()
            .filter(|peer| peer.node != settings.node);
        Self {
            peers: others
                .map(|peer| (peer.node.clone(), Slot::new(peer)))
                .collect(),
            sessions: HashMap::new(),
            lingering: HashMap::new(),
            detector: Detector::new(settings.detector),
            changed: false,
            deliverable: VecDeque::new(),
            leaving: false,
        }
    }

    pub(crate) fn list(&mut self, session: &Session) {
        if !session.listed.swap(true, Ordering::Relaxed) {
            self.deliverable.push_back(session.id);
        }
    }

    pub(crate) fn next_event(&mut self) -> Option<(ClusterEvent, Option<Arc<Session>>)> {
        if let Some(change) = self.next_change() {
            return Some((change, None));
        }
        while let Some(id) = self.deliverable.pop_front() {
            let Some(session) = self.sessions.get(&id).cloned() else {
                continue;
            };
            session.listed.store(false, Ordering::Relaxed);
            let slot = self.peers.get(&session.peer.node);
            if !slot.is_some_and(|slot| slot.membership.is_told(id)) {
                // Listed again as soon as the consumer is told.
                continue;
            }
            if let Some((payload, acknowledge)) = session.take() {
                let event = ClusterEvent::Message {
                    from: session.peer.clone(),
                    payload,
                };
                if !session.is_drained() {
                    self.list(&session);
                }
                return Some((event, acknowledge.then_some(session)));
            }
        }
        None
    }

    pub(crate) fn next_change(&mut self) -> Option<ClusterEvent> {
        if !self.changed {
            return None;
        }
        let mut slots = self.peers.values_mut();
        let change = slots.find_map(|slot| {
            slot.membership
                .next_change()
                .map(|change| (change, slot.current.clone()))
        });
        let Some((change, current)) = change else {
            self.changed = false;
            return None;
        };
        Some(match change {
            Change::Up(peer) => {
                // It may have been faster than the news of it.
                current
                    .iter()
                    .filter(|session| !session.is_drained())
                    .for_each(|session| self.list(session));
                ClusterEvent::Up { peer }
            }
            Change::Suspect(peer) => ClusterEvent::Suspect { peer },
            Change::Alive(peer) => ClusterEvent::Alive { peer },
            Change::Down(peer, cause) => ClusterEvent::Down { peer, cause },
        })
    }
}

impl Slot {
    fn new(address: &PeerAddress) -> Self {
        Self {
            address: address.clone(),
            membership: Membership::default(),
            current: None,
            previous: None,
            latest: None,
            last: None,
            last_heard: None,
        }
    }

    pub(crate) fn view(&self, now: Duration) -> PeerView {
        let open = self.membership.actual();
        let state = match open {
            Some(standing) if standing.suspected => PeerState::Suspect,
            Some(_) => PeerState::Alive,
            None if self.last.is_some() => PeerState::Dead,
            None => PeerState::NeverSeen,
        };
        let current = self.current.as_ref().filter(|_| open.is_some());
        let heard = current
            .map(|session| session.life.heard())
            .or(self.last_heard);
        PeerView {
            address: self.address.clone(),
            id: self.last.clone(),
            state,
            last_heard: heard.map(|heard| now.saturating_sub(heard)),
            send_queue_bytes: current.map_or(0, |session| {
                usize::try_from(session.backlog()).unwrap_or(usize::MAX)
            }),
            receive_queue_bytes: current.map_or(0, |session| session.untaken()),
        }
    }
}
