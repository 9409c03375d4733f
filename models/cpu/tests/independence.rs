//! The runner's contract: a row of logits is a function of its sequence's tokens. Seeded random schedules (how prompts are cut into chunks,
//! who else is in the step, which blocks, copies and imports of blocks on the way) against the plainest one, bit for bit.

mod common;

use common::{bits, golden, open, options, table};
use fastrand::Rng;
use understudy_cpu::{CpuRunner, LoadOptions, Quantize, load};
use understudy_engine_core::runner::{BlockId, Chunk, ModelRunner};
use understudy_kernels::BLOCK;

const SEQUENCES: usize = 5;

/// Token ids of the sequences, of various lengths; the same for every schedule.
fn sequences(vocab: usize) -> Vec<Vec<u32>> {
    let mut rng = Rng::with_seed(99);
    [1, 17, 40, 64, 90]
        .map(|length| (0..length).map(|_| rng.u32(0..vocab as u32)).collect())
        .to_vec()
}

/// Every row of every sequence, computed alone, one token at a time.
fn plain(runner: &mut CpuRunner, sequences: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let one = |tokens: &Vec<u32>| {
        let table = table(0, tokens.len());
        let rows = tokens.iter().enumerate();
        let rows =
            rows.flat_map(|(start, token)| common::all_logits(runner, &table, start, &[*token]));
        bits(&rows.collect::<Vec<_>>())
    };
    sequences.iter().map(one).collect()
}

/// A sequence on its way.
struct Progress {
    table: Vec<BlockId>,
    done: usize,
    rows: Vec<f32>,
}

/// The same rows by a random schedule. Blocks are reused from schedule to schedule, so old keys lie behind new ones.
fn scheduled(runner: &mut CpuRunner, sequences: &[Vec<u32>], rng: &mut Rng) -> Vec<Vec<u32>> {
    // More than the sequences need, so that they move about.
    let mut free: Vec<BlockId> = (0..runner.info().kv_blocks as BlockId).collect();
    rng.shuffle(&mut free);
    let vocab = runner.info().vocab_size;
    let mut all: Vec<Progress> = sequences
        .iter()
        .map(|_| Progress {
            table: Vec::new(),
            done: 0,
            rows: Vec::new(),
        })
        .collect();
    while (0..SEQUENCES).any(|s| all[s].done < sequences[s].len()) {
        let mut members: Vec<(usize, usize)> = (0..SEQUENCES)
            .filter(|s| all[*s].done < sequences[*s].len() && rng.f32() < 0.7)
            .map(|s| (s, sequences[s].len() - all[s].done))
            .collect();
        rng.shuffle(&mut members);
        for (s, take) in &mut members {
            *take = if rng.bool() {
                1
            } else {
                1 + rng.usize(0..*take)
            };
            let progress = &mut all[*s];
            while progress.table.len() * BLOCK < progress.done + *take {
                progress.table.push(free.pop().unwrap());
            }
        }
        let chunks: Vec<Chunk<'_>> = members
            .iter()
            .map(|(s, take)| Chunk {
                table: &all[*s].table,
                start: all[*s].done,
                tokens: &sequences[*s][all[*s].done..all[*s].done + take],
                logits_for: *take,
            })
            .collect();
        let mut logits = Vec::new();
        runner.execute(&chunks, &mut logits).unwrap();
        let mut rest = logits.as_slice();
        for (s, take) in members {
            let (own, others) = rest.split_at(take * vocab);
            all[s].rows.extend_from_slice(own);
            all[s].done += take;
            rest = others;
        }
        assert!(rest.is_empty());
        let moved = rng.usize(0..SEQUENCES);
        move_a_block(runner, &mut all[moved], &mut free, rng);
    }
    all.iter().map(|progress| bits(&progress.rows)).collect()
}

