use std::collections::HashMap;

use super::*;
use crate::{
    fake::{FakeOptions, FakeRunner, Faults},
    frame::{FinishReason, SamplingParams},
    testing::Dice,
};

/// A scheduler with its runner, and everything that came out.
struct Lab {
    scheduler: Scheduler,
    runner: Recorder,
    tokens: HashMap<AttemptId, Vec<StepToken>>,
    failed: HashMap<AttemptId, AttemptError>,
}

/// A runner that notes what it is given.
struct Recorder {
    inner: FakeRunner,
    /// Per step, per chunk: slot, start, length, rows.
    steps: Vec<Vec<(Slot, usize, usize, usize)>>,
}

impl ModelRunner for Recorder {
    fn info(&self) -> &ModelInfo {
        self.inner.info()
    }

    fn execute(&mut self, chunks: &[Chunk<'_>], logits: &mut Vec<f32>) -> Result<(), StepError> {
        self.steps.push(
            chunks
                .iter()
                .map(|c| (c.slot, c.start, c.tokens.len(), c.logits_for))
                .collect(),
        );
        self.inner.execute(chunks, logits)
    }

    fn release(&mut self, slot: Slot) {
        self.inner.release(slot);
    }
}

fn model() -> FakeOptions {
    FakeOptions {
        vocab_size: 48,
        context_length: 200,
        slots: 4,
        eos_token_ids: vec![7],
        ..FakeOptions::default()
    }
}

impl Lab {
    fn new(model: FakeOptions, options: SchedulerOptions) -> Self {
        let inner = FakeRunner::new(model, Faults::default());
        let scheduler = Scheduler::new(inner.info(), options);
        let runner = Recorder {
            inner,
            steps: Vec::new(),
        };
        Self {
            scheduler,
            runner,
            tokens: HashMap::new(),
            failed: HashMap::new(),
        }
    }

    fn start(&mut self, start: &StartAttempt) {
        if let Err(error) = self.scheduler.start(start.clone()) {
            self.failed.insert(start.attempt, error);
        }
    }

    /// Returns whether there was work.
    fn step(&mut self) -> bool {
        let Some(outcome) = self.scheduler.step(&mut self.runner).unwrap() else {
            return false;
        };
        for token in outcome.tokens {
            self.tokens.entry(token.attempt).or_default().push(token);
        }
        self.failed.extend(outcome.failed);
        true
    }

    fn run(&mut self) {
        while self.step() {}
    }

    fn output(&self, attempt: AttemptId) -> &[StepToken] {
        self.tokens.get(&attempt).map_or(&[], Vec::as_slice)
    }
}

fn attempt(request: u128, epoch: u32) -> AttemptId {
    AttemptId { request, epoch }
}

fn start(request: u128, prompt: &[u32], sampling: &SamplingParams) -> StartAttempt {
    StartAttempt {
        attempt: attempt(request, 1),
        prompt: prompt.to_vec(),
        committed: vec![],
        expect_logprobs: vec![],
        sampling: sampling.clone(),
    }
}

/// The same request, resumed after `cut` tokens of `whole`, comparing the last `compare` of them.
fn resumed(start: &StartAttempt, whole: &[StepToken], cut: usize, compare: usize) -> StartAttempt {
    StartAttempt {
        attempt: attempt(start.attempt.request, 2),
        committed: whole[..cut].iter().map(|token| token.token.id).collect(),
        expect_logprobs: whole[cut - compare..cut]
            .iter()
            .map(|token| token.token.logprob)
            .collect(),
        ..start.clone()
    }
}

fn settings() -> Vec<SamplingParams> {
    let neutral = SamplingParams {
        max_tokens: 30,
        seed: 11,
        ..SamplingParams::default()
    };
    let warm = SamplingParams {
        temperature: 0.9,
        ..neutral.clone()
    };
    vec![
        neutral.clone(),
        SamplingParams {
            ignore_eos: true,
            top_logprobs: 3,
            ..neutral.clone()
        },
        warm.clone(),
        SamplingParams {
            seed: u64::MAX,
            ..warm.clone()
        },
        SamplingParams {
            top_k: 5,
            ..warm.clone()
        },
        SamplingParams {
            top_p: 0.8,
            ..warm.clone()
        },
        SamplingParams {
            min_p: 0.1,
            ..warm.clone()
        },
        SamplingParams {
            top_k: 9,
            top_p: 0.7,
            min_p: 0.02,
            temperature: 1.5,
            top_logprobs: 2,
            ..warm.clone()
        },
        SamplingParams {
            repetition_penalty: 1.3,
            ..neutral.clone()
        },
        SamplingParams {
            presence_penalty: 1.5,
            ..warm.clone()
        },
        SamplingParams {
            frequency_penalty: -0.7,
            ..neutral.clone()
        },
        SamplingParams {
            frequency_penalty: 0.5,
            presence_penalty: -0.5,
            repetition_penalty: 0.8,
            ..warm.clone()
        },
        SamplingParams {
            min_tokens: 12,
            stop_token_ids: vec![3, 9, 20, 21, 22],
            ..warm.clone()
        },
        SamplingParams {
            ignore_eos: true,
            max_tokens: 500,
            ..warm
        },
    ]
}

/// The oracle: the request alone, whole prompt in one chunk.
fn alone(model: &FakeOptions, start: &StartAttempt) -> Vec<StepToken> {
    let mut lab = Lab::new(
        model.clone(),
        SchedulerOptions {
            max_waiting: 0,
            step_tokens: 4096,
        },
    );
    lab.start(start);
    lab.run();
    assert_eq!(lab.failed.get(&start.attempt), None);
    lab.output(start.attempt).to_vec()
}

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
                    slots: 1 + dice.throw(4),
                    ..model()
                },
                options,
            );
            let neighbours = add_neighbours(&mut lab, &mut dice);
            for _ in 0..dice.throw(30) {
                lab.step();
            }
            let resumed = resumed(&start, &whole, cut, dice.throw(cut + 1));
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
            start(
                1000 + index as u128,
                &prompt,
                &settings[dice.throw(settings.len())],
            )
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
        ..good
    };
    assert_eq!(run(&unchecked, 1), None, "nothing to compare with");
}

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
        [(Slot(2), 96, 4, 1), (Slot(3), 0, 4, 0)],
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
fn waiting_is_bounded_and_in_order() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 3,
        ..SamplingParams::default()
    };
    let mut lab = Lab::new(
        FakeOptions {
            slots: 1,
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
            slots: 2,
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
            slots: 1,
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
fn the_context_ends_an_output() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 500,
        ..SamplingParams::default()
    };
    for prompt in [1, 150, 198, 199] {
        let output = alone(&model(), &start(1, &vec![1; prompt], &sampling));
        assert_eq!(output.len(), 200 - prompt);
        assert_eq!(output.last().unwrap().finish, Some(FinishReason::Length));
    }
}

