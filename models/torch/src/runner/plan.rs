//! What a step computes, as indices: which row is whose, where its keys go, which keys it sees. Made on the host, once per step.
//!
//! ```text
//!  rows of a step:  | lone rows, by length: a group | … | a chunk of several rows | … |
//! ```
//!
//! Lone rows (decoding) are put together so that a group is one attention over padded keys. Chunks of several rows stay alone. The rows'
//! order is free: only attention cares whose they are, and wanted rows are picked by index.

use std::ops::Range;

use understudy_engine_core::runner::{BLOCK, Chunk};

/// Rows that attend together: `batch` sequences of `rows` rows each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub first_row: usize,
    pub rows: usize,
    /// Indices of the chunks.
    pub members: Vec<usize>,
}

/// All indices of a step in one list, so that they travel to a device at once.
#[derive(Debug, Default)]
pub struct Plan {
    pub indices: Vec<i64>,
    /// Of the rows.
    pub ids: Range<usize>,
    pub positions: Range<usize>,
    /// Where each row's keys and values go: block times its length, plus offset.
    pub slots: Range<usize>,
    /// Blocks that are begun and not filled. They are cleared: what lies beyond a sequence's end is masked, and must be numbers.
    pub begun: Range<usize>,
    /// Rows whose logits are wanted, in the order of the chunks.
    pub wanted: Range<usize>,
    pub groups: Vec<Group>,
    /// For each group, for each window of the model: which keys are read.
    pub reads: Vec<Vec<Read>>,
}

/// The keys that a group reads, under one window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read {
    /// Those of the rows themselves: the chunk begins at position 0.
    Own,
    /// Of blocks in the cache.
    Cached {
        /// `[batch, blocks each]`.
        blocks: Range<usize>,
        /// `[batch]`: positions of the first keys.
        bases: Range<usize>,
        /// Keys of each sequence, padding included.
        keys: usize,
        /// Whether some row must not see some of them.
        masked: bool,
    },
}

/// Lone rows whose sequences are at most this much longer than the shortest go together...
const PADDED_AT_MOST: f64 = 1.25;
/// ...and a few more positions are always worth a call less.
const PADDED_POSITIONS: usize = 64;

