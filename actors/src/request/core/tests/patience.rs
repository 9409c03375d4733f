//! What comes to an end: requests that kill engines, and replicas that go on refusing.

use super::*;

/// A request on which engines die again and again is the one that kills them: it ends, and takes no more along.
#[test]
fn a_request_that_kills_engines_is_ended_for_good() {
    let now = Instant::now();
    let settings = Settings {
        max_attempts: 100,
        max_engine_deaths: 3,
        ..SETTINGS
    };
    let mut core = core_with(&[], settings);
    core.attach(1, 0, 100).unwrap();
    // Engines that somebody kills, nodes that leave, and messages that are lost, are no evidence.
    for cause in [
        LossCause::EngineGone,
        LossCause::NodeDown,
        LossCause::Stopped,
        LossCause::Gap,
    ] {
        for _ in 0..5 {
            assert!(terminals(&core.lost(core.epoch(), cause, now)).is_empty());
        }
    }
    core.lost(core.epoch(), LossCause::EngineExit, now);
    core.lost(core.epoch(), LossCause::EngineHang, now);
    // A token shows that it is not that request.
    core.tokens(vec![token(core.epoch(), 0, 2)], now);
    core.lost(core.epoch(), LossCause::EngineExit, now);
    core.lost(core.epoch(), LossCause::EngineExit, now);
    let end = core.lost(core.epoch(), LossCause::EngineExit, now);
    let [ServerMessage::Error { error, .. }] = terminals(&end)[..] else {
        panic!("one end")
    };
    assert_eq!(
        (error.code, error.retriable),
        (ErrorCode::AttemptsExhausted, false)
    );
    assert!(end.contains(&Effect::Observe(Observation::Quarantined)));
}

fn full() -> Refusal {
    Refusal::Engine(AttemptError::Full {
        running: 1,
        waiting: 1,
        limit: 2,
    })
}

#[test]
fn a_full_engine_is_no_lost_attempt_and_not_asked_for_ever() {
    let start = Instant::now();
    let mut core = core(&[]);
    core.attach(1, 0, 100).unwrap();
    let mut now = start;
    while now < start + SETTINGS.no_replica_timeout {
        core.dispatched(core.epoch(), at("a"), "f".into(), now);
        let effects = core.refused(core.epoch(), full(), now);
        let after = effects.iter().find_map(|e| match e {
            Effect::Route { after, shun, .. } => {
                assert_eq!(*shun, Some(at("a")), "any other replica is better");
                Some(*after)
            }
            _ => None,
        });
        let after = after.expect("asked again");
        assert!(!after.is_zero());
        assert_eq!(core.stage(), Stage::Queued, "no engine ever took it");
        now += after;
    }
    let end = core.refused(core.epoch(), full(), now);
    let [ServerMessage::Error { error, .. }] = terminals(&end)[..] else {
        panic!("one end")
    };
    assert_eq!(error.code, ErrorCode::Overloaded);
    assert!(error.retriable);
}

#[test]
fn progress_starts_the_time_of_refusals_over() {
    let start = Instant::now();
    let mut core = core(&[]);
    core.refused(1, full(), start);
    core.tokens(vec![token(2, 0, 2)], start);
    core.lost(2, LossCause::NodeDown, start);
    let late = start + SETTINGS.no_replica_timeout;
    core.refused(3, full(), late);
    assert!(core.outcome().is_none());
}

/// Whoever had a place, and lost it with its engine, has not been waiting for one all that time.
#[test]
fn a_fail_over_starts_the_time_of_refusals_over() {
    let start = Instant::now();
    let mut core = core(&[]);
    core.refused(1, full(), start);
    core.dispatched(2, at("a"), "f".into(), start);
    let late = start + 2 * SETTINGS.no_replica_timeout;
    core.lost(2, LossCause::EngineExit, late);
    core.refused(3, full(), late);
    assert!(core.outcome().is_none());
}
