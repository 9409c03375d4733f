//! Small tokenizers of every kind, built in code, and a seeded source of numbers for property tests.

use std::{path::Path, sync::Arc};

use serde_json::{Value, json};

use crate::{
    rng::{Domain, uniform},
    tokenizer::TextTokenizer,
};

/// Numbers for property tests: the same seed gives the same test.
pub struct Dice {
    seed: u64,
    throws: u64,
}

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self { seed, throws: 0 }
    }

    /// A number in `0..sides`.
    pub fn throw(&mut self, sides: usize) -> usize {
        self.throws += 1;
        (uniform(self.seed, self.throws, 0, Domain::Token) * sides as f64) as usize
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.throw(of.len())]
    }
}

pub fn load(json: &Value) -> Arc<TextTokenizer> {
    let bytes = serde_json::to_vec(json).unwrap();
    Arc::new(
        TextTokenizer::from_bytes(&bytes, Path::new("tokenizer.json"))
            .unwrap_or_else(|e| panic!("{e}")),
    )
}

fn vocab(tokens: &[String]) -> Value {
    tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn special(id: usize, content: &str) -> Value {
    json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
}

/// GPT-2's alphabet: the character that stands for a byte.
fn byte_char(byte: u8) -> char {
    let mut next = 0x100;
    for candidate in 0..=255_u8 {
        let printable = matches!(candidate, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        if candidate == byte {
            return char::from_u32(if printable { u32::from(byte) } else { next }).unwrap();
        }
        next += u32::from(!printable);
    }
    unreachable!("the loop meets every byte")
}

/// Byte-level BPE: id 0 is special `<|end|>`, 1..=256 are the bytes 0..=255, then a few merges. `<s>` is put in front of a
/// text when asked for.
pub fn byte_level() -> Arc<TextTokenizer> {
    let mut tokens = vec!["<|end|>".to_owned()];
    tokens.extend((0..=255).map(|byte| byte_char(byte).to_string()));
    for text in ["he", "hel", "\u{120}w", "é", "日", "\u{1F600}"] {
        tokens.push(text.bytes().map(byte_char).collect());
    }
    // A token that ends inside a character, one that begins inside it, and one that is never valid.
    for bytes in [&[b'a', 0xe6, 0x97][..], &[0xa5, b'b'], &[0xff, 0xc0]] {
        tokens.push(bytes.iter().map(|&byte| byte_char(byte)).collect());
    }
    tokens.push("<s>".to_owned());
    let bos = tokens.len() - 1;
    load(&json!({
        "version": "1.0",
        "added_tokens": [special(0, "<|end|>"), special(bos, "<s>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab(&tokens), "merges": ["h e", "he l"]},
    }))
}

/// Llama 2's shape: metaspaces by normalizer and decoder, bytes for what the vocabulary lacks. 0 is special `</s>`,
/// 1..=256 are the bytes.
pub fn byte_fallback() -> Arc<TextTokenizer> {
    let mut tokens = vec!["</s>".to_owned()];
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["▁", "▁▁", "▁hello", "lo", "w", "▁w", "é", "<0xZZ>"].map(str::to_owned));
    load(&json!({
        "version": "1.0",
        "added_tokens": [special(0, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": vocab(&tokens), "merges": [], "byte_fallback": true, "fuse_unk": true},
    }))
}

/// Unigram with metaspaces, as T5 has it.
pub fn metaspace() -> Arc<TextTokenizer> {
    let tokens = ["</s>", "▁", "▁▁", "▁hello", "lo", "w", "▁w", "é", "日本"];
    let pieces: Vec<Value> = tokens.iter().map(|token| json!([token, -1.0])).collect();
    load(&json!({
        "version": "1.0",
        "added_tokens": [special(0, "</s>")],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces},
    }))
}

/// The older shapes: WordPiece with `##`, BPE with `</w>`, whole words without any decoder.
pub fn older() -> Vec<Arc<TextTokenizer>> {
    let tokens = |all: &[&str]| {
        vocab(
            &all.iter()
                .map(|&token| token.to_owned())
                .collect::<Vec<_>>(),
        )
    };
    vec![
        load(&json!({
            "version": "1.0", "added_tokens": [special(0, "[UNK]")],
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
                "vocab": tokens(&["[UNK]", "hello", "##lo", ".", "do", "n't", "é", ","])},
        })),
        load(&json!({
            "version": "1.0", "added_tokens": [special(0, "<unk>")],
            "decoder": {"type": "BPEDecoder", "suffix": "</w>"},
            "model": {"type": "BPE", "merges": [], "end_of_word_suffix": "</w>", "vocab": tokens(&["<unk>", "hel", "lo</w>", "w</w>", "é", "x"])},
        })),
        load(&json!({
            "version": "1.0", "added_tokens": [special(0, "<unk>")],
            "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": tokens(&["<unk>", "a", "bc", "é"])},
        })),
    ]
}
