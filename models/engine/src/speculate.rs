//! Drafts by looking up what came before: the tokens that followed the last few tokens the last time.
//!
//! Source: "prompt lookup decoding" (A. Saxena, 2023), as in vLLM's `ngram` method. Free of a second model, and good where
//! outputs repeat their input: code edits, summaries, structured data.
//!
//! Invariant: a draft is a guess. What is sampled does not depend on it, so neither does anything here on the output bits:
//! the tables may forget, and hash collisions only make worse guesses.

/// Tokens that one draft may have at most.
pub const MAX_DRAFT_TOKENS: u32 = 16;

/// Length of a sequence's first draft; it doubles while drafts are right, and halves while they are not.
const FIRST_DRAFT_TOKENS: usize = 4;
/// Drafts in a row without a single right token, from which on drafting pauses.
const PATIENCE: u32 = 2;
/// Steps of the first pause; each further failure doubles it.
const FIRST_PAUSE_STEPS: u32 = 4;
/// Steps of the longest pause.
const MAX_PAUSE_STEPS: u32 = 128;
/// Bounds of a table's entries: 64 KiB at most, for each of two tables a sequence.
const TABLE_ENTRIES: std::ops::RangeInclusive<usize> = 64..=16 * 1024;

/// Where each n-gram of a sequence ended last; one entry per hash, the latest wins.
#[derive(Debug)]
struct Ngrams<const N: usize> {
    /// Index after the n-gram's last token; 0 is none.
    ends: Vec<u32>,
}

impl<const N: usize> Ngrams<N> {
    fn new(entries: usize) -> Self {
        Self {
            ends: vec![0; entries],
        }
    }

