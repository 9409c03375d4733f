//! Measures what one message costs to encode and to decode.
//!
//! `cargo run --release -p understudy-protocol --example codec_speed`

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::time::Instant;

use bytes::BytesMut;
use serde::Serialize;
use understudy_protocol::message::{ServerMessage, TokenEvent};
use understudy_protocol::{decode_client, decode_server, encode};

const ROUNDS: u32 = 1_000_000;

fn main() {
    let token = ServerMessage::Token(TokenEvent {
        stream: 12,
        position: 345,
        id: 6789,
        text: " word".to_owned(),
        logprob: Some(-0.123),
        top_logprobs: Vec::new(),
    });
    report("token", &token, |payload| {
        drop(black_box(decode_server(payload)))
    });
    for message in common::client_messages() {
        let name = common::Value::of(&message).kind().to_owned();
        report(&name, &message, |payload| {
            drop(black_box(decode_client(payload)))
        });
    }
}

fn report(name: &str, message: &impl Serialize, decode: impl Fn(&[u8])) {
    let mut out = BytesMut::with_capacity(4096);
    let start = Instant::now();
    for _ in 0..ROUNDS {
        out.clear();
        let _ = black_box(encode(black_box(message), &mut out));
    }
    let encoding = start.elapsed() / ROUNDS;
    let payload = common::payload(message);
    let start = Instant::now();
    for _ in 0..ROUNDS {
        decode(black_box(&payload));
    }
    let decoding = start.elapsed() / ROUNDS;
    println!(
        "{name:>8}: {:4} bytes, encode {encoding:?}, decode {decoding:?}",
        payload.len()
    );
}
