//! From questions and answers to token ids with loss weights: chat turns, or plain completions.

use fastrand::Rng;
use tokenizers::Tokenizer;

use super::tasks::{Item, Piece, Task, draw};
use super::tokenizer::{ASSISTANT, BOS, END, SYSTEM, USER};

/// One training sequence. `weights[i]` is the weight of predicting `ids[i]`; 0 means context.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sample {
    pub ids: Vec<u32>,
    pub weights: Vec<f32>,
}

/// Of 100 examples of the task, how many are plain completions; they are short, so digits get more practice.
fn raw_share(task: Task) -> u32 {
    match task {
        Task::Count => 35,
        Task::Arithmetic => 55,
        Task::Fact => 30,
        Task::Word => 30,
        Task::Story => 20,
    }
}

/// Of 10,000 examples, how many are of which task. Counts and stories are long, sums are short: of the *tokens*
/// about 50 % are counts, 25 % arithmetic, 8 % words, 12 % stories, 5 % facts.
const MIX: [(Task, u32); 5] = [
    (Task::Arithmetic, 6100),
    (Task::Count, 1500),
    (Task::Word, 1300),
    (Task::Fact, 900),
    (Task::Story, 200),
];

/// Longest conversation in training.
pub const MAX_TOKENS: usize = 1000;

impl Sample {
    /// Appends context.
    fn context(&mut self, ids: &[u32]) {
        self.ids.extend_from_slice(ids);
        self.weights.resize(self.ids.len(), 0.0);
    }

    /// Appends what is to be learned, and the end token.
    fn learned(&mut self, pieces: &[Piece], encode: &dyn Fn(&str) -> Vec<u32>) {
        for piece in pieces {
            self.ids.extend(encode(&piece.text));
            self.weights.resize(self.ids.len(), piece.weight);
        }
        self.ids.push(END);
        self.weights.push(1.0);
    }
}

/// Makes samples with one tokenizer.
pub struct Writer<'a> {
    tokenizer: &'a Tokenizer,
}

impl<'a> Writer<'a> {
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer }
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        // Byte-level pieces always encode; an empty result would only drop the sample's text.
        self.tokenizer
            .encode(text, false)
            .map(|encoding| encoding.get_ids().to_vec())
            .unwrap_or_default()
    }

    /// What a plain completion of `item` is prompted with.
    pub fn raw_prompt(&self, item: &Item) -> Vec<u32> {
        [vec![BOS], self.encode(&item.raw_prompt)].concat()
    }

    /// What the chat template makes of one question.
    pub fn chat_prompt(&self, item: &Item) -> Vec<u32> {
        [
            vec![BOS, USER],
            self.encode(&item.question),
            vec![END, ASSISTANT],
        ]
        .concat()
    }

    /// What must follow the prompt: the answer's tokens and the end.
    pub fn answer(&self, item: &Item, raw: bool) -> Vec<u32> {
        let mut sample = Sample::default();
        let pieces = if raw { &item.raw_answer } else { &item.answer };
        sample.learned(pieces, &|text| self.encode(text));
        sample.ids
    }

    /// A plain completion.
    pub fn raw(&self, item: &Item) -> Sample {
        let mut sample = Sample::default();
        sample.context(&self.raw_prompt(item));
        sample.learned(&item.raw_answer, &|text| self.encode(text));
        sample
    }

    /// One question, one answer.
    pub fn chat(&self, item: &Item) -> Sample {
        let mut sample = Sample::default();
        sample.context(&[BOS]);
        self.turn(&mut sample, item);
        sample
    }

    fn turn(&self, sample: &mut Sample, item: &Item) {
        sample.context(
            &[
                vec![USER],
                self.encode(&item.question),
                vec![END, ASSISTANT],
            ]
            .concat(),
        );
        sample.learned(&item.answer, &|text| self.encode(text));
    }

    /// A conversation about several things, cut before the turn that would exceed [`MAX_TOKENS`].
    fn conversation(&self, rng: &mut Rng, turns: usize) -> Sample {
        let mut sample = Sample::default();
        sample.context(&[BOS]);
        for _ in 0..turns {
            let before = sample.clone();
            self.turn(&mut sample, &draw(task(rng), rng, false));
            if sample.ids.len() > MAX_TOKENS {
                return before;
            }
        }
        sample
    }

    /// A random training sample.
    pub fn draw(&self, rng: &mut Rng) -> Sample {
        match rng.u32(..1000) {
            // Long conversations, so that distances up to the context's length are practised.
            0..4 => self.conversation(rng, 30),
            4..44 => {
                let turns = rng.usize(2..=4);
                self.conversation(rng, turns)
            }
            _ => {
                let item = draw(task(rng), rng, false);
                if rng.u32(..100) < raw_share(item.task) {
                    return self.raw(&item);
                }
                let mut sample = self.chat(&item);
                if rng.u32(..100) < 3 {
                    self.prefix_system(&mut sample, rng);
                }
                sample
            }
        }
    }

    /// Some clients always send a system message; it changes nothing.
    fn prefix_system(&self, sample: &mut Sample, rng: &mut Rng) {
        let texts = [
            "You are a helpful assistant.",
            "You are a small demo model.",
            "Answer the question.",
            "Be brief.",
        ];
        let turn = [
            vec![SYSTEM],
            self.encode(texts[rng.usize(..texts.len())]),
            vec![END],
        ]
        .concat();
        sample.weights.splice(1..1, turn.iter().map(|_| 0.0));
        sample.ids.splice(1..1, turn);
    }
}

fn task(rng: &mut Rng) -> Task {
    let mut at = rng.u32(..10_000);
    for (task, share) in MIX {
        if at < share {
            return task;
        }
        at -= share;
    }
    Task::Arithmetic
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::tasks::{Operator, arithmetic_item};
    use crate::demo::tokenizer;

    #[test]
    fn the_mix_is_complete() {
        assert_eq!(MIX.iter().map(|(_, share)| share).sum::<u32>(), 10_000);
    }

    #[test]
    fn only_answers_are_learned() {
        let tokenizer = tokenizer::for_tests();
        let writer = Writer::new(tokenizer);
        let item = arithmetic_item(12, Operator::Add, 34, 2);
        let sample = writer.chat(&item);
        let learned: Vec<u32> = sample
            .ids
            .iter()
            .zip(&sample.weights)
            .filter(|(_, weight)| **weight > 0.0)
            .map(|(id, _)| *id)
            .collect();
        assert_eq!(
            tokenizer.decode(&learned, false).unwrap(),
            "12+34=46<|end|>"
        );
        let prompt = writer.chat_prompt(&item);
        assert_eq!(sample.ids[..prompt.len()], prompt);
        let raw = writer.raw(&item);
        assert_eq!(raw.ids[..raw.ids.len() - 3], writer.raw_prompt(&item));
    }

    #[test]
    fn samples_fit_and_line_up() {
        let tokenizer = tokenizer::for_tests();
        let writer = Writer::new(tokenizer);
        let mut rng = Rng::with_seed(9);
        let mut longest = 0;
        for _ in 0..3000 {
            let sample = writer.draw(&mut rng);
            assert_eq!(sample.ids.len(), sample.weights.len());
            assert_eq!(sample.ids[0], BOS);
            longest = longest.max(sample.ids.len());
        }
        assert!((600..=MAX_TOKENS).contains(&longest), "{longest}");
    }
}
