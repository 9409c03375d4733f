//! Addition and subtraction, digit by digit: digits beside an operator are single tokens.

use fastrand::Rng;

use super::{Item, Piece, Task, held_out, pick, piece};

/// What is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    Add,
    Subtract,
}

impl Operator {
    fn sign(self) -> char {
        match self {
            Self::Add => '+',
            Self::Subtract => '-',
        }
    }

    fn apply(self, a: i64, b: i64) -> i64 {
        match self {
            Self::Add => a + b,
            Self::Subtract => a - b,
        }
    }
}

const QUESTIONS: [&str; 8] = [
    "{a}{o}{b}",
    "{a}{o}{b}=",
    "{a}{o}{b}?",
    "{a} {o} {b}",
    "What is {a}{o}{b}?",
    "What is {a} {o} {b}?",
    "Calculate {a}{o}{b}.",
    "what is {a}{o}{b}",
];

/// The question with phrasing number `phrasing` (any number). The chat answer is the whole equation.
pub fn arithmetic_item(a: i64, operator: Operator, b: i64, phrasing: usize) -> Item {
    let fill = |form: &str| {
        form.replace("{a}", &a.to_string())
            .replace("{b}", &b.to_string())
            .replace("{o}", &operator.sign().to_string())
    };
    let result: Vec<Piece> = vec![piece(operator.apply(a, b).to_string(), 1.0)];
    Item {
        task: Task::Arithmetic,
        key: Some(key(a, operator, b)),
        question: fill(QUESTIONS[phrasing % QUESTIONS.len()]),
        answer: [vec![piece(fill("{a}{o}{b}="), 0.3)], result.clone()].concat(),
        raw_prompt: fill("{a}{o}{b}="),
        raw_answer: result,
    }
}

/// Both orders of a sum are in the same split.
fn key(a: i64, operator: Operator, b: i64) -> String {
    match operator {
        Operator::Add => format!("{}+{}", a.min(b), a.max(b)),
        Operator::Subtract => format!("{a}-{b}"),
    }
}

pub(super) fn draw(rng: &mut Rng, examination: bool) -> Item {
    let operator = *pick(rng, &[&Operator::Add, &Operator::Subtract]);
    loop {
        let (mut a, mut b) = operands(rng);
        // Negative results exist, but are not half of the subtractions.
        if operator == Operator::Subtract && a < b && rng.u32(..100) < 70 {
            (a, b) = (b, a);
        }
        if held_out(&key(a, operator, b)) == examination {
            let phrasing = match rng.bool() {
                true => rng.usize(..4),
                false => rng.usize(..),
            };
            return arithmetic_item(a, operator, b, phrasing);
        }
    }
}

fn operands(rng: &mut Rng) -> (i64, i64) {
    match rng.u32(..100) {
        0..78 => (rng.i64(0..100), rng.i64(0..100)),
        78..84 => (rng.i64(0..20), rng.i64(0..20)),
        _ => (rng.i64(0..1000), rng.i64(0..1000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equations_hold() {
        let answer = |a, operator, b| arithmetic_item(a, operator, b, 0).answer_text();
        assert_eq!(answer(12, Operator::Add, 34), "12+34=46");
        assert_eq!(answer(3, Operator::Subtract, 5), "3-5=-2");
        let mut rng = Rng::with_seed(3);
        for _ in 0..2000 {
            let text = draw(&mut rng, false).answer_text();
            let (left, right) = text.split_once('=').unwrap();
            let at = left.find(['+', '-']).unwrap();
            let (a, b): (i64, i64) = (left[..at].parse().unwrap(), left[at + 1..].parse().unwrap());
            let expected = if left.as_bytes()[at] == b'+' {
                a + b
            } else {
                a - b
            };
            assert_eq!(right.parse::<i64>().unwrap(), expected);
        }
    }

    #[test]
    fn a_sum_has_one_key_in_both_orders() {
        assert_eq!(key(7, Operator::Add, 31), key(31, Operator::Add, 7));
        assert_ne!(
            key(7, Operator::Subtract, 31),
            key(31, Operator::Subtract, 7)
        );
    }
}
