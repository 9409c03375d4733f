//! The seam between scheduling and mathematics: what executes one step.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

/// A slot of the KV cache: one running sequence owns one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// Consecutive tokens of one sequence to run through the model in one step.
#[derive(Debug, Clone)]
pub struct Chunk<'a> {
    pub slot: Slot,
    /// Position of `tokens[0]` in the sequence; the slot's cache already holds positions `0..start`.
    pub start: usize,
    /// At least one token.
    pub tokens: &'a [u32],
    /// For how many of the last tokens the logits are wanted, `0 ..= tokens.len()`.
    pub logits_for: usize,
}

/// Facts about a loaded model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    pub architecture: String,
    pub context_length: usize,
    pub vocab_size: usize,
    pub eos_token_ids: Vec<u32>,
    pub device: String,
    pub dtype: String,
    /// Number of slots, each of `context_length` positions.
    pub slots: usize,
    pub fingerprint: String,
    /// Whether the contract of [`ModelRunner`] holds bit for bit. If not, replays need only be close; see [`crate::replay`].
    pub exact: bool,
}

/// A counter that a runner moves while a step goes on, so that its owner can tell a long step from a hung one. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Ticks(Arc<AtomicU64>);

impl Ticks {
    /// Some part of a step is done.
    pub fn tick(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    /// How many parts so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A step that failed as a whole. The engine process reports it and exits: its owner starts a clean one.
#[derive(Debug, thiserror::Error)]
#[error("model step failed: {message}")]
pub struct StepError {
    pub message: String,
}

/// Executes steps on one device. Owned by one dedicated OS thread.
///
/// Contract: a row of logits is a pure function of the tokens at positions `0..=p` of its sequence. It does not depend
/// on how they were cut into chunks, on the other chunks of the step, or on the slot. A runner that keeps this only
/// approximately says so in [`ModelInfo::exact`].
pub trait ModelRunner {
    fn info(&self) -> &ModelInfo;

    /// Gives the runner a counter to move several times a second within a long step. Without one, or in a runner whose
    /// steps are short, a step shows when it is over.
    fn set_ticks(&mut self, _ticks: Ticks) {}

    /// Runs all chunks; appends to `logits` one row of `vocab_size` values per wanted position, chunk by chunk, in
    /// position order. `logits` arrives empty.
    ///
    /// # Errors
    /// [`StepError`] if the device or the library failed.
    fn execute(&mut self, chunks: &[Chunk<'_>], logits: &mut Vec<f32>) -> Result<(), StepError>;

    /// The slot's sequence is gone; its cache may be reused from position 0.
    fn release(&mut self, slot: Slot);
}

/// The first line of a caught panic's text: LibTorch appends pages of C++ frames to its own.
#[must_use]
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.and_then(|text| text.lines().next())
        .unwrap_or("panic without a text")
        .to_owned()
}
