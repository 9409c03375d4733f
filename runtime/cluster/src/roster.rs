//! What the hub knows, behind its lock: the configured peers, their sessions, and who has something to tell.
//!
//! Invariant: a peer has one session that is opening or open, and none is admitted while the node server may still know
//! the one before it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::detector::Detector;
use crate::event::{ClusterEvent, DownCause, PeerState, PeerView};
use crate::handshake::Refusal;
use crate::identity::{NodeName, PeerAddress, PeerId};
use crate::membership::{Change, Latest, Membership, may_enter};
use crate::session::{Phase, Session};
use crate::settings::ClusterSettings;

pub(crate) struct State {
    pub(crate) peers: BTreeMap<NodeName, Slot>,
    /// The configured peers, in the order of the configuration.
    order: Vec<NodeName>,
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

/// How a session ended.
pub(crate) struct End {
    pub(crate) session: Arc<Session>,
    pub(crate) cause: DownCause,
    pub(crate) was_open: bool,
    /// Payloads that the consumer had not taken.
    pub(crate) undelivered: usize,
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
        Self {
            peers: settings
                .others()
                .map(|peer| (peer.node.clone(), Slot::new(peer)))
                .collect(),
            order: settings.others().map(|peer| peer.node.clone()).collect(),
            sessions: HashMap::new(),
            lingering: HashMap::new(),
            detector: Detector::new(settings.detector),
            changed: false,
            deliverable: VecDeque::new(),
            leaving: false,
        }
    }

    /// Registers the session as opening, or returns the one that stands in its way.
    pub(crate) fn admit(
        &mut self,
        session: &Arc<Session>,
        now: Duration,
    ) -> Result<Option<Arc<Session>>, Refusal> {
        if self.leaving {
            return Err(Refusal::Leaving);
        }
        let slot = self
            .peers
            .get_mut(&session.peer.node)
            .ok_or(Refusal::UnknownNode)?;
        let incarnation = session.peer.incarnation;
        if !may_enter(slot.latest, incarnation, now) {
            return Err(Refusal::StaleIncarnation);
        }
        let lingering = slot
            .previous
            .iter()
            .filter(|session| session.is_lingering());
        if let Some(obstacle) = slot.current.iter().chain(lingering).next() {
            return Ok(Some(obstacle.clone()));
        }
        slot.latest = Some(Latest {
            incarnation,
            ended: None,
        });
        slot.current = Some(session.clone());
        self.sessions.insert(session.id, session.clone());
        Ok(None)
    }

    /// The session carries messages from now on.
    pub(crate) fn open(&mut self, session: &Session, now: Duration) {
        self.detector.open(session.id, now);
        self.changed = true;
        if let Some(slot) = self.peers.get_mut(&session.peer.node) {
            slot.membership.open(session.id, session.peer.clone());
            slot.last = Some(session.peer.clone());
            slot.last_heard = Some(now);
        }
    }

    /// Ends a session; `None` if it has ended before.
    pub(crate) fn close(&mut self, id: u64, cause: DownCause, now: Duration) -> Option<End> {
        let session = self.sessions.remove(&id)?;
        let cause = match cause {
            DownCause::ConnectionLost if session.has_left() => DownCause::Left,
            cause => cause,
        };
        let was_open = session.phase() == Phase::Open;
        self.detector.close(id);
        self.changed = true;
        if let Some(slot) = self.peers.get_mut(&session.peer.node) {
            slot.close(&session, &cause, was_open, now);
        }
        let abort = matches!(cause, DownCause::Silent(_) | DownCause::Replaced);
        let undelivered = session.close(abort);
        if session.is_lingering() {
            self.lingering.insert(id, session.clone());
        }
        Some(End {
            session,
            cause,
            was_open,
            undelivered,
        })
    }

