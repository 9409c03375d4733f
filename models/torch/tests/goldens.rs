//! The models' mathematics against Hugging Face transformers, on tiny random checkpoints of odd sizes.

mod common;

use std::path::{Path, PathBuf};

use common::{
    Expected, all_logits, argmax, expected, expected_in, goldens, open, scheduled, worst,
};
use fastrand::Rng;
use understudy_checkpoint::families;
use understudy_engine_core::runner::{BLOCK, Chunk, ModelRunner};
use understudy_torch::load::{LoadOptions, load_encoder, load_stock};
use understudy_torch::options::{DtypeChoice, KvMemory, Numerics};
use understudy_torch::runner::TorchRunner;

/// Largest difference of a prompt logit, in absolute terms; the logits of these models reach about ten.
const TOLERANCE: f32 = 1e-4;
/// Of a log probability along the greedy path.
const LOGPROB_TOLERANCE: f32 = 1e-3;

fn options() -> LoadOptions {
    LoadOptions {
        numerics: Numerics::Stock,
        dtype: DtypeChoice::F32,
        max_sequences: 6,
        threads: 1,
        ..LoadOptions::default()
    }
}

fn load(directory: &Path) -> TorchRunner {
    load_within(directory, None)
}

fn load_within(directory: &Path, context_length: Option<usize>) -> TorchRunner {
    let options = LoadOptions {
        context_length,
        ..options()
    };
    load_stock(directory, &options, &mut |_| {})
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
}

/// Those of models that generate text, with the context that they were computed in.
fn decoders() -> impl Iterator<Item = (PathBuf, Option<usize>)> {
    goldens().into_iter().filter_map(|directory| {
        let spec = families::read(&directory).unwrap();
        if !spec.generates() {
            return None;
        }
        // LongRoPE's factors follow from the length that is run.
        let (expected, _) = expected_in(&directory);
        let length = expected.prompt.len() + expected.greedy.len();
        Some((directory, Some(length)))
    })
}

fn check_greedy(name: &str, runner: &mut dyn ModelRunner, expected: &Expected) {
    let vocab = runner.info().vocab_size;
    let mut last = all_logits(runner, 1, 0, &expected.prompt);
    for (step, want) in expected.greedy.iter().enumerate() {
        let row = &last[last.len() - vocab..];
        if let Some(top) = expected.top5.get(step) {
            let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
            for (id, logprob) in top {
                let got = (f64::from(row[*id as usize]) - sum.ln()) as f32;
                let off = (got - logprob).abs();
                assert!(
                    off <= LOGPROB_TOLERANCE,
                    "{name}: step {step}, id {id}: {off}"
                );
            }
        }
        let id = argmax(row);
        assert_eq!(id, *want, "{name}: greedy token {step}");
        if step + 1 < expected.greedy.len() {
            last = all_logits(runner, 1, expected.prompt.len() + step, &[id]);
        }
    }
}

#[test]
fn decoders_match_transformers() {
    for (directory, length) in decoders() {
        let name = directory
            .file_name()
            .unwrap()
            .to_string_lossy()
            .into_owned();
        let mut runner = load_within(&directory, length);
        let (expected, logits) = expected_in(&directory);
        let off = worst(&all_logits(&mut runner, 0, 0, &expected.prompt), &logits);
        println!("{name}: largest difference of a logit {off:e}");
        assert!(off <= TOLERANCE, "{name}: {off}");
        check_greedy(&name, &mut runner, &expected);
    }
}

#[test]
fn encoders_match_transformers() {
    for directory in goldens() {
        if families::read(&directory).unwrap().generates() {
            continue;
        }
        let name = directory
            .file_name()
            .unwrap()
            .to_string_lossy()
            .into_owned();
        let (expected, hidden) = expected_in(&directory);
        let mut encoder = load_encoder(&directory, &options()).unwrap();
        // In company, and alone.
        let other = &expected.prompt[..7];
        let encoded = encoder.encode(&[other, &expected.prompt]).unwrap();
        let alone = encoder.encode(&[&expected.prompt]).unwrap();
        for encoded in [&encoded[1], &alone[0]] {
            let off = worst(&encoded.hidden, &hidden);
            println!("{name}: largest difference of a hidden state {off:e}");
            assert!(off <= TOLERANCE, "{name}: {off}");
            // Hidden states are what a bare encoder is loaded for: its pooler is left out.
            if let (Some(got), Some(pooled)) = (&encoded.pooled, &expected.pooled) {
                let off = worst(got, pooled);
                assert!(off <= TOLERANCE, "{name}, pooled: {off}");
            }
            if let Some(score) = expected.score {
                let off = worst(encoded.scores.as_ref().unwrap(), &[score]);
                assert!(off <= TOLERANCE, "{name}, score: {off}");
            }
        }
    }
}

/// Chunks, neighbours and blocks choose the kernels and the masks; what comes out stays close to the whole prompt at once.
#[test]
fn schedules_stay_close() {
    for (directory, _) in decoders() {
        let name = directory
            .file_name()
            .unwrap()
            .to_string_lossy()
            .into_owned();
        let mut runner = load(&directory);
        let vocab = runner.info().vocab_size as u32;
        let most = runner.info().context_length;
        let mut rng = Rng::with_seed(17);
        let sequences: Vec<Vec<u32>> = [1, 15, 40, 70, 90]
            .map(|length: usize| (0..length.min(most)).map(|_| rng.u32(0..vocab)).collect())
            .to_vec();
        let plain: Vec<Vec<f32>> = sequences
            .iter()
            .map(|tokens| all_logits(&mut runner, 0, 0, tokens))
            .collect();
        for seed in 0..6 {
            let rows = scheduled(&mut runner, &sequences, 6, &mut Rng::with_seed(seed));
            for (got, want) in rows.iter().zip(&plain) {
                let off = worst(got, want);
                assert!(off <= TOLERANCE, "{name}, seed {seed}: {off}");
            }
        }
    }
}

