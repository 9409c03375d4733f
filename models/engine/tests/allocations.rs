//! Choosing a token allocates nothing once the sampler has seen its first row.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use understudy_engine_core::{
    frame::SamplingParams,
    penalties::History,
    sampler::{SampleInput, Sampler},
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
