//! Text to token ids and back, by the `tokenizers` crate.
//!
//! Invariant: everything here is a pure function of tokenizer.json. Encoding happens once per request, at admission; after
//! that ids are the truth and text is derived from them.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use tokenizers::Tokenizer;

/// Kinds of tokenizer models that a tokenizer.json may hold.
const KNOWN_MODELS: [&str; 4] = ["BPE", "Unigram", "WordPiece", "WordLevel"];

/// Why a tokenizer cannot be loaded, or a text not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error(
        "tokenizer {path} is missing; copy tokenizer.json from where the checkpoint came from (a sentencepiece tokenizer.model alone must be converted with transformers first)"
    )]
    Missing { path: PathBuf },
    #[error("cannot read tokenizer {path}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "tokenizer {path} is not valid JSON: {source}; the file may be truncated, copy it again"
    )]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("tokenizer {path} is of an unknown type {kind:?}; supported are {}", KNOWN_MODELS.join(", "))]
    UnknownType { path: PathBuf, kind: String },
    #[error("tokenizer {path} cannot be used: {message}")]
    Unusable { path: PathBuf, message: String },
    #[error("text and tokens cannot be converted: {message}")]
    Convert { message: String },
}

/// A loaded tokenizer.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    vocab_size: usize,
}

impl TextTokenizer {
    /// Loads a tokenizer.json.
    ///
    /// # Errors
    /// [`TokenizerError`], but not `Convert`.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let bytes = std::fs::read(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => TokenizerError::Missing {
                path: path.to_owned(),
            },
            _ => TokenizerError::Read {
                path: path.to_owned(),
                source,
            },
        })?;
        Self::from_bytes(&bytes, path)
    }

    /// Loads a tokenizer.json from memory; `path` is for messages.
    ///
    /// # Errors
    /// As [`Self::from_file`].
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self, TokenizerError> {
        let path = path.to_owned();
        let json: serde_json::Value = match serde_json::from_slice(bytes) {
            Ok(json) => json,
            Err(source) => return Err(TokenizerError::Json { path, source }),
        };
        // Old files name no type; the library recognises them by their keys.
        if let Some(kind) = json["model"]["type"]
            .as_str()
            .filter(|kind| !KNOWN_MODELS.contains(kind))
        {
            return Err(TokenizerError::UnknownType {
                path,
                kind: kind.to_owned(),
            });
        }
        let mut inner = Tokenizer::from_bytes(bytes).map_err(|error| TokenizerError::Unusable {
            path,
            message: error.to_string(),
        })?;
        // Files from training may carry both; here a prompt is never cut or filled behind the client's back.
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        Ok(Self::new(inner))
    }

    /// Wraps a tokenizer built in memory.
    #[must_use]
    pub fn new(inner: Tokenizer) -> Self {
        let vocab_size = inner
            .get_vocab(true)
            .values()
            .max()
            .map_or(0, |&id| id as usize + 1);
        Self { inner, vocab_size }
    }

    /// The ids of a text. `special` adds what the tokenizer puts around a text by itself (such as a beginning-of-text
    /// id); a chat template has written that already. Special tokens spelled out in the text become their ids.
    ///
    /// # Errors
    /// [`TokenizerError::Convert`].
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = guarded(|| self.inner.encode_fast(text, special))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids in one go, special tokens left out. See [`crate::detokenizer`] for streams.
    ///
    /// # Errors
    /// [`TokenizerError::Convert`].
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        if !ids.iter().any(|&id| self.is_visible(id)) {
            return Ok(String::new());
        }
        guarded(|| self.inner.decode(ids, true))
    }

    /// Whether an id is a token that is not special.
    #[must_use]
    pub fn is_visible(&self, id: u32) -> bool {
        self.visible_token(id).is_some()
    }

    /// The token of an id as it stands in the vocabulary, unless it is special.
    pub(crate) fn visible_token(&self, id: u32) -> Option<String> {
        let token = self.inner.id_to_token(id)?;
        (!self.inner.get_added_vocabulary().is_special_token(&token)).then_some(token)
    }

    /// One more than the highest id.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token by its exact content.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The library's tokenizer.
    #[must_use]
    pub fn inner(&self) -> &Tokenizer {
        &self.inner
    }
}

/// Runs the library. Some of its parts panic on what a client may send or a tokenizer.json may hold (a decoder given an
/// empty token, say); here that is an error of one request.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, TokenizerError> {
    let message = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the tokenizer library panicked".to_owned(),
    };
    Err(TokenizerError::Convert { message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{byte_fallback, byte_level, metaspace};

    fn load(text: &str) -> TokenizerError {
        TextTokenizer::from_bytes(text.as_bytes(), Path::new("m/tokenizer.json")).unwrap_err()
    }

    #[test]
    fn text_survives_the_way_there_and_back() {
        for tokenizer in [byte_level(), byte_fallback()] {
            for text in ["hello w", "日本 é😀\n", "  two  spaces ", ""] {
                let ids = tokenizer.encode(text, false).unwrap();
                assert_eq!(tokenizer.decode(&ids).unwrap(), text);
            }
        }
        let ids = metaspace().encode("hello w", false).unwrap();
        assert_eq!(metaspace().decode(&ids).unwrap(), "hello w");
    }

    #[test]
    fn special_tokens_are_added_only_on_request() {
        let tokenizer = byte_level();
        let bos = tokenizer.token_to_id("<s>").unwrap();
        let plain = tokenizer.encode("hello", false).unwrap();
        assert_eq!(
            tokenizer.encode("hello", true).unwrap(),
            [&[bos], &plain[..]].concat()
        );
        assert_eq!(
            tokenizer.encode("<|end|>", false).unwrap(),
            [0],
            "spelled out, it is the token"
        );
        assert_eq!(tokenizer.vocab_size(), bos as usize + 1);
    }

    #[test]
    fn files_that_cannot_be_used_say_what_to_do() {
        let missing = TextTokenizer::from_file(Path::new("no/such/tokenizer.json"))
            .unwrap_err()
            .to_string();
        assert!(
            missing.contains("no/such/tokenizer.json") && missing.contains("copy"),
            "{missing}"
        );
        let cases = [
            ("{", "truncated"),
            (
                r#"{"model": {"type": "Sorcery"}}"#,
                "unknown type \"Sorcery\"",
            ),
            (
                r#"{"model": {"type": "BPE"}}"#,
                "m/tokenizer.json cannot be used",
            ),
            ("[]", "cannot be used"),
        ];
        for (text, part) in cases {
            let message = load(text).to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
