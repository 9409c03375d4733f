//! The golden checkpoints on a GPU. Without one these tests say loudly that they tested nothing.

mod common;

use std::io::Write;

use common::{GOLDENS, all_logits, argmax, expected, golden};
use understudy_engine_core::runner::{Chunk, ModelRunner, Slot};
use understudy_torch::device::DeviceChoice;
use understudy_torch::load::{DtypeChoice, LoadOptions, load};
use understudy_torch::runner::LlamaRunner;

/// Looser than on the CPU: sums run in another order there.
const TOLERANCE: f32 = 1e-3;

fn on_gpu(name: &str, dtype: DtypeChoice) -> Option<LlamaRunner> {
    if !std::path::Path::new("/dev/nvidiactl").exists() {
        // Straight to the descriptor: the test harness would swallow a println.
        let _ = writeln!(
            std::io::stderr(),
            "\nSKIPPED: no GPU here; nothing of CUDA was tested\n"
        );
        return None;
    }
    let options = LoadOptions {
        dtype,
        device: DeviceChoice::Cuda(0),
        max_sequences: 4,
        ..LoadOptions::default()
    };
    Some(
        load(&golden(name), &options, &mut |_| {})
            .unwrap_or_else(|error| panic!("{name}: {error}")),
    )
}

#[test]
fn f32_on_a_gpu_matches_transformers() {
    for name in GOLDENS {
        let Some(mut runner) = on_gpu(name, DtypeChoice::F32) else {
            return;
        };
        assert_eq!(runner.info().device, "cuda:0");
        let (expected, logits) = expected(name);
        let vocab = runner.info().vocab_size;
        let mut last = all_logits(&mut runner, 1, 0, &expected.prompt);
        let worst = last
            .iter()
            .zip(&logits)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst <= TOLERANCE, "{name}: {worst}");
        for (step, want) in expected.greedy.iter().enumerate() {
            let id = argmax(&last[last.len() - vocab..]);
            assert_eq!(id, *want, "{name}: greedy token {step}");
            last = all_logits(&mut runner, 1, expected.prompt.len() + step, &[id]);
        }
    }
}

/// Several sequences in one step, in narrow types: every path of the stock cache.
#[test]
fn batches_in_every_type_run_on_a_gpu() {
    for dtype in [DtypeChoice::F32, DtypeChoice::Bf16, DtypeChoice::F16] {
        let Some(mut runner) = on_gpu("f32_gqa_tied", dtype) else {
            return;
        };
        let (expected, reference) = expected("f32_gqa_tied");
        let prompt = &expected.prompt;
        let mut logits = Vec::new();
        let first = [
            Chunk {
                slot: Slot(0),
                start: 0,
                tokens: &prompt[..9],
                logits_for: 0,
            },
            Chunk {
                slot: Slot(2),
                start: 0,
                tokens: &prompt[..1],
                logits_for: 1,
            },
        ];
        runner.execute(&first, &mut logits).unwrap();
        let second = [
            Chunk {
                slot: Slot(2),
                start: 1,
                tokens: &prompt[1..2],
                logits_for: 1,
            },
            Chunk {
                slot: Slot(0),
                start: 9,
                tokens: &prompt[9..],
                logits_for: 1,
            },
        ];
        logits.clear();
        runner.execute(&second, &mut logits).unwrap();
        let vocab = runner.info().vocab_size;
        let (got, want) = (&logits[vocab..], &reference[reference.len() - vocab..]);
        let largest = want.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
        let worst = got
            .iter()
            .zip(want)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(
            got.len() == vocab && worst <= 0.1 * largest,
            "{dtype:?}: {worst} of {largest}"
        );
    }
}
