//! Time per token of the sampler, by vocabulary and setting: `cargo run --release -p understudy-engine-core --example
//! sampler_speed`.

use std::time::Instant;

use understudy_engine_core::{
    frame::SamplingParams,
    penalties::History,
    sampler::{SampleInput, Sampler},
};

fn main() {
    let base = SamplingParams {
        temperature: 0.8,
        ..SamplingParams::default()
    };
    let settings = [
        ("greedy", SamplingParams::default()),
        (
            "greedy, 5 top logprobs",
            SamplingParams {
                top_logprobs: 5,
                ..SamplingParams::default()
            },
        ),
        (
            "greedy, penalties",
            SamplingParams {
                repetition_penalty: 1.1,
                ..SamplingParams::default()
            },
        ),
        ("temperature", base.clone()),
        (
            "top-k 40",
            SamplingParams {
                top_k: 40,
                ..base.clone()
            },
        ),
        (
            "top-p 0.9",
            SamplingParams {
                top_p: 0.9,
                ..base.clone()
            },
        ),
        (
            "top-k 40, top-p 0.9, min-p 0.05",
            SamplingParams {
                top_k: 40,
                top_p: 0.9,
                min_p: 0.05,
                ..base
            },
        ),
    ];
    println!(
        "{:<34} {:>9} {:>9} {:>9}   µs per token (median)",
        "vocabulary", 1_608, 32_000, 128_256
    );
    for (name, params) in settings {
        let times =
            [1_608, 32_000, 128_256].map(|vocab| format!("{:9.1}", microseconds(vocab, &params)));
        println!("{name:<34} {}", times.join(" "));
    }
}

fn microseconds(vocab: u64, params: &SamplingParams) -> f64 {
    // Roughly normal, as real logits are: a few tokens stand out.
    let noise = |id: u64| {
        (0..12)
            .map(|i| {
                ((id * 12 + i).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32 / 16_777_216.0
            })
            .sum::<f32>()
    };
    let logits: Vec<f32> = (0..vocab).map(|id| (noise(id) - 6.0) * 3.0).collect();
    let history = History::of_prompt(&(0..500).collect::<Vec<u32>>());
    let mut sampler = Sampler::new();
    let mut times: Vec<f64> = (0..201)
        .map(|position| {
            let started = Instant::now();
            let input = SampleInput {
                logits: &logits,
                params,
                history: Some(&history),
                suppressed: &[],
                mask: None,
                position,
            };
            std::hint::black_box(
                sampler
                    .sample(input)
                    .map(|token| token.id)
                    .unwrap_or_default(),
            );
            started.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
