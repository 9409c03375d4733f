//! A sequence and its blocks: their names, what may be taken from others, and what losing them means.

use super::Sequence;
use crate::{
    blocks::{BlockHash, BlockManager, Content},
    frame::AttemptId,
    runner::BLOCK,
};

impl Sequence {
    /// Higher ones are computed first.
    #[must_use]
    pub fn priority(&self) -> i32 {
        self.priority
    }

    /// Whose prompt it would share.
    #[must_use]
    pub fn fork_of(&self) -> Option<AttemptId> {
        self.fork_of
    }

    /// Whether some step has computed anything of it.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.begun
    }

    /// Tokens known so far, prompt and output.
    #[must_use]
    pub fn known_len(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens that it may ever have.
    #[must_use]
    pub fn max_len(&self) -> usize {
        let longest = self
            .prompt_len
            .saturating_add(self.sampling.max_tokens as usize);
        longest.min(self.context_length)
    }

    /// Whether the whole prompt is computed.
    #[must_use]
    pub fn has_prompt_computed(&self) -> bool {
        self.computed >= self.prompt_len
    }

    /// Whether what this one has computed of its prompt is what the other one has yet to compute.
    #[must_use]
    pub fn shares_prompt_with(&self, other: &Self) -> bool {
        self.root == other.root
            && self.tokens[..self.prompt_len] == other.tokens[..other.prompt_len]
    }

    /// Positions of the prompt that can be taken from another sequence: all but the last, and none whose logits are wanted.
    #[must_use]
    pub fn forkable_len(&self) -> usize {
        (self.prompt_len - 1).min(self.first_row())
    }

    /// Full blocks that can be taken from the cache: at least one token is left to compute, and none whose logits are wanted
    /// is taken.
    #[must_use]
    pub fn cacheable_blocks(&self) -> usize {
        (self.tokens.len() - 1).min(self.first_row()) / BLOCK
    }

    /// What a block holds whose tokens are all known.
    pub fn content(&mut self, index: usize, blocks: &BlockManager) -> Content {
        let words = self.tokens.as_chunks::<BLOCK>().0;
        while self.hashes.len() <= index {
            let parent = self.hashes.last().copied().unwrap_or(self.root);
            let hash = blocks.hash(self.root, parent, &words[self.hashes.len()]);
            self.hashes.push(hash);
        }
        let before = index.checked_sub(1);
        Content {
            hash: self.hashes[index],
            parent: before.map_or(self.root, |before| self.hashes[before]),
            tokens: words[index],
        }
    }

    /// The name alone.
    pub fn hash(&mut self, index: usize, blocks: &BlockManager) -> BlockHash {
        match self.hashes.get(index) {
            Some(hash) => *hash,
            None => self.content(index, blocks).hash,
        }
    }

    /// Its blocks hold so many positions that others have computed.
    pub fn take_over(&mut self, computed: usize) {
        self.computed = computed;
    }

    /// It has no blocks any more. What it has generated is forced from now on.
    pub fn preempt(&mut self) {
        self.computed = 0;
        if self.tokens.len() > self.forced_len {
            // A log is compared before the first token after it.
            self.forced_len = self.tokens.len();
            self.expect_logprobs.clear();
        }
    }
}
