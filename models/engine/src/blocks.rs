//! Who holds which block of the KV cache, and which blocks hold prefixes that somebody may ask for again.
//!
//! ```text
//!            allocate                     release, registered
//!   free ───────────────> used (1 … n) ───────────────────────> cached ──> … evicted, least recently used first
//!    ^                      │     ^                                │
//!    └──── release, not ────┘     └────────── share (a hit) ───────┘
//! ```
//!
//! A block is *registered* under the hash of its content once all its positions are computed; from then on nobody writes to
//! it. Several sequences may hold one block, each with a reference of its own. Who wants to write asks first
//! ([`BlockManager::make_writable`]), and is sent to a copy if others read the block or may come to read it.
//!
//! Invariant: every block is in exactly one of the three states, and free + used + cached is all there are. Numbers only:
//! no keys, no values, no device.

mod hash;

use std::collections::HashMap;

pub use hash::BlockHash;

use crate::runner::{BLOCK, BlockId};

/// No block: the end of the list of cached ones.
const NONE: BlockId = BlockId::MAX;

/// What a registered block holds, enough to name it and to prove the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    pub hash: BlockHash,
    /// Hash of the block before it, or the root.
    pub parent: BlockHash,
    pub tokens: [u32; BLOCK],
}

#[derive(Debug, Clone)]
struct Block {
    references: u32,
    content: Option<Content>,
    /// Neighbours among the cached blocks, by time of use.
    older: BlockId,
    newer: BlockId,
}

/// Whether a holder of a block may write to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writable {
    /// It is the only holder.
    Already,
    /// It now holds this block instead; the content has yet to be copied.
    Copy { to: BlockId },
    /// A copy is needed, and no block is left for it. Nothing has changed.
    NoRoom,
}

/// How many blocks are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockCounts {
    pub free: usize,
    pub used: usize,
    pub cached: usize,
}

impl BlockCounts {
    /// All blocks.
    #[must_use]
    pub fn total(self) -> usize {
        self.free + self.used + self.cached
    }
}

/// Bugs that the tests put in to see that they find them.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sabotage {
    NoCopyOnWrite,
    HashWithoutParent,
    RegisterRejectedDrafts,
}

/// See the module.
#[derive(Debug)]
pub struct BlockManager {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    by_hash: HashMap<BlockHash, BlockId>,
    oldest: BlockId,
    newest: BlockId,
    cached: usize,
    evictions: u64,
    #[cfg(test)]
    pub(crate) sabotage: Option<Sabotage>,
}

impl BlockManager {
    /// All blocks free. Takes all the memory that it will ever need.
    #[must_use]
    pub fn new(blocks: usize) -> Self {
        let empty = Block {
            references: 0,
            content: None,
            older: NONE,
            newer: NONE,
        };
        Self {
            blocks: vec![empty; blocks],
            free: (0..blocks as BlockId).rev().collect(),
            // Twice: erased entries take room in the table until it is tidied, which it must not be by growing.
            by_hash: HashMap::with_capacity(2 * blocks),
            oldest: NONE,
            newest: NONE,
            cached: 0,
            evictions: 0,
            #[cfg(test)]
            sabotage: None,
        }
    }

    /// How many blocks are in which state.
    #[must_use]
    pub fn counts(&self) -> BlockCounts {
        BlockCounts {
            free: self.free.len(),
            used: self.blocks.len() - self.available(),
            cached: self.cached,
        }
    }

    /// Blocks that [`Self::allocate`] can give: free or cached.
    #[must_use]
    pub fn available(&self) -> usize {
        self.free.len() + self.cached
    }

