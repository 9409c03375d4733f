//! The promise: a resumed attempt is the uninterrupted one, bit by bit, whatever happens around it.

use super::*;

#[test]
fn a_resumed_attempt_is_the_uninterrupted_one_at_every_cut() {
    let mut dice = Dice::new(1);
    for (request, sampling) in settings().into_iter().enumerate() {
        let prompt: Vec<u32> = (0..1 + dice.throw(20))
            .map(|_| dice.throw(48) as u32)
            .collect();
        let start = start(request as u128, &prompt, &sampling);
        let whole = alone(&model(), &start);
        assert!(whole.last().unwrap().finish.is_some());
        for cut in 0..whole.len() {
            let options = SchedulerOptions {
                max_waiting: 8,
                step_tokens: 1 + dice.throw(24),
            };
            let mut lab = Lab::new(
                FakeOptions {
                    max_sequences: 1 + dice.throw(4),
                    ..model()
                },
                options,
            );
            let neighbours = add_neighbours(&mut lab, &mut dice);
            for _ in 0..dice.throw(30) {
                lab.step();
            }
            let resumed = StartAttempt {
                suspect: dice.throw(2) == 0,
                ..resumed(&start, &whole, cut, dice.throw(cut + 1))
            };
            lab.start(&resumed);
            lab.run();
            assert_eq!(lab.failed, HashMap::new(), "{sampling:?}, cut at {cut}");
            let expected: Vec<StepToken> = whole[cut..]
                .iter()
                .map(|token| StepToken {
                    attempt: resumed.attempt,
                    ..token.clone()
                })
                .collect();
            assert_eq!(
                lab.output(resumed.attempt),
                expected,
                "{sampling:?}, cut at {cut}"
            );
            for neighbour in neighbours {
                assert_eq!(lab.output(neighbour.attempt), alone(&model(), &neighbour));
            }
        }
    }
}

fn add_neighbours(lab: &mut Lab, dice: &mut Dice) -> Vec<StartAttempt> {
    let settings = settings();
    let neighbours: Vec<StartAttempt> = (0..dice.throw(5))
        .map(|index| {
            let prompt: Vec<u32> = (0..1 + dice.throw(60))
                .map(|_| dice.throw(48) as u32)
                .collect();
            let sampling = &settings[dice.throw(settings.len())];
            StartAttempt {
                suspect: dice.throw(3) == 0,
                ..start(1000 + index as u128, &prompt, sampling)
            }
        })
        .collect();
    for neighbour in &neighbours {
        lab.start(neighbour);
    }
    neighbours
}

#[test]
fn a_log_that_is_not_this_models_is_refused() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 30,
        ..SamplingParams::default()
    };
    let start = start(1, &[5, 6], &sampling);
    let whole = alone(&model(), &start);
    let good = resumed(&start, &whole, 20, 6);
    let run = |start: &StartAttempt, salt: u64| {
        let mut lab = Lab::new(
            FakeOptions { salt, ..model() },
            SchedulerOptions {
                max_waiting: 0,
                step_tokens: 7,
            },
        );
        lab.start(start);
        lab.run();
        assert_eq!(lab.scheduler.running_len(), 0, "its slot is free again");
        lab.failed.remove(&start.attempt)
    };
    assert_eq!(run(&good, 0), None);
    for index in 0..6 {
        let mut bad = good.clone();
        let expected = bad.expect_logprobs[index].to_bits() ^ 1;
        bad.expect_logprobs[index] = f32::from_bits(expected);
        let actual = expected ^ 1;
        let position = 14 + index as u32;
        assert_eq!(
            run(&bad, 0),
            Some(AttemptError::ReplayMismatch {
                position,
                expected,
                actual
            })
        );
    }
    let mut bad = good.clone();
    bad.prompt[0] = 4;
    assert!(matches!(
        run(&bad, 0),
        Some(AttemptError::ReplayMismatch { position: 14, .. })
    ));
    assert!(matches!(
        run(&good, 1),
        Some(AttemptError::ReplayMismatch { position: 14, .. })
    ));
    let unchecked = StartAttempt {
        expect_logprobs: vec![],
        suspect: false,
        ..good
    };
    assert_eq!(run(&unchecked, 1), None, "nothing to compare with");
}

