//! Token ids to text, one id at a time, never with half a character.
//!
//! Three families, recognised by the decoder in tokenizer.json:
//! - *byte-level* (GPT-2's alphabet): every token is bytes; they go through a [`Utf8Assembler`]. Exact, whatever the bytes.
//! - *everything else*: a token's text is what it adds to the decoded text of the token before it, so that rules about the
//!   first token (a leading space that is dropped) apply to the first token only.
//! - *byte fallback* (`<0x0A>` tokens in the second family): such tokens go through the assembler too.
//!
//! Invariant: the pieces of a sequence, with [`Detokenizer::finish`]'s, are the library's decoding of the whole, and no
//! piece ends inside a character. Where bytes form no UTF-8, byte-level still equals the library; with byte fallback the
//! library decides over a whole run of bytes at its end, and we over each character, so that text can flow: a broken run
//! then differs in the number of U+FFFD. The state is a fold over the ids, so a replay rebuilds it.

use std::sync::Arc;

use tokenizers::{Decoder, DecoderWrapper};

use crate::tokenizer::TextTokenizer;

/// How many of the prompt's last tokens are looked at for context.
const PROMPT_TAIL: usize = 8;

/// Tokens that an unknown decoder may keep open at most before their text is let go as it is: a character has four bytes.
const MAX_OPEN_TOKENS: usize = 8;

/// How a tokenizer's tokens become text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    ByteLevel,
    /// Context of one token; `byte_fallback` if `<0x..>` tokens are bytes.
    Contextual {
        byte_fallback: bool,
    },
}

/// The text of one output stream.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Arc<TextTokenizer>,
    family: Family,
    bytes: Utf8Assembler,
    /// The last tokens whose text is out: what the next token's text is a continuation of. Empty at the very start.
    context: Vec<u32>,
    /// Tokens whose text is not out, since it may end inside a character.
    open: Vec<u32>,
}

impl Detokenizer {
    /// Starts after a prompt, so that the prompt's text followed by the pieces is the text of both. With an empty
    /// `prompt` the pieces are the text of the output alone.
    #[must_use]
    pub fn new(tokenizer: Arc<TextTokenizer>, prompt: &[u32]) -> Self {
        let family = family_of(tokenizer.inner().get_decoder());
        let mut detokenizer = Self {
            tokenizer,
            family,
            bytes: Utf8Assembler::default(),
            context: Vec::new(),
            open: Vec::new(),
        };
        for &id in &prompt[prompt.len().saturating_sub(PROMPT_TAIL)..] {
            detokenizer.push(id);
        }
        detokenizer
    }

    /// The text that `id` completes; empty for special tokens, unknown ids, and as long as a character is incomplete.
    pub fn push(&mut self, id: u32) -> String {
        let Some(token) = self.tokenizer.visible_token(id) else {
            return String::new();
        };
        match (self.family, fallback_byte(&token)) {
            (Family::ByteLevel, _) => self.bytes.push(&token_bytes(&token)),
            (
                Family::Contextual {
                    byte_fallback: true,
                },
                Some(byte),
            ) => self.push_byte(id, byte),
            (Family::Contextual { .. }, _) => {
                let broken = self.close_bytes();
                broken + &self.push_contextual(id)
            }
        }
    }

    /// The end of the stream: what was held back, with U+FFFD for characters that were never completed.
    pub fn finish(&mut self) -> String {
        if self.family == Family::ByteLevel {
            return self.bytes.finish();
        }
        let mut text = self.close_bytes();
        if !self.open.is_empty() {
            text += &self.release_open();
        }
        text
    }