    fn slot(&self, ngram: &[u32; N]) -> usize {
        let hash = ngram.iter().fold(0_u64, |hash, &id| {
            (hash ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        (hash >> 32) as usize & (self.ends.len() - 1)
    }

    /// Notes the n-gram that ends before `end`.
    fn insert(&mut self, tokens: &[u32], end: usize) {
        if let Some(ngram) = tokens[..end].last_chunk::<N>() {
            let slot = self.slot(ngram);
            self.ends[slot] = end as u32;
        }
    }

    /// Where the last n-gram of all stood before.
    fn find(&self, tokens: &[u32]) -> Option<usize> {
        let ngram = tokens.last_chunk::<N>()?;
        let end = self.ends[self.slot(ngram)] as usize;
        (tokens[..end].last_chunk() == Some(ngram)).then_some(end)
    }
}

/// Drafts for one sequence. Takes all its memory at the start.
#[derive(Debug)]
pub struct Drafter {
    max_tokens: usize,
    /// Length of the next draft.
    width: usize,
    /// Drafts in a row of which nothing was right.
    failures: u32,
    /// Steps without a draft that are still to come.
    pause: u32,
    threes: Ngrams<3>,
    twos: Ngrams<2>,
    /// How many of the tokens are in the tables.
    indexed: usize,
}

impl Drafter {
    /// For drafts of up to `max_tokens` in a sequence of about `expected_len`.
    #[must_use]
    pub fn new(max_tokens: u32, expected_len: usize) -> Self {
        let entries = (2 * expected_len)
            .clamp(*TABLE_ENTRIES.start(), *TABLE_ENTRIES.end())
            .next_power_of_two();
        let max_tokens = max_tokens as usize;
        Self {
            max_tokens,
            width: FIRST_DRAFT_TOKENS.min(max_tokens),
            failures: 0,
            pause: 0,
            threes: Ngrams::new(entries),
            twos: Ngrams::new(entries),
            indexed: 0,
        }
    }

    /// Appends to `out` what may follow `tokens`, `limit` tokens at most. One call per step.
    pub fn draft(&mut self, tokens: &[u32], limit: usize, out: &mut Vec<u32>) {
        // The n-gram that ends with the last token is left out: it would find itself.
        for end in self.indexed + 1..tokens.len() {
            self.threes.insert(tokens, end);
            self.twos.insert(tokens, end);
        }
        self.indexed = tokens.len().saturating_sub(1);
        if self.pause > 0 {
            self.pause -= 1;
            return;
        }
        let found = self.threes.find(tokens).or_else(|| self.twos.find(tokens));
        let Some(from) = found else {
            return;
        };
        // Past the end the repetition is taken to go on: "a b a b" drafts "a b a b …".
        let period = tokens.len() - from;
        let length = self.width.min(limit);
        out.extend((0..length).map(|index| tokens[from + index % period]));
    }

    /// How many of the drafted tokens were the right ones.
    pub fn learn(&mut self, drafted: usize, accepted: usize) {
        if accepted == 0 {
            self.failures += 1;
            self.width = (self.width / 2).max(1);
            if let Some(excess) = self.failures.checked_sub(PATIENCE) {
                self.pause = FIRST_PAUSE_STEPS
                    .saturating_mul(1 << excess.min(16))
                    .min(MAX_PAUSE_STEPS);
            }
        } else {
            self.failures = 0;
            if accepted == drafted {
                self.width = (2 * self.width).min(self.max_tokens);
            } else if 2 * accepted < drafted {
                self.width = (self.width / 2).max(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Dice;

    fn draft(drafter: &mut Drafter, tokens: &[u32]) -> Vec<u32> {
        let mut out = Vec::new();
        drafter.draft(tokens, 99, &mut out);
        out
    }

    #[test]
    fn the_most_recent_longest_match_is_continued() {
        let mut drafter = Drafter::new(3, 100);
        assert_eq!(draft(&mut drafter, &[1, 2, 3, 4, 5, 9, 2, 3, 7]), [0; 0]);
        let tokens = [1, 2, 3, 4, 5, 9, 2, 3, 7, 1, 2, 3];
        assert_eq!(draft(&mut drafter, &tokens), [4, 5, 9], "by three tokens");
        let tokens = [&tokens[..], &[8, 2, 3]].concat();
        assert_eq!(
            draft(&mut drafter, &tokens),
            [8, 2, 3],
            "by two, the latest"
        );
        let mut drafter = Drafter::new(5, 100);
        drafter.learn(4, 4);
        assert_eq!(draft(&mut drafter, &[6, 6, 6]), [6; 5], "itself continued");
        assert_eq!(draft(&mut drafter, &[6]), [0; 0]);
    }

    /// With tables that are large enough nothing is forgotten, so a search of everything finds the same.
    #[test]
    fn the_tables_find_what_a_search_finds() {
        let mut dice = Dice::new(2);
        for _ in 0..50 {
            let mut drafter = Drafter::new(1, 16_000);
            let mut tokens = Vec::new();
            for _ in 0..150 {
                tokens.push(dice.throw(6) as u32);
                let find = |n: usize| {
                    let ends = (n..tokens.len()).rev();
                    let last = &tokens[tokens.len().saturating_sub(n)..];
                    ends.into_iter().find(|&end| &tokens[end - n..end] == last)
                };
                let expected = find(3).or_else(|| find(2)).map(|from| tokens[from]);
                assert_eq!(draft(&mut drafter, &tokens).first().copied(), expected);
            }
        }
    }

    #[test]
    fn wrong_drafts_get_shorter_and_rarer_and_right_ones_longer() {
        let tokens = [5; 50];
        let mut drafter = Drafter::new(16, 100);
        let mut lengths = |accepted: fn(usize) -> usize, steps| {
            let step = |_| {
                let length = draft(&mut drafter, &tokens).len();
                if length > 0 {
                    drafter.learn(length, accepted(length));
                }
                length
            };
            (0..steps).map(step).collect::<Vec<_>>()
        };
        assert_eq!(lengths(|all| all, 4), [4, 8, 16, 16]);
        assert_eq!(lengths(|_| 0, 7), [16, 8, 0, 0, 0, 0, 4]);
        let late = lengths(|_| 0, 1000);
        assert!(late.iter().filter(|&&length| length > 0).count() < 15);
    }
}
