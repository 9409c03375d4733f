//! Drafts: the same tokens in fewer steps.

use super::*;

fn repeating(speculate: u32) -> SamplingParams {
    SamplingParams {
        logit_bias: vec![(30, 100.0)],
        ignore_eos: true,
        max_tokens: 50,
        speculate,
        ..SamplingParams::default()
    }
}

fn run(start: &StartAttempt, exact: bool) -> (Vec<StepToken>, usize, Totals) {
    let mut lab = Lab::new(model(), SchedulerOptions::default());
    if !exact {
        let info = ModelInfo {
            exact: false,
            ..lab.runner.info().clone()
        };
        lab.scheduler = Scheduler::new(&info, SchedulerOptions::default());
    }
    lab.start(start);
    lab.run();
    assert_eq!(lab.failed, HashMap::new());
    let totals = lab.scheduler.totals();
    (
        lab.output(start.attempt).to_vec(),
        lab.runner.steps.len(),
        totals,
    )
}

#[test]
fn what_repeats_itself_comes_in_fewer_steps() {
    let plain = start(1, &[1, 2], &repeating(0));
    let (expected, steps, totals) = run(&plain, true);
    assert_eq!((steps, totals.drafted_tokens), (50, 0));
    let drafted = start(1, &[1, 2], &repeating(16));
    let (tokens, steps, totals) = run(&drafted, true);
    assert_eq!(tokens, expected);
    assert!(steps < 12, "{steps} steps");
    assert_eq!(totals.accepted_tokens, 50 - steps as u64);
    assert_eq!(totals.generated_tokens, 50);
    let (tokens, steps, totals) = run(&drafted, false);
    assert_eq!((tokens, steps), (expected, 50), "bits could change");
    assert_eq!(totals.drafted_tokens, 0);
}

#[test]
fn drafts_end_where_the_output_ends() {
    for max_tokens in 1..30 {
        for stop in [None, Some(10), Some(13)] {
            let sampling = |speculate| {
                let mut sampling = repeating(speculate);
                sampling.max_tokens = max_tokens;
                // Frequent enough to be met in the middle of a draft, with min_tokens holding it off before.
                sampling.stop_token_ids = stop.map(|_| 30).into_iter().collect();
                sampling.min_tokens = stop.unwrap_or(0).min(max_tokens);
                sampling.frequency_penalty = 0.7;
                sampling
            };
            let (expected, ..) = run(&start(1, &[3; 170], &sampling(0)), true);
            let (tokens, ..) = run(&start(1, &[3; 170], &sampling(16)), true);
            assert_eq!(tokens, expected, "{max_tokens} {stop:?}");
            assert!(tokens.last().unwrap().finish.is_some());
        }
    }
}

#[test]
fn text_without_repetitions_is_soon_left_alone() {
    let sampling = SamplingParams {
        temperature: 3.0,
        ignore_eos: true,
        max_tokens: 190,
        speculate: 8,
        ..SamplingParams::default()
    };
    let (tokens, _, totals) = run(&start(1, &[1], &sampling), true);
    assert_eq!(tokens.len(), 190);
    assert!(totals.drafted_tokens < 60, "{totals:?}");
}

/// A grammar that allows each token only after its predecessor.
#[derive(Debug)]
struct Counting {
    next: u32,
}

impl TokenMask for Counting {
    fn mask(&mut self, out: &mut [u32]) {
        out.fill(0);
        out[self.next as usize / 32] |= 1 << (self.next % 32);
    }

    fn accept(&mut self, id: u32) {
        assert_eq!(id, self.next, "told of every token in order");
        self.next = (id + 1) % 40;
    }
}

#[test]
fn a_grammar_sees_every_token_once_whatever_is_drafted_or_replayed() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 90,
        speculate: 16,
        ..SamplingParams::default()
    };
    for committed in [0_u32, 5, 45] {
        let mut lab = Lab::new(model(), SchedulerOptions::default());
        let start = StartAttempt {
            committed: (0..committed).map(|id| id % 40).collect(),
            ..start(1, &[1, 2], &sampling)
        };
        let grammar = Box::new(Counting { next: 0 });
        lab.scheduler.start_with(start, Some(grammar)).unwrap();
        lab.run();
        let ids: Vec<u32> = lab
            .output(attempt(1, 1))
            .iter()
            .map(|t| t.token.id)
            .collect();
        let expected: Vec<u32> = (committed..90).map(|id| id % 40).collect();
        assert_eq!(ids, expected);
        assert!(lab.scheduler.totals().accepted_tokens > 10);
    }
}
