//! Slots, budgets, queues: who is computed when.

use super::*;

#[test]
fn a_step_keeps_its_budget_and_never_starves_a_decode() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 60,
        ..SamplingParams::default()
    };
    let mut lab = Lab::new(
        model(),
        SchedulerOptions {
            max_waiting: 9,
            step_tokens: 10,
        },
    );
    lab.start(&start(1, &[1], &sampling));
    lab.start(&start(2, &[2], &sampling));
    lab.step();
    lab.start(&start(3, &[3; 100], &sampling));
    lab.start(&start(4, &[4; 30], &sampling));
    for step in 1..13 {
        lab.step();
        let chunks = &lab.runner.steps[step];
        assert!(
            chunks.iter().map(|chunk| chunk.2).sum::<usize>() <= 10,
            "{chunks:?}"
        );
        assert_eq!(lab.output(attempt(1, 1)).len(), step + 1);
        assert_eq!(lab.output(attempt(2, 1)).len(), step + 1);
    }
    assert!(
        lab.output(attempt(3, 1)).is_empty(),
        "12 steps leave room for 96 tokens of its prompt"
    );
    lab.step();
    assert_eq!(lab.output(attempt(3, 1)).len(), 1);
    let last = lab.runner.steps.last().unwrap();
    assert_eq!(
        last[2..],
        [(2, 96, 4, 1), (9, 0, 4, 0)],
        "what is left goes to the next prompt"
    );
    lab.run();
    assert!((1..5).all(|request| lab.output(attempt(request, 1)).len() == 60));
}

#[test]
fn every_slot_decodes_in_every_step_even_if_the_budget_is_set_too_low() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 5,
        ..SamplingParams::default()
    };
    let mut lab = Lab::new(
        model(),
        SchedulerOptions {
            max_waiting: 9,
            step_tokens: 1,
        },
    );
    for request in 0..4 {
        lab.start(&start(request, &[1], &sampling));
    }
    lab.run();
    assert_eq!(lab.runner.steps.len(), 5);
}

#[test]
fn waiting_is_bounded_and_in_order() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 3,
        ..SamplingParams::default()
    };
    let mut lab = Lab::new(
        FakeOptions {
            max_sequences: 1,
            ..model()
        },
        SchedulerOptions {
            max_waiting: 2,
            step_tokens: 9,
        },
    );
    for request in 1..=4 {
        lab.start(&start(request, &[1], &sampling));
    }
    let full = AttemptError::Full {
        running: 1,
        waiting: 2,
        limit: 2,
    };
    assert_eq!(lab.failed, HashMap::from([(attempt(4, 1), full)]));
    let mut order = Vec::new();
    while lab.step() {
        order.extend((1..=3).filter(|&request| lab.output(attempt(request, 1)).len() == 1));
    }
    order.dedup();
    assert_eq!(order, [1, 2, 3]);
}

#[test]
fn a_cancel_frees_the_slot_for_the_next_and_changes_no_one_else() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 20,
        ..SamplingParams::default()
    };
    let mut lab = Lab::new(
        FakeOptions {
            max_sequences: 2,
            ..model()
        },
        SchedulerOptions {
            max_waiting: 9,
            step_tokens: 9,
        },
    );
    let starts: Vec<StartAttempt> = (0..4)
        .map(|request| start(request, &[request as u32; 12], &sampling))
        .collect();
    starts.iter().for_each(|start| lab.start(start));
    for _ in 0..5 {
        lab.step();
    }
    assert!(lab.scheduler.cancel(attempt(0, 1)), "running");
    assert!(lab.scheduler.cancel(attempt(3, 1)), "waiting");
    assert!(!lab.scheduler.cancel(attempt(0, 1)));
    assert!(!lab.scheduler.cancel(attempt(9, 1)));
    assert_eq!(
        (lab.scheduler.running_len(), lab.scheduler.waiting_len()),
        (2, 0)
    );
    lab.run();
    assert!(lab.output(attempt(0, 1)).len() < 20 && lab.output(attempt(3, 1)).is_empty());
    for request in [1, 2] {
        assert_eq!(
            lab.output(attempt(request, 1)),
            alone(&model(), &starts[request as usize])
        );
    }
    assert_eq!(lab.scheduler.kv_used_tokens(), 0);
}

