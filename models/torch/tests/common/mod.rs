//! What the tests of this crate share: the golden checkpoints, and ways to run them.

#![allow(dead_code)]

use std::path::{Path, PathBuf};

use fastrand::Rng;
use serde::Deserialize;
use understudy_engine_core::runner::{BLOCK, BlockId, Chunk, ModelRunner};
use understudy_torch::load::{LoadOptions, load_stock};
use understudy_torch::runner::TorchRunner;

/// What transformers computed.
#[derive(Deserialize)]
pub struct Expected {
    pub prompt: Vec<u32>,
    #[serde(default)]
    pub greedy: Vec<u32>,
    /// Of each greedy token: the likeliest ids and their log probabilities.
    #[serde(default)]
    pub top5: Vec<Vec<(u32, f32)>>,
    pub pooled: Option<Vec<f32>>,
    pub score: Option<f32>,
}

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../cpu/tests/golden")
        .join(name)
}

/// All golden checkpoints, by name.
pub fn goldens() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(golden("")).unwrap();
    let mut all: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("expected.json").exists())
        .collect();
    all.sort();
    assert!(all.len() > 30, "some are missing: {all:?}");
    all
}

/// What transformers computed with a checkpoint, and every row of the prompt: logits, or an encoder's hidden states.
pub fn expected_in(directory: &Path) -> (Expected, Vec<f32>) {
    let text = std::fs::read(directory.join("expected.json")).unwrap();
    let rows = ["logits.f32", "hidden.f32"].map(|name| std::fs::read(directory.join(name)).ok());
    let bytes = rows.into_iter().flatten().next().unwrap();
    let rows = bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    (serde_json::from_slice(&text).unwrap(), rows)
}

pub fn expected(name: &str) -> (Expected, Vec<f32>) {
    expected_in(&golden(name))
}

pub fn open(name: &str, options: &LoadOptions) -> TorchRunner {
    load_stock(&golden(name), options, &mut |_| {})
        .unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The blocks of one of several whole contexts, not in order.
pub fn table(runner: &dyn ModelRunner, place: usize) -> Vec<BlockId> {
    let each = runner.info().context_length.div_ceil(BLOCK);
    let blocks = place * each..(place + 1) * each;
    assert!(blocks.end <= runner.info().kv_blocks, "{place}");
    blocks.rev().map(|block| block as BlockId).collect()
}

/// Logits of all tokens of one chunk.
pub fn all_logits(
    runner: &mut dyn ModelRunner,
    place: usize,
    start: usize,
    tokens: &[u32],
) -> Vec<f32> {
    let mut logits = Vec::new();
    let chunk = Chunk {
        table: &table(runner, place),
        start,
        tokens,
        logits_for: tokens.len(),
    };
    runner.execute(&[chunk], &mut logits).unwrap();
    logits
}

/// Every row of every sequence by a random schedule: how they are cut into chunks, who else is in the step, which blocks.
pub fn scheduled(
    runner: &mut dyn ModelRunner,
    sequences: &[Vec<u32>],
    places: usize,
    rng: &mut Rng,
) -> Vec<Vec<f32>> {
    let mut order: Vec<usize> = (0..places).collect();
    rng.shuffle(&mut order);
    let tables: Vec<Vec<BlockId>> = order.iter().map(|place| table(runner, *place)).collect();
    let vocab = runner.info().vocab_size;
    let mut done = vec![0; sequences.len()];
    let mut rows = vec![Vec::new(); sequences.len()];
    while (0..sequences.len()).any(|s| done[s] < sequences[s].len()) {
        let mut members: Vec<usize> = (0..sequences.len())
            .filter(|s| done[*s] < sequences[*s].len() && rng.f32() < 0.7)
            .collect();
        rng.shuffle(&mut members);
        let chunks: Vec<Chunk<'_>> = members
            .iter()
            .map(|s| {
                let left = sequences[*s].len() - done[*s];
                let take = match rng.bool() {
                    true => 1,
                    false => 1 + rng.usize(0..left),
                };
                Chunk {
                    table: &tables[*s],
                    start: done[*s],
                    tokens: &sequences[*s][done[*s]..done[*s] + take],
                    logits_for: take,
                }
            })
            .collect();
        let mut logits = Vec::new();
        runner.execute(&chunks, &mut logits).unwrap();
        let mut rest = logits.as_slice();
        for (s, chunk) in members.iter().zip(&chunks) {
            let (own, others) = rest.split_at(chunk.tokens.len() * vocab);
            rows[*s].extend_from_slice(own);
            done[*s] += chunk.tokens.len();
            rest = others;
        }
        assert!(rest.is_empty());
    }
    rows
}

/// The largest difference of two lists; infinite if one is not a number.
pub fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |worst, x| {
            if x.is_nan() {
                f32::INFINITY
            } else {
                worst.max(x)
            }
        })
}

pub fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).fold(0, |best, id| if row[id] > row[best] { id } else { best }) as u32
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A directory of its own under the system's temporary one, removed at the end.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!(
            "understudy-torch-{name}-{}-{count}",
            std::process::id()
        ));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A copy of a golden checkpoint.
    pub fn of_golden(name: &str) -> Self {
        let scratch = Self::new(name);
        for file in std::fs::read_dir(golden(name)).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), scratch.0.join(file.file_name())).unwrap();
        }
        scratch
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Changes `config.json`.
    pub fn edit_config(&self, change: impl FnOnce(&mut serde_json::Value)) {
        let path = self.path("config.json");
        let mut config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        std::fs::write(path, config.to_string()).unwrap();
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
