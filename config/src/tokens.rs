//! The access tokens that clients show a gateway: the one reading of `gateway.token_file`, for the configuration's
//! check, the gateways themselves, the command line and the launcher.
//!
//! One token a line. Empty lines and lines that begin with `#` are skipped. No message holds any of a token.

use std::fs;
use std::path::{Path, PathBuf};

/// A token is a line; a file larger than this is another file.
const MAX_TOKEN_FILE_BYTES: u64 = 64 * 1024;

/// Why a token file cannot be used: what, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the token file {path}: {why}")]
pub struct TokenFileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub why: TokenFileProblem,
}

/// What is wrong with a token file.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileProblem {
    #[error("{0}")]
    Unreadable(#[from] std::io::Error),
    #[error("it is not a file")]
    NotAFile,
    #[error(
        "it has {0} bytes; a token file has a token a line, and {MAX_TOKEN_FILE_BYTES} bytes at most"
    )]
    TooLarge(u64),
    #[error("line {0} holds more than one word; write one token a line")]
    SeveralWords(usize),
    /// A list without tokens would let everybody in, which is hardly what a token file is for.
    #[error("it holds no token; write one a line, or leave gateway.token_file out")]
    Empty,
}

/// The tokens of a file, in its order; at least one.
///
/// # Errors
/// The file cannot be read, or is no list of tokens.
pub fn read_tokens(path: &Path) -> Result<Vec<String>, TokenFileError> {
    read(path).map_err(|why| TokenFileError {
        path: path.to_owned(),
        why,
    })
}

fn read(path: &Path) -> Result<Vec<String>, TokenFileProblem> {
    let found = fs::metadata(path)?;
    if !found.is_file() {
        return Err(TokenFileProblem::NotAFile);
    }
    if found.len() > MAX_TOKEN_FILE_BYTES {
        return Err(TokenFileProblem::TooLarge(found.len()));
    }
    parse(&fs::read_to_string(path)?)
}

fn parse(text: &str) -> Result<Vec<String>, TokenFileProblem> {
    let mut tokens = Vec::new();
    for (at, line) in text.lines().map(str::trim).enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if line.contains(char::is_whitespace) {
            return Err(TokenFileProblem::SeveralWords(at + 1));
        }
        tokens.push(line.to_owned());
    }
    if tokens.is_empty() {
        return Err(TokenFileProblem::Empty);
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_token_a_line_beside_comments() {
        let text = "# clients\n\n  first \r\nsecond\n# third\n";
        assert_eq!(parse(text).expect("two tokens"), ["first", "second"]);
        assert!(matches!(parse("# none\n\n"), Err(TokenFileProblem::Empty)));
        let several = parse("first\nnot one\n").expect_err("two words");
        assert!(
            matches!(several, TokenFileProblem::SeveralWords(2)),
            "{several}"
        );
        assert!(!several.to_string().contains("not"));
    }
}
