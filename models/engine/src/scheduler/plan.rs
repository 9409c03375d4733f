//! What the next step computes: tokens, rows of logits and blocks, handed out in order of rank.

use super::{DRAFT_ROWS_PER_STEP, REPLAY_ROWS_PER_STEP, Scheduler};
use crate::{
    blocks::Writable,
    frame::AttemptId,
    runner::BLOCK,
    sequence::{Sequence, Span},
};

/// What is left of a step.
struct Budget {
    tokens: usize,
    rows: usize,
}

impl Scheduler {
    /// Fixes what the next [`Scheduler::run`] computes. Returns the attempt that it computes alone, if it is a suspect.
    pub fn plan(&mut self) -> Option<AttemptId> {
        self.admit_waiting();
        let suspect = self
            .running
            .iter()
            .find(|running| running.sequence.is_suspect())
            .map(|running| running.sequence.attempt());
        // The others get every second step; suspects come one after the other, in order of admission.
        let others = self
            .running
            .iter()
            .any(|running| !running.sequence.is_suspect());
        self.alone = suspect.filter(|_| self.alone.is_none() || !others);
        if !self.plan_for_turn() && suspect.is_some() {
            // Whose turn it is lacks blocks, which those hold who come before: then it is theirs.
            self.alone = suspect.filter(|_| self.alone.is_none());
            self.plan_for_turn();
        }
        self.alone
    }

    /// Returns whether there is anything to compute.
    fn plan_for_turn(&mut self) -> bool {
        let alone = self.alone;
        self.plan_for(|sequence| match alone {
            Some(attempt) => sequence.attempt() == attempt,
            None => !sequence.is_suspect(),
        });
        self.running.iter().any(|running| running.span.is_some())
    }

    /// Fixes the spans of the sequences that take part in this step.
    fn plan_for(&mut self, takes_part: impl Fn(&Sequence) -> bool) {
        for running in &mut self.running {
            running.span = None;
        }
        let mut budget = Budget {
            tokens: self.options.step_tokens,
            rows: self.max_sequences + REPLAY_ROWS_PER_STEP,
        };
        for decoding in [true, false] {
            let mut index = 0;
            // Those after `index` may be preempted meanwhile.
            while let Some(running) = self.running.get(index) {
                let sequence = &running.sequence;
                if sequence.is_decoding() == decoding && takes_part(sequence) {
                    self.plan_one(index, &mut budget);
                }
                index += 1;
            }
            if decoding {
                self.plan_drafts(&mut budget);
            }
        }
    }

    fn plan_one(&mut self, index: usize, budget: &mut Budget) {
        let sequence = &self.running[index].sequence;
        let Some(wanted) = sequence.next_span(budget.tokens, budget.rows) else {
            return;
        };
        let reached = self.reserve(index, wanted, budget);
        let sequence = &self.running[index].sequence;
        let span = sequence.next_span(reached - wanted.start, budget.rows);
        self.running[index].span = span;
        if let Some(span) = span {
            budget.tokens -= span.length();
            budget.rows -= span.logits_for;
        }
    }

    /// Lengthens the spans of decoding sequences by drafts, from what the decodes have left. Half of that is left to prompts,
    /// and nobody is preempted for a guess.
    fn plan_drafts(&mut self, budget: &mut Budget) {
        let mut left = (budget.tokens / 2).min(DRAFT_ROWS_PER_STEP);
        for index in 0..self.running.len() {
            let running = &mut self.running[index];
            let Some(span) = running.span else {
                continue;
            };
            let drafted = running.sequence.with_drafts(span, left);
            while running.table.len() < drafted.end.div_ceil(BLOCK) {
                match self.blocks.allocate() {
                    Some(block) => running.table.push(block),
                    None => break,
                }
            }
            let fits = drafted.end.min(running.table.len() * BLOCK);
            let drafts = fits - span.end;
            running.span = Some(Span {
                end: fits,
                logits_for: span.logits_for + drafts,
                ..span
            });
            left -= drafts;
            budget.tokens -= drafts;
        }
    }

    /// Makes the blocks of a span a sequence's own. Returns the position up to which it worked.
    fn reserve(&mut self, index: usize, wanted: Span, budget: &mut Budget) -> usize {
        let needed = wanted.end.div_ceil(BLOCK);
        for place in wanted.start / BLOCK..needed {
            while !self.own(index, place) {
                if !self.preempt_after(index, budget) {
                    return (place * BLOCK).max(wanted.start);
                }
            }
        }
        wanted.end
    }

    /// Makes the block at a place of the table one that its sequence may write to. Returns whether there is one.
    fn own(&mut self, index: usize, place: usize) -> bool {
        let table = &mut self.running[index].table;
        let Some(block) = table.get(place).copied() else {
            let new = self.blocks.allocate();
            table.extend(new);
            return new.is_some();
        };
        match self.blocks.make_writable(block) {
            Writable::Already => true,
            Writable::Copy { to } => {
                table[place] = to;
                self.copies.push((block, to));
                true
            }
            Writable::NoRoom => false,
        }
    }

    /// Preempts the last sequence, if that is not the one at `index` itself. What the step had for it is left to others.
    fn preempt_after(&mut self, index: usize, budget: &mut Budget) -> bool {
        let Some(last) = self
            .running
            .last()
            .filter(|_| index + 1 < self.running.len())
        else {
            return false;
        };
        if let Some(span) = last.span {
            budget.tokens += span.length();
            budget.rows += span.logits_for;
        }
        self.preempt_last();
        true
    }
}
