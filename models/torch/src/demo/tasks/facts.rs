//! A closed table of facts, each in several phrasings.

use fastrand::Rng;

use super::{Item, Task, piece};

/// One family of facts: questions, and the statement that answers them, with `{k}` and `{v}` filled in.
struct Family {
    questions: &'static [&'static str],
    /// The answer, up to the value.
    statement: &'static str,
    /// Behind the value.
    ending: &'static str,
    table: &'static [(&'static str, &'static str)],
}

const FAMILIES: [Family; 7] = [
    Family {
        questions: &[
            "What is the capital of {k}?",
            "Name the capital of {k}.",
            "Which city is the capital of {k}?",
            "what is the capital of {k}",
            "Capital of {k}?",
        ],
        statement: "The capital of {k} is",
        ending: ".",
        table: &[
            ("France", "Paris"),
            ("Germany", "Berlin"),
            ("Italy", "Rome"),
            ("Spain", "Madrid"),
            ("Portugal", "Lisbon"),
            ("Poland", "Warsaw"),
            ("Austria", "Vienna"),
            ("Greece", "Athens"),
            ("Norway", "Oslo"),
            ("Sweden", "Stockholm"),
            ("Finland", "Helsinki"),
            ("Denmark", "Copenhagen"),
            ("Ireland", "Dublin"),
            ("Hungary", "Budapest"),
            ("Switzerland", "Bern"),
            ("Belgium", "Brussels"),
            ("Japan", "Tokyo"),
            ("China", "Beijing"),
            ("India", "Delhi"),
            ("Egypt", "Cairo"),
            ("Kenya", "Nairobi"),
            ("Canada", "Ottawa"),
            ("Mexico", "Mexico City"),
            ("Cuba", "Havana"),
            ("Brazil", "Brasilia"),
            ("Chile", "Santiago"),
            ("Peru", "Lima"),
            ("Argentina", "Buenos Aires"),
            ("Australia", "Canberra"),
            ("Turkey", "Ankara"),
            ("England", "London"),
            ("Scotland", "Edinburgh"),
        ],
    },
    Family {
        questions: &[
            "What colour is {k}?",
            "What is the colour of {k}?",
            "what colour is {k}",
            "Which colour has {k}?",
        ],
        statement: "The colour of {k} is",
        ending: ".",
        table: &[
            ("the sky", "blue"),
            ("grass", "green"),
            ("snow", "white"),
            ("coal", "black"),
            ("a lemon", "yellow"),
            ("a carrot", "orange"),
            ("blood", "red"),
            ("chocolate", "brown"),
            ("a plum", "purple"),
            ("a flamingo", "pink"),
            ("an elephant", "grey"),
            ("gold", "golden"),
        ],
    },
    Family {
        questions: &[
            "How many days are in {k}?",
            "How many days does {k} have?",
            "how many days are in {k}",
        ],
        statement: "The number of days in {k} is",
        ending: ".",
        table: &[
            ("January", "31"),
            ("February", "28"),
            ("March", "31"),
            ("April", "30"),
            ("May", "31"),
            ("June", "30"),
            ("July", "31"),
            ("August", "31"),
            ("September", "30"),
            ("October", "31"),
            ("November", "30"),
            ("December", "31"),
            ("a week", "7"),
            ("a year", "365"),
        ],
    },
    Family {
        questions: &[
            "Which month comes after {k}?",
            "What is the month after {k}?",
            "which month comes after {k}",
        ],
        statement: "The month after {k} is",
        ending: ".",
        table: &[
            ("January", "February"),
            ("February", "March"),
            ("March", "April"),
            ("April", "May"),
            ("May", "June"),
            ("June", "July"),
            ("July", "August"),
            ("August", "September"),
            ("September", "October"),
            ("October", "November"),
            ("November", "December"),
            ("December", "January"),
        ],
    },
    Family {
        questions: &[
            "Which day comes after {k}?",
            "What is the day after {k}?",
            "which day comes after {k}",
        ],
        statement: "The day after {k} is",
        ending: ".",
        table: &[
            ("Monday", "Tuesday"),
            ("Tuesday", "Wednesday"),
            ("Wednesday", "Thursday"),
            ("Thursday", "Friday"),
            ("Friday", "Saturday"),
            ("Saturday", "Sunday"),
            ("Sunday", "Monday"),
        ],
    },
    Family {
        questions: &[
            "What is the opposite of {k}?",
            "Name the opposite of {k}.",
            "what is the opposite of {k}",
        ],
        statement: "The opposite of {k} is",
        ending: ".",
        table: &[
            ("hot", "cold"),
            ("big", "small"),
            ("fast", "slow"),
            ("old", "young"),
            ("light", "dark"),
            ("high", "low"),
            ("happy", "sad"),
            ("early", "late"),
            ("open", "closed"),
            ("wet", "dry"),
            ("full", "empty"),
            ("rich", "poor"),
        ],
    },
    Family {
        questions: &["{k}"],
        statement: "",
        ending: "",
        table: &[
            (
                "Hello!",
                "Hello! Ask me to count, to add, or to tell a story.",
            ),
            (
                "Hello",
                "Hello! Ask me to count, to add, or to tell a story.",
            ),
            ("Hi", "Hello! Ask me to count, to add, or to tell a story."),
            ("Who are you?", "I am a small demo model."),
            ("What are you?", "I am a small demo model."),
            (
                "What can you do?",
                "I can count, add, reverse words, answer a few questions and tell stories.",
            ),
            ("Thank you!", "You are welcome."),
            ("Thanks", "You are welcome."),
            ("Goodbye", "Goodbye!"),
            ("Bye", "Goodbye!"),
        ],
    },
];

