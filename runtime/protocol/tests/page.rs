//! `docs/protocol.md` names every message, every field and every error code of the types, and no other code.

mod common;

use std::path::Path;

use common::Value;
use understudy_protocol::message::default_credit;
use understudy_protocol::{PROTOCOL_VERSION, handshake, scan};

fn page() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/protocol.md");
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The part of the page under a heading, up to the next heading of the same level or above.
fn section<'a>(page: &'a str, heading: &str) -> &'a str {
    let level = heading.chars().take_while(|&c| c == '#').count();
    let start = page
        .find(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("no heading {heading:?}"))
        + heading.len()
        + 2;
    let rest = &page[start..];
    let mut offset = 0;
    for line in rest.split_inclusive('\n') {
        let hashes = line.chars().take_while(|&c| c == '#').count();
        if (1..=level).contains(&hashes) {
            return &rest[..offset];
        }
        offset += line.len();
    }
    rest
}

fn assert_named(part: &str, direction: &str, value: &Value) {
    let kind = value.kind();
    let text = section(part, &format!("#### `{kind}`"));
    let mut keys = Vec::new();
    value.keys(&mut keys);
    for key in keys.iter().filter(|key| *key != "type") {
        assert!(
            text.contains(&format!("`{key}`")),
            "{direction} {kind}: `{key}` is not described"
        );
    }
}

#[test]
fn every_message_and_field_is_described() {
    let page = page();
    let client = section(&page, "### Client to server");
    let server = section(&page, "### Server to client");
    for message in common::client_messages() {
        assert_named(client, "client", &Value::of(&message));
    }
    for message in common::server_messages() {
        assert_named(server, "server", &Value::of(&message));
    }
}

#[test]
fn every_error_code_has_its_row() {
    let page = page();
    let table = section(&page, "## Error codes");
    let rows: Vec<Vec<&str>> = table
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.split('|').map(str::trim).collect())
        .collect();
    assert_eq!(
        rows.len(),
        common::codes().len(),
        "a row for no code, or a code without a row"
    );
    for code in common::codes() {
        let name = format!("`{}`", code.as_str());
        let row = rows
            .iter()
            .find(|row| row[1] == name)
            .unwrap_or_else(|| panic!("{name} has no row"));
        let retriable = if code.is_retriable() { "yes" } else { "no" };
        assert_eq!(row[2], retriable, "{name}");
    }
}

#[test]
fn a_code_is_written_on_the_wire_as_it_says() {
    for code in common::codes() {
        let written = rmp_serde::to_vec(&code).unwrap();
        assert_eq!(
            rmp_serde::from_slice::<String>(&written).unwrap(),
            code.as_str()
        );
    }
}

#[test]
fn numbers_of_the_page_are_those_of_the_code() {
    let page = page();
    let facts = [
        format!("# The client protocol, version {PROTOCOL_VERSION}"),
        format!("| `credit` | u32 | {} |", default_credit()),
        format!("At most {} bytes. |", handshake::MAX_CLIENT_NAME_BYTES),
        "| payload of a frame before `hello` was read | 4,096 bytes |".to_owned(),
        format!("Nesting is limited to {} levels", scan::MAX_DEPTH),
        format!("| nesting of a message | {} |", scan::MAX_DEPTH),
        format!("in one message | {} |", scan::MAX_CLIENT_ITEMS),
    ];
    assert_eq!(handshake::HANDSHAKE_FRAME_BYTES, 4096);
    for fact in facts {
        assert!(page.contains(&fact), "the page does not say {fact:?}");
    }
}
