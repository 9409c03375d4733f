//! What a peer is, what its consumer was told of it, and which of two runs of a node is the right one. Pure.
//!
//! The difference between what is and what was told is the next event, so that events are never queued: a
//! consumer that is slow misses sessions that came and went in the meantime, but never sees an impossible order.

use std::time::Duration;

use crate::event::DownCause;
use crate::identity::PeerId;

/// How long after its end a run of a node keeps earlier runs of the same node out.
pub(crate) const STALE_HOLD: Duration = Duration::from_secs(10);

/// A session that is open, or that the consumer believes open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) session: u64,
    pub(crate) peer: PeerId,
    pub(crate) suspected: bool,
}

/// A change that the consumer is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Up(PeerId),
    Suspect(PeerId),
    Alive(PeerId),
    Down(PeerId, DownCause),
}

/// One peer's standing, actual and told.
#[derive(Debug, Default)]
pub(crate) struct Membership {
    actual: Option<Standing>,
    told: Option<Standing>,
    /// Why the session that was told of has ended.
    cause: Option<DownCause>,
}

impl Membership {
    /// A session is open.
    pub(crate) fn open(&mut self, session: u64, peer: PeerId) {
        debug_assert!(self.actual.is_none(), "one session per peer");
        self.actual = Some(Standing {
            session,
            peer,
            suspected: false,
        });
    }

    /// The session is suspected, or no longer.
    pub(crate) fn suspect(&mut self, session: u64, suspected: bool) {
        if let Some(actual) = self
            .actual
            .as_mut()
            .filter(|actual| actual.session == session)
        {
            actual.suspected = suspected;
        }
    }

    /// The session is closed.
    pub(crate) fn close(&mut self, session: u64, cause: DownCause) {
        if self
            .actual
            .as_ref()
            .is_some_and(|actual| actual.session == session)
        {
            self.actual = None;
        }
        if self
            .told
            .as_ref()
            .is_some_and(|told| told.session == session)
        {
            self.cause = Some(cause);
        }
    }

    /// The open session.
    pub(crate) fn actual(&self) -> Option<&Standing> {
        self.actual.as_ref()
    }

    /// Whether the consumer knows that this session is open, and it is.
    pub(crate) fn is_told(&self, session: u64) -> bool {
        let is = |standing: &Option<Standing>| {
            standing
                .as_ref()
                .is_some_and(|standing| standing.session == session)
        };
        is(&self.actual) && is(&self.told)
    }

    /// The next thing to tell. What is returned counts as told.
    pub(crate) fn next_change(&mut self) -> Option<Change> {
        match (&mut self.told, &self.actual) {
            (None, None) => None,
            (None, Some(actual)) => {
                self.told = Some(Standing {
                    suspected: false,
                    ..actual.clone()
                });
                Some(Change::Up(actual.peer.clone()))
            }
            (Some(told), Some(actual)) if told.session == actual.session => {
                if told.suspected == actual.suspected {
                    return None;
                }
                told.suspected = actual.suspected;
                let peer = actual.peer.clone();
                Some(if actual.suspected {
                    Change::Suspect(peer)
                } else {
                    Change::Alive(peer)
                })
            }
            (Some(_), _) => {
                let told = self.told.take()?;
                Some(Change::Down(
                    told.peer,
                    self.cause.take().unwrap_or(DownCause::ConnectionLost),
                ))
            }
        }
    }
}

/// The latest run of a node that was met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Latest {
    pub(crate) incarnation: u64,
    /// When its session ended; `None` while it is open or opening.
    pub(crate) ended: Option<Duration>,
}

