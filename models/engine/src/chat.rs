//! Chat templates as Hugging Face checkpoints carry them: Jinja2 text, rendered by minijinja.
//!
//! Conventions of transformers that are kept: blocks are trimmed (`trim_blocks`, `lstrip_blocks`), `messages` and
//! `add_generation_prompt` are given, `tools` and `documents` are none, special tokens stand under their names, `raise_exception(text)` refuses a
//! conversation, `strftime_now(format)` gives the time, `tojson` writes Python's JSON, strings and maps have Python's
//! methods ([`methods`]), `{% generation %}` marks are ignored.
//!
//! Invariant: rendering happens once, at admission; the ids that come out are the request from then on.

mod json;
mod methods;

use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value, context};
use serde::{Deserialize, Serialize};

/// The name under which the template appears in messages.
const TEMPLATE: &str = "chat_template";

/// Marks an error as [`ChatError::Refused`] on its way through the template engine.
const REFUSED: &str = "raise_exception: ";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    pub content: String,
}

/// Why a conversation cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The template is no valid Jinja2, or uses what we do not have.
    #[error("chat template, line {line}: {message}")]
    Template { line: usize, message: String },
    /// The template itself refuses this conversation (`raise_exception`): the client's fault.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// There is nothing to render.
    #[error("messages is empty; send at least one message")]
    NoMessages,
}

/// A compiled template with its special tokens.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Value,
}

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are names such as `bos_token` with their texts.
    ///
    /// # Errors
    /// [`ChatError::Template`].
    pub fn new<'a>(
        source: &str,
        special_tokens: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_unknown_method_callback(methods::call);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", json::to_json);
        environment
            .add_template_owned(TEMPLATE, without_generation_marks(source))
            .map_err(chat_error)?;
        let special_tokens = special_tokens
            .into_iter()
            .map(|(name, text)| (name.to_owned(), Value::from(text)));
        Ok(Self {
            environment,
            special_tokens: special_tokens.collect(),
        })
    }

    /// The text of a conversation; with `add_generation_prompt` up to where the assistant's answer begins.
    ///
    /// # Errors
    /// [`ChatError`].
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        if messages.is_empty() {
            return Err(ChatError::NoMessages);
        }
        let template = self
            .environment
            .get_template(TEMPLATE)
            .map_err(chat_error)?;
        // None, as transformers passes them: templates ask `tools is not none`, and an undefined value is not none.
        let values = context! {
            messages, add_generation_prompt, tools => (), documents => (), ..self.special_tokens.clone()
        };
        template.render(values).map_err(chat_error)
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(
        ErrorKind::InvalidOperation,
        format!("{REFUSED}{message}"),
    ))
}

/// The local time in a format of `strftime(3)`.
fn strftime_now(format: String) -> Result<String, Error> {
    let invalid = || {
        Error::new(
            ErrorKind::InvalidOperation,
            "strftime_now: the format cannot be used",
        )
    };
    let format = std::ffi::CString::new(format).map_err(|_| invalid())?;
    let mut buffer = [0_u8; 256];
    // SAFETY: `time` takes no pointer here; `localtime_r` and `strftime` write only into what they are given, whose
    // sizes are stated; an all-zero `tm` is a valid value (it may hold a null time zone name).
    let written = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut parts: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&raw const now, &raw mut parts).is_null() {
            return Err(invalid());
        }
        libc::strftime(
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            format.as_ptr(),
            &raw const parts,
        )
    };
    Ok(String::from_utf8_lossy(&buffer[..written]).into_owned())
}

/// Takes out `{% generation %}` and `{% endgeneration %}`, by which transformers marks the assistant's tokens for
/// training. Their whitespace control is kept, by an empty comment in their place.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let tag = &rest[start + 2..start + length];
        let name = tag.trim_matches(['-', '+', ' ', '\t', '\n']);
        out.push_str(&rest[..start]);
        if name == "generation" || name == "endgeneration" {
            out.push_str(if tag.starts_with('-') { "{#-" } else { "{#" });
            out.push_str(if tag.ends_with('-') { " -#}" } else { " #}" });
        } else {
            out.push_str(&rest[start..start + length + 2]);
        }
        rest = &rest[start + length + 2..];
    }
    out + rest
}

/// The innermost cause decides: a refusal may have passed through macros and includes.
fn chat_error(error: Error) -> ChatError {
    let mut causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| {
        error.source()
    });
    let refusal = causes.find_map(|cause| {
        cause
            .downcast_ref::<Error>()?
            .detail()?
            .strip_prefix(REFUSED)
            .map(str::to_owned)
    });
    match refusal {
        Some(message) => ChatError::Refused(message),
        None => ChatError::Template {
            line: error.line().unwrap_or(0),
            message: error.detail().map_or_else(
                || error.kind().to_string(),
                |detail| format!("{}: {detail}", error.kind()),
            ),
        },
    }
}

#[cfg(test)]
mod tests;
