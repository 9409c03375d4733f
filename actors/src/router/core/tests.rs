use std::sync::Arc;
use std::time::{Duration, Instant};

use understudy_cluster::{NodeName, PeerId};
use understudy_engine_core::frame::{AttemptId, SamplingParams, StartAttempt};
use understudy_protocol::message::ReplicaStatus;

use super::*;
use crate::peer::ReplicaId;

const LIMITS: Limits = Limits {
    no_replica_timeout: Duration::from_secs(10),
    max_waiting: 4,
    report_timeout: Duration::from_secs(60),
};

type Core = RouterCore<u32>;

fn peer(name: &str, incarnation: u64) -> PeerId {
    PeerId::new(NodeName::new(name).unwrap(), incarnation)
}

fn report(index: u32, state: ReplicaState, fingerprint: &str) -> ReplicaReport {
    let status = ReplicaStatus {
        model: "m".into(),
        node: "n".into(),
        replica: index,
        state: state.as_str().into(),
        in_flight: 0,
        workers: Vec::new(),
    };
    let replica = ReplicaId {
        model: Arc::from("m"),
        index,
    };
    ReplicaReport {
        replica,
        state,
        capacity: 2,
        fingerprint: fingerprint.into(),
        status,
    }
}

fn route(request: u128, epoch: u32) -> Route<u32> {
    Route {
        model: Arc::from("m"),
        start: StartAttempt {
            attempt: AttemptId { request, epoch },
            prompt: vec![1],
            committed: Vec::new(),
            expect_logprobs: Vec::new(),
            suspect: false,
            sampling: SamplingParams::default(),
            ..StartAttempt::default()
        },
        fingerprint: None,
        avoid: Vec::new(),
        shun: None,
        reply: request as u32,
    }
}

fn dispatched(effects: &[Effect<u32>]) -> Vec<(String, u32)> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Dispatch { to, reply, .. } => {
                Some((format!("{}:{}", to.peer.node, to.replica), *reply))
            }
            _ => None,
        })
        .collect()
}

fn two_hosts(now: Instant) -> Core {
    let mut core = Core::new(LIMITS);
    core.report(
        &peer("a", 1),
        vec![report(0, ReplicaState::Ready, "f")],
        now,
    );
    core.report(
        &peer("b", 1),
        vec![report(1, ReplicaState::Ready, "f")],
        now,
    );
    core
}

#[test]
fn work_is_spread_and_waits_when_all_are_full() {
    let now = Instant::now();
    let mut core = two_hosts(now);
    let mut counts = std::collections::BTreeMap::new();
    for request in 0..4 {
        for (place, _) in dispatched(&core.route(route(request, 1), now)) {
            *counts.entry(place).or_insert(0) += 1;
        }
    }
    assert_eq!(counts.values().copied().collect::<Vec<i32>>(), [2, 2]);
    assert!(core.route(route(9, 1), now).is_empty());
    assert_eq!(core.waiting_count(), 1);
    let freed = core.release(
        AttemptId {
            request: 0,
            epoch: 1,
        },
        false,
        now,
    );
    assert_eq!(
        dispatched(&freed).len(),
        1,
        "the place that was freed goes to the one that waits"
    );
}

#[test]
fn a_lost_node_loses_its_attempts_and_nothing_else() {
    let now = Instant::now();
    let mut core = two_hosts(now);
    for request in 0..4 {
        core.route(route(request, 1), now);
    }
    let lost = core.peer_down(&peer("b", 1), now);
    let told: Vec<u32> = lost
        .iter()
        .filter_map(|effect| match effect {
            Effect::Lost {
                cause: LossCause::NodeDown,
                reply,
                ..
            } => Some(*reply),
            _ => None,
        })
        .collect();
    assert_eq!(told.len(), 2);
    assert_eq!(core.running_count(), 2);
    // Should the node live after all, it must not work on.
    let cancelled = lost
        .iter()
        .filter(|effect| matches!(effect, Effect::Cancel { at, .. } if at.peer == peer("b", 1)));
    assert_eq!(cancelled.count(), 2);
    assert!(core.peer_down(&peer("b", 1), now).is_empty(), "once");
}

