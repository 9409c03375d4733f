//! Relations between numbers: what must be shorter than what, so that detection and recovery can work at all.

use crate::load::ClusterConfig;
use crate::schema::Reader;

pub(super) fn check(config: &ClusterConfig, reader: &mut Reader<'_>) {
    let detector = &config.failure_detector;
    let mut relate =
        |section: &str, small: (&str, u64), factor: u64, big: (&str, u64), why: &str| {
            let holds = small
                .1
                .checked_mul(factor)
                .is_some_and(|least| least <= big.1);
            if !holds {
                let problem = relation(reader, section, small, factor, big).help(why);
                reader.problems.push(problem);
            }
        };
    let section = "failure_detector";
    let interval = ("heartbeat_interval_ms", detector.heartbeat_interval_ms);
    let suspect = ("suspect_after_ms", detector.suspect_after_ms);
    let dead = ("dead_after_ms", detector.dead_after_ms);
    let engine = (
        "engine_heartbeat_timeout_ms",
        detector.engine_heartbeat_timeout_ms,
    );
    relate(
        section,
        interval,
        2,
        suspect,
        "one late heartbeat must not make a node suspect",
    );
    relate(
        section,
        (suspect.0, suspect.1.saturating_add(1)),
        1,
        dead,
        "a node is suspected before it is declared dead",
    );
    relate(
        section,
        interval,
        2,
        engine,
        "one late heartbeat must not kill an engine",
    );

    let restart = &config.restart;
    let first = ("backoff_initial_ms", restart.backoff_initial_ms);
    relate(
        "restart",
        first,
        1,
        ("backoff_max_ms", restart.backoff_max_ms),
        "the wait grows from the initial one to the longest",
    );

    let gateway = &config.gateway;
    let default = ("default_deadline_ms", gateway.default_deadline_ms);
    relate(
        "gateway",
        default,
        1,
        ("max_deadline_ms", gateway.max_deadline_ms),
        "the default must itself be allowed",
    );
}

/// The problem stands at the key that the file gives; a default that does not fit is named in words.
fn relation(
    reader: &Reader<'_>,
    section: &str,
    small: (&str, u64),
    factor: u64,
    big: (&str, u64),
) -> crate::problem::Problem {
    let (small_key, big_key) = (
        format!("{section}.{}", small.0),
        format!("{section}.{}", big.0),
    );
    let origin = |key: &str| {
        if reader.is_given(key) {
            ""
        } else {
            " (the default)"
        }
    };
    let times = if factor == 1 {
        String::new()
    } else {
        format!("{factor} times ")
    };
    if reader.is_given(&big_key) {
        let message = format!(
            "{} is too short beside `{}`{}",
            big.1,
            small.0,
            origin(&small_key)
        );
        reader
            .problem_at(&big_key, message)
            .allowed(format!("at least {}", small.1.saturating_mul(factor)))
    } else {
        let message = format!(
            "too long: {times}`{}` must not exceed `{}`{}",
            small.0,
            big.0,
            origin(&big_key)
        );
        reader.problem_at(&small_key, message).allowed(format!(
            "at most {}, or a longer `{}`",
            big.1 / factor,
            big.0
        ))
    }
}
