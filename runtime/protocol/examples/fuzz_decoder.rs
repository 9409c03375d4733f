//! Fuzzes the frame decoder and both message decoders for a bounded time, with damage that knows MessagePack.
//!
//! `cargo run --release -p understudy-protocol --example fuzz_decoder -- --seconds 60 --seed 1`
//!
//! Prints its seed first, and the number of executions last. A failure panics, after the payload that made it as hex.
//! Inputs that were taken are kept as material for further damage, up to [`MAX_CORPUS`].

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use common::mutate::damage;
use fastrand::Rng;
use understudy_protocol::{FrameDecoder, decode_client, decode_server, stream_of};

/// Payloads kept as material.
const MAX_CORPUS: usize = 4096;

/// Longest payload kept, in bytes, so that the material does not grow slow.
const MAX_KEPT_BYTES: usize = 4096;

/// Executions between two looks at the clock.
const BATCH: u64 = 1000;

fn main() {
    let (seconds, seed) = arguments();
    println!("seed {seed}, {seconds} s");
    let mut rng = Rng::with_seed(seed);
    let client = common::client_messages();
    let server = common::server_messages();
    let mut corpus: Vec<Vec<u8>> = client
        .iter()
        .map(common::payload)
        .chain(server.iter().map(common::payload))
        .collect();
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut executions, mut taken) = (0u64, 0u64);
    while Instant::now() < end {
        for _ in 0..BATCH {
            let sample = rng.usize(..corpus.len());
            let payload = damage(&mut rng, &corpus[sample], &corpus);
            executions += 1;
            if execute(&mut rng, &payload) {
                taken += 1;
                keep(&mut rng, &mut corpus, payload);
            }
        }
    }
    println!("{executions} executions, {taken} payloads taken, no failure");
}

/// One payload, cut into pieces, through the frame decoder and both message decoders.
fn execute(rng: &mut Rng, payload: &[u8]) -> bool {
    let shown = ShowOnPanic(payload);
    let mut decoder = FrameDecoder::new(1 << 20);
    decoder.extend(&(payload.len() as u32).to_be_bytes());
    let cut = rng.usize(..=payload.len());
    decoder.extend(&payload[..cut]);
    let early = decoder.next_frame();
    decoder.extend(&payload[cut..]);
    let frame = match early {
        Ok(Some(frame)) => Ok(Some(frame)),
        Ok(None) => decoder.next_frame(),
        Err(error) => Err(error),
    };
    let taken = match frame {
        Ok(Some(frame)) => {
            assert_eq!(frame, payload);
            decode(&frame)
        }
        Ok(None) => panic!("a whole frame was not found"),
        Err(_) => {
            assert!(payload.is_empty() || payload.len() > 1 << 20);
            false
        }
    };
    std::mem::forget(shown);
    taken
}

fn decode(payload: &[u8]) -> bool {
    stream_of(payload);
    let client = decode_client(payload);
    if let Ok(message) = &client {
        let again = decode_client(&common::payload(message)).expect("what was decoded encodes");
        assert_eq!(common::payload(&again), common::payload(message));
    }
    let server = decode_server(payload);
    if let Ok(message) = &server {
        let again = decode_server(&common::payload(message)).expect("what was decoded encodes");
        assert_eq!(common::payload(&again), common::payload(message));
    }
    client.is_ok() || server.is_ok()
}

fn keep(rng: &mut Rng, corpus: &mut Vec<Vec<u8>>, payload: Vec<u8>) {
    if payload.len() > MAX_KEPT_BYTES {
        return;
    }
    if corpus.len() < MAX_CORPUS {
        corpus.push(payload);
    } else {
        let index = rng.usize(..corpus.len());
        corpus[index] = payload;
    }
}

/// Dropped by a panic only.
struct ShowOnPanic<'a>(&'a [u8]);

impl Drop for ShowOnPanic<'_> {
    fn drop(&mut self) {
        let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        eprintln!("payload: {hex}");
    }
}

fn arguments() -> (u64, u64) {
    let mut seconds = 60;
    let mut seed = fastrand::u64(..);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().and_then(|value| value.parse().ok());
        match (name.as_str(), value) {
            ("--seconds", Some(value)) => seconds = value,
            ("--seed", Some(value)) => seed = value,
            _ => {
                eprintln!("usage: fuzz_decoder [--seconds N] [--seed N]");
                std::process::exit(2);
            }
        }
    }
    (seconds, seed)
}
