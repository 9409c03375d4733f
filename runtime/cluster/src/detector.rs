//! The failure detector: who is silent for too long. Pure: time comes in, actions come out.
//!
//! A session is *suspected* after `suspect_after` without a byte from it and *dead* after `dead_after`. Anything
//! received is life, not only heartbeats, so bulk traffic cannot get a busy peer declared dead.
//!
//! Invariant: time in which this process itself did not run is not held against others. Each tick says when it
//! wants to be called again; when it is called later than that by more than a heartbeat interval (we were stopped,
//! or starved), the lateness is added to everybody's allowance, because their signs of life may lie unread in our
//! own sockets. So that a process that is starved *all* the time still finds its dead, one silence is excused at
//! most [`MAX_EXCUSES`] times.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::settings::DetectorSettings;

/// How often our own lateness may prolong one silence of a peer.
pub(crate) const MAX_EXCUSES: u32 = 8;

/// Least time between two ticks.
const LEAST_WAIT: Duration = Duration::from_micros(200);

/// Names a session in this detector.
pub(crate) type Key = u64;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Send a heartbeat on every session.
    Beat,
    /// The session is silent: stop trusting it.
    Suspect(Key),
    /// It was suspected, and is heard again.
    Alive(Key),
    /// It was silent for this long: close it. It is forgotten here.
    Dead(Key, Duration),
}

/// The state of the detector.
#[derive(Debug)]
pub(crate) struct Detector {
    settings: DetectorSettings,
    sessions: BTreeMap<Key, Watch>,
    next_beat: Duration,
    /// When the next tick is due; `None` before the first.
    due: Option<Duration>,
}

#[derive(Debug, Clone, Copy)]
struct Watch {
    heard: Duration,
    /// Our own lateness that counts in the peer's favour.
    excused: Duration,
    excuses: u32,
    suspected: bool,
}

impl Watch {
    fn hear(&mut self, at: Duration) {
        if at > self.heard {
            *self = Self {
                heard: at,
                excused: Duration::ZERO,
                excuses: 0,
                suspected: self.suspected,
            };
        }
    }

    fn excuse(&mut self, lateness: Duration) {
        if self.excuses < MAX_EXCUSES {
            self.excuses += 1;
            self.excused += lateness;
        }
    }

    fn silence(&self, now: Duration) -> Duration {
        now.saturating_sub(self.heard + self.excused)
    }
}

impl Detector {
    pub(crate) fn new(settings: DetectorSettings) -> Self {
        Self {
            settings,
            sessions: BTreeMap::new(),
            next_beat: Duration::ZERO,
            due: None,
        }
    }

    /// Watches a session from `now` on.
    pub(crate) fn open(&mut self, key: Key, now: Duration) {
        let watch = Watch {
            heard: now,
            excused: Duration::ZERO,
            excuses: 0,
            suspected: false,
        };
        self.sessions.insert(key, watch);
    }

    /// Watches a session no longer.
    pub(crate) fn close(&mut self, key: Key) {
        self.sessions.remove(&key);
    }

    /// The session was heard from at `at`; older news is no news.
    pub(crate) fn hear(&mut self, key: Key, at: Duration) {
        if let Some(watch) = self.sessions.get_mut(&key) {
            watch.hear(at);
        }
    }

    /// Looks at the clock. To be called again at [`Detector::due`].
    pub(crate) fn tick(&mut self, now: Duration) -> Vec<Action> {
        self.excuse_lateness(now);
        let mut actions = Vec::new();
        if now >= self.next_beat {
            self.next_beat = now + self.settings.heartbeat_interval;
            actions.push(Action::Beat);
        }
        let DetectorSettings {
            suspect_after,
            dead_after,
            ..
        } = self.settings;
        self.sessions.retain(|&key, watch| {
            let silence = watch.silence(now);
            if silence >= dead_after {
                actions.push(Action::Dead(key, now.saturating_sub(watch.heard)));
                return false;
            }
            if watch.suspected != (silence >= suspect_after) {
                watch.suspected = !watch.suspected;
                actions.push(if watch.suspected {
                    Action::Suspect(key)
                } else {
                    Action::Alive(key)
                });
            }
            true
        });
        self.due = Some(self.next_due(now));
        actions
    }

    /// When the next tick is due.
    pub(crate) fn due(&self) -> Duration {
        self.due.unwrap_or_default()
    }

    fn excuse_lateness(&mut self, now: Duration) {
        let Some(due) = self.due else {
            return;
        };
        let lateness = now.saturating_sub(due);
        if lateness > self.settings.heartbeat_interval {
            // Who was heard since then needs no excuse: its signs of life were read in spite of our lateness.
            self.sessions
                .values_mut()
                .filter(|watch| watch.heard < due)
                .for_each(|watch| watch.excuse(lateness));
        }
    }