/// Whether a run of a node may come in. A later one always may, and takes the place of an earlier one. An earlier
/// one is a zombie (stopped, replaced, continued) while a later one is here or was until just now; after that it
/// may, so that a clock that was set back does not lock a node out for good.
pub(crate) fn may_enter(latest: Option<Latest>, incarnation: u64, now: Duration) -> bool {
    match latest {
        Some(latest) if incarnation < latest.incarnation => latest
            .ended
            .is_some_and(|ended| now.saturating_sub(ended) >= STALE_HOLD),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::NodeName;

    fn peer(incarnation: u64) -> PeerId {
        PeerId::new(NodeName::new("p").unwrap(), incarnation)
    }

    fn told(membership: &mut Membership) -> Vec<Change> {
        std::iter::from_fn(|| membership.next_change()).collect()
    }

    #[test]
    fn a_session_from_up_to_down() {
        let mut membership = Membership::default();
        assert_eq!(told(&mut membership), []);
        membership.open(1, peer(5));
        assert!(!membership.is_told(1));
        assert_eq!(told(&mut membership), [Change::Up(peer(5))]);
        assert!(membership.is_told(1));
        membership.suspect(1, true);
        assert_eq!(told(&mut membership), [Change::Suspect(peer(5))]);
        membership.suspect(1, false);
        assert_eq!(told(&mut membership), [Change::Alive(peer(5))]);
        membership.close(1, DownCause::Left);
        assert!(
            !membership.is_told(1),
            "closed at once, before the consumer knows"
        );
        assert_eq!(
            told(&mut membership),
            [Change::Down(peer(5), DownCause::Left)]
        );
    }

    #[test]
    fn down_precedes_every_new_up() {
        let mut membership = Membership::default();
        membership.open(1, peer(5));
        told(&mut membership);
        membership.close(1, DownCause::Replaced);
        membership.open(2, peer(6));
        membership.suspect(2, true);
        assert!(!membership.is_told(2));
        let expected = [
            Change::Down(peer(5), DownCause::Replaced),
            Change::Up(peer(6)),
            Change::Suspect(peer(6)),
        ];
        assert_eq!(told(&mut membership), expected);
    }

    #[test]
    fn a_slow_consumer_misses_whole_sessions_and_nothing_else() {
        let mut membership = Membership::default();
        membership.open(1, peer(5));
        told(&mut membership);
        let silent = DownCause::Silent(Duration::from_secs(1));
        membership.close(1, silent.clone());
        membership.open(2, peer(5));
        membership.close(2, DownCause::ConnectionLost);
        membership.open(3, peer(5));
        membership.suspect(1, true);
        assert_eq!(
            told(&mut membership),
            [Change::Down(peer(5), silent), Change::Up(peer(5))]
        );
        membership.open_and_close_unseen();
    }

    impl Membership {
        fn open_and_close_unseen(mut self) {
            self.close(3, DownCause::Left);
            told(&mut self);
            self.open(4, peer(5));
            self.close(4, DownCause::Left);
            assert_eq!(told(&mut self), []);
        }
    }

    #[test]
    fn random_histories_keep_the_order() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..500 {
            let mut membership = Membership::default();
            let (mut session, mut up) = (0, None);
            for _ in 0..60 {
                match random.u8(0..4) {
                    0 if membership.actual().is_none() => {
                        session += 1;
                        membership.open(session, peer(session));
                    }
                    1 => membership.close(session, DownCause::ConnectionLost),
                    2 => membership.suspect(session, random.bool()),
                    _ => match membership.next_change() {
                        None => {}
                        Some(Change::Up(peer)) => assert_eq!(up.replace((peer, false)), None),
                        Some(Change::Suspect(peer)) => {
                            assert_eq!(up.replace((peer.clone(), true)), Some((peer, false)))
                        }
                        Some(Change::Alive(peer)) => {
                            assert_eq!(up.replace((peer.clone(), false)), Some((peer, true)))
                        }
                        Some(Change::Down(peer, _)) => assert_eq!(up.take().unwrap().0, peer),
                    },
                }
            }
        }
    }

    #[test]
    fn only_a_zombie_is_kept_out() {
        let latest = |ended| {
            Some(Latest {
                incarnation: 5,
                ended,
            })
        };
        let now = Duration::from_secs(100);
        assert!(may_enter(None, 1, now));
        assert!(may_enter(latest(None), 6, now));
        assert!(
            may_enter(latest(None), 5, now),
            "the same run, after a partition"
        );
        assert!(!may_enter(latest(None), 4, now));
        assert!(!may_enter(latest(Some(now - STALE_HOLD / 2)), 4, now));
        assert!(may_enter(latest(Some(now - STALE_HOLD)), 4, now));
    }
}