/// What one sequence leaves in a block, even if it is no number, does not reach another.
#[test]
fn a_blocks_past_does_not_matter() {
    let mut runner = open("f32_gqa_tied", &options());
    let (expected, logits) = expected("f32_gqa_tied");
    let poison: Vec<u8> = f32::NAN
        .to_le_bytes()
        .repeat(runner.info().kv_block_bytes / 4);
    for block in 0..runner.info().kv_blocks {
        runner.import_block(block as u32, &poison).unwrap();
    }
    // Side by side with a shorter one, whose keys are padded: its block is begun by the first token and never filled.
    let (long, short) = (common::table(&runner, 0), common::table(&runner, 1));
    let (first, rest) = expected.prompt.split_at(18);
    let mut got = all_logits(&mut runner, 0, 0, first);
    let mut beside = Vec::new();
    let vocab = runner.info().vocab_size;
    for (index, token) in rest.iter().take(BLOCK - 1).enumerate() {
        let chunk = |table, start, token| Chunk {
            table,
            start,
            tokens: std::slice::from_ref(token),
            logits_for: 1,
        };
        let chunks = [
            chunk(&long, first.len() + index, token),
            chunk(&short, index, &expected.prompt[index]),
        ];
        let mut rows = Vec::new();
        runner.execute(&chunks, &mut rows).unwrap();
        got.extend(&rows[..vocab]);
        beside.extend(&rows[vocab..]);
    }
    for got in [got, beside] {
        let off = worst(&got, &logits[..got.len()]);
        assert!(off <= TOLERANCE, "{off}");
    }
}

/// A block that is copied or sent elsewhere is the block.
#[test]
fn blocks_are_copied_exported_and_imported() {
    let (mut runner, mut other) = (
        open("f32_gqa_tied", &options()),
        open("f32_gqa_tied", &options()),
    );
    let (expected, logits) = expected("f32_gqa_tied");
    let vocab = runner.info().vocab_size;
    let (first, rest) = expected.prompt.split_at(20);
    all_logits(&mut runner, 0, 0, first);
    let (from, to) = (common::table(&runner, 0), common::table(&runner, 1));
    for (from, to) in from.iter().zip(&to).take(2) {
        runner.copy_block(*from, *to).unwrap();
        let mut bytes = vec![7];
        runner.export_block(*from, &mut bytes).unwrap();
        assert_eq!(bytes.len() - 1, runner.info().kv_block_bytes);
        other.import_block(*to, &bytes[1..]).unwrap();
    }
    for runner in [&mut runner, &mut other] {
        let off = worst(
            &all_logits(runner, 1, first.len(), rest),
            &logits[first.len() * vocab..],
        );
        assert!(off <= TOLERANCE, "{off}");
    }
    assert!(other.import_block(0, &[0; 3]).is_err());
    assert!(other.copy_block(0, u32::MAX).is_err());
}

#[test]
fn impossible_chunks_are_errors() {
    let options = LoadOptions {
        context_length: Some(96),
        max_sequences: 2,
        ..options()
    };
    let mut runner = open("f32_gqa_tied", &options);
    let table: Vec<u32> = (0..6).collect();
    let chunk = |table, start, tokens, logits_for| Chunk {
        table,
        start,
        tokens,
        logits_for,
    };
    let mut refused = |chunks: &[Chunk<'_>], part: &str| {
        let error = runner.execute(chunks, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    };
    refused(&[chunk(&table, 96, &[1], 1)], "context");
    refused(&[chunk(&table, 0, &[], 0)], "0 tokens");
    refused(&[chunk(&table, 0, &[1], 2)], "logits for 2");
    refused(&[chunk(&table, 0, &[100_000], 1)], "vocabulary");
    refused(&[chunk(&table[..1], 16, &[1], 1)], "1 blocks");
    refused(&[chunk(&[1 << 30], 0, &[1], 1)], "block 1073741824");
    let twice = [chunk(&table, 0, &[1], 0), chunk(&table, 1, &[1], 0)];
    refused(&twice, "written twice");
    let many = [
        chunk(&table[..1], 0, &[1], 0),
        chunk(&table[1..], 0, &[1], 0),
        chunk(&table[2..], 0, &[1], 0),
    ];
    refused(&many, "2 sequences");
}

/// Narrow types run, and are close to the wide one.
#[test]
fn narrow_types_are_close() {
    for (directory, length) in decoders() {
        let name = directory
            .file_name()
            .unwrap()
            .to_string_lossy()
            .into_owned();
        let (expected, logits) = expected_in(&directory);
        let largest = logits.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        let options = LoadOptions {
            dtype: DtypeChoice::Bf16,
            context_length: length,
            kv_memory: KvMemory::Bytes(16 << 20),
            ..options()
        };
        let mut runner = load_stock(&directory, &options, &mut |_| {}).unwrap();
        assert_eq!(runner.info().dtype, "bf16");
        let (first, rest) = expected.prompt.split_at(11);
        let mut got = all_logits(&mut runner, 0, 0, first);
        got.extend(all_logits(&mut runner, 0, first.len(), rest));
        let off = worst(&got, &logits);
        println!("{name}: {off} of {largest} in bf16");
        assert!(off <= 0.25 * largest, "{name}: {off} of {largest}");
    }
}