#[test]
fn another_incarnation_is_another_place() {
    let now = Instant::now();
    let mut core = Core::new(LIMITS);
    core.report(
        &peer("a", 1),
        vec![report(0, ReplicaState::Ready, "f")],
        now,
    );
    core.route(route(1, 1), now);
    core.report(
        &peer("a", 2),
        vec![report(0, ReplicaState::Ready, "f")],
        now,
    );
    core.peer_down(&peer("a", 1), now);
    assert_eq!(core.running_count(), 0);
    assert_eq!(
        dispatched(&core.route(route(1, 2), now)),
        [("a:m/0".to_owned(), 1)]
    );
    let at = core
        .running(AttemptId {
            request: 1,
            epoch: 2,
        })
        .unwrap()
        .0;
    assert_eq!(at.peer.incarnation, 2);
}

#[test]
fn only_the_same_numbers_go_on_with_a_log() {
    let now = Instant::now();
    let mut core = Core::new(LIMITS);
    core.report(
        &peer("a", 1),
        vec![report(0, ReplicaState::Ready, "other")],
        now,
    );
    let wanted = Route {
        fingerprint: Some("mine".into()),
        ..route(1, 2)
    };
    assert!(core.route(wanted, now).is_empty());
    let late = now + LIMITS.no_replica_timeout;
    assert!(matches!(
        &core.tick(late)[..],
        [Effect::Unroutable {
            reason: Unroutable::NoneMatches { .. },
            ..
        }]
    ));
}

#[test]
fn suspects_and_refusers_get_no_new_work() {
    let now = Instant::now();
    let mut core = two_hosts(now);
    core.suspect(&peer("a", 1), true, now);
    assert_eq!(
        dispatched(&core.route(route(1, 1), now)),
        [("b:m/1".to_owned(), 1)]
    );
    let refuser = ReplicaRef {
        peer: peer("b", 1),
        replica: ReplicaId {
            model: Arc::from("m"),
            index: 1,
        },
    };
    assert!(
        core.route(
            Route {
                avoid: vec![refuser],
                ..route(2, 1)
            },
            now
        )
        .is_empty()
    );
    let relieved = core.suspect(&peer("a", 1), false, now);
    assert_eq!(dispatched(&relieved), [("a:m/0".to_owned(), 2)]);
}

#[test]
fn waiting_ends_typed() {
    let now = Instant::now();
    let mut core = Core::new(LIMITS);
    core.report(&peer("a", 1), vec![report(0, ReplicaState::Down, "")], now);
    let all_down = core.route(route(1, 1), now);
    assert!(matches!(
        &all_down[..],
        [Effect::Unroutable {
            reason: Unroutable::AllDown { .. },
            ..
        }]
    ));
    core.report(
        &peer("a", 1),
        vec![report(0, ReplicaState::Starting, "")],
        now,
    );
    assert!(core.route(route(2, 1), now).is_empty());
    assert!(
        core.tick(now + LIMITS.no_replica_timeout - Duration::from_millis(1))
            .is_empty()
    );
    let late = core.tick(now + LIMITS.no_replica_timeout);
    assert!(matches!(
        &late[..],
        [Effect::Unroutable {
            reason: Unroutable::NoneReady { .. },
            ..
        }]
    ));
    for request in 3..7 {
        assert!(core.route(route(request, 1), now).is_empty());
    }
    let refused = core.route(route(8, 1), now);
    assert!(matches!(
        &refused[..],
        [Effect::Unroutable {
            reason: Unroutable::TooManyWaiting { .. },
            ..
        }]
    ));
}

#[test]
fn a_release_with_cancel_reaches_the_host_once() {
    let now = Instant::now();
    let mut core = two_hosts(now);
    core.route(route(1, 1), now);
    let attempt = AttemptId {
        request: 1,
        epoch: 1,
    };
    assert!(matches!(
        &core.release(attempt, true, now)[..],
        [Effect::Cancel { .. }]
    ));
    assert!(core.release(attempt, true, now).is_empty());
    assert!(core.replicas().all(|(.., outstanding)| outstanding == 0));
}