    /// The next heartbeat or threshold, or soon when a suspect may have recovered.
    fn next_due(&self, now: Duration) -> Duration {
        let DetectorSettings {
            heartbeat_interval,
            suspect_after,
            dead_after,
        } = self.settings;
        let threshold = |watch: &Watch| {
            let limit = if watch.suspected {
                dead_after
            } else {
                suspect_after
            };
            watch.heard + watch.excused + limit
        };
        let look = match self.sessions.values().any(|watch| watch.suspected) {
            true => now + heartbeat_interval / 8,
            false => self.next_beat,
        };
        let first = self.sessions.values().map(threshold).min().unwrap_or(look);
        first.min(look).min(self.next_beat).max(now + LEAST_WAIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Ticks whenever due until `until`, with `hear` called before each tick; returns (ms, action) without beats.
    fn run(
        detector: &mut Detector,
        from_ms: u32,
        until_ms: u32,
        mut hear: impl FnMut(&mut Detector, Duration),
    ) -> Vec<(u128, Action)> {
        let mut now = MS * from_ms;
        let mut seen = Vec::new();
        while now <= MS * until_ms {
            hear(detector, now);
            let actions = detector
                .tick(now)
                .into_iter()
                .filter(|action| *action != Action::Beat);
            seen.extend(actions.map(|action| (now.as_millis(), action)));
            now = detector.due();
        }
        seen
    }

    fn watching(keys: &[Key]) -> Detector {
        let mut detector = Detector::new(DetectorSettings::default());
        keys.iter()
            .for_each(|&key| detector.open(key, Duration::ZERO));
        detector
    }

    #[test]
    fn silence_is_suspected_then_dead_at_the_exact_times() {
        let seen = run(&mut watching(&[1]), 0, 3000, |_, _| {});
        assert_eq!(
            seen,
            [
                (600, Action::Suspect(1)),
                (1000, Action::Dead(1, MS * 1000))
            ]
        );
    }

    #[test]
    fn a_peer_that_is_heard_stays_alive() {
        let seen = run(&mut watching(&[1]), 0, 60_000, |detector, now| {
            let last_beat = Duration::from_millis(now.as_millis() as u64 / 200 * 200);
            detector.hear(1, last_beat);
        });
        assert_eq!(seen, []);
    }

    #[test]
    fn suspicion_is_lifted_by_one_sign_of_life() {
        let seen = run(&mut watching(&[1, 2]), 0, 1400, |detector, now| {
            detector.hear(2, now);
            if now >= MS * 700 {
                detector.hear(1, MS * 700);
            }
        });
        let (at, last) = &seen[1];
        assert_eq!(
            (seen.len(), seen[0].clone(), last),
            (3, (600, Action::Suspect(1)), &Action::Alive(1))
        );
        assert!((700..=730).contains(at), "{at}");
        assert_eq!(seen[2], (1300, Action::Suspect(1)));
    }

    #[test]
    fn flapping_never_kills_and_old_news_is_ignored() {
        let mut heard = Duration::ZERO;
        let seen = run(&mut watching(&[1]), 0, 20_000, |detector, now| {
            if now.saturating_sub(heard) >= MS * 900 {
                heard = now;
            }
            detector.hear(1, heard);
            detector.hear(1, heard / 2);
        });
        assert!(seen.len() > 40, "{}", seen.len());
        assert!(
            seen.iter()
                .all(|(_, action)| !matches!(action, Action::Dead(..)))
        );
        assert!(
            seen.windows(2).all(|pair| pair[0].1 != pair[1].1),
            "suspect and alive take turns"
        );
    }

    #[test]
    fn our_own_long_pause_kills_nobody_who_lives() {
        let mut detector = watching(&[1, 2]);
        run(&mut detector, 0, 200, |detector, now| {
            detector.hear(1, now);
            detector.hear(2, now);
        });
        // Stopped for an hour. The first tick comes before anything could be read from the sockets.
        let seen = run(&mut detector, 3_600_000, 3_603_000, |detector, now| {
            if now > MS * 3_600_050 {
                detector.hear(1, now);
            }
        });
        let dead: Vec<_> = seen
            .iter()
            .filter(|(_, action)| matches!(action, Action::Dead(..)))
            .collect();
        assert_eq!(dead.len(), 1, "{seen:?}");
        assert!(
            matches!(dead[0], (at, Action::Dead(2, _)) if (3_600_700..=3_601_100).contains(at)),
            "{seen:?}"
        );
    }

    #[test]
    fn our_lateness_excuses_nobody_who_was_heard_in_the_meantime() {
        let mut detector = watching(&[1, 2]);
        assert_eq!(detector.tick(Duration::ZERO), [Action::Beat]);
        assert_eq!(detector.due(), MS * 200);
        // The tick comes 300 ms late; by then 1 has been heard, 2 has not.
        detector.hear(1, MS * 450);
        let seen = run(&mut detector, 500, 1500, |_, _| {});
        let suspected = |key| {
            let is_it = |action: &Action| *action == Action::Suspect(key);
            seen.iter().find(|(_, action)| is_it(action)).map(|it| it.0)
        };
        assert_eq!((suspected(1), suspected(2)), (Some(1050), Some(900)));
    }

    #[test]
    fn a_starved_process_still_finds_its_dead() {
        let mut detector = watching(&[1]);
        let late = MS * 250;
        let mut now = Duration::ZERO;
        while !detector
            .tick(now)
            .iter()
            .any(|action| matches!(action, Action::Dead(..)))
        {
            assert!(now < MS * 10_000, "must end");
            now = detector.due() + late;
        }
        assert!(now >= MS * 2000 && now < MS * 4500, "{now:?}");
    }

    #[test]
    fn beats_come_once_per_interval() {
        let mut detector = watching(&[]);
        let mut beats = Vec::new();
        let mut now = Duration::ZERO;
        while now <= MS * 2000 {
            if detector.tick(now).contains(&Action::Beat) {
                beats.push(now.as_millis());
            }
            now = detector.due();
        }
        assert_eq!(
            beats,
            [0, 200, 400, 600, 800, 1000, 1200, 1400, 1600, 1800, 2000]
        );
    }

    #[test]
    fn a_closed_session_is_forgotten() {
        let mut detector = watching(&[1]);
        detector.close(1);
        detector.hear(1, MS);
        assert_eq!(run(&mut detector, 0, 3000, |_, _| {}), []);
    }
}
