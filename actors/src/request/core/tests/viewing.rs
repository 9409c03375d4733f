//! Who is shown what, when: cancelled streams, full connections, long logs.

use super::*;

/// Whoever cancels has no use for what is left, and must not have to pay for the end of it.
#[test]
fn a_cancelled_stream_ends_without_credit() {
    let now = Instant::now();
    let mut core = core(&[]);
    core.attach(1, 0, 1).unwrap();
    for position in 0..5 {
        core.tokens(vec![token(1, position, position)], now);
    }
    let effects = core.cancel(now);
    assert!(shown(&effects).is_empty());
    assert!(matches!(
        terminals(&effects)[..],
        [ServerMessage::Finished {
            finish_reason: FinishReason::Cancelled,
            ..
        }]
    ));
    assert!(core.is_over());
    // The log is whole for whoever reads it again.
    let again = core.attach(2, 0, 100).unwrap();
    assert_eq!(shown(&again).len(), 5);
}

#[test]
fn a_cancel_after_the_end_still_gives_the_end() {
    let now = Instant::now();
    let mut core = core(&[]);
    core.attach(1, 0, 1).unwrap();
    let ids = [2, 3, 9];
    for (position, id) in ids.into_iter().enumerate() {
        core.tokens(vec![token(1, position as u32, id)], now);
    }
    assert!(!core.is_over());
    assert_eq!(terminals(&core.cancel(now)).len(), 1);
    assert!(core.is_over());
}

#[test]
fn a_connection_that_is_full_holds_the_stream_and_lets_it_go_on() {
    let now = Instant::now();
    let mut core = core(&[]);
    core.attach(1, 0, 100).unwrap();
    core.hold(true);
    for (position, id) in [2, 3, 9].into_iter().enumerate() {
        let effects = core.tokens(vec![token(1, position as u32, id)], now);
        assert!(shown(&effects).is_empty() && terminals(&effects).is_empty());
    }
    let effects = core.hold(false);
    assert_eq!((shown(&effects).len(), terminals(&effects).len()), (3, 1));
}

#[test]
fn a_long_log_is_shown_in_several_turns() {
    let now = Instant::now();
    let mut core = core(&[]);
    let total = 600;
    for position in 0..total {
        core.tokens(vec![token(1, position, 2)], now);
    }
    let mut effects = core.attach(1, 0, 10_000).unwrap();
    let (mut seen, mut turns) = (shown(&effects).len(), 1);
    while effects.contains(&Effect::More) {
        effects = core.more();
        seen += shown(&effects).len();
        turns += 1;
    }
    assert_eq!((seen, turns), (total as usize, 3));
}