/// Any order of events keeps the books: what runs is what the replicas count.
#[test]
fn outstanding_always_equals_running() {
    for seed in 0..200 {
        let mut random = fastrand::Rng::with_seed(seed);
        let now = Instant::now();
        let mut core = two_hosts(now);
        for step in 0..200_u128 {
            match random.u32(0..6) {
                0 | 1 => drop(core.route(route(step, 1), now)),
                2 => drop(core.release(
                    AttemptId {
                        request: random.u128(0..=step),
                        epoch: 1,
                    },
                    random.bool(),
                    now,
                )),
                3 => drop(core.peer_down(&peer("b", 1), now)),
                4 => drop(core.report(
                    &peer("b", 1),
                    vec![report(1, ReplicaState::Ready, "f")],
                    now,
                )),
                _ => drop(core.suspect(&peer("a", 1), random.bool(), now)),
            }
            let outstanding: u32 = core.replicas().map(|(.., outstanding)| outstanding).sum();
            assert_eq!(
                outstanding as usize,
                core.running_count(),
                "seed {seed}, step {step}"
            );
        }
    }
}

/// Heartbeats live on a thread of their own: a host whose actors are stuck is found by its reports.
#[test]
fn a_host_that_reports_no_more_is_given_up() {
    let start = Instant::now();
    let mut core = two_hosts(start);
    for request in 0..4 {
        core.route(route(request, 1), start);
    }
    let step = Duration::from_millis(100);
    let mut now = start;
    let lost = loop {
        now += step;
        core.report(
            &peer("a", 1),
            vec![report(0, ReplicaState::Ready, "f")],
            now,
        );
        let effects = core.tick(now);
        if !effects.is_empty() {
            break effects;
        }
    };
    assert_eq!(now - start, LIMITS.report_timeout);
    assert!(matches!(&lost[0], Effect::Silent(silent) if *silent == peer("b", 1)));
    let count = |wanted: fn(&Effect<u32>) -> bool| lost.iter().filter(|e| wanted(e)).count();
    assert_eq!(count(|e| matches!(e, Effect::Lost { .. })), 2);
    assert_eq!(count(|e| matches!(e, Effect::Cancel { .. })), 2);
    core.report(
        &peer("b", 1),
        vec![report(1, ReplicaState::Ready, "f")],
        now,
    );
    assert_eq!(
        dispatched(&core.route(route(9, 1), now)),
        [("b:m/1".to_owned(), 9)],
        "its next report brings it back"
    );
}

#[test]
fn a_router_that_was_held_up_blames_nobody() {
    let start = Instant::now();
    let mut core = two_hosts(start);
    core.route(route(1, 1), start);
    core.tick(start);
    assert!(core.tick(start + 10 * LIMITS.report_timeout).is_empty());
    assert_eq!(core.running_count(), 1);
}

#[test]
fn who_has_just_refused_is_asked_last() {
    let now = Instant::now();
    let mut core = two_hosts(now);
    let refuser = ReplicaRef {
        peer: peer("a", 1),
        replica: ReplicaId {
            model: Arc::from("m"),
            index: 0,
        },
    };
    let mut places = Vec::new();
    for request in 0..4 {
        let shunning = Route {
            shun: Some(refuser.clone()),
            ..route(request, 2)
        };
        places.extend(dispatched(&core.route(shunning, now)));
    }
    let at: Vec<&str> = places.iter().map(|(place, _)| place.as_str()).collect();
    assert_eq!(at, ["b:m/1", "b:m/1", "a:m/0", "a:m/0"]);
}

#[test]
fn a_log_that_every_replica_refused_fails_and_says_so() {
    let now = Instant::now();
    let mut core = Core::new(LIMITS);
    core.report(
        &peer("a", 1),
        vec![report(0, ReplicaState::Ready, "f")],
        now,
    );
    let refuser = ReplicaRef {
        peer: peer("a", 1),
        replica: ReplicaId {
            model: Arc::from("m"),
            index: 0,
        },
    };
    let avoiding = Route {
        avoid: vec![refuser],
        ..route(1, 2)
    };
    // A node that is away may come back with one that takes it.
    assert!(core.route(avoiding, now).is_empty());
    assert!(matches!(
        &core.tick(now + LIMITS.no_replica_timeout)[..],
        [Effect::Unroutable {
            reason: Unroutable::AllRefused { .. },
            ..
        }]
    ));
}
