//! The golden checkpoints on a GPU. Without one these tests say loudly that they tested nothing.

mod common;

use std::io::Write;
use std::path::Path;

use common::{all_logits, argmax, expected, expected_in, golden, goldens, worst};
use understudy_checkpoint::families;
use understudy_engine_core::runner::{Chunk, ModelRunner};
use understudy_torch::device::DeviceChoice;
use understudy_torch::load::{LoadOptions, load_stock};
use understudy_torch::options::{DtypeChoice, KvMemory};
use understudy_torch::runner::TorchRunner;

/// Looser than on the CPU: sums run in another order there.
const TOLERANCE: f32 = 1e-3;

fn on_gpu(directory: &Path, dtype: DtypeChoice) -> Option<TorchRunner> {
    if !Path::new("/dev/nvidiactl").exists() {
        // Straight to the descriptor: the test harness would swallow a println.
        let _ = writeln!(
            std::io::stderr(),
            "\nSKIPPED: no GPU here; nothing of CUDA was tested\n"
        );
        return None;
    }
    // LongRoPE's factors follow from the length that is run.
    let (expected, _) = expected_in(directory);
    let options = LoadOptions {
        dtype,
        device: DeviceChoice::Cuda(0),
        max_sequences: 4,
        context_length: Some(expected.prompt.len() + expected.greedy.len()),
        kv_memory: KvMemory::Bytes(16 << 20),
        ..LoadOptions::default()
    };
    Some(
        load_stock(directory, &options, &mut |_| {})
            .unwrap_or_else(|error| panic!("{}: {error}", directory.display())),
    )
}

#[test]
fn f32_on_a_gpu_matches_transformers() {
    let all = goldens().into_iter();
    for directory in all.filter(|path| families::read(path).unwrap().generates()) {
        let Some(mut runner) = on_gpu(&directory, DtypeChoice::F32) else {
            return;
        };
        let name = directory.display();
        assert_eq!(runner.info().device, "cuda:0");
        let (expected, logits) = expected_in(&directory);
        let vocab = runner.info().vocab_size;
        let mut last = all_logits(&mut runner, 1, 0, &expected.prompt);
        let off = worst(&last, &logits);
        assert!(off <= TOLERANCE, "{name}: {off}");
        for (step, want) in expected.greedy.iter().enumerate() {
            let id = argmax(&last[last.len() - vocab..]);
            assert_eq!(id, *want, "{name}: greedy token {step}");
            if step + 1 < expected.greedy.len() {
                last = all_logits(&mut runner, 1, expected.prompt.len() + step, &[id]);
            }
        }
    }
}

/// Several sequences in one step, in narrow types: every path of the stock cache.
#[test]
fn batches_in_every_type_run_on_a_gpu() {
    for dtype in [DtypeChoice::F32, DtypeChoice::Bf16, DtypeChoice::F16] {
        let Some(mut runner) = on_gpu(&golden("f32_gqa_tied"), dtype) else {
            return;
        };
        let (expected, reference) = expected("f32_gqa_tied");
        let prompt = &expected.prompt;
        let (one, two) = (common::table(&runner, 0), common::table(&runner, 2));
        let mut logits = Vec::new();
        let first = [
            Chunk {
                table: &one,
                start: 0,
                tokens: &prompt[..9],
                logits_for: 0,
            },
            Chunk {
                table: &two,
                start: 0,
                tokens: &prompt[..1],
                logits_for: 1,
            },
        ];
        runner.execute(&first, &mut logits).unwrap();
        let second = [
            Chunk {
                table: &two,
                start: 1,
                tokens: &prompt[1..2],
                logits_for: 1,
            },
            Chunk {
                table: &one,
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
        let off = worst(got, want);
        assert!(
            got.len() == vocab && off <= 0.1 * largest,
            "{dtype:?}: {off} of {largest}"
        );
    }
}
