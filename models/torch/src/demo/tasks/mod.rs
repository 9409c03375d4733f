//! What the demo model learns. Each task makes questions with known answers, in a chat form and a raw form.

mod arithmetic;
mod count;
mod facts;
mod stories;
mod words;

pub use arithmetic::{Operator, arithmetic_item};
pub use count::{count_item, counted};
pub use facts::{FACT_COUNT, fact_items};
pub use stories::{is_story, story_item};
pub use words::{WordTask, word_item};

use fastrand::Rng;

/// A kind of question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Task {
    Count,
    Arithmetic,
    Fact,
    Word,
    Story,
}

/// A stretch of text and how much its tokens count in the loss; 0 is context only.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    pub text: String,
    pub weight: f32,
}

/// One question with its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    pub task: Task,
    /// What [`held_out`] splits by; `None` for closed tables and stories, which have one split only.
    pub key: Option<String>,
    /// What a user types in a chat.
    pub question: String,
    /// What the assistant answers.
    pub answer: Vec<Piece>,
    /// The text of a plain completion.
    pub raw_prompt: String,
    /// Its continuation.
    pub raw_answer: Vec<Piece>,
}

impl Item {
    /// The chat answer as one text.
    pub fn answer_text(&self) -> String {
        text_of(&self.answer)
    }

    /// The raw continuation as one text.
    pub fn raw_answer_text(&self) -> String {
        text_of(&self.raw_answer)
    }
}

fn text_of(pieces: &[Piece]) -> String {
    pieces.iter().map(|piece| piece.text.as_str()).collect()
}

fn piece(text: impl Into<String>, weight: f32) -> Piece {
    Piece {
        text: text.into(),
        weight,
    }
}

fn pick<'a, T: ?Sized>(rng: &mut Rng, choices: &[&'a T]) -> &'a T {
    choices[rng.usize(..choices.len())]
}

/// Whether the item with this key is kept for examination: one key in ten, by FNV-1a.
pub fn held_out(key: &str) -> bool {
    let hash = key.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    // The low bits of FNV-1a are weak for short keys; fold the high half in.
    (hash ^ (hash >> 29) ^ (hash >> 47)) % 10 == 0
}

/// A random item of `task` from the training split or, with `held_out`, from the examination split. Facts and
/// stories have one split only.
pub fn draw(task: Task, rng: &mut Rng, held_out: bool) -> Item {
    match task {
        Task::Count => count::draw(rng, held_out),
        Task::Arithmetic => arithmetic::draw(rng, held_out),
        Task::Fact => facts::draw(rng),
        Task::Word => words::draw(rng, held_out),
        Task::Story => stories::story_item(rng),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_is_held_out() {
        let mut count = 0;
        for a in 0..100 {
            for b in 0..100 {
                count += usize::from(held_out(&format!("{a}+{b}")));
            }
        }
        assert!((900..1100).contains(&count), "{count}");
    }

    #[test]
    fn the_same_seed_draws_the_same_items() {
        for task in [
            Task::Count,
            Task::Arithmetic,
            Task::Fact,
            Task::Word,
            Task::Story,
        ] {
            let items = |seed| {
                let mut rng = Rng::with_seed(seed);
                (0..20)
                    .map(|_| draw(task, &mut rng, false))
                    .collect::<Vec<_>>()
            };
            assert_eq!(items(5), items(5));
            assert_ne!(items(5), items(6));
        }
    }
}
