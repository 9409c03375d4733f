//! Choosing a token allocates nothing once the sampler has seen its first row, and neither does anything else in a step of
//! decoding sequences.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use understudy_engine_core::{
    fake::{FakeOptions, FakeRunner, Faults},
    frame::{AttemptId, SamplingParams, StartAttempt},
    penalties::History,
    runner::ModelRunner,
    sampler::{SampleInput, Sampler},
    scheduler::{Scheduler, SchedulerOptions},
};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// Counts this thread's allocations on their way to the system's allocator.
struct Counting;

// SAFETY: everything is handed on unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_token_allocates_nothing_in_steady_state() {
    let logits: Vec<f32> = (0..5000_u32)
        .map(|id| (id.wrapping_mul(2_654_435_761) >> 20) as f32 / 400.0)
        .collect();
    let mask = vec![0x5555_5555; 157];
    let base = SamplingParams {
        temperature: 0.8,
        ..SamplingParams::default()
    };
    let settings = [
        SamplingParams::default(),
        base.clone(),
        SamplingParams {
            top_k: 40,
            top_p: 0.9,
            min_p: 0.01,
            ..base.clone()
        },
        SamplingParams {
            top_p: 0.95,
            repetition_penalty: 1.1,
            presence_penalty: 0.5,
            logit_bias: vec![(8, 3.0), (11, -2.0)],
            ..base
        },
    ];
    for params in &settings {
        let mut history = History::of_prompt(&[1, 2, 3]);
        history.reserve(200);
        let mut sampler = Sampler::new();
        let mut token = |position| {
            let input = SampleInput {
                logits: &logits,
                params,
                history: Some(&history),
                suppressed: &[7],
                mask: Some(&mask),
                position,
            };
            let id = sampler.sample(input).unwrap().id;
            history.push(id);
        };
        token(0);
        let before = ALLOCATIONS.get();
        (1..200).for_each(&mut token);
        assert_eq!(ALLOCATIONS.get() - before, 0, "{params:?}");
    }
}

/// Decodes of every kind, with blocks being filled, named, registered and evicted as they go on.
#[test]
fn a_step_of_decoding_sequences_allocates_nothing() {
    let options = FakeOptions {
        vocab_size: 64,
        context_length: 1024,
        max_sequences: 24,
        ..FakeOptions::default()
    };
    let mut runner = FakeRunner::new(options, Faults::default());
    let mut scheduler = Scheduler::new(runner.info(), SchedulerOptions::default());
    let kinds = [
        SamplingParams::default(),
        SamplingParams {
            temperature: 0.9,
            top_p: 0.9,
            frequency_penalty: 0.1,
            ..SamplingParams::default()
        },
        SamplingParams {
            allowed_token_ids: Some(vec![3, 4]),
            speculate: 8,
            ..SamplingParams::default()
        },
        SamplingParams {
            logit_bias: vec![(5, 40.0)],
            speculate: 1,
            ..SamplingParams::default()
        },
    ];
    let start = |request: u32, max_tokens| StartAttempt {
        attempt: AttemptId {
            request: u128::from(request),
            epoch: 1,
        },
        prompt: vec![request % 64; 20],
        sampling: SamplingParams {
            ignore_eos: true,
            max_tokens,
            ..kinds[request as usize % kinds.len()].clone()
        },
        ..StartAttempt::default()
    };
    // Cached prefixes of earlier requests fill the cache, so that blocks come from evictions.
    for request in 100..124 {
        scheduler.start(start(request, 1000)).unwrap();
    }
    while scheduler.step(&mut runner).unwrap().is_some() {}
    for request in 0..24 {
        scheduler.start(start(request, 1000)).unwrap();
    }
    let mut step = || {
        let outcome = scheduler.step(&mut runner).unwrap().unwrap();
        let tokens = outcome.tokens.len();
        scheduler.recycle(outcome);
        tokens
    };
    // The first steps find how much memory rows and outcomes take at most.
    (0..20).for_each(|_| {
        step();
    });
    let before = ALLOCATIONS.get();
    let tokens: usize = (0..80).map(|_| step()).sum();
    assert_eq!(ALLOCATIONS.get() - before, 0, "in {tokens} tokens");
    assert!(tokens > 80 * 24, "drafts are among them");
    let totals = scheduler.totals();
    assert!(scheduler.evictions() > 0 && totals.accepted_tokens > 0);
}
