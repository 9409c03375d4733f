//! The demo model's tokenizer: a `tokenizer.json` that the `tokenizers` crate and transformers load alike.
//!
//! Byte-level, so any text survives the round trip; a whole-word vocabulary without merges (`ignore_merges`), so a
//! piece of text is either one token or its bytes. The splitting rule is what makes the tasks learnable:
//!
//! ```text
//! " 57"      one token: a number (0 to 999) behind a space, away from operators, as in counting
//! "5" "7"    digits beside an operator or without a space: arithmetic is learned digit by digit
//! "moon\""   letters before a closing quote are single tokens: spelling, reversing
//! ```

use std::collections::BTreeMap;

use fastrand::Rng;
use serde_json::{Value, json};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer};

use super::tasks::{Task, draw, fact_items};

/// First token of every text.
pub const BOS: u32 = 0;
/// Ends a turn and a text.
pub const END: u32 = 1;
/// Opens a turn.
pub const USER: u32 = 2;
pub const ASSISTANT: u32 = 3;
pub const SYSTEM: u32 = 4;

const SPECIAL: [&str; 5] = [
    "<|bos|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
];
const NUMBERS: u32 = 1000;

/// In this order: number word, letter of a quoted word, word, digit, operator, punctuation, white space.
const SPLIT: &str = r#"(?<![-+=*/]) (?:0|[1-9]\d{0,2})(?!\d)(?! ?[-+=*/])|\p{L}(?=\p{L}*")| ?\p{L}+|\d| ?[-+=*/]| ?[^\s\p{L}\d]+|\s"#;

/// The chat template: each turn is its role's token, its text, `<|end|>`.
pub const CHAT_TEMPLATE: &str = "{{- bos_token }}\n\
{%- for message in messages %}\n    \
{%- if message['role'] not in ['system', 'user', 'assistant'] %}\n        \
{{- raise_exception('roles are system, user and assistant') }}\n    \
{%- endif %}\n    \
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}\n\
{%- endfor %}\n\
{%- if add_generation_prompt %}\n    \
{{- '<|assistant|>' }}\n\
{%- endif %}\n";

/// Why the tokenizer cannot be built or used.
#[derive(Debug, thiserror::Error)]
#[error("demo tokenizer: {0}")]
pub struct TokenizerError(String);

impl From<tokenizers::Error> for TokenizerError {
    fn from(error: tokenizers::Error) -> Self {
        Self(error.to_string())
    }
}

/// Loads a tokenizer from the text of its `tokenizer.json`.
pub fn load(json: &str) -> Result<Tokenizer, TokenizerError> {
    json.parse::<Tokenizer>().map_err(TokenizerError::from)
}

/// The text of the demo model's `tokenizer.json`, the same at every call.
pub fn build() -> Result<String, TokenizerError> {
    let bytes_only = load(&tokenizer_json(&[]).to_string())?;
    let words = frequent_words(&bytes_only)?;
    Ok(format!("{:#}\n", tokenizer_json(&words)))
}

/// Every piece of at least two bytes that the tasks use often, numbers aside; sorted.
fn frequent_words(tokenizer: &Tokenizer) -> Result<Vec<String>, TokenizerError> {
    const AT_LEAST: usize = 4;
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut add = |text: &str, times: usize| -> Result<(), TokenizerError> {
        for word in pieces(tokenizer, text)? {
            let plain = !word.bytes().any(|b| b.is_ascii_digit());
            if plain && word.chars().count() > 1 {
                *counts.entry(word).or_default() += times;
            }
        }
        Ok(())
    };
    for item in fact_items() {
        for text in [
            &item.question,
            &item.answer_text(),
            &item.raw_prompt,
            &item.raw_answer_text(),
        ] {
            add(text, AT_LEAST)?;
        }
    }
    for task in [Task::Count, Task::Arithmetic, Task::Word, Task::Story] {
        let mut rng = Rng::with_seed(task as u64);
        for _ in 0..1500 {
            let item = draw(task, &mut rng, false);
            for text in [&item.question, &item.answer_text(), &item.raw_prompt] {
                add(text, 1)?;
            }
        }
    }
    counts.retain(|_, count| *count >= AT_LEAST);
    Ok(counts.into_keys().collect())
}

/// `text` as the pre-tokenizer splits it, in the byte alphabet of the vocabulary.
fn pieces(tokenizer: &Tokenizer, text: &str) -> Result<Vec<String>, TokenizerError> {
    let mut split = PreTokenizedString::from(text);
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut split)?;
    }
    Ok(split
        .get_splits(OffsetReferential::Original, OffsetType::Byte)
        .into_iter()
        .map(|(word, _, _)| word.to_owned())
        .collect())
}

/// GPT-2's printable stand-in for every byte, in order of the byte.
fn byte_alphabet() -> Vec<char> {
    let printable =
        |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    (0..256)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap_or('?')
        })
        .collect()
}

