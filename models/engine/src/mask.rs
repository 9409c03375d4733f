//! Bitmaps over the vocabulary: which tokens may stand at a position.
//!
//! ```text
//! word 0                              word 1
//! bit 0 = id 0, bit 1 = id 1, …       bit 0 = id 32, …        a set bit is an allowed id
//! ```
//!
//! The layout is llguidance's, so that a grammar's masks are used as they come. Ids beyond the last word are forbidden.
//!
//! Invariant: a mask only takes tokens away; the logits of those that stay keep their bits.

/// Ids of one word.
const WORD: usize = u32::BITS as usize;

/// What narrows the choice at each position of one sequence, such as a grammar: a fold over the output tokens.
pub trait TokenMask: std::fmt::Debug {
    /// Writes the bitmap of the ids that may stand at the next position.
    fn mask(&mut self, out: &mut [u32]);

    /// A token was put out (or stands in the log that is replayed): the next mask is for the position after it.
    fn accept(&mut self, id: u32);
}

/// Words of a bitmap over so many ids.
#[must_use]
pub fn words_for(vocab_size: usize) -> usize {
    vocab_size.div_ceil(WORD)
}

/// The bitmap of a list of ids. Ids that are not in the vocabulary are left out.
#[must_use]
pub fn bitmap_of(ids: &[u32], vocab_size: usize) -> Vec<u32> {
    let mut bitmap = vec![0; words_for(vocab_size)];
    for &id in ids.iter().filter(|&&id| (id as usize) < vocab_size) {
        bitmap[id as usize / WORD] |= 1 << (id as usize % WORD);
    }
    bitmap
}

/// Leaves in `mask` what both allow.
pub fn intersect(mask: &mut [u32], other: &[u32]) {
    for (word, other) in mask.iter_mut().zip(other) {
        *word &= other;
    }
}

/// Sets the logits of all forbidden ids to minus infinity.
pub fn apply(mask: &[u32], logits: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide(mask: &[u32], logits: &mut [f32]) {
            apply_words(mask, logits);
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the feature was just detected on this CPU.
            return unsafe { wide(mask, logits) };
        }
    }
    apply_words(mask, logits);
}

#[inline(always)]
fn apply_words(mask: &[u32], logits: &mut [f32]) {
    let covered = logits.len().min(mask.len() * WORD);
    let (known, beyond) = logits.split_at_mut(covered);
    beyond.fill(f32::NEG_INFINITY);
    let (blocks, tail) = known.as_chunks_mut::<WORD>();
    for (block, &word) in blocks.iter_mut().zip(mask) {
        // Grammars mostly allow nearly nothing or nearly everything.
        match word {
            u32::MAX => {}
            0 => *block = [f32::NEG_INFINITY; WORD],
            _ => apply_word(word, block),
        }
    }
    if let Some(&word) = mask.get(blocks.len()) {
        apply_word(word, tail);
    }
}

/// Without a branch per id, so that the compiler makes vectors of it.
#[inline(always)]
fn apply_word(word: u32, logits: &mut [f32]) {
    for (bit, logit) in logits.iter_mut().enumerate() {
        let allowed = word >> bit & 1 != 0;
        *logit = if allowed { *logit } else { f32::NEG_INFINITY };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Dice;

    #[test]
    fn forbidden_ids_go_to_minus_infinity_and_the_others_keep_their_bits() {
        let mut dice = Dice::new(3);
        for length in (1..200).chain([1000, 4099]) {
            let ids: Vec<u32> = (0..length)
                .filter(|_| dice.throw(3) == 0)
                .map(|id| id as u32)
                .collect();
            let row: Vec<f32> = (0..length).map(|id| -0.5 - id as f32).collect();
            let expected: Vec<f32> = (0..length)
                .map(|id| match ids.binary_search(&(id as u32)) {
                    Ok(_) => row[id],
                    Err(_) => f32::NEG_INFINITY,
                })
                .collect();
            let mask = bitmap_of(&ids, length);
            let (mut wide, mut portable) = (row.clone(), row);
            apply(&mask, &mut wide);
            apply_words(&mask, &mut portable);
            assert_eq!((&wide, &portable), (&expected, &expected), "{length} ids");
        }
    }

    #[test]
    fn whole_words_and_ids_beyond_the_mask() {
        let mut logits = vec![1.0; 100];
        apply(&[u32::MAX, 0, 1], &mut logits);
        let allowed: Vec<usize> = (0..100).filter(|&id| logits[id] == 1.0).collect();
        assert_eq!(allowed, (0..32).chain([64]).collect::<Vec<_>>());
    }

    #[test]
    fn an_intersection_is_what_both_allow() {
        let mut mask = bitmap_of(&[1, 40, 41, 999], 64);
        intersect(&mut mask, &bitmap_of(&[0, 1, 41], 64));
        assert_eq!(mask, bitmap_of(&[1, 41], 64));
    }
}
