//! Golden bytes: the wire is what it was, and what `docs/protocol.md` says.
//!
//! After a deliberate change of the wire:
//! `cargo test --release -p understudy-protocol --test golden -- --ignored rewrite`, then read the difference.

mod common;

use std::path::{Path, PathBuf};

use common::{Turn, Value};
use understudy_protocol::frame::HEADER_BYTES;
use understudy_protocol::{FrameDecoder, decode_client, decode_server};

const MARKER: &str = "<!-- exchange:";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn page_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/protocol.md")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All sample messages, as the golden file has them: direction and type, then the frame's bytes.
fn messages_text() -> String {
    let client = common::client_messages();
    let server = common::server_messages();
    let client = client
        .iter()
        .map(|m| ('>', Value::of(m).kind().to_owned(), common::frame(m)));
    let server = server
        .iter()
        .map(|m| ('<', Value::of(m).kind().to_owned(), common::frame(m)));
    client
        .chain(server)
        .map(|(who, kind, bytes)| format!("{who} {kind}\n{}", common::hex_dump(&bytes)))
        .collect()
}

/// Direction and bytes of each frame in a golden file.
fn frames(text: &str) -> Vec<(char, Vec<u8>)> {
    let mut frames: Vec<(char, Vec<u8>)> = Vec::new();
    for line in text.lines() {
        match line.chars().next() {
            Some(who @ ('>' | '<')) => frames.push((who, Vec::new())),
            Some(' ') => {
                let hex = &line[2..49];
                frames.last_mut().unwrap().1.extend(common::parse_hex(hex));
            }
            _ => {}
        }
    }
    frames
}

#[test]
fn every_message_is_encoded_as_it_was() {
    assert_eq!(read(&golden("messages.txt")), messages_text());
}

#[test]
fn the_golden_bytes_decode_to_the_messages() {
    let frames = frames(&read(&golden("messages.txt")));
    let client: Vec<_> = frames
        .iter()
        .filter(|(who, _)| *who == '>')
        .map(|(_, bytes)| decode_client(&bytes[HEADER_BYTES..]).unwrap())
        .collect();
    let server: Vec<_> = frames
        .iter()
        .filter(|(who, _)| *who == '<')
        .map(|(_, bytes)| decode_server(&bytes[HEADER_BYTES..]).unwrap())
        .collect();
    assert_eq!(client, common::client_messages());
    assert_eq!(server, common::server_messages());
}

#[test]
fn the_exchange_decodes_frame_by_frame() {
    let text = read(&golden("exchange.txt"));
    let mut turns = common::exchange()
        .into_iter()
        .filter(|turn| !matches!(turn, Turn::Lost));
    for (who, bytes) in frames(&text) {
        let mut decoder = FrameDecoder::new(1024);
        decoder.extend(&bytes);
        let payload = decoder.next_frame().unwrap().expect("one whole frame");
        assert_eq!(decoder.finish(), Ok(()));
        match turns.next().expect("as many turns as frames") {
            Turn::Client(message) => {
                assert_eq!(who, '>');
                assert_eq!(decode_client(&payload), Ok(message));
            }
            Turn::Server(message) => {
                assert_eq!(who, '<');
                assert_eq!(decode_server(&payload), Ok(message));
            }
            Turn::Lost => unreachable!(),
        }
    }
    assert!(turns.next().is_none());
}

/// Start and end of the worked exchange in the page.
fn block(page: &str) -> (usize, usize) {
    let marker = page.find(MARKER).expect("the marker of the exchange");
    let start = marker + page[marker..].find("```text\n").expect("a fence") + "```text\n".len();
    let end = start + page[start..].find("```").expect("its end");
    (start, end)
}

#[test]
fn the_page_shows_the_golden_bytes() {
    let text = read(&golden("exchange.txt"));
    assert_eq!(text, common::exchange_text());
    let page = read(&page_path());
    let (start, end) = block(&page);
    assert_eq!(
        &page[start..end],
        text,
        "docs/protocol.md and the golden file differ"
    );
}

#[test]
#[ignore = "rewrites the golden files and the page"]
fn rewrite() {
    std::fs::write(golden("messages.txt"), messages_text()).unwrap();
    std::fs::write(golden("exchange.txt"), common::exchange_text()).unwrap();
    let mut page = read(&page_path());
    let (start, end) = block(&page);
    page.replace_range(start..end, &common::exchange_text());
    std::fs::write(page_path(), page).unwrap();
}
