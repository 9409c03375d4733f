//! Strings that obey a rule: names, hosts, paths.

use std::path::{Component, Path, PathBuf};

use toml::Spanned;
use toml::de::DeValue;

use super::{Complaint, Kind, string};

/// A string that obeys a rule.
pub(crate) struct Text {
    what: &'static str,
    allowed: &'static str,
    obeys: fn(&str) -> bool,
}

fn is_word(text: &str, max_len: usize, extra: &str) -> bool {
    let start = text
        .chars()
        .next()
        .is_some_and(|c| c.is_ascii_alphanumeric());
    start
        && text.len() <= max_len
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || extra.contains(c))
}

/// The name of a cluster, node or zone: it becomes part of file names, log lines and metric labels.
pub(crate) fn name() -> Text {
    Text {
        what: "name",
        allowed: "1 to 64 of letters, digits, `.`, `_`, `-`; starts with a letter or digit",
        obeys: |text| is_word(text, 64, "._-"),
    }
}

/// The name of a model, as clients write it.
pub(crate) fn model_name() -> Text {
    Text {
        what: "model name",
        allowed: "1 to 128 of letters, digits, `.`, `_`, `-`, `/`, `:`, `@`, `+`; starts with a letter or digit",
        obeys: |text| is_word(text, 128, "._-/:@+"),
    }
}

/// A host name or IP address.
pub(crate) fn host() -> Text {
    Text {
        what: "host",
        allowed: "a host name or an IP address, without a port",
        obeys: |text| {
            text.parse::<std::net::IpAddr>().is_ok()
                || (!text.is_empty() && text.len() <= 253 && text.split('.').all(is_host_label))
        },
    }
}

fn is_host_label(label: &str) -> bool {
    let ends = !label.is_empty() && !label.starts_with('-') && !label.ends_with('-');
    ends && label.len() <= 63
        && label
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

/// An ssh destination. It must not start with `-`, which ssh would take for an option.
pub(crate) fn ssh_destination() -> Text {
    Text {
        what: "ssh destination",
        allowed: "`host` or `user@host`, or an alias of ~/.ssh/config",
        obeys: |text| is_word(text, 255, "._-@:[]"),
    }
}

/// A path on another machine, which cannot be looked at from here.
pub(crate) fn remote_path() -> Text {
    Text {
        what: "path",
        allowed: "a path on that host; not empty, without control characters",
        obeys: |text| {
            !text.is_empty() && !text.starts_with('-') && !text.chars().any(char::is_control)
        },
    }
}

impl Kind for Text {
    type Value = String;

    fn type_name(&self) -> String {
        "string".into()
    }

    fn allowed(&self) -> String {
        self.allowed.into()
    }

    fn read(&self, _: &Path, value: &Spanned<DeValue<'_>>) -> Result<String, Vec<Complaint>> {
        let text = string(value, "a string")?;
        if (self.obeys)(text) {
            return Ok(text.to_owned());
        }
        Err(vec![Complaint::at(
            value,
            format!("\"{}\" is not a {}", text.escape_debug(), self.what),
        )])
    }

    fn show(&self, value: &String) -> String {
        format!("\"{value}\"")
    }
}

/// A path on this machine, relative to the directory of the configuration file.
pub(crate) struct LocalPath;

pub(crate) fn path() -> LocalPath {
    LocalPath
}

/// Joins and removes `.` and `..` by name only, so that a path that does not exist yet can be shown without them.
pub(crate) fn join_normal(base: &Path, path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in base.join(path).components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                normal.pop();
            }
            other => normal.push(other),
        }
    }
    normal
}

impl Kind for LocalPath {
    type Value = PathBuf;

    fn type_name(&self) -> String {
        "path".into()
    }

    fn allowed(&self) -> String {
        "absolute, or relative to the directory of this file".into()
    }

    fn read(&self, base: &Path, value: &Spanned<DeValue<'_>>) -> Result<PathBuf, Vec<Complaint>> {
        let text = string(value, "a path")?;
        if text.is_empty() || text.chars().any(char::is_control) {
            return Err(vec![Complaint::at(
                value,
                "a path must not be empty or hold control characters",
            )]);
        }
        // Only a shell knows what it means; taken literally, a folder named `~` would appear beside the file.
        if text.starts_with('~') {
            return Err(vec![Complaint::at(
                value,
                "`~` does not mean the home directory here; write the path in full",
            )]);
        }
        Ok(join_normal(base, Path::new(text)))
    }

    fn show(&self, value: &PathBuf) -> String {
        format!("\"{}\"", value.display())
    }
}