    /// Every configured peer, in the order of the configuration.
    pub(crate) fn views(&self, now: Duration) -> Vec<PeerView> {
        let slots = self.order.iter().filter_map(|node| self.peers.get(node));
        slots.map(|slot| slot.view(now)).collect()
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

    fn next_change(&mut self) -> Option<ClusterEvent> {
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

    fn close(&mut self, session: &Arc<Session>, cause: &DownCause, was_open: bool, now: Duration) {
        self.membership.close(session.id, cause.clone());
        self.current.take_if(|current| current.id == session.id);
        self.previous = Some(session.clone());
        self.latest = self.latest.map(|latest| Latest {
            ended: Some(now),
            ..latest
        });
        if was_open {
            self.last_heard = Some(session.life.heard());
        }
    }

    fn view(&self, now: Duration) -> PeerView {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Clock, Life};
    use crate::cookie::Cookie;
    use crate::membership::STALE_HOLD;
    use crate::transport::Breaker;

    const SECOND: Duration = Duration::from_secs(1);

    fn name(node: &str) -> NodeName {
        NodeName::new(node).unwrap()
    }

    /// What node `a` knows of `c` and `b`, configured in this order, and of itself.
    fn state() -> State {
        let listen = "127.0.0.1:0".parse().unwrap();
        let mut settings = ClusterSettings::new("t", name("a"), 1, listen, Cookie::generate());
        let address = |node| PeerAddress::at(name(node), listen);
        settings.peers = ["c", "a", "b"].map(address).to_vec();
        State::new(&settings)
    }

    fn session(id: u64, node: &str, incarnation: u64) -> Arc<Session> {
        let peer = PeerId::new(name(node), incarnation);
        let life = Life::begin(Clock::start());
        Arc::new(Session::new(id, peer, life, Breaker::of_nothing(), 1 << 20))
    }

    fn admitted(
        state: &mut State,
        session: &Arc<Session>,
        now: Duration,
    ) -> Result<Option<u64>, Refusal> {
        let outcome = state.admit(session, now);
        outcome.map(|obstacle| obstacle.map(|session| session.id))
    }

    #[test]
    fn peers_are_shown_in_the_order_of_the_configuration_without_this_node() {
        let mut state = state();
        let c = session(1, "c", 5);
        assert_eq!(admitted(&mut state, &c, SECOND), Ok(None));
        let shown = |state: &State| -> Vec<_> {
            let views = state.views(SECOND * 3).into_iter();
            views
                .map(|view| (view.address.node.to_string(), view.state))
                .collect()
        };
        let unseen = |node: &str| (node.to_owned(), PeerState::NeverSeen);
        assert_eq!(
            shown(&state),
            [unseen("c"), unseen("b")],
            "opening is not open"
        );
        state.open(&c, SECOND);
        assert_eq!(shown(&state)[0], ("c".to_owned(), PeerState::Alive));
        state.close(1, DownCause::ConnectionLost, SECOND * 2);
        assert_eq!(
            shown(&state),
            [("c".to_owned(), PeerState::Dead), unseen("b")]
        );
    }

    #[test]
    fn one_session_a_peer_and_the_one_before_must_be_gone() {
        let mut state = state();
        let (first, second) = (session(1, "b", 5), session(2, "b", 5));
        assert_eq!(admitted(&mut state, &first, SECOND), Ok(None));
        first.hand_over();
        assert_eq!(
            admitted(&mut state, &second, SECOND),
            Ok(Some(1)),
            "it is in the way"
        );
        let end = state.close(1, DownCause::Replaced, SECOND).unwrap();
        assert_eq!((end.session.id, end.was_open), (1, false));
        assert!(
            state.close(1, DownCause::Replaced, SECOND).is_none(),
            "once"
        );
        assert_eq!(
            admitted(&mut state, &second, SECOND),
            Ok(Some(1)),
            "it lingers"
        );
        assert!(state.lingering.contains_key(&1));
        first.set_gone();
        assert_eq!(admitted(&mut state, &second, SECOND), Ok(None));
        assert_eq!(state.sessions.keys().copied().collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn an_earlier_run_is_kept_out_while_a_later_one_is_here_and_for_a_while_after() {
        let mut state = state();
        let (zombie, later) = (session(1, "b", 4), session(2, "b", 5));
        assert_eq!(admitted(&mut state, &later, SECOND), Ok(None));
        let refused = Err(Refusal::StaleIncarnation);
        assert_eq!(admitted(&mut state, &zombie, SECOND), refused);
        state.close(2, DownCause::Left, SECOND);
        assert_eq!(admitted(&mut state, &zombie, SECOND * 2), refused);
        assert_eq!(admitted(&mut state, &zombie, SECOND + STALE_HOLD), Ok(None));
    }

    #[test]
    fn strangers_and_late_comers_are_refused() {
        let mut state = state();
        let unknown = Err(Refusal::UnknownNode);
        assert_eq!(admitted(&mut state, &session(1, "d", 1), SECOND), unknown);
        assert_eq!(
            admitted(&mut state, &session(2, "a", 1), SECOND),
            unknown,
            "it is this node"
        );
        state.leaving = true;
        let leaving = Err(Refusal::Leaving);
        assert_eq!(admitted(&mut state, &session(3, "b", 1), SECOND), leaving);
        assert!(state.sessions.is_empty());
    }

    #[test]
    fn the_consumer_hears_of_an_end_only_if_it_heard_of_the_beginning() {
        let mut state = state();
        let b = session(1, "b", 5);
        assert_eq!(admitted(&mut state, &b, SECOND), Ok(None));
        state.close(1, DownCause::ConnectionLost, SECOND);
        assert!(state.next_event().is_none());
        let b = session(2, "b", 5);
        assert_eq!(admitted(&mut state, &b, SECOND), Ok(None));
        state.open(&b, SECOND);
        let up = state.next_event().unwrap().0;
        assert!(matches!(up, ClusterEvent::Up { peer } if peer == b.peer));
        state.close(2, DownCause::Silent(SECOND), SECOND * 2);
        let down = state.next_event().unwrap().0;
        assert!(matches!(
            down,
            ClusterEvent::Down {
                cause: DownCause::Silent(_),
                ..
            }
        ));
        assert!(state.next_event().is_none());
    }
}
