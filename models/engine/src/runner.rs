//! The seam between scheduling and mathematics: what executes one step.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

pub use understudy_kernels::BLOCK;

/// A block of the KV cache: room for [`BLOCK`] consecutive positions of a sequence. Several sequences may read one.
pub type BlockId = u32;

/// Consecutive tokens of one sequence to run through the model in one step.
#[derive(Debug, Clone)]
pub struct Chunk<'a> {
    /// The sequence's blocks in order: position `p` lies in `table[p / BLOCK]` at offset `p % BLOCK`. Long enough for all
    /// tokens of the chunk. What the chunk writes is written by no other chunk of the step, and read by none.
    pub table: &'a [BlockId],
    /// Position of `tokens[0]` in the sequence; the blocks already hold positions `0..start`. What they hold from `start` on
    /// is of no use (drafts that were not accepted, say) and is overwritten.
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
    /// Sequences in one step at most.
    pub max_sequences: usize,
    /// Blocks of the KV cache, of [`BLOCK`] positions each; they are numbered from 0.
    pub kv_blocks: usize,
    /// Length of an exported block, in bytes.
    pub kv_block_bytes: usize,
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
/// on how they were cut into chunks, on the other chunks of the step, or on which blocks hold them. A runner that keeps
/// this only approximately says so in [`ModelInfo::exact`].
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

    /// Copies the keys and values of all layers of a block: one of two sequences that share it is about to write.
    ///
    /// # Errors
    /// [`StepError`] if the device or the library failed.
    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), StepError>;

    /// Appends the keys and values of all layers of a block to `out`: [`ModelInfo::kv_block_bytes`] bytes, in a layout that
    /// depends on the fingerprint only.
    ///
    /// # Errors
    /// [`StepError`] if the device or the library failed.
    fn export_block(&mut self, block: BlockId, out: &mut Vec<u8>) -> Result<(), StepError>;

    /// Fills a block with what [`Self::export_block`] of a runner with the same fingerprint gave.
    ///
    /// # Errors
    /// [`StepError`] if the length is wrong, or the device or the library failed.
    fn import_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), StepError>;
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