    fn push_byte(&mut self, id: u32, byte: u8) -> String {
        let opened = if self.open.is_empty() || self.bytes.is_open() {
            String::new()
        } else {
            self.release_open()
        };
        self.open.push(id);
        let text = self.bytes.push(&[byte]);
        if self.bytes.is_open() {
            return opened + &text;
        }
        let ids = std::mem::take(&mut self.open);
        if !self.context.is_empty() {
            return opened + &text;
        }
        // The very start: the library's rules for the first token may apply.
        let first = if text.contains(char::REPLACEMENT_CHARACTER) {
            text
        } else {
            self.decode(&ids)
        };
        self.context = ids;
        opened + &first
    }

    /// One U+FFFD for each byte of a character that will not be completed, as the library has it.
    fn close_bytes(&mut self) -> String {
        let text = "\u{fffd}".repeat(self.bytes.open_len());
        if self.bytes.is_open() {
            self.bytes = Utf8Assembler::default();
            let ids = std::mem::take(&mut self.open);
            if self.context.is_empty() {
                self.context = ids;
            }
        }
        text
    }

    fn push_contextual(&mut self, id: u32) -> String {
        self.open.push(id);
        // Decoders that we do not know may also assemble characters from several tokens; the mark tells.
        let text = self.open_text();
        if text.ends_with(char::REPLACEMENT_CHARACTER) && self.open.len() < MAX_OPEN_TOKENS {
            return String::new();
        }
        self.settle(id);
        text
    }

    fn release_open(&mut self) -> String {
        let text = self.open_text();
        if let Some(&last) = self.open.last() {
            self.settle(last);
        }
        text
    }

    fn settle(&mut self, last: u32) {
        self.context.clear();
        self.context.push(last);
        self.open.clear();
    }

    /// What the open tokens add to their context.
    fn open_text(&self) -> String {
        let before = self.decode(&self.context);
        let both: Vec<u32> = self.context.iter().chain(&self.open).copied().collect();
        let mut after = self.decode(&both);
        if !after.starts_with(&before) {
            // A decoder that rewrites what it has written; nothing that is out can be taken back.
            return self.decode(&self.open);
        }
        after.split_off(before.len())
    }

    fn decode(&self, ids: &[u32]) -> String {
        if ids.is_empty() {
            return String::new();
        }
        // Decoders fail on nothing that a vocabulary holds; an unprintable token has no text.
        self.tokenizer.decode(ids).unwrap_or_default()
    }
}

/// Puts UTF-8 together from arbitrary cuts; what is no UTF-8 becomes U+FFFD as in [`String::from_utf8_lossy`].
#[derive(Debug, Clone, Default)]
pub struct Utf8Assembler {
    /// The beginning of a character, at most 3 bytes between two calls.
    open: Vec<u8>,
}

impl Utf8Assembler {
    /// Adds bytes, and takes every character that is complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.open.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = &self.open[..];
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, invalid) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = invalid;
                    let Some(length) = error.error_len() else {
                        break;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[length..];
                }
            }
        }
        let done = self.open.len() - rest.len();
        self.open.drain(..done);
        text
    }

    /// U+FFFD if a character was begun, else nothing.
    pub fn finish(&mut self) -> String {
        if std::mem::take(&mut self.open).is_empty() {
            String::new()
        } else {
            "\u{fffd}".to_owned()
        }
    }

    fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    fn open_len(&self) -> usize {
        self.open.len()
    }
}

fn family_of(decoder: Option<&DecoderWrapper>) -> Family {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => Family::ByteLevel,
        // Whether `<0x41>` is a byte is asked of the decoder itself, so that it is right inside any sequence.
        Some(decoder) => {
            let decoded = decoder.decode(vec!["<0x41>".to_owned()]);
            Family::Contextual {
                byte_fallback: decoded.is_ok_and(|text| text == "A"),
            }
        }
        None => Family::Contextual {
            byte_fallback: false,
        },
    }
}

/// The byte that a token such as `<0x0A>` stands for.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The bytes of a byte-level token; a token outside of that alphabet (an added one) stands for itself.
fn token_bytes(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// GPT-2's alphabet backwards: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards in order.
fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