#[test]
fn ending_ids_end_and_min_tokens_keeps_them_away() {
    // With this many stop ids the first token is one of them, unless it is suppressed.
    let stops: Vec<u32> = (0..40).collect();
    let sampling = |min_tokens| SamplingParams {
        min_tokens,
        stop_token_ids: stops.clone(),
        max_tokens: 50,
        ..settings()[2].clone()
    };
    for min_tokens in [0, 1, 5] {
        let output = alone(&model(), &start(1, &[1], &sampling(min_tokens)));
        assert!(output.len() > min_tokens as usize && output.len() < 50);
        let (last, before) = output.split_last().unwrap();
        assert_eq!(last.finish, Some(FinishReason::Stop));
        assert!(last.token.id < 40);
        assert!(
            before
                .iter()
                .all(|token| token.token.id >= 40 && token.finish.is_none())
        );
    }
    let eos = SamplingParams {
        max_tokens: 150,
        ..settings()[2].clone()
    };
    let output = alone(&model(), &start(1, &[1], &eos));
    assert_eq!(output.last().unwrap().token.id, 7);
    let output = alone(
        &model(),
        &start(
            1,
            &[1],
            &SamplingParams {
                ignore_eos: true,
                ..eos
            },
        ),
    );
    assert_eq!(output.len(), 150);
    assert!(
        output.iter().any(|token| token.token.id == 7),
        "it may be chosen, and changes nothing"
    );
}

#[test]
fn requests_that_cannot_be_served_say_why() {
    let base = start(1, &[1], &SamplingParams::default());
    let with = |change: &dyn Fn(&mut StartAttempt)| {
        let mut start = base.clone();
        change(&mut start);
        start
    };
    let cases = [
        (with(&|s| s.prompt.clear()), "empty"),
        (with(&|s| s.prompt = vec![1; 200]), "200 tokens"),
        (
            with(&|s| s.prompt = vec![1; 250]),
            "shorten the prompt by 51",
        ),
        (with(&|s| s.committed = vec![1; 200]), "exceed"),
        (with(&|s| s.prompt = vec![1, 48]), "index 1"),
        (with(&|s| s.committed = vec![48]), "index 1"),
        (with(&|s| s.expect_logprobs = vec![0.0]), "1 logprobs"),
        (with(&|s| s.committed = vec![7]), "already end"),
        (
            with(&|s| (s.committed, s.sampling.max_tokens) = (vec![1, 1], 2)),
            "already end",
        ),
        (with(&|s| s.sampling.temperature = f32::NAN), "temperature"),
        (with(&|s| s.sampling.temperature = -1.0), "temperature"),
        (with(&|s| s.sampling.top_p = 0.0), "top_p"),
        (with(&|s| s.sampling.min_p = 1.5), "min_p"),
        (
            with(&|s| s.sampling.repetition_penalty = 0.0),
            "repetition_penalty",
        ),
        (
            with(&|s| s.sampling.presence_penalty = 3.0),
            "presence_penalty",
        ),
        (
            with(&|s| s.sampling.frequency_penalty = f32::INFINITY),
            "frequency_penalty",
        ),
        (with(&|s| s.sampling.max_tokens = 0), "max_tokens"),
        (with(&|s| s.sampling.min_tokens = 900), "min_tokens"),
        (with(&|s| s.sampling.top_logprobs = 65), "top_logprobs"),
        (
            with(&|s| s.sampling.stop_token_ids = vec![48]),
            "stop token id 48",
        ),
    ];
    for (start, part) in cases {
        let mut lab = Lab::new(model(), SchedulerOptions::default());
        lab.start(&start);
        let error = lab
            .failed
            .remove(&start.attempt)
            .unwrap_or_else(|| panic!("{part}: accepted"));
        assert!(
            matches!(&error, AttemptError::Invalid(text) if text.contains(part)),
            "{part}: {error}"
        );
    }
    let mut lab = Lab::new(model(), SchedulerOptions::default());
    lab.start(&with(&|s| {
        (s.sampling.min_tokens, s.sampling.stop_token_ids) = (2, (0..48).collect())
    }));
    lab.run();
    assert!(
        matches!(&lab.failed[&base.attempt], AttemptError::Invalid(text) if text.contains("whole vocabulary"))
    );
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
            generated_tokens: 11
        }
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
        fn release(&mut self, slot: Slot) {
            self.0.release(slot);
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
