//! Blocks: who shares them, who has to give them up, and what fits at all.

use super::*;
use crate::{blocks::BlockHash, kv_frame::KvTransferError};

fn sampling(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        ignore_eos: true,
        max_tokens,
        ..SamplingParams::default()
    }
}

fn lab(max_sequences: usize, kv_blocks: usize, step_tokens: usize) -> Lab {
    let model = FakeOptions {
        max_sequences,
        kv_blocks: Some(kv_blocks),
        ..model()
    };
    let max_waiting = 8;
    Lab::new(
        model,
        SchedulerOptions {
            max_waiting,
            step_tokens,
        },
    )
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|index| index * 7 % 48).collect()
}

#[test]
fn a_known_prefix_is_not_computed_again_but_for_the_block_of_the_last_token() {
    for (length, hits) in [(16, 0), (17, 16), (32, 16), (33, 32), (40, 32)] {
        let mut lab = lab(2, 20, 99);
        let first = start(1, &prompt(length), &sampling(3));
        lab.start(&first);
        lab.run();
        let second = start(2, &prompt(length), &sampling(3));
        lab.start(&second);
        lab.run();
        assert_eq!(lab.scheduler.totals().prefix_hit_tokens, hits);
        assert_eq!(lab.output(second.attempt), alone(&model(), &second));
        let salted = StartAttempt {
            cache_salt: 1,
            ..start(3, &prompt(length), &sampling(3))
        };
        lab.start(&salted);
        lab.run();
        assert_eq!(lab.scheduler.totals().prefix_hit_tokens, hits, "no guest");
    }
}

#[test]
fn rows_that_a_replay_compares_are_computed_whatever_is_cached() {
    let base = start(1, &prompt(40), &sampling(60));
    let whole = alone(&model(), &base);
    let mut lab = lab(1, 20, 99);
    lab.start(&base);
    lab.run();
    let mut replay = resumed(&base, &whole, 40, 25);
    lab.start(&replay);
    lab.run();
    // Rows from position 40 + 40 - 25 - 1 on are compared: three whole blocks come before.
    assert_eq!(lab.scheduler.totals().prefix_hit_tokens, 48);
    assert_eq!(lab.failed, HashMap::new());
    replay.attempt.epoch = 3;
    replay.expect_logprobs[0] += 1.0;
    lab.start(&replay);
    lab.run();
    assert!(matches!(
        lab.failed[&replay.attempt],
        AttemptError::ReplayMismatch { position: 15, .. }
    ));
}

#[test]
fn forks_wait_for_the_prompt_and_compute_only_its_last_token() {
    let mut lab = lab(4, 20, 8);
    let leader = start(1, &prompt(30), &sampling(40));
    lab.start(&leader);
    for request in 2..=4 {
        lab.start(&StartAttempt {
            fork_of: Some(leader.attempt),
            ..start(request, &prompt(30), &sampling(40))
        });
    }
    assert_eq!(lab.scheduler.waiting_len(), 3);
    while lab.output(leader.attempt).is_empty() {
        lab.step();
        assert!(lab.runner.steps.last().unwrap().len() == 1, "they wait");
    }
    lab.step();
    let computed: Vec<_> = lab
        .runner
        .steps
        .last()
        .unwrap()
        .iter()
        .map(|c| (c.1, c.2))
        .collect();
    assert_eq!(computed, [(30, 1), (29, 1), (29, 1), (29, 1)]);
    assert_eq!(
        lab.scheduler.block_counts().used,
        5,
        "one block is shared by all"
    );
    lab.run();
    for request in 1..=4 {
        assert_eq!(
            lab.output(attempt(request, 1))
                .iter()
                .map(|t| &t.token)
                .collect::<Vec<_>>(),
            alone(&model(), &leader)
                .iter()
                .map(|t| &t.token)
                .collect::<Vec<_>>()
        );
    }
}

#[test]
fn a_fork_of_nobody_or_of_another_prompt_is_an_ordinary_start() {
    let mut lab = lab(4, 30, 9);
    lab.start(&start(1, &prompt(30), &sampling(10)));
    for (request, leader, salt) in [(2, 77, 0), (3, 1, 0), (4, 4, 0), (5, 1, 5)] {
        lab.start(&StartAttempt {
            fork_of: Some(attempt(leader, 1)),
            cache_salt: salt,
            ..start(request, &prompt(20 + salt as u32 * 2), &sampling(10))
        });
    }
    assert_eq!(
        (lab.scheduler.running_len(), lab.scheduler.waiting_len()),
        (4, 1)
    );
    lab.run();
    assert!((1..=5).all(|request| lab.output(attempt(request, 1)).len() == 10));
}

#[test]
fn when_blocks_run_out_the_youngest_of_the_lowest_priority_gives_up_its_own() {
    let mut lab = lab(4, 6, 64);
    let with = |request, priority| StartAttempt {
        priority,
        ..start(request, &[request as u32; 20], &sampling(40))
    };
    for (request, priority) in [(1, 0), (2, 5), (3, 0)] {
        lab.start(&with(request, priority));
    }
    let mut order = Vec::new();
    let mut repeated = 0;
    while lab.step() {
        let steps = std::mem::take(&mut lab.runner.steps);
        repeated += steps.iter().flatten().filter(|chunk| chunk.1 == 0).count();
        for request in 1..=3 {
            let ended = lab
                .output(attempt(request, 1))
                .last()
                .is_some_and(|t| t.finish.is_some());
            if ended && !order.contains(&request) {
                order.push(request);
            }
        }
    }
    assert_eq!(order, [2, 1, 3], "by priority, then by age");
    assert!(lab.scheduler.totals().preemptions >= 1);
    assert!(repeated >= 3);
    for request in 1..=3 {
        let alone = alone(&model(), &with(request, 0));
        assert_eq!(lab.output(attempt(request, 1)), alone);
    }
}

