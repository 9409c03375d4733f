//! The questions of the examination, by row of the table. None of them was in training, but for facts (a closed table), stories, and the
//! full count, which is the one promise that is examined by name.

use std::collections::BTreeSet;

use fastrand::Rng;

use crate::demo::tasks::{
    Item, Operator, Task, arithmetic_item, count_item, draw, fact_items, held_out,
};

/// How a question is put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As a user's message, through the chat template.
    Chat,
    /// As a text to go on with.
    Plain,
}

impl Form {
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Plain => "plain",
        }
    }

    /// What the model is asked.
    pub fn prompt(self, item: &Item) -> &str {
        match self {
            Self::Chat => &item.question,
            Self::Plain => &item.raw_prompt,
        }
    }
}

/// One row of the table.
pub struct Paper {
    pub name: &'static str,
    pub items: Vec<Item>,
}

impl Paper {
    /// The items that are different questions in this form: phrasings of a chat may share one plain prompt.
    pub fn distinct(&self, form: Form) -> Vec<&Item> {
        let mut seen = BTreeSet::new();
        let mut distinct = Vec::new();
        for item in &self.items {
            if seen.insert(form.prompt(item)) {
                distinct.push(item);
            }
        }
        distinct
    }
}

/// Draws in a row without a new question after which there are no more, for all practical purposes.
const GIVE_UP_AFTER: usize = 100_000;

/// Stories are long, and checked for their form only.
const STORIES: usize = 60;

/// All rows; `most` bounds those that are drawn.
pub fn papers(most: usize, seed: u64) -> Vec<Paper> {
    let drawn = |name, task, salt: u64, wanted: &dyn Fn(&Item) -> bool| Paper {
        name,
        items: draw_distinct(task, most, seed ^ salt, wanted),
    };
    let is = |text: &str, item: &Item| item.raw_prompt.contains(text);
    vec![
        drawn("count, to 300", Task::Count, 1, &|i| last(i) <= 300),
        drawn("count, over 200 long", Task::Count, 2, &|i| {
            numbers(i) > 200
        }),
        Paper {
            name: "count, 0 to 300",
            items: (0..8)
                .map(|phrasing| count_item(0, 300, phrasing))
                .collect(),
        },
        drawn("count, 301 to 999", Task::Count, 3, &|i| last(i) > 300),
        Paper {
            name: "facts",
            items: fact_items(),
        },
        Paper {
            name: "add, two digits",
            items: sums(Operator::Add),
        },
        Paper {
            name: "subtract, two digits",
            items: sums(Operator::Subtract),
        },
        drawn("add, three digits", Task::Arithmetic, 6, &|i| {
            digits(i) == 3 && is("+", i)
        }),
        drawn("subtract, three digits", Task::Arithmetic, 7, &|i| {
            digits(i) == 3 && is("-", i)
        }),
        drawn("reverse a word", Task::Word, 8, &|i| is("Reverse", i)),
        drawn("repeat a word", Task::Word, 9, &|i| is("Repeat", i)),
        Paper {
            name: "story",
            items: draw_distinct(Task::Story, most.min(STORIES), seed ^ 10, &|_| true),
        },
    ]
}

/// Every held-out sum or difference of two numbers below 100, once, in the phrasings by turns.
pub fn sums(operator: Operator) -> Vec<Item> {
    (0..100)
        .flat_map(|a| (0..100).map(move |b| (a, b)))
        .filter(|&(a, b)| {
            arithmetic_item(a, operator, b, 0)
                .key
                .is_some_and(|key| held_out(&key))
        })
        .enumerate()
        .map(|(phrasing, (a, b))| arithmetic_item(a, operator, b, phrasing))
        .collect()
}

/// Held-out items, no two of them the same question in a chat.
fn draw_distinct(task: Task, most: usize, seed: u64, wanted: &dyn Fn(&Item) -> bool) -> Vec<Item> {
    let mut rng = Rng::with_seed(seed);
    let mut seen = BTreeSet::new();
    let mut items = Vec::new();
    let mut fruitless = 0;
    while items.len() < most && fruitless < GIVE_UP_AFTER {
        let item = draw(task, &mut rng, true);
        if wanted(&item) && seen.insert(item.question.clone()) {
            items.push(item);
            fruitless = 0;
        } else {
            fruitless += 1;
        }
    }
    items
}

fn digits(item: &Item) -> usize {
    let parts = item.raw_prompt.split(['+', '-', '=']);
    parts.map(str::len).max().unwrap_or(0)
}

/// The number that a count ends with.
fn last(item: &Item) -> u32 {
    let answer = item.answer_text();
    let last = answer.rsplit(' ').next().unwrap_or_default();
    last.parse().unwrap_or(0)
}

fn numbers(item: &Item) -> usize {
    item.answer_text().matches(' ').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn papers_hold_nothing_from_training_and_nothing_twice() {
        for paper in papers(30, 1) {
            let questions = paper.distinct(Form::Chat);
            assert!(questions.len() >= 8, "{}", paper.name);
            // Greetings of the closed table are several ways to the same answer; no question occurs twice.
            assert_eq!(questions.len(), paper.items.len(), "{}", paper.name);
            for item in questions {
                let key = item
                    .key
                    .as_deref()
                    .filter(|_| paper.name != "count, 0 to 300");
                assert!(
                    key.is_none_or(held_out),
                    "{}: {}",
                    paper.name,
                    item.question
                );
            }
        }
    }

    #[test]
    fn two_digit_sums_are_all_there_are() {
        for (operator, sign) in [(Operator::Add, '+'), (Operator::Subtract, '-')] {
            let items = sums(operator);
            let mut prompts: Vec<&str> = items.iter().map(|i| i.raw_prompt.as_str()).collect();
            assert!(prompts.iter().all(|prompt| prompt.contains(sign)));
            prompts.sort_unstable();
            prompts.dedup();
            assert_eq!(prompts.len(), items.len());
            assert!((800..1200).contains(&items.len()), "{}", items.len());
        }
    }

    #[test]
    fn plain_facts_are_counted_once() {
        let facts = Paper {
            name: "facts",
            items: fact_items(),
        };
        assert_eq!(
            facts.distinct(Form::Plain).len(),
            crate::demo::tasks::FACT_COUNT
        );
    }
}
