use fastrand::Rng;

use super::papers::sums;
use super::*;
use crate::demo::tasks::{
    Operator, WordTask, arithmetic_item, count_item, draw, fact_items, word_item,
};

/// More phrasings than any task has.
const PHRASINGS: usize = 24;

fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo")
}

fn room() -> Room {
    // Threads that wait for each other cost more than they give at this size, above all on a busy machine.
    Room::open(&shipped(), 1).unwrap()
}

/// Every task in every phrasing, and stories about everything.
fn all_forms() -> Vec<Item> {
    let mut items = fact_items();
    for phrasing in 0..PHRASINGS {
        for operator in [Operator::Add, Operator::Subtract] {
            items.push(arithmetic_item(7, operator, 38, phrasing));
            items.push(arithmetic_item(904, operator, 17, phrasing));
        }
        items.push(count_item(0, 300, phrasing));
        items.push(count_item(57, 71, phrasing));
        for task in [WordTask::Reverse, WordTask::Repeat(2), WordTask::Repeat(4)] {
            items.push(word_item("stone", task, phrasing));
            items.push(word_item("qx", task, phrasing));
        }
    }
    let mut rng = Rng::with_seed(3);
    items.extend((0..400).map(|_| draw(Task::Story, &mut rng, true)));
    items
}

/// What the model was trained on is what clients' messages become.
#[test]
fn training_and_serving_write_the_same_prompts() {
    let text = TextModel::load(&shipped()).unwrap();
    let json = std::fs::read_to_string(shipped().join("tokenizer.json")).unwrap();
    assert_eq!(json, tokenizer::build().unwrap());
    let tokenizer = tokenizer::load(&json).unwrap();
    let writer = Writer::new(&tokenizer);
    let message = |role: &str, content: String| ChatMessage {
        role: role.to_owned(),
        content,
    };
    let mut before: Option<Item> = None;
    for item in all_forms() {
        let question = message("user", item.question.clone());
        let chat = text.encode_chat(std::slice::from_ref(&question)).unwrap();
        assert_eq!(writer.chat_prompt(&item), chat, "{}", item.question);
        let plain = text.encode_prompt(&item.raw_prompt).unwrap();
        assert_eq!(writer.raw_prompt(&item), plain, "{}", item.raw_prompt);
        if let Some(before) = before.replace(item.clone()) {
            let turns = [
                message("user", before.question.clone()),
                message("assistant", before.answer_text()),
                question,
            ];
            let trained = [writer.chat(&before).ids, chat[1..].to_vec()].concat();
            assert_eq!(trained, text.encode_chat(&turns).unwrap());
        }
    }
}

#[test]
fn one_wrong_token_or_a_missing_end_is_wrong() {
    let room = room();
    let item = count_item(3, 6, 0);
    let ids = |text: &str| {
        room.tokenizer
            .encode(text, false)
            .unwrap()
            .get_ids()
            .to_vec()
    };
    for form in [Form::Chat, Form::Plain] {
        assert!(room.is_right(&item, form, &[ids(" 3 4 5 6"), vec![END]].concat()));
        assert!(!room.is_right(&item, form, &ids(" 3 4 5 6")), "no end");
        for wrong in [" 3 4 6", " 3 4 5 5 6", " 3 4 5 6 7", " 3 4 5", ""] {
            assert!(!room.is_right(&item, form, &[ids(wrong), vec![END]].concat()));
        }
        // The same text in other tokens: digits apart are not what was learned.
        let spelled = [ids(" "), ids("3"), ids(" 4 5 6"), vec![END]].concat();
        assert_eq!(
            room.tokenizer.decode(&spelled, false).unwrap(),
            " 3 4 5 6<|end|>"
        );
        assert!(!room.is_right(&item, form, &spelled));
    }
}

/// The checkpoint in the repository keeps its promises with the arithmetic that it is served with.
#[test]
fn the_shipped_model_counts_adds_and_knows_its_facts() {
    let mut room = room();
    let wrong = |room: &mut Room, items: &[Item], form: Form| -> Vec<String> {
        let items: Vec<&Item> = items.iter().collect();
        let outputs = room.answers(&items, form, &mut || {}).unwrap();
        let answers = items.iter().zip(&outputs);
        answers
            .filter(|(item, output)| !room.is_right(item, form, output))
            .map(|(item, _)| form.prompt(item).to_owned())
            .collect()
    };
    for form in [Form::Chat, Form::Plain] {
        let counts = [count_item(0, 300, 0)];
        assert_eq!(wrong(&mut room, &counts, form), [""; 0], "{form:?}");
        assert_eq!(wrong(&mut room, &fact_items(), form), [""; 0], "{form:?}");
    }
    let sums: Vec<Item> = [Operator::Add, Operator::Subtract]
        .into_iter()
        .flat_map(|operator| sums(operator).into_iter().step_by(19).take(50))
        .collect();
    assert_eq!(sums.len(), 100);
    for form in [Form::Chat, Form::Plain] {
        let wrong = wrong(&mut room, &sums, form);
        assert!(wrong.len() <= 5, "{form:?}: {wrong:?}");
    }
}