#[test]
fn a_higher_priority_takes_the_place_of_a_lower_one_and_equals_wait() {
    let mut lab = lab(1, 20, 64);
    let with = |request, priority| StartAttempt {
        priority,
        ..start(request, &[1; 20], &sampling(10))
    };
    lab.start(&with(1, 0));
    lab.step();
    lab.start(&with(2, 0));
    lab.step();
    assert_eq!(lab.output(attempt(1, 1)).len(), 2);
    lab.start(&with(3, 1));
    lab.step();
    assert_eq!(lab.output(attempt(3, 1)).len(), 1);
    lab.run();
    assert_eq!(lab.scheduler.totals().preemptions, 1);
    assert_eq!(lab.output(attempt(1, 1)), alone(&model(), &with(1, 0)));
    let begun = [1, 2, 3].map(|request| lab.output(attempt(request, 1)).len());
    assert_eq!(begun, [10, 10, 10]);
}

#[test]
fn what_the_whole_cache_cannot_hold_is_refused_and_a_full_cache_ends_an_output() {
    let mut lab = lab(2, 3, 64);
    lab.start(&start(1, &prompt(48), &sampling(1)));
    let error = lab.failed[&attempt(1, 1)].to_string();
    assert!(error.contains("KV cache of 48 tokens"), "{error}");
    lab.start(&StartAttempt {
        committed: vec![1; 9],
        ..start(2, &prompt(40), &sampling(100))
    });
    assert!(matches!(
        lab.failed[&attempt(2, 1)],
        AttemptError::ReplayMismatch { position: 8, .. }
    ));
    lab.start(&start(3, &prompt(40), &sampling(100)));
    lab.run();
    let output = lab.output(attempt(3, 1));
    assert_eq!(output.len(), 8);
    assert_eq!(output[7].finish, Some(FinishReason::Length));
}

#[test]
fn a_long_prompt_holds_up_no_decode() {
    let mut lab = lab(3, 40, 20);
    lab.start(&start(1, &[1], &sampling(50)));
    lab.step();
    lab.start(&start(2, &prompt(150), &sampling(5)));
    for step in 2..10 {
        lab.step();
        assert_eq!(lab.output(attempt(1, 1)).len(), step);
    }
    assert_eq!(lab.output(attempt(2, 1)).len(), 1);
}

#[test]
fn blocks_that_are_carried_over_spare_their_computation_and_change_nothing() {
    let (mut one, mut other) = (lab(2, 20, 64), lab(2, 4, 64));
    let first = start(1, &prompt(60), &sampling(3));
    one.start(&first);
    one.run();
    let export = |lab: &mut Lab, salt| {
        lab.scheduler
            .export_prefix(&mut lab.runner, &prompt(60), salt)
            .unwrap()
    };
    assert_eq!(export(&mut one, 1).len(), 0);
    let frames = export(&mut one, 0);
    assert_eq!(frames.len(), 3);
    for frame in frames.iter().chain(&frames) {
        other.scheduler.import(&mut other.runner, frame).unwrap();
    }
    assert_eq!(other.scheduler.block_counts().cached, 3);
    assert_eq!(export(&mut other, 0), frames);
    let second = start(2, &prompt(60), &sampling(3));
    other.start(&second);
    other.run();
    assert_eq!(other.scheduler.totals().prefix_hit_tokens, 48);
    assert_eq!(other.output(second.attempt), alone(&model(), &second));
    let mut out = vec![5];
    let unknown = other
        .scheduler
        .export(&mut other.runner, BlockHash([0; 16]), &mut out);
    assert!(matches!(unknown, Err(KvTransferError::Unknown(_))));
    let root = BlockHash::root(&other.runner.info().fingerprint, 0);
    let hash = root.child(prompt(16).first_chunk().unwrap());
    other
        .scheduler
        .export(&mut other.runner, hash, &mut out)
        .unwrap();
    assert_eq!(out[1..], frames[0]);
}

#[test]
fn an_import_displaces_no_used_block_and_takes_nothing_damaged() {
    let (mut one, mut other) = (lab(2, 20, 64), lab(2, 4, 64));
    one.start(&start(1, &prompt(33), &sampling(3)));
    one.run();
    let frames = one
        .scheduler
        .export_prefix(&mut one.runner, &prompt(33), 0)
        .unwrap();
    other.start(&start(1, &[9; 60], &sampling(3)));
    other.step();
    let full = other.scheduler.import(&mut other.runner, &frames[0]);
    assert!(full.unwrap_err().is_retriable());
    other.run();
    let mut damaged = frames[0].clone();
    damaged[200] ^= 1;
    let error = other.scheduler.import(&mut other.runner, &damaged);
    assert!(matches!(error, Err(KvTransferError::Checksum { .. })));
    other
        .scheduler
        .import(&mut other.runner, &frames[0])
        .unwrap();
    let mut foreign = Lab::new(
        FakeOptions { salt: 1, ..model() },
        SchedulerOptions::default(),
    );
    let error = foreign.scheduler.import(&mut foreign.runner, &frames[0]);
    assert!(matches!(error, Err(KvTransferError::Fingerprint)));
}
