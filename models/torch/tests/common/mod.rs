//! What the tests of this crate share: the golden checkpoints, and ways to run them.

#![allow(dead_code)]

use std::path::{Path, PathBuf};

use serde::Deserialize;
use understudy_engine_core::runner::{Chunk, ModelRunner, Slot};
use understudy_torch::load::{LoadOptions, load};
use understudy_torch::runner::LlamaRunner;

/// All golden checkpoints; see `scripts/golden/make_llama_goldens.py`.
pub const GOLDENS: [&str; 6] = [
    "f32_gqa_tied",
    "f32_untied_sharded",
    "bf16_mha_tied",
    "f16_biases_sharded",
    "f32_llama3_rope",
    "f32_linear_rope",
];

/// What transformers computed.
#[derive(Deserialize)]
pub struct Expected {
    pub prompt: Vec<u32>,
    pub greedy: Vec<u32>,
}

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

pub fn expected(name: &str) -> (Expected, Vec<f32>) {
    let directory = golden(name);
    let text = std::fs::read(directory.join("expected.json")).unwrap();
    let bytes = std::fs::read(directory.join("logits.f32")).unwrap();
    let logits = bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    (serde_json::from_slice(&text).unwrap(), logits)
}

pub fn open(name: &str, options: &LoadOptions) -> LlamaRunner {
    load(&golden(name), options, &mut |_| {}).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Logits of all tokens of one chunk.
pub fn all_logits(
    runner: &mut dyn ModelRunner,
    slot: u32,
    start: usize,
    tokens: &[u32],
) -> Vec<f32> {
    let mut logits = Vec::new();
    runner
        .execute(
            &[Chunk {
                slot: Slot(slot),
                start,
                tokens,
                logits_for: tokens.len(),
            }],
            &mut logits,
        )
        .unwrap();
    logits
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
