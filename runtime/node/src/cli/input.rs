//! What `generate` completes: text, a file, token ids or chat messages.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::Args;
use understudy_protocol::message::{ChatMessage, Input};

use super::exit::Failure;

/// Largest prompt that is read; far above any gateway's frame limit, which decides in the end.
const MAX_PROMPT_BYTES: u64 = 256 << 20;

/// Exactly one kind of input.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Input (one of)")]
#[group(required = true, multiple = false, args = ["prompt", "prompt_file", "token_ids", "message"])]
pub struct InputArgs {
    /// Text to complete
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Complete the text in FILE as it is, final newline included; - reads standard input
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// Complete token ids, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub token_ids: Vec<u32>,
    /// Answer a chat message; a role may stand before it (system:, user:, assistant:), user is meant otherwise. Give
    /// it again for a conversation
    #[arg(long, value_name = "[ROLE:]TEXT")]
    pub message: Vec<String>,
}

impl InputArgs {
    /// The protocol's input. Reads the file or standard input.
    pub fn read(&self) -> Result<Input, Failure> {
        if let Some(text) = &self.prompt {
            Ok(Input::Prompt(text.clone()))
        } else if let Some(file) = &self.prompt_file {
            read_prompt(file).map(Input::Prompt)
        } else if !self.token_ids.is_empty() {
            Ok(Input::TokenIds(self.token_ids.clone()))
        } else {
            Ok(Input::Messages(
                self.message.iter().map(|text| chat_message(text)).collect(),
            ))
        }
    }
}

/// Splits a known role off the front.
fn chat_message(text: &str) -> ChatMessage {
    let (role, content) = ["system", "user", "assistant"]
        .into_iter()
        .find_map(|role| {
            Some((
                role,
                text.strip_prefix(role)?.strip_prefix(':')?.trim_start(),
            ))
        })
        .unwrap_or(("user", text));
    ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
    }
}

fn read_prompt(file: &Path) -> Result<String, Failure> {
    let name = if file == Path::new("-") {
        "standard input".to_owned()
    } else {
        file.display().to_string()
    };
    let told = |why: String| Failure::usage(format!("cannot read the prompt from {name}: {why}"));
    let bytes = if file == Path::new("-") {
        read_bounded(io::stdin().lock())
    } else {
        File::open(file).and_then(read_bounded)
    };
    let bytes = bytes.map_err(|error| told(error.to_string()))?;
    if bytes.len() as u64 > MAX_PROMPT_BYTES {
        return Err(told(format!("it is longer than {MAX_PROMPT_BYTES} bytes")));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        told(format!("it is not UTF-8 text (byte {at})"))
    })
}

/// One byte more than allowed, at most, so that the caller sees the excess.
fn read_bounded(source: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(MAX_PROMPT_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_split_off_messages() {
        let split = |text: &str| {
            let message = chat_message(text);
            (message.role, message.content)
        };
        let pair = |role: &str, content: &str| (role.to_owned(), content.to_owned());
        assert_eq!(split("system: be brief"), pair("system", "be brief"));
        assert_eq!(split("assistant:ok"), pair("assistant", "ok"));
        assert_eq!(split("hello: world"), pair("user", "hello: world"));
        assert_eq!(split("users: 5"), pair("user", "users: 5"));
    }

    #[test]
    fn files_are_taken_as_they_are_or_refused_by_name() {
        let file =
            std::env::temp_dir().join(format!("understudy-cli-prompt-{}", std::process::id()));
        std::fs::write(&file, "two\nlines\n").expect("written");
        assert_eq!(read_prompt(&file), Ok("two\nlines\n".to_owned()));
        std::fs::write(&file, b"ab\xff").expect("written");
        let failure = read_prompt(&file).expect_err("not UTF-8");
        assert!(
            failure.message.contains("not UTF-8 text (byte 2)"),
            "{failure}"
        );
        std::fs::remove_file(&file).expect("removed");
        let failure = read_prompt(&file).expect_err("gone");
        assert!(
            failure.message.contains(&file.display().to_string()),
            "{failure}"
        );
    }
}
