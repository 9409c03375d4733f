//! Counting from `a` to `b`: every number is one token, so a lost or repeated token is visible at once.

use fastrand::Rng;

use super::{Item, Task, held_out, piece};

/// The range that the model card promises.
const MAX: u32 = 300;
/// Above `MAX` only short counts occur, so that every number token is trained.
const FAR_MAX: u32 = 999;
const FAR_LENGTH: u32 = 40;

/// Counts to this number or below are never held out: the only count to 1 is the one from 0.
const ALWAYS_TRAINED: u32 = 10;

const QUESTIONS: [&str; 8] = [
    "Count from {a} to {b}.",
    "Count from {a} to {b}",
    "count from {a} to {b}",
    "Count from {a} to {b}:",
    "Please count from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "Count up from {a} to {b}.",
    "Count to {b}, starting from {a}.",
];

/// The answer: every number from `a` to `b` with a space before it.
pub fn counted(a: u32, b: u32) -> String {
    (a..=b).map(|n| format!(" {n}")).collect()
}

/// The question with phrasing number `phrasing` (any number).
pub fn count_item(a: u32, b: u32, phrasing: usize) -> Item {
    let fill = |form: &str| {
        form.replace("{a}", &a.to_string())
            .replace("{b}", &b.to_string())
    };
    // Every step weighs the same: going on and stopping are one decision, and a weight would bias it.
    let answer = vec![piece(counted(a, b), 1.0)];
    Item {
        task: Task::Count,
        key: Some(key(a, b)),
        question: fill(QUESTIONS[phrasing % QUESTIONS.len()]),
        answer: answer.clone(),
        raw_prompt: fill(if phrasing % 3 == 2 {
            "count from {a} to {b}:"
        } else {
            "Count from {a} to {b}:"
        }),
        raw_answer: answer,
    }
}

fn key(a: u32, b: u32) -> String {
    format!("count {a} {b}")
}

pub(super) fn draw(rng: &mut Rng, examination: bool) -> Item {
    loop {
        let (a, b) = range(rng);
        let kept = b > ALWAYS_TRAINED && held_out(&key(a, b));
        if kept == examination {
            return count_item(a, b, rng.usize(..));
        }
    }
}

/// Short ranges for practice in stopping, long and full ones for distance; the mean length is about 90.
fn range(rng: &mut Rng) -> (u32, u32) {
    let length = match rng.u32(..100) {
        0..25 => rng.u32(1..=10),
        25..50 => log_uniform(rng, MAX),
        50..80 => rng.u32(1..=MAX),
        80..90 => rng.u32(MAX - 40..=MAX),
        90..94 => {
            let length = rng.u32(1..=FAR_LENGTH);
            let a = rng.u32(0..=FAR_MAX - length);
            return (a, a + length);
        }
        // From 0 or 1, as people ask.
        _ => {
            let a = rng.u32(0..=1);
            return (a, a + log_uniform(rng, MAX - 1));
        }
    };
    let a = rng.u32(0..=MAX - length);
    (a, a + length)
}

fn log_uniform(rng: &mut Rng, max: u32) -> u32 {
    let top = f64::from(max + 1).ln();
    ((rng.f64() * top).exp() as u32).clamp(1, max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_count_every_number_once() {
        for (a, b) in [(0, 1), (5, 6), (5, 7), (5, 8), (0, 300), (298, 300)] {
            let item = count_item(a, b, 0);
            let numbers: Vec<u32> = item
                .answer_text()
                .split_whitespace()
                .map(|n| n.parse().unwrap())
                .collect();
            assert_eq!(numbers, (a..=b).collect::<Vec<_>>());
            assert_eq!(item.answer_text(), item.raw_answer_text());
        }
    }

    #[test]
    fn ranges_stay_inside_and_reach_the_ends() {
        let mut rng = Rng::with_seed(1);
        let drawn: Vec<_> = (0..20_000).map(|_| range(&mut rng)).collect();
        assert!(drawn.iter().all(|&(a, b)| a < b && b <= FAR_MAX));
        assert!(drawn.iter().all(|&(a, b)| b <= MAX || b - a <= FAR_LENGTH));
        assert!(drawn.contains(&(0, 300)));
    }
}