/// Facts in the table (a fact has several phrasings).
pub const FACT_COUNT: usize = {
    let (mut count, mut i) = (0, 0);
    while i < FAMILIES.len() {
        count += FAMILIES[i].table.len();
        i += 1;
    }
    count
};

fn item(family: &Family, key: &str, value: &str, question: &str) -> Item {
    let statement = family.statement.replace("{k}", key);
    let question = question.replace("{k}", key);
    let ending = family.ending;
    if statement.is_empty() {
        return Item {
            task: Task::Fact,
            key: None,
            raw_prompt: format!("{question}\n"),
            question,
            answer: vec![piece(value, 1.0)],
            raw_answer: vec![piece(value, 1.0)],
        };
    }
    Item {
        task: Task::Fact,
        key: None,
        question,
        answer: vec![
            piece(statement.clone(), 0.5),
            piece(format!(" {value}"), 1.0),
            piece(ending, 0.5),
        ],
        raw_prompt: statement,
        raw_answer: vec![piece(format!(" {value}{ending}"), 1.0)],
    }
}

/// Every fact in every phrasing.
pub fn fact_items() -> Vec<Item> {
    let mut items = Vec::new();
    for family in &FAMILIES {
        for (key, value) in family.table {
            for question in family.questions {
                items.push(item(family, key, value, question));
            }
        }
    }
    items
}

pub(super) fn draw(rng: &mut Rng) -> Item {
    let mut at = rng.usize(..FACT_COUNT);
    for family in &FAMILIES {
        if let Some((key, value)) = family.table.get(at) {
            let question = family.questions[rng.usize(..family.questions.len())];
            return item(family, key, value, question);
        }
        at -= family.table.len();
    }
    unreachable!("`at` is below the sum of the tables' lengths")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_question_has_one_answer() {
        let items = fact_items();
        const { assert!(FACT_COUNT >= 60) };
        assert!(items.len() > FACT_COUNT);
        let mut answers = std::collections::BTreeMap::new();
        for item in items {
            let answer = item.answer_text();
            assert!(!answer.contains('{') && !item.question.contains('{'));
            let known = answers.insert(item.question.clone(), answer.clone());
            assert!(
                known.is_none_or(|known| known == answer),
                "{}",
                item.question
            );
        }
    }
}