impl Plan {
    /// The plan of these chunks; `windows` are those that occur in the model.
    #[must_use]
    pub fn of(chunks: &[Chunk<'_>], windows: &[Option<usize>]) -> Self {
        let mut plan = Self {
            groups: groups(chunks),
            ..Self::default()
        };
        let in_order: Vec<&Chunk<'_>> = plan
            .groups
            .iter()
            .flat_map(|group| group.members.iter().map(|member| &chunks[*member]))
            .collect();
        let positions = |chunk: &Chunk<'_>| chunk.start..chunk.start + chunk.tokens.len();
        let tokens = in_order.iter().flat_map(|chunk| chunk.tokens);
        plan.ids = plan.add(tokens.map(|id| i64::from(*id)));
        let each = in_order.iter().flat_map(|chunk| positions(chunk));
        plan.positions = plan.add(each.map(|position| position as i64));
        plan.slots = plan.add(
            in_order
                .iter()
                .flat_map(|chunk| positions(chunk).map(|position| slot(chunk, position))),
        );
        plan.begun = plan.add(in_order.iter().filter_map(|chunk| begun(chunk)));
        plan.wanted = plan.add(wanted(chunks, &plan.groups).into_iter());
        let groups = std::mem::take(&mut plan.groups);
        for group in &groups {
            let reads = windows
                .iter()
                .map(|window| plan.read(group, chunks, *window));
            let reads = reads.collect();
            plan.reads.push(reads);
        }
        plan.groups = groups;
        plan
    }

    fn add(&mut self, values: impl Iterator<Item = i64>) -> Range<usize> {
        let first = self.indices.len();
        self.indices.extend(values);
        first..self.indices.len()
    }

    fn read(&mut self, group: &Group, chunks: &[Chunk<'_>], window: Option<usize>) -> Read {
        let members: Vec<&Chunk<'_>> = group.members.iter().map(|m| &chunks[*m]).collect();
        if let [chunk] = members[..]
            && chunk.start == 0
        {
            return Read::Own;
        }
        // From the block of the first key that the first row sees, to the last row's own.
        let first_key = |chunk: &Chunk<'_>| match window {
            Some(window) => (chunk.start + 1).saturating_sub(window),
            None => 0,
        };
        let base = |chunk: &Chunk<'_>| first_key(chunk) / BLOCK * BLOCK;
        let keys = |chunk: &Chunk<'_>| chunk.start + group.rows - base(chunk);
        let longest = members.iter().map(|chunk| keys(chunk)).max().unwrap_or(0);
        let exact = members
            .iter()
            .all(|chunk| keys(chunk) == longest && first_key(chunk) == base(chunk));
        let each = longest.div_ceil(BLOCK);
        let blocks = self.add(members.iter().flat_map(|chunk| {
            let last = (chunk.start + group.rows - 1) / BLOCK;
            // Padding is the sequence's own: nothing of another one is ever touched.
            (base(chunk) / BLOCK..)
                .map(move |block| i64::from(chunk.table[block.min(last)]))
                .take(each)
        }));
        let bases = self.add(members.iter().map(|chunk| base(chunk) as i64));
        Read::Cached {
            blocks,
            bases,
            keys: longest,
            masked: group.rows > 1 || !exact,
        }
    }
}

/// Lone rows by length, then the other chunks in their order.
fn groups(chunks: &[Chunk<'_>]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut row = 0;
    let mut add = |rows: usize, members: Vec<usize>| {
        let first_row = row;
        row += rows * members.len();
        groups.push(Group {
            first_row,
            rows,
            members,
        });
    };
    let (mut lone, others): (Vec<usize>, Vec<usize>) =
        (0..chunks.len()).partition(|index| chunks[*index].tokens.len() == 1);
    lone.sort_by_key(|index| chunks[*index].start);
    let mut rest = lone.as_slice();
    while let Some(shortest) = rest.first() {
        let length = chunks[*shortest].start + 1;
        let limit = (length + PADDED_POSITIONS).max((length as f64 * PADDED_AT_MOST) as usize);
        let count = rest.partition_point(|index| chunks[*index].start < limit);
        let (together, longer) = rest.split_at(count);
        add(1, together.to_vec());
        rest = longer;
    }
    for index in others {
        add(chunks[index].tokens.len(), vec![index]);
    }
    groups
}

fn slot(chunk: &Chunk<'_>, position: usize) -> i64 {
    i64::from(chunk.table[position / BLOCK]) * BLOCK as i64 + (position % BLOCK) as i64
}

/// The last block of a chunk, if the chunk begins it and does not fill it.
fn begun(chunk: &Chunk<'_>) -> Option<i64> {
    let end = chunk.start + chunk.tokens.len();
    let first_of_last = (end - 1) / BLOCK * BLOCK;
    let begun = first_of_last >= chunk.start && !end.is_multiple_of(BLOCK);
    begun.then(|| i64::from(chunk.table[first_of_last / BLOCK]))
}

fn wanted(chunks: &[Chunk<'_>], groups: &[Group]) -> Vec<i64> {
    let mut firsts = vec![0; chunks.len()];
    for group in groups {
        for (place, member) in group.members.iter().enumerate() {
            firsts[*member] = group.first_row + place * group.rows;
        }
    }
    let rows = chunks.iter().zip(firsts).flat_map(|(chunk, first)| {
        let end = first + chunk.tokens.len();
        end - chunk.logits_for..end
    });
    rows.map(|row| row as i64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk<'a>(table: &'a [u32], start: usize, tokens: &'a [u32]) -> Chunk<'a> {
        Chunk {
            table,
            start,
            tokens,
            logits_for: 1,
        }
    }

    fn part(plan: &Plan, range: &Range<usize>) -> Vec<i64> {
        plan.indices[range.clone()].to_vec()
    }

    #[test]
    fn lone_rows_go_together_and_are_found_again() {
        let tokens: Vec<u32> = (0..40).collect();
        let (long, short, new) = ([9, 8, 7], [3], [5, 4, 2]);
        let chunks = [
            chunk(&long, 40, &tokens[..1]),
            chunk(&new, 0, &tokens[..35]),
            chunk(&short, 2, &tokens[7..8]),
        ];
        let plan = Plan::of(&chunks, &[None]);
        assert_eq!(plan.groups[0].members, [2, 0]);
        assert_eq!(plan.groups[1].members, [1]);
        assert_eq!(part(&plan, &plan.ids)[..3], [7, 0, 0]);
        assert_eq!(part(&plan, &plan.positions)[..4], [2, 40, 0, 1]);
        assert_eq!(part(&plan, &plan.slots)[..3], [50, 120, 80]);
        assert_eq!(part(&plan, &plan.wanted), [1, 36, 0]);
        // The new sequence fills two blocks and begins a third.
        assert_eq!(part(&plan, &plan.begun), [2]);
        let Read::Cached {
            blocks,
            bases,
            keys,
            masked,
        } = &plan.reads[0][0]
        else {
            panic!("{plan:?}");
        };
        // The shorter sequence is padded with its own last block.
        assert_eq!(part(&plan, blocks), [3, 3, 3, 9, 8, 7]);
        assert_eq!((part(&plan, bases), *keys, *masked), (vec![0, 0], 41, true));
        assert_eq!(plan.reads[1], [Read::Own]);
    }

    #[test]
    fn very_different_lengths_stay_apart() {
        let table: Vec<u32> = (0..100).collect();
        let chunks = [
            chunk(&table, 1500, &[1]),
            chunk(&table, 10, &[1]),
            chunk(&table, 80, &[1]),
        ];
        let plan = Plan::of(&chunks, &[None]);
        let members: Vec<_> = plan.groups.iter().map(|group| &group.members).collect();
        assert_eq!(members, [&vec![1], &vec![2], &vec![0]]);
    }

    #[test]
    fn a_window_reads_its_own_blocks_only() {
        let table: Vec<u32> = (100..110).collect();
        let plan = Plan::of(&[chunk(&table, 100, &[1])], &[None, Some(20), Some(5)]);
        let read = |index: usize| match &plan.reads[0][index] {
            Read::Cached {
                blocks,
                bases,
                keys,
                masked,
            } => (part(&plan, blocks), part(&plan, bases), *keys, *masked),
            Read::Own => panic!(),
        };
        assert_eq!(read(0).2, 101);
        assert!(!read(0).3);
        // Keys 81 to 100 of blocks that begin at 80.
        assert_eq!(read(1), (vec![105, 106], vec![80], 21, true));
        // Keys 96 to 100: no mask.
        assert_eq!(read(2), (vec![106], vec![96], 5, false));
    }

    #[test]
    fn a_block_that_is_gone_on_with_is_not_cleared() {
        let table = [0, 1];
        for (start, count, begun) in [(15, 1, 0), (16, 1, 1), (17, 1, 0), (0, 32, 0), (3, 14, 1)] {
            let tokens = vec![1; count];
            let plan = Plan::of(&[chunk(&table, start, &tokens)], &[None]);
            assert_eq!(plan.begun.len(), begun, "{start} {count}");
        }
    }
}
