//! Everything a gateway needs to know of a model's text side, in one value: [`TextModel`].

use std::{path::Path, sync::Arc};

use crate::{
    chat::{ChatError, ChatMessage, ChatTemplate},
    detokenizer::Detokenizer,
    model_dir::{GenerationDefaults, ModelDir, ModelDirError},
    tokenizer::{TextTokenizer, TokenizerError},
};

/// Why a model's text side cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum TextModelError {
    #[error(transparent)]
    Dir(#[from] ModelDirError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error("the chat template of {path} cannot be used: {source}")]
    Chat { path: String, source: ChatError },
}

/// Why a prompt cannot be turned into tokens. The client's fault, except for a template that is broken.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Chat(#[from] ChatError),
    #[error("this model has no chat template; send a prompt or token ids in place of messages")]
    NoChatTemplate,
    #[error("token id {id} at index {index} is not in the vocabulary of {vocab_size} ids")]
    ForeignToken {
        id: u32,
        index: usize,
        vocab_size: usize,
    },
}

/// Tokenizer, chat template and limits of one model. Cheap to share, immutable.
#[derive(Debug)]
pub struct TextModel {
    dir: ModelDir,
    tokenizer: Arc<TextTokenizer>,
    tokenizer_hash: String,
    chat: Option<ChatTemplate>,
}

impl TextModel {
    /// Loads the text side of a checkpoint directory.
    ///
    /// # Errors
    /// [`TextModelError`], which says which file and what to do.
    pub fn load(path: &Path) -> Result<Self, TextModelError> {
        let dir = ModelDir::open(path)?;
        let tokenizer = TextTokenizer::from_file(&dir.tokenizer_path())?;
        let files = dir.chat_files()?;
        let chat = files
            .template()
            .map(|template| ChatTemplate::new(template, files.special_tokens()))
            .transpose()
            .map_err(|source| TextModelError::Chat {
                path: path.display().to_string(),
                source,
            })?;
        let tokenizer_hash = dir.tokenizer_hash()?;
        Ok(Self {
            dir,
            tokenizer: Arc::new(tokenizer),
            tokenizer_hash,
            chat,
        })
    }

    /// The ids of a plain prompt, with what the tokenizer puts in front of a text by itself.
    ///
    /// # Errors
    /// [`PromptError::Tokenizer`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        Ok(self.tokenizer.encode(text, true)?)
    }

    /// The ids of a conversation, up to where the assistant's answer begins. The template writes the special tokens; ones
    /// that a message spells out become tokens too, as in transformers.
    ///
    /// # Errors
    /// [`PromptError`].
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>, PromptError> {
        let chat = self.chat.as_ref().ok_or(PromptError::NoChatTemplate)?;
        Ok(self
            .tokenizer
            .encode(&chat.render(messages, true)?, false)?)
    }

    /// Checks ids that a client has sent itself.
    ///
    /// # Errors
    /// [`PromptError::ForeignToken`].
    pub fn check_tokens(&self, ids: &[u32]) -> Result<(), PromptError> {
        let vocab_size = self.vocab_size();
        match ids.iter().position(|&id| id as usize >= vocab_size) {
            Some(index) => Err(PromptError::ForeignToken {
                id: ids[index],
                index,
                vocab_size,
            }),
            None => Ok(()),
        }
    }

    /// A stream of text that begins after `prompt`.
    #[must_use]
    pub fn detokenizer(&self, prompt: &[u32]) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.tokenizer), prompt)
    }

    /// The text of one token by itself, for lists of alternatives; special tokens by their names.
    #[must_use]
    pub fn token_text(&self, id: u32) -> String {
        let text = self.tokenizer.decode(&[id]).unwrap_or_default();
        if text.is_empty() {
            self.tokenizer.inner().id_to_token(id).unwrap_or_default()
        } else {
            text
        }
    }

    /// Prompt plus output tokens at most, as the checkpoint has it; a deployment may set less.
    #[must_use]
    pub fn context_length(&self) -> usize {
        self.dir.context_length
    }

    /// The larger of the model's and the tokenizer's vocabulary.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.dir
            .vocab_size
            .unwrap_or(0)
            .max(self.tokenizer.vocab_size())
    }

    /// Ids that end a text.
    #[must_use]
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.dir.eos_token_ids
    }

    /// What the checkpoint recommends where a request says nothing.
    #[must_use]
    pub fn generation_defaults(&self) -> &GenerationDefaults {
        &self.dir.generation
    }

    /// Whether [`Self::encode_chat`] can work.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    /// SHA-256 of tokenizer.json, in hexadecimal.
    #[must_use]
    pub fn tokenizer_hash(&self) -> &str {
        &self.tokenizer_hash
    }

    /// The tokenizer itself.
    #[must_use]
    pub fn tokenizer(&self) -> &Arc<TextTokenizer> {
        &self.tokenizer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn user(content: &str) -> ChatMessage {
        ChatMessage {
            role: "user".to_owned(),
            content: content.to_owned(),
        }
    }

    /// The model that ships with the repository.
    fn demo() -> TextModel {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../demo");
        TextModel::load(&path).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn the_demo_models_text_streams_whole() {
        let model = demo();
        assert!(model.context_length() >= 512 && model.has_chat_template());
        for text in [
            "count from 1 to 12",
            "Zoë said: \"日本 😀\"\n",
            "12 + 34 = 46, -7",
            "1 2 3 100 101 299 300",
        ] {
            let ids = model.encode_prompt(text).unwrap();
            let mut detokenizer = model.detokenizer(&[]);
            let mut streamed: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
            streamed += &detokenizer.finish();
            assert_eq!(streamed, text);
            model.check_tokens(&ids).unwrap();
        }
    }

    #[test]
    fn the_demo_models_chat_ends_where_the_answer_begins() {
        let model = demo();
        let ids = model.encode_chat(&[user("hi")]).unwrap();
        let names: Vec<String> = ids.iter().map(|&id| model.token_text(id)).collect();
        assert_eq!(names.first().map(String::as_str), Some("<|bos|>"));
        assert_eq!(names.last().map(String::as_str), Some("<|assistant|>"));
        assert_eq!(
            names.iter().filter(|name| *name == "<|bos|>").count(),
            1,
            "the template writes it, the tokenizer does not"
        );
        let wizard = ChatMessage {
            role: "wizard".to_owned(),
            content: String::new(),
        };
        assert!(matches!(
            model.encode_chat(&[wizard]),
            Err(PromptError::Chat(ChatError::Refused(_)))
        ));
        let end = model.eos_token_ids()[0];
        assert!(ids.contains(&end), "messages end as answers do");
    }

    #[test]
    fn foreign_ids_are_found() {
        let model = demo();
        let foreign = model.vocab_size() as u32;
        let error = model.check_tokens(&[0, foreign]).unwrap_err();
        assert!(
            matches!(error, PromptError::ForeignToken { index: 1, .. }),
            "{error}"
        );
        assert_eq!(model.token_text(foreign), "");
        assert_eq!(model.tokenizer_hash().len(), 64);
    }
}