#[test]
fn rows_of_a_replay_are_bounded() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 190,
        ..SamplingParams::default()
    };
    let start = start(1, &[1, 2], &sampling);
    let whole = alone(&model(), &start);
    let mut lab = Lab::new(
        model(),
        SchedulerOptions {
            max_waiting: 9,
            step_tokens: 4096,
        },
    );
    lab.start(&resumed(&start, &whole, 180, 180));
    lab.run();
    assert_eq!(lab.failed, HashMap::new());
    assert_eq!(lab.output(attempt(1, 2)).len(), 10);
    let rows = lab
        .runner
        .steps
        .iter()
        .map(|step| step.iter().map(|chunk| chunk.3).sum::<usize>());
    assert!(rows.max().unwrap() <= 4 + REPLAY_ROWS_PER_STEP);
}

#[test]
fn totals_tell_prompt_replay_and_output_apart() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 20,
        ..SamplingParams::default()
    };
    let start = start(1, &[1; 7], &sampling);
    let whole = alone(&model(), &start);
    let mut lab = Lab::new(
        model(),
        SchedulerOptions {
            max_waiting: 0,
            step_tokens: 4,
        },
    );
    lab.start(&resumed(&start, &whole, 9, 3));
    lab.run();
    assert_eq!(
        lab.scheduler.totals(),
        Totals {
            prompt_tokens: 7,
            replayed_tokens: 9,
            generated_tokens: 11,
            ..Totals::default()
        }
    );
}

/// A runner whose rows depend on how many of them are computed at a time, as a library's operators have it.
struct Batchy {
    inner: FakeRunner,
    info: ModelInfo,
    /// How far a logit moves in a chunk of more than one token.
    by: f32,
}

impl Batchy {
    fn new(dtype: &str, by: f32) -> Self {
        let inner = FakeRunner::new(model(), Faults::default());
        let info = ModelInfo {
            exact: false,
            dtype: dtype.to_owned(),
            ..inner.info().clone()
        };
        Self { inner, info, by }
    }
}

impl ModelRunner for Batchy {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn execute(&mut self, chunks: &[Chunk<'_>], logits: &mut Vec<f32>) -> Result<(), StepError> {
        self.inner.execute(chunks, logits)?;
        if chunks.iter().any(|chunk| chunk.tokens.len() > 1) {
            for (index, logit) in logits.iter_mut().enumerate() {
                *logit += if index % 2 == 0 { self.by } else { -self.by };
            }
        }
        Ok(())
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), StepError> {
        self.inner.copy_block(from, to)
    }

    fn export_block(&mut self, block: BlockId, out: &mut Vec<u8>) -> Result<(), StepError> {
        self.inner.export_block(block, out)
    }

    fn import_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), StepError> {
        self.inner.import_block(block, bytes)
    }
}

#[test]
fn a_runner_that_is_not_exact_may_be_close() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 30,
        ..SamplingParams::default()
    };
    let start = start(1, &[5, 6], &sampling);
    let whole = alone(&model(), &start);
    let resumed = resumed(&start, &whole, 20, 4);
    let run = |dtype: &str, by: f32| {
        let mut runner = Batchy::new(dtype, by);
        let mut scheduler = Scheduler::new(runner.info(), SchedulerOptions::default());
        scheduler.start(resumed.clone()).unwrap();
        let (mut tokens, mut failed) = (Vec::new(), Vec::new());
        while let Some(outcome) = scheduler.step(&mut runner).unwrap() {
            tokens.extend(outcome.tokens.into_iter().map(|token| token.token.id));
            failed.extend(outcome.failed);
        }
        (tokens, failed, scheduler.totals().close_logprobs)
    };
    let rest: Vec<u32> = whole[20..].iter().map(|token| token.token.id).collect();
    assert_eq!(run("f32", 0.0), (rest.clone(), vec![], 0));
    assert_eq!(
        run("f32", 1e-4),
        (rest.clone(), vec![], 4),
        "close, and counted"
    );
    assert_eq!(run("bf16", 0.05), (rest, vec![], 4));
    for (dtype, by) in [("f32", 0.05), ("bf16", 2.0)] {
        let (tokens, failed, _) = run(dtype, by);
        assert_eq!(tokens, [0; 0]);
        assert!(
            matches!(
                failed[..],
                [(_, AttemptError::ReplayMismatch { position: 16, .. })]
            ),
            "{dtype} {by}: {failed:?}"
        );
    }
}
