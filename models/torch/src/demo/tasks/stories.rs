//! Short stories from a small grammar, 100 to 300 tokens long.

use fastrand::Rng;

use super::{Item, Task, pick, piece};

const NAMES: [&str; 12] = [
    "Mia", "Tom", "Lily", "Ben", "Anna", "Max", "Ella", "Sam", "Nora", "Leo", "Ruby", "Finn",
];
const ANIMALS: [&str; 12] = [
    "fox", "rabbit", "bear", "owl", "duck", "mouse", "cat", "dog", "horse", "frog", "goat",
    "hedgehog",
];
const KINDS: [&str; 10] = [
    "small", "brave", "clever", "shy", "old", "young", "friendly", "hungry", "quiet", "curious",
];
const PLACES: [&str; 10] = [
    "forest", "village", "garden", "mountain", "river", "meadow", "castle", "harbour", "valley",
    "island",
];
const THINGS: [&str; 10] = [
    "key", "lamp", "boat", "book", "bell", "crown", "kite", "drum", "ring", "map",
];
const COLOURS: [&str; 6] = ["red", "blue", "green", "golden", "silver", "white"];
const FOODS: [&str; 6] = ["bread", "soup", "apples", "honey", "cheese", "cake"];
const WEATHER: [&str; 6] = ["sunny", "rainy", "windy", "cold", "warm", "foggy"];

/// What a story is about; the same values return through all of its sentences.
struct Cast<'a> {
    name: &'a str,
    animal: &'a str,
    kind: &'a str,
    place: &'a str,
    thing: &'a str,
    colour: &'a str,
}

/// A story with a question that may ask for its hero.
pub fn story_item(rng: &mut Rng) -> Item {
    let cast = Cast {
        name: pick(rng, &NAMES),
        animal: pick(rng, &ANIMALS),
        kind: pick(rng, &KINDS),
        place: pick(rng, &PLACES),
        thing: pick(rng, &THINGS),
        colour: pick(rng, &COLOURS),
    };
    let Cast {
        name,
        animal,
        thing,
        ..
    } = cast;
    let article = if animal == "owl" { "an" } else { "a" };
    let question = match rng.u32(..10) {
        0..3 => "Tell me a story.".to_owned(),
        3 => "tell me a story".to_owned(),
        4 => "Write a short story.".to_owned(),
        5 => format!("Tell me a story about {article} {animal}."),
        6 => format!("Tell me a story about {name}."),
        7 => format!("Tell me a story about a {thing}."),
        8 => format!("Tell me a story about {name} and {article} {animal}."),
        _ => format!("Write a story about {article} {animal} and a {thing}."),
    };
    let story = story(rng, &cast);
    let opening = "Once upon a time";
    // Much of a story is chance, which teaches little and drowns the rest: a low weight.
    Item {
        task: Task::Story,
        key: None,
        question,
        answer: vec![piece(story.clone(), 0.25)],
        raw_prompt: opening.to_owned(),
        raw_answer: vec![piece(&story[opening.len()..], 0.25)],
    }
}

fn story(rng: &mut Rng, cast: &Cast<'_>) -> String {
    let Cast {
        name,
        animal,
        kind,
        place,
        thing,
        colour,
    } = cast;
    let article = match kind.as_bytes()[0] {
        b'a' | b'e' | b'i' | b'o' | b'u' => "an",
        _ => "a",
    };
    let mut text = format!(
        "Once upon a time there was {article} {kind} {animal} who lived near the {place}. \
         The {animal} had a friend whose name was {name}."
    );
    let episodes = rng.usize(4..=15);
    let mut before = usize::MAX;
    for _ in 0..episodes {
        // Never the same episode twice in a row.
        let mut which = rng.usize(..EPISODES);
        if which == before {
            which = (which + 1) % EPISODES;
        }
        before = which;
        text.push(' ');
        text.push_str(&episode(rng, cast, which));
    }
    text.push_str(&match rng.u32(..3) {
        0 => format!(
            " In the end {name} and the {animal} took the {colour} {thing} home and were happy."
        ),
        1 => format!(" At last {name} gave the {colour} {thing} to the {animal}, and they danced."),
        _ => {
            format!(" When the night came, {name} and the {animal} went to sleep near the {place}.")
        }
    });
    text.push_str(" The end.");
    text
}

/// Whether `text` has a story's form and is about what `question` asks for: it begins and ends as stories do, tells of one animal and
/// of one person throughout, and contains every name and noun of the question.
pub fn is_story(text: &str, question: &str) -> bool {
    let words: Vec<&str> = text.split(|c: char| !c.is_alphabetic()).collect();
    let heroes = |of: &[&str]| of.iter().filter(|hero| words.contains(hero)).count();
    let asked = question.split([' ', '.']).filter(|word| {
        [&NAMES[..], &ANIMALS, &THINGS]
            .iter()
            .any(|of| of.contains(word))
    });
    text.starts_with("Once upon a time there was a")
        && text.ends_with(" The end.")
        && heroes(&NAMES) == 1
        && heroes(&ANIMALS) == 1
        && asked.into_iter().all(|word| words.contains(&word))
}

const EPISODES: usize = 9;

fn episode(rng: &mut Rng, cast: &Cast<'_>, which: usize) -> String {
    let Cast {
        name,
        animal,
        place,
        thing,
        colour,
        ..
    } = cast;
    let weather = pick(rng, &WEATHER);
    let food = pick(rng, &FOODS);
    let other = pick(rng, &PLACES);
    match which {
        0 => {
            format!("One {weather} day {name} walked to the {other} and found a {colour} {thing}.")
        }
        1 => format!(
            "The {animal} wanted to eat some {food}, so {name} made some {food} for the {animal}."
        ),
        2 => format!(
            "It was a {weather} morning, and the {animal} was looking for the {colour} {thing}."
        ),
        3 => format!(
            "Then {name} said that the {thing} was lost, and they looked for it in the {other}."
        ),
        4 => format!("They walked for a long time until they came to the {other}."),
        5 => format!("\"Where is the {thing}?\" asked {name}."),
        6 => format!("The {animal} laughed and ran back to the {place}."),
        7 => format!("{name} was tired, so they sat down and ate {food}."),
        _ => format!("Soon the {animal} found the {colour} {thing} under a tree."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_story_keeps_its_cast_and_ends() {
        let mut rng = Rng::with_seed(8);
        for _ in 0..200 {
            let item = story_item(&mut rng);
            let text = item.answer_text();
            assert!(text.starts_with("Once upon a time") && text.ends_with("The end."));
            assert_eq!(
                format!("{}{}", item.raw_prompt, item.raw_answer_text()),
                text
            );
            assert!(is_story(&text, &item.question), "{text}");
        }
    }

    #[test]
    fn what_is_no_story_or_another_one_is_told() {
        let story = "Once upon a time there was a small fox who lived near the river. \
                     The fox had a friend whose name was Mia. Mia found a red key. The end.";
        for question in [
            "",
            "Tell me a story.",
            "Tell me a story about Mia and a fox.",
            "Write a story about a fox and a key.",
        ] {
            assert!(is_story(story, question), "{question}");
        }
        for question in [
            "Tell me a story about Tom.",
            "Tell me a story about an owl.",
            "Tell me a story about a lamp.",
        ] {
            assert!(!is_story(story, question), "{question}");
        }
        for (part, with) in [
            (" The end.", ""),
            ("Once upon a time", "Then"),
            ("Mia found", "Tom found"),
            ("The fox had", "The bear had"),
            ("Mia", "She"),
        ] {
            assert!(!is_story(&story.replace(part, with), ""), "{part}");
        }
    }
}
