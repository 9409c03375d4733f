//! Words for a shell.

use std::path::Path;

/// A word for the shell, whatever it holds.
pub fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// A path, for the shell.
pub fn quote_path(path: &Path) -> String {
    quote(&path.to_string_lossy())
}

/// A word as a person would write it: quoted only where it must be.
pub fn shown(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        quote(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_they_must_be() {
        assert_eq!(shown("/opt/a-b_c.toml"), "/opt/a-b_c.toml");
        assert_eq!(shown("/opt/it's here"), "'/opt/it'\\''s here'");
        assert_eq!(shown(""), "''");
    }
}