#[test]
fn a_later_epoch_replaces_an_earlier_one() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 9,
        ..SamplingParams::default()
    };
    let mut lab = Lab::new(
        FakeOptions {
            max_sequences: 1,
            ..model()
        },
        SchedulerOptions {
            max_waiting: 0,
            step_tokens: 9,
        },
    );
    let first = start(1, &[1], &sampling);
    lab.start(&first);
    lab.step();
    assert_eq!(lab.scheduler.start(first.clone()), Ok(None), "again");
    let second = StartAttempt {
        attempt: attempt(1, 2),
        ..first.clone()
    };
    assert_eq!(lab.scheduler.start(second), Ok(Some(attempt(1, 1))));
    lab.start(&first);
    assert!(
        matches!(lab.failed[&attempt(1, 1)], AttemptError::Invalid(_)),
        "stale"
    );
    lab.run();
    assert_eq!(
        (
            lab.output(attempt(1, 1)).len(),
            lab.output(attempt(1, 2)).len()
        ),
        (1, 9)
    );
}

#[test]
fn a_runner_that_returns_too_little_is_an_error() {
    struct Short(FakeRunner);
    impl ModelRunner for Short {
        fn info(&self) -> &ModelInfo {
            self.0.info()
        }
        fn execute(
            &mut self,
            chunks: &[Chunk<'_>],
            logits: &mut Vec<f32>,
        ) -> Result<(), StepError> {
            self.0.execute(chunks, logits)?;
            logits.pop();
            Ok(())
        }
        fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), StepError> {
            self.0.copy_block(from, to)
        }

        fn export_block(&mut self, block: BlockId, out: &mut Vec<u8>) -> Result<(), StepError> {
            self.0.export_block(block, out)
        }

        fn import_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), StepError> {
            self.0.import_block(block, bytes)
        }
    }
    let mut runner = Short(FakeRunner::new(model(), Faults::default()));
    let mut scheduler = Scheduler::new(runner.info(), SchedulerOptions::default());
    scheduler
        .start(start(1, &[1], &SamplingParams::default()))
        .unwrap();
    assert!(
        scheduler
            .step(&mut runner)
            .unwrap_err()
            .message
            .contains("47 logits")
    );
}

#[test]
fn suspects_are_computed_alone_until_their_first_token_and_hold_nobody_up() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 40,
        ..SamplingParams::default()
    };
    let mut lab = Lab::new(
        model(),
        SchedulerOptions {
            max_waiting: 9,
            step_tokens: 10,
        },
    );
    lab.start(&start(1, &[1], &sampling));
    lab.step();
    for request in [2, 3] {
        lab.start(&StartAttempt {
            suspect: true,
            ..start(request, &[4; 25], &sampling)
        });
    }
    let mut order = Vec::new();
    for _ in 0..12 {
        let planned = lab.scheduler.plan();
        assert!(lab.run_planned());
        let chunks = lab.runner.steps.last().unwrap();
        match planned {
            Some(_) => assert_eq!(chunks.len(), 1, "{chunks:?}"),
            None => assert_eq!(lab.output(attempt(1, 1)).len(), order.len() / 2 + 2),
        }
        order.push(planned.map_or(1, |attempt| attempt.request));
    }
    assert_eq!(order, [2, 1, 2, 1, 2, 1, 3, 1, 3, 1, 3, 1]);
    assert_eq!(lab.scheduler.plan(), None);
    lab.run();
    for request in 1..=3 {
        let prompt: &[u32] = if request == 1 { &[1] } else { &[4; 25] };
        let start = start(request, prompt, &sampling);
        assert_eq!(lab.output(start.attempt), alone(&model(), &start));
    }
}
