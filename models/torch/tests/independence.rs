//! The runner's contract: a row of logits is a function of its sequence's tokens. Seeded random schedules (how prompts are cut into chunks,
//! who else is in the step, which slot) against the plainest one, bit for bit.

mod common;

use common::{bits, golden, open, scheduled, table};
use fastrand::Rng;
use understudy_engine_core::runner::{Chunk, ModelRunner};
use understudy_torch::load::{LoadOptions, load, load_stock};
use understudy_torch::options::{DtypeChoice, Numerics};

const PLACES: usize = 7;

/// Token ids of the sequences, of various lengths; the same for every schedule.
fn sequences(vocab: usize) -> Vec<Vec<u32>> {
    let mut rng = Rng::with_seed(99);
    [1, 17, 40, 64, 90]
        .map(|length| (0..length).map(|_| rng.u32(0..vocab as u32)).collect())
        .to_vec()
}

/// Every row of every sequence, computed alone, one token at a time, in the same blocks.
fn plain(runner: &mut dyn ModelRunner, sequences: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let table = table(runner, 0);
    let mut rows = Vec::new();
    for tokens in sequences {
        let mut logits = Vec::new();
        for (start, token) in tokens.iter().enumerate() {
            let mut row = Vec::new();
            let chunk = Chunk {
                table: &table,
                start,
                tokens: std::slice::from_ref(token),
                logits_for: 1,
            };
            runner.execute(&[chunk], &mut row).unwrap();
            logits.extend(row);
        }
        rows.push(logits);
    }
    rows
}

fn options(numerics: Numerics, threads: usize) -> LoadOptions {
    LoadOptions {
        numerics,
        threads,
        max_sequences: PLACES,
        context_length: Some(96),
        ..LoadOptions::default()
    }
}

/// Number of schedules whose rows differ from the plain ones.
fn differing(name: &str, numerics: Numerics, threads: usize, schedules: u64) -> u64 {
    let mut runner = open(name, &options(numerics, threads));
    let sequences = sequences(runner.info().vocab_size);
    let expected: Vec<Vec<u32>> = plain(&mut open(name, &options(numerics, 1)), &sequences)
        .iter()
        .map(|rows| bits(rows))
        .collect();
    (0..schedules)
        .filter(|seed| {
            let rows = scheduled(&mut runner, &sequences, PLACES, &mut Rng::with_seed(*seed));
            let same = rows
                .iter()
                .zip(&expected)
                .all(|(rows, expected)| bits(rows) == *expected);
            if !same && numerics == Numerics::Exact {
                println!("{name}, {threads} threads: schedule of seed {seed} differs");
            }
            !same
        })
        .count() as u64
}

/// What `models/cpu/tests/independence.rs` asks of the exact executor, asked of LibTorch's operators: that test can fail.
#[test]
fn the_stock_operators_fail_this_test() {
    assert!(differing("f32_gqa_tied", Numerics::Stock, 1, 20) > 0);
}

/// The demo model is larger, so that its products are split over threads.
#[test]
fn the_demo_model_keeps_its_bits_too() {
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo");
    assert!(
        demo.join("model.safetensors").exists(),
        "the weights are in the repository"
    );
    let open = |threads| load(&demo, &options(Numerics::Exact, threads), &mut |_| {}).unwrap();
    let sequences = sequences(open(1).info().vocab_size);
    let expected: Vec<Vec<u32>> = plain(&mut *open(1), &sequences)
        .iter()
        .map(|rows| bits(rows))
        .collect();
    let mut runner = open(2);
    for seed in 0..10 {
        let rows = scheduled(&mut *runner, &sequences, PLACES, &mut Rng::with_seed(seed));
        assert!(
            rows.iter()
                .zip(&expected)
                .all(|(rows, expected)| bits(rows) == *expected),
            "seed {seed}"
        );
    }
}

#[test]
fn equal_models_have_equal_fingerprints_and_other_weights_another() {
    let print = |name: &str, threads, context| {
        let options = LoadOptions {
            threads,
            context_length: Some(context),
            ..options(Numerics::Stock, 1)
        };
        load_stock(&golden(name), &options, &mut |_| {})
            .unwrap()
            .info()
            .fingerprint
            .clone()
    };
    let one = print("f32_gqa_tied", 1, 96);
    assert_eq!(
        one,
        print("f32_gqa_tied", 2, 50),
        "threads and context length are no part of the arithmetic"
    );
    assert_ne!(one, print("f32_linear_rope", 1, 96));
}

/// Two widths in one checkpoint: narrowing rounds each matrix by itself, whatever most of them are.
#[test]
fn rounding_any_matrix_is_another_model() {
    let scratch = common::Scratch::of_golden("bf16_mha_tied");
    widen(
        &scratch.path("model.safetensors"),
        "model.layers.0.mlp.up_proj.weight",
    );
    let print = |dtype| {
        let options = LoadOptions {
            dtype,
            ..options(Numerics::Exact, 1)
        };
        let runner = load(&scratch.0, &options, &mut |_| {}).unwrap();
        runner.info().fingerprint.clone()
    };
    let stored = print(DtypeChoice::Auto);
    assert_eq!(stored, print(DtypeChoice::F32), "widening changes nothing");
    let narrowed = print(DtypeChoice::Bf16);
    assert_ne!(stored, narrowed, "the wide matrix is rounded");
    assert_ne!(narrowed, print(DtypeChoice::F16));
}

/// Stores one bf16 tensor of a file as f32, with bits that bf16 cannot hold.
fn widen(path: &std::path::Path, name: &str) {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut data = bytes[8 + length..].to_vec();
    let offsets = &header[name]["data_offsets"];
    let at = |index: usize| offsets[index].as_u64().unwrap() as usize;
    let wide: Vec<u8> = data[at(0)..at(1)]
        .chunks_exact(2)
        .flat_map(|half| [1, 0, half[0], half[1]])
        .collect();
    let start = data.len();
    data.extend(&wide);
    header[name]["dtype"] = "F32".into();
    header[name]["data_offsets"] = serde_json::json!([start, data.len()]);
    let header = header.to_string();
    let file = [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        &data,
    ]
    .concat();
    std::fs::write(path, file).unwrap();
}
