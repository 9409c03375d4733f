//! The reference page `docs/configuration.md`, made from the schema. A test compares the file with it.

use std::fmt::Write;

use crate::schema::{KeyInfo, Scope, SectionInfo};
use crate::settings::sections;

const HEAD: &str = "\
# Configuration

One TOML file describes the whole cluster; every node reads the same file. `understudy check FILE` reports everything
that is wrong with it at once, with line, key, what is allowed and the nearest known key. Two files to start from:
[`config/profiles/local.toml`](../config/profiles/local.toml), two nodes on one machine, which `./scripts/launch.sh`
starts by default, and [`config/profiles/cluster.toml`](../config/profiles/cluster.toml), real hosts.

The smallest useful file:

```toml
[[node]]
name = \"a\"
cluster_port = 7600
client_port = 7601

[[model]]
name = \"demo\"
path = \"models/demo\"
```

Conventions:

- Durations are integers in milliseconds (`…_ms`). Sizes (`…_bytes`) are integers in bytes, or strings such as
  `\"256MiB\"`.
- Relative paths start from the directory of the file, not from where a command is run.
- Unknown keys are errors, so that a misspelt one cannot silently have no effect.
- Keys marked † may differ from machine to machine, so a node that is restarted after an edit of them joins the others as
  before. On all others nodes must agree: they compare a checksum when they meet, which comments, layout and the order of
  keys do not change. After an edit of such a key start all nodes anew, or set `cluster.config_mismatch` to `\"warn\"` first.
- Each replica goes to the eligible host with the fewest replicas so far, the first in the file among equals. Every
  node works this out from the file alone.

<!-- Made from the types by: cargo run --release -p understudy-config --example docs > docs/configuration.md -->
";

/// The page in Markdown: every key with its type, default, allowed values and meaning.
pub fn page() -> String {
    let mut out = HEAD.to_owned();
    for section in sections() {
        write_section(&mut out, &section);
    }
    out
}

fn write_section(out: &mut String, section: &SectionInfo) {
    let title = if section.repeated {
        format!("[[{}]]", section.name)
    } else {
        format!("[{}]", section.name)
    };
    // Writing to a String cannot fail.
    let _ = write!(out, "\n## `{title}`\n\n{}\n\n", section.doc);
    out.push_str("| key | type | default | allowed | meaning |\n|---|---|---|---|---|\n");
    for key in &section.keys {
        write_key(out, key);
    }
}

fn write_key(out: &mut String, key: &KeyInfo) {
    let mark = if key.scope == Scope::Local {
        " †"
    } else {
        ""
    };
    let default = match &key.default {
        None => "**required**".to_owned(),
        Some(words) if words.contains('`') || words.contains(' ') && !words.starts_with('[') => {
            words.clone()
        }
        Some(none) if none == "none" => "none".to_owned(),
        Some(value) => format!("`{value}`"),
    };
    let _ = writeln!(
        out,
        "| `{}`{mark} | {} | {} | {} | {} |",
        key.name,
        key.type_name,
        cell(&default),
        cell(&key.allowed),
        cell(&key.doc)
    );
}

/// A pipe would end the cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}
