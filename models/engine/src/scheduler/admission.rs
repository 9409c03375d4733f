//! Who runs, who waits, and who has to go back to waiting.
//!
//! A sequence begins to run when there is a place for it and blocks for its next chunk, those of a known prefix counted as
//! there. It displaces what has a lower priority; equals only if it is the very first of all, which must get on (a fork that
//! waited for its prompt may find that younger ones have passed it). Nobody displaces one that stands before it, so nobody is
//! sent back and forth. One that was preempted comes back when all that it had fits.

use super::{Rank, Running, Scheduler, Waiting};
use crate::{runner::BLOCK, sequence::Sequence};

/// Room reserved ahead in a table, at most.
const RESERVE_BLOCKS: usize = 256;

/// Where a sequence's first positions come from.
enum Prefix {
    /// It waits until another one has computed the prompt that both have.
    Pending,
    /// Blocks that are in [`Scheduler::hits`] now hold so many positions.
    Known { positions: usize },
}

impl Scheduler {
    /// Puts an attempt into the queue, at the place of its rank.
    pub(super) fn enqueue(&mut self, waiting: Waiting) {
        let place = self
            .waiting
            .partition_point(|other| other.rank < waiting.rank);
        self.waiting.insert(place, waiting);
    }

    /// Lets run what can.
    pub(super) fn admit_waiting(&mut self) {
        let mut index = 0;
        while let Some(waiting) = self.waiting.get(index) {
            let rank = waiting.rank;
            let full = self.running.len() >= self.max_sequences;
            let displaceable = self.displaceable(rank);
            if full && displaceable == 0 {
                return;
            }
            let Prefix::Known { positions } = self.find_prefix(index) else {
                index += 1;
                continue;
            };
            let needed = self.blocks_needed(index, positions);
            if needed > self.blocks.available() + self.blocks_of_last(displaceable) {
                return;
            }
            if full || needed > self.blocks.available() {
                self.preempt_last();
                continue;
            }
            self.admit(index, positions);
        }
    }

    /// Ends a running sequence.
    pub(super) fn remove(&mut self, index: usize) -> Running {
        let mut running = self.running.remove(index);
        // From the end: what is evicted first should be the end of a prefix, without which the rest is still of use.
        for block in running.table.drain(..).rev() {
            self.blocks.release(block);
        }
        running
    }

    /// Sends the last one of all back to waiting.
    pub(super) fn preempt_last(&mut self) {
        let Some(last) = self.running.len().checked_sub(1) else {
            return;
        };
        let Running {
            rank, mut sequence, ..
        } = self.remove(last);
        self.totals.preemptions += 1;
        sequence.preempt();
        self.enqueue(Waiting {
            rank,
            sequence,
            preempted: true,
        });
    }

    /// How many of the running sequences, from the end, one of this rank may displace.
    fn displaceable(&self, rank: Rank) -> usize {
        let is_first = self.running.first().is_some_and(|first| rank < first.rank);
        let lower = |running: &&Running| is_first || running.rank.0 > rank.0;
        self.running.iter().rev().take_while(lower).count()
    }

    /// Blocks held by the last `count` running sequences; those that are shared counted more than once, which at worst
    /// displaces in vain.
    fn blocks_of_last(&self, count: usize) -> usize {
        let last = self.running.iter().rev().take(count);
        last.map(|running| running.table.len()).sum()
    }

    /// Fills `hits` with the blocks that hold the beginning of a waiting sequence.
    fn find_prefix(&mut self, index: usize) -> Prefix {
        let Waiting { rank, sequence, .. } = &mut self.waiting[index];
        let rank = *rank;
        self.hits.clear();
        for place in 0..sequence.cacheable_blocks() {
            let hash = sequence.hash(place, &self.blocks);
            match self.blocks.lookup(hash) {
                Some(block) => self.hits.push(block),
                None => break,
            }
        }
        let positions = self.hits.len() * BLOCK;
        self.find_leader(index, rank, positions)
            .unwrap_or(Prefix::Known { positions })
    }

    /// What a fork may take from the attempt that it is a fork of, if that is more than `positions`.
    fn find_leader(&mut self, index: usize, rank: Rank, positions: usize) -> Option<Prefix> {
        let fork = &self.waiting[index].sequence;
        let named = fork.fork_of()?;
        let is_leader =
            |sequence: &Sequence| sequence.attempt() == named && sequence.shares_prompt_with(fork);
        let waits = |before: Rank| before < rank;
        // Only one that stands before it is waited for: that one gets on whatever this one does.
        let queued = &self.waiting[..index];
        if queued.iter().any(|leader| is_leader(&leader.sequence)) {
            return Some(Prefix::Pending);
        }
        let leader = self
            .running
            .iter()
            .find(|leader| is_leader(&leader.sequence))?;
        if !leader.sequence.has_prompt_computed() {
            return waits(leader.rank).then_some(Prefix::Pending);
        }
        let shared = fork.forkable_len();
        if shared <= positions {
            return None;
        }
        self.hits.clear();
        self.hits.extend(&leader.table[..shared.div_ceil(BLOCK)]);
        Some(Prefix::Known { positions: shared })
    }

    /// How many of the available blocks it takes to let a sequence run that finds so many positions computed.
    fn blocks_needed(&self, index: usize, positions: usize) -> usize {
        let Waiting {
            sequence,
            preempted,
            ..
        } = &self.waiting[index];
        let known = sequence.known_len();
        let target = if *preempted {
            known
        } else {
            known.min(positions + self.options.step_tokens)
        };
        let cached = self
            .hits
            .iter()
            .filter(|&&block| self.blocks.is_cached(block))
            .count();
        // The last block of a fork is written to, and so copied.
        let copied = usize::from(!positions.is_multiple_of(BLOCK));
        let needed = target.div_ceil(BLOCK) - self.hits.len() + cached + copied;
        // Alone it may have all; the copy is done without if it must be.
        needed.min(self.blocks.counts().total())
    }

    fn admit(&mut self, index: usize, positions: usize) {
        let Waiting {
            rank, mut sequence, ..
        } = self.waiting.remove(index);
        let room = sequence.max_len().div_ceil(BLOCK).min(RESERVE_BLOCKS);
        let mut table = Vec::with_capacity(room.max(self.hits.len()));
        for &block in &self.hits {
            self.blocks.share(block);
            table.push(block);
        }
        sequence.take_over(positions);
        self.totals.prefix_hit_tokens += positions as u64;
        let place = self.running.partition_point(|other| other.rank < rank);
        let running = Running {
            rank,
            sequence,
            table,
            registered: positions / BLOCK,
            span: None,
        };
        self.running.insert(place, running);
    }
}
