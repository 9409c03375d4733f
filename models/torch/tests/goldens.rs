//! The model's mathematics against Hugging Face transformers, on tiny random checkpoints of odd sizes.

mod common;

use common::{GOLDENS, all_logits, argmax, expected, open};
use understudy_engine_core::runner::ModelRunner;
use understudy_torch::load::{DtypeChoice, LoadOptions};
use understudy_torch::runner::{LlamaRunner, Numerics};

/// Largest difference of a prompt logit, in absolute terms; the logits of these models reach about ten.
const TOLERANCE: f32 = 1e-4;

fn check_prefill(name: &str, runner: &mut LlamaRunner) {
    let (expected, logits) = expected(name);
    let got = all_logits(runner, 0, 0, &expected.prompt);
    assert_eq!(got.len(), logits.len(), "{name}");
    let worst = got
        .iter()
        .zip(&logits)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    println!("{name}: largest difference of a logit {worst:e}");
    assert!(worst <= TOLERANCE, "{name}: {worst}");
}

fn check_greedy(name: &str, runner: &mut LlamaRunner) {
    let (expected, _) = expected(name);
    let vocab = runner.info().vocab_size;
    let mut last = all_logits(runner, 1, 0, &expected.prompt);
    for (step, want) in expected.greedy.iter().enumerate() {
        let id = argmax(&last[last.len() - vocab..]);
        assert_eq!(id, *want, "{name}: greedy token {step}");
        last = all_logits(runner, 1, expected.prompt.len() + step, &[id]);
    }
}

#[test]
fn exact_numerics_match_transformers() {
    for name in GOLDENS {
        let mut runner = open(
            name,
            &LoadOptions {
                max_sequences: 2,
                threads: 2,
                ..LoadOptions::default()
            },
        );
        check_prefill(name, &mut runner);
        check_greedy(name, &mut runner);
    }
}

#[test]
fn stock_numerics_match_transformers() {
    for name in GOLDENS {
        let options = LoadOptions {
            numerics: Numerics::Stock,
            dtype: DtypeChoice::F32,
            max_sequences: 2,
            threads: 1,
            ..LoadOptions::default()
        };
        let mut runner = open(name, &options);
        check_prefill(name, &mut runner);
        check_greedy(name, &mut runner);
    }
}

/// Attention over a cached prefix and a longer chunk: the stock path's masks.
#[test]
fn chunked_prefill_matches_transformers() {
    for numerics in [Numerics::Exact, Numerics::Stock] {
        let options = LoadOptions {
            numerics,
            dtype: DtypeChoice::F32,
            max_sequences: 3,
            threads: 1,
            ..LoadOptions::default()
        };
        let mut runner = open("f32_gqa_tied", &options);
        let (expected, logits) = expected("f32_gqa_tied");
        let (first, rest) = expected.prompt.split_at(18);
        let mut got = all_logits(&mut runner, 2, 0, first);
        got.extend(all_logits(&mut runner, 2, first.len(), rest));
        let worst = got
            .iter()
            .zip(&logits)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst <= TOLERANCE, "{numerics:?}: {worst}");
    }
}

/// Widening is exact, so the width in which weights are kept may not change a bit, nor the fingerprint.
#[test]
fn narrow_and_widened_weights_give_the_same_bits() {
    for name in ["bf16_mha_tied", "f16_biases_sharded"] {
        let (expected, _) = expected(name);
        let mut narrow = open(
            name,
            &LoadOptions {
                max_sequences: 1,
                ..LoadOptions::default()
            },
        );
        let mut wide = open(
            name,
            &LoadOptions {
                max_sequences: 1,
                dtype: DtypeChoice::F32,
                ..LoadOptions::default()
            },
        );
        let rows =
            |runner: &mut LlamaRunner| common::bits(&all_logits(runner, 0, 0, &expected.prompt));
        assert_eq!(rows(&mut narrow), rows(&mut wide));
        assert_eq!(narrow.info().fingerprint, wide.info().fingerprint);
    }
    let narrowed = open(
        "f32_gqa_tied",
        &LoadOptions {
            max_sequences: 1,
            dtype: DtypeChoice::Bf16,
            ..LoadOptions::default()
        },
    );
    let stored = open(
        "f32_gqa_tied",
        &LoadOptions {
            max_sequences: 1,
            ..LoadOptions::default()
        },
    );
    assert_ne!(narrowed.info().fingerprint, stored.info().fingerprint);
    assert_eq!(
        (narrowed.info().dtype.as_str(), stored.info().dtype.as_str()),
        ("bf16", "f32")
    );
}