    /// Cached blocks that had to go, since the start.
    #[must_use]
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// A block of one's own, for the price of the prefix that has not been asked for longest; `None` if all are used.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => self.evict()?,
        };
        self.blocks[block as usize].references = 1;
        Some(block)
    }

    /// One more holder of a used or cached block.
    pub fn share(&mut self, block: BlockId) {
        if self.is_cached(block) {
            self.unlink(block);
        }
        self.blocks[block as usize].references += 1;
    }

    /// One holder less. Without any, a registered block stays cached.
    ///
    /// # Panics
    /// If nobody holds it: a table was released twice.
    pub fn release(&mut self, block: BlockId) {
        let state = &mut self.blocks[block as usize];
        assert!(state.references > 0, "block {block} is released twice");
        state.references -= 1;
        if state.references > 0 {
            return;
        }
        if state.content.is_some() {
            self.link_newest(block);
        } else {
            self.free.push(block);
        }
    }

    /// Makes sure that a holder of `block` may write to it.
    pub fn make_writable(&mut self, block: BlockId) -> Writable {
        #[cfg(test)]
        if self.sabotage == Some(Sabotage::NoCopyOnWrite) {
            return Writable::Already;
        }
        let state = &self.blocks[block as usize];
        let alone = state.references == 1;
        if alone && state.content.is_none() {
            return Writable::Already;
        }
        if let Some(to) = self.allocate() {
            self.release(block);
            return Writable::Copy { to };
        }
        if alone {
            // Going on is worth more than what somebody may ask for.
            self.unregister(block);
            return Writable::Already;
        }
        Writable::NoRoom
    }

    /// Registers a used block whose positions are all computed. If another block holds the same, that one stays known.
    pub fn register(&mut self, block: BlockId, content: Content) {
        let state = &mut self.blocks[block as usize];
        if state.content.is_some() || self.by_hash.contains_key(&content.hash) {
            return;
        }
        state.content = Some(content);
        self.by_hash.insert(content.hash, block);
    }

    /// The block that holds this, if one does.
    #[must_use]
    pub fn lookup(&self, hash: BlockHash) -> Option<BlockId> {
        self.by_hash.get(&hash).copied()
    }

    /// What a block is registered as.
    #[must_use]
    pub fn content(&self, block: BlockId) -> Option<&Content> {
        self.blocks[block as usize].content.as_ref()
    }

    /// Whether nobody holds a block, but it is kept for its content.
    #[must_use]
    pub fn is_cached(&self, block: BlockId) -> bool {
        let state = &self.blocks[block as usize];
        state.references == 0 && state.content.is_some()
    }

    /// The name of a block by its place and tokens.
    #[must_use]
    pub fn hash(&self, root: BlockHash, parent: BlockHash, tokens: &[u32; BLOCK]) -> BlockHash {
        #[cfg(test)]
        if self.sabotage == Some(Sabotage::HashWithoutParent) {
            return root.child(tokens);
        }
        let _ = root;
        parent.child(tokens)
    }

    /// Checks the invariant against the tables that are held.
    ///
    /// # Errors
    /// In words, what is wrong.
    pub fn verify<'a>(&self, tables: impl Iterator<Item = &'a [BlockId]>) -> Result<(), String> {
        let mut held = vec![0; self.blocks.len()];
        tables
            .flatten()
            .for_each(|&block| held[block as usize] += 1);
        let mut states = vec![0; self.blocks.len()];
        self.free
            .iter()
            .for_each(|&block| states[block as usize] += 1);
        let mut block = self.oldest;
        while block != NONE {
            states[block as usize] += 1;
            block = self.blocks[block as usize].newer;
        }
        for (id, state) in self.blocks.iter().enumerate() {
            if state.references != held[id] {
                return Err(format!(
                    "block {id} counts {} references, and {} tables have it",
                    state.references, held[id]
                ));
            }
            if states[id] + u32::from(state.references > 0) != 1 {
                return Err(format!("block {id} is lost, or in two states"));
            }
            if let Some(content) = &state.content
                && self.lookup(content.hash) != Some(id as BlockId)
            {
                return Err(format!("block {id} is not found under its hash"));
            }
        }
        let known = self.blocks.iter().filter(|state| state.content.is_some());
        if known.count() != self.by_hash.len() {
            return Err("a hash leads to a block with other content".to_owned());
        }
        Ok(())
    }

    fn evict(&mut self) -> Option<BlockId> {
        let block = self.oldest;
        if block == NONE {
            return None;
        }
        self.unlink(block);
        self.unregister(block);
        self.evictions += 1;
        Some(block)
    }

    fn unregister(&mut self, block: BlockId) {
        if let Some(content) = self.blocks[block as usize].content.take() {
            self.by_hash.remove(&content.hash);
        }
    }

    fn link_newest(&mut self, block: BlockId) {
        let older = std::mem::replace(&mut self.newest, block);
        let state = &mut self.blocks[block as usize];
        (state.older, state.newer) = (older, NONE);
        match self.blocks.get_mut(older as usize) {
            Some(older) => older.newer = block,
            None => self.oldest = block,
        }
        self.cached += 1;
    }

    fn unlink(&mut self, block: BlockId) {
        let Block { older, newer, .. } = self.blocks[block as usize];
        match self.blocks.get_mut(older as usize) {
            Some(state) => state.newer = newer,
            None => self.oldest = newer,
        }
        match self.blocks.get_mut(newer as usize) {
            Some(state) => state.older = older,
            None => self.newest = older,
        }
        self.cached -= 1;
    }
}

#[cfg(test)]
mod tests;
