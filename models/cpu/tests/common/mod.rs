//! What the tests of this crate share: the golden checkpoints, and ways to run them.

#![allow(dead_code)]

use std::path::{Path, PathBuf};

use serde::Deserialize;
use understudy_cpu::{CpuRunner, KvMemory, LoadOptions, load};
use understudy_engine_core::runner::{BlockId, Chunk, ModelRunner};
use understudy_kernels::BLOCK;

/// What transformers computed for a golden checkpoint; see `scripts/golden`.
#[derive(Deserialize)]
pub struct Expected {
    pub prompt: Vec<u32>,
    #[serde(default)]
    pub greedy: Vec<u32>,
    /// The five likeliest tokens at each generated position; of the older checkpoints there are none.
    #[serde(default)]
    pub top5: Vec<Vec<(u32, f32)>>,
    /// Of encoders.
    #[serde(default)]
    pub pooled: Option<Vec<f32>>,
    #[serde(default)]
    pub score: Option<f32>,
    #[serde(default)]
    pub token_types: Vec<u32>,
    #[serde(default)]
    pub score_with_token_types: Option<f32>,
}

pub fn golden_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

pub fn golden(name: &str) -> PathBuf {
    golden_root().join(name)
}

/// All golden checkpoints that hold `file`.
pub fn goldens_with(file: &str) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(golden_root())
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join(file).exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub fn expected(name: &str) -> Expected {
    let text = std::fs::read(golden(name).join("expected.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

pub fn floats(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

/// Small, private, and with little memory: many tests run side by side.
pub fn options() -> LoadOptions {
    LoadOptions {
        threads: 1,
        max_sequences: 4,
        kv_memory: KvMemory::Bytes(64 << 20),
        share_weights: false,
        ..LoadOptions::default()
    }
}

pub fn open(name: &str, options: &LoadOptions) -> CpuRunner {
    load(&golden(name), options, &mut |_| {})
        .unwrap_or_else(|error| panic!("{name}: {error}"))
        .0
}

/// A table for `positions` positions that begins at block `first`.
pub fn table(first: usize, positions: usize) -> Vec<BlockId> {
    (first..first + positions.div_ceil(BLOCK))
        .map(|block| block as BlockId)
        .collect()
}

/// Logits of all tokens of one chunk of the sequence whose blocks are `table`.
pub fn all_logits(
    runner: &mut dyn ModelRunner,
    table: &[BlockId],
    start: usize,
    tokens: &[u32],
) -> Vec<f32> {
    let mut logits = Vec::new();
    let chunk = Chunk {
        table,
        start,
        tokens,
        logits_for: tokens.len(),
    };
    runner.execute(&[chunk], &mut logits).unwrap();
    logits
}

pub fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).fold(0, |best, id| if row[id] > row[best] { id } else { best }) as u32
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Natural logarithms of the softmax, in double precision.
pub fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
    row.iter().map(|x| f64::from(x - max) - sum.ln()).collect()
}

/// The largest difference of two rows.
pub fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}
