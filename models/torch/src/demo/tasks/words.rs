//! Reversing and repeating short words. Words stand in quotes: letters before a closing quote are single tokens.

use fastrand::Rng;

use super::{Item, Task, held_out, pick, piece};

/// What is done to the word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WordTask {
    Reverse,
    /// Say it this many times, 2 to 4.
    Repeat(u32),
}

const REAL: [&str; 60] = [
    "cat", "dog", "sun", "moon", "star", "tree", "bird", "fish", "milk", "bread", "stone", "river",
    "cloud", "rain", "snow", "wind", "fire", "leaf", "root", "seed", "apple", "pear", "plum",
    "grape", "lemon", "house", "door", "wall", "roof", "chair", "table", "spoon", "plate", "clock",
    "lamp", "book", "page", "pen", "word", "song", "drum", "bell", "ship", "boat", "train",
    "wheel", "road", "path", "hill", "lake", "sand", "wave", "shell", "crab", "frog", "mouse",
    "horse", "sheep", "goat", "duck",
];

/// The question with phrasing number `phrasing` (any number).
pub fn word_item(word: &str, task: WordTask, phrasing: usize) -> Item {
    let (question, raw_prompt, answer) = match task {
        WordTask::Reverse => {
            let forms = [
                format!("Reverse \"{word}\"."),
                format!("Reverse the word \"{word}\"."),
                format!("Spell \"{word}\" backwards."),
                format!("reverse \"{word}\""),
            ];
            let backwards: String = word.chars().rev().collect();
            (
                forms[phrasing % forms.len()].clone(),
                format!("Reverse \"{word}\":"),
                format!("\"{backwards}\""),
            )
        }
        WordTask::Repeat(times) => {
            let forms = [
                format!("Repeat \"{word}\" {times} times."),
                format!("Repeat the word \"{word}\" {times} times."),
                format!("Say \"{word}\" {times} times."),
                format!("repeat \"{word}\" {times} times"),
            ];
            let quoted = format!("\"{word}\"");
            (
                forms[phrasing % forms.len()].clone(),
                format!("Repeat \"{word}\" {times} times:"),
                vec![quoted; times as usize].join(" "),
            )
        }
    };
    Item {
        task: Task::Word,
        key: Some(word.to_owned()),
        question,
        answer: vec![piece(answer.clone(), 1.0)],
        raw_prompt,
        raw_answer: vec![piece(format!(" {answer}"), 1.0)],
    }
}

pub(super) fn draw(rng: &mut Rng, examination: bool) -> Item {
    let task = match rng.u32(..100) {
        0..65 => WordTask::Reverse,
        _ => WordTask::Repeat(rng.u32(2..=4)),
    };
    loop {
        let word = word(rng);
        if held_out(&word) == examination {
            return word_item(&word, task, rng.usize(..));
        }
    }
}

/// A real word, a pronounceable one, or plain letters; 2 to 7 letters.
fn word(rng: &mut Rng) -> String {
    match rng.u32(..100) {
        0..15 => pick(rng, &REAL).to_owned(),
        15..55 => {
            let syllables = rng.usize(1..=3);
            let mut word = String::new();
            for _ in 0..syllables {
                word.push(char::from(b"bcdfghjklmnprstvwz"[rng.usize(..18)]));
                word.push(char::from(b"aeiou"[rng.usize(..5)]));
            }
            if rng.bool() {
                word.push(char::from(b"lmnrst"[rng.usize(..6)]));
            }
            word
        }
        _ => {
            let length = rng.usize(2..=7);
            (0..length)
                .map(|_| char::from(rng.u8(b'a'..=b'z')))
                .collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_right() {
        assert_eq!(
            word_item("stone", WordTask::Reverse, 0).answer_text(),
            "\"enots\""
        );
        assert_eq!(
            word_item("moon", WordTask::Repeat(3), 0).answer_text(),
            "\"moon\" \"moon\" \"moon\""
        );
    }

    #[test]
    fn words_are_short_and_lower_case() {
        let mut rng = Rng::with_seed(2);
        for _ in 0..2000 {
            let word = word(&mut rng);
            assert!((2..=7).contains(&word.len()), "{word}");
            assert!(word.bytes().all(|b| b.is_ascii_lowercase()));
        }
    }
}