/// Copies one block elsewhere, or exports and imports it; what it leaves behind is used again.
fn move_a_block(
    runner: &mut CpuRunner,
    progress: &mut Progress,
    free: &mut Vec<BlockId>,
    rng: &mut Rng,
) {
    if progress.table.is_empty() || free.is_empty() {
        return;
    }
    let (index, to) = (rng.usize(0..progress.table.len()), free.swap_remove(0));
    let from = std::mem::replace(&mut progress.table[index], to);
    if rng.bool() {
        runner.copy_block(from, to).unwrap();
    } else {
        let mut bytes = Vec::new();
        runner.export_block(from, &mut bytes).unwrap();
        runner.import_block(to, &bytes).unwrap();
    }
    free.push(from);
}

fn with_threads(threads: usize, quantize: Quantize) -> LoadOptions {
    LoadOptions {
        threads,
        quantize,
        context_length: Some(96),
        ..options()
    }
}

fn check(directory: &std::path::Path, quantize: Quantize, schedules: u64) {
    let open = |threads| {
        load(directory, &with_threads(threads, quantize), &mut |_| {})
            .unwrap()
            .0
    };
    let sequences = sequences(open(1).info().vocab_size);
    let expected = plain(&mut open(1), &sequences);
    for threads in [1, 2] {
        let mut runner = open(threads);
        for seed in 0..schedules {
            let rows = scheduled(&mut runner, &sequences, &mut Rng::with_seed(seed));
            assert!(
                rows == expected,
                "{}, {quantize:?}, {threads} threads, seed {seed}",
                directory.display()
            );
        }
    }
}

#[test]
fn schedules_do_not_change_a_bit() {
    for (name, quantize, schedules) in [
        ("f32_gqa_tied", Quantize::None, 400),
        ("bf16_mha_tied", Quantize::None, 150),
        ("f16_biases_sharded", Quantize::None, 150),
        ("f32_gqa_tied", Quantize::Int8, 300),
        ("f32_untied_sharded", Quantize::Int4, 150),
    ] {
        check(&golden(name), quantize, schedules);
    }
}

/// Windows, soft caps, experts, learned positions, parallel branches: every family.
#[test]
fn schedules_do_not_change_a_bit_of_any_family() {
    for name in common::goldens_with("logits.f32") {
        check(&golden(&name), Quantize::None, 15);
    }
}

/// The demo model is larger, so that its products are split over threads.
#[test]
fn the_demo_model_keeps_its_bits_too() {
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo");
    assert!(
        demo.join("model.safetensors").exists(),
        "the weights are in the repository"
    );
    check(&demo, Quantize::None, 10);
    check(&demo, Quantize::Int8, 10);
}

#[test]
fn a_block_of_the_wrong_size_is_refused() {
    let mut runner = open("f32_gqa_tied", &with_threads(1, Quantize::None));
    let mut bytes = Vec::new();
    runner.export_block(0, &mut bytes).unwrap();
    assert_eq!(bytes.len(), runner.info().kv_block_bytes);
    bytes.pop();
    assert!(
        runner
            .import_block(0, &bytes)
            .unwrap_err()
            .to_string()
            .contains("bytes")
    );
    let beyond = runner.info().kv_blocks as BlockId;
    assert!(runner.copy_block(0, beyond).is_err() && runner.copy_block(beyond, 0).is_err());
}

#[test]
fn impossible_chunks_are_errors() {
    let mut runner = open("f32_gqa_tied", &with_threads(1, Quantize::None));
    let beyond = runner.info().kv_blocks as BlockId;
    let mut refused = |table: &[BlockId], start, tokens: &[u32], logits_for, part: &str| {
        let chunk = Chunk {
            table,
            start,
            tokens,
            logits_for,
        };
        let error = runner.execute(&[chunk], &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    };
    refused(&[0, 1, 2, 3, 4, 5, 6], 96, &[1], 1, "context");
    refused(&[0], 16, &[1], 1, "blocks");
    refused(&[beyond], 0, &[1], 1, "block");
    refused(&[0], 0, &[], 0, "0 tokens");
    refused(&[0], 0, &[1], 2, "logits for 2");
    refused(&[0], 0, &[100_000], 1, "vocabulary");
}