fn tokenizer_json(words: &[String]) -> Value {
    let alphabet = byte_alphabet();
    let space = alphabet[usize::from(b' ')];
    let mut vocabulary: Vec<String> = SPECIAL.iter().map(|s| (*s).to_owned()).collect();
    vocabulary.extend(alphabet.iter().map(char::to_string));
    vocabulary.extend((0..NUMBERS).map(|n| format!("{space}{n}")));
    vocabulary.extend(words.iter().cloned());
    let ids: serde_json::Map<String, Value> = vocabulary
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect();
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": SPECIAL[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": SPECIAL[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {SPECIAL[0]: {"id": SPECIAL[0], "ids": [BOS], "tokens": [SPECIAL[0]]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
            "vocab": ids, "merges": []},
    })
}

/// The text of `tokenizer_config.json`.
pub fn config_json() -> String {
    let value = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[1],
        "add_bos_token": true,
        "clean_up_tokenization_spaces": false,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    });
    format!("{value:#}\n")
}

/// The text of `generation_config.json`: greedy by default, as the answers are exact.
pub fn generation_json() -> String {
    let value = json!({
        "bos_token_id": BOS,
        "eos_token_id": [END],
        "pad_token_id": END,
        "do_sample": false,
    });
    format!("{value:#}\n")
}

/// Built once for all tests: building reads thousands of examples.
#[cfg(test)]
pub(super) fn for_tests() -> &'static Tokenizer {
    static SHARED: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
    SHARED.get_or_init(|| load(&build().unwrap()).unwrap())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
        tokenizer.encode(text, false).unwrap().get_tokens().to_vec()
    }

    #[test]
    fn it_is_the_same_every_time() {
        assert_eq!(build().unwrap(), build().unwrap());
    }

    #[test]
    fn numbers_behind_a_space_are_one_token_each() {
        let tokenizer = for_tests();
        for n in [0, 7, 10, 99, 100, 300, 999] {
            assert_eq!(tokens(tokenizer, &format!(" {n}")), [format!("Ġ{n}")]);
        }
        assert_eq!(tokens(tokenizer, " 5 6 7").len(), 3);
        assert_eq!(
            tokens(tokenizer, "Count from 5 to 300.")[2..],
            ["Ġ5", "Ġto", "Ġ300", "."]
        );
    }

    #[test]
    fn arithmetic_is_digits() {
        let tokenizer = for_tests();
        assert_eq!(
            tokens(tokenizer, "12+34=46"),
            ["1", "2", "+", "3", "4", "=", "4", "6"]
        );
        assert_eq!(
            tokens(tokenizer, " 12 + 34?"),
            ["Ġ", "1", "2", "Ġ+", "Ġ", "3", "4", "?"]
        );
        assert!(!tokens(tokenizer, "What is 12-3").contains(&"Ġ12".to_owned()));
    }

    #[test]
    fn quoted_words_are_letters() {
        let tokenizer = for_tests();
        assert_eq!(tokens(tokenizer, "\"fox\""), ["\"", "f", "o", "x", "\""]);
        assert_eq!(tokens(tokenizer, " the fox"), ["Ġthe", "Ġfox"]);
    }

    #[test]
    fn pieces_encode_as_the_whole_does() {
        let tokenizer = for_tests();
        let mut rng = Rng::with_seed(11);
        for task in [
            Task::Count,
            Task::Arithmetic,
            Task::Fact,
            Task::Word,
            Task::Story,
        ] {
            for _ in 0..300 {
                let item = draw(task, &mut rng, false);
                let apart: Vec<u32> = item
                    .answer
                    .iter()
                    .flat_map(|p| {
                        tokenizer
                            .encode(p.text.as_str(), false)
                            .unwrap()
                            .get_ids()
                            .to_vec()
                    })
                    .collect();
                let whole = tokenizer.encode(item.answer_text(), false).unwrap();
                assert_eq!(apart, whole.get_ids(), "{}", item.answer_text());
            }
        }
    }

    #[test]
    fn any_text_survives() {
        let tokenizer = for_tests();
        let mut rng = Rng::with_seed(4);
        for _ in 0..2000 {
            let text: String = (0..rng.usize(0..40))
                .map(|_| match rng.u32(..4) {
                    0 => rng.char(' '..='~'),
                    1 => rng.char('\0'..='\u{2ff}'),
                    2 => *[
                        ' ',
                        '\n',
                        '"',
                        '7',
                        '=',
                        '+',
                        'é',
                        '日',
                        '\u{1f600}',
                        '\u{301}',
                    ]
                    .get(rng.usize(..10))
                    .unwrap(),
                    _ => rng.char('\0'..=char::MAX),
                })
                .collect();
            let ids = tokenizer
                .encode(text.as_str(), false)
                .unwrap()
                .get_ids()
                .to_vec();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
    }

    #[test]
    fn special_tokens_have_their_ids() {
        let tokenizer = for_tests();
        for (id, token) in SPECIAL.iter().enumerate() {
            assert_eq!(tokenizer.token_to_id(token), Some(id as u32));
        }
        let chat = tokenizer
            .encode("<|user|>Hi<|end|><|assistant|>", true)
            .unwrap();
        assert_eq!(chat.get_ids()[..2], [BOS, USER]);
        assert_eq!(*chat.get_ids().last().unwrap(), ASSISTANT);
    }
}
