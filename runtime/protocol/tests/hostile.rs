//! Damaged, truncated and invented bytes: decoding never panics, and what it takes it would write again the same way.

mod common;

use common::mutate::damage;
use fastrand::Rng;
use understudy_protocol::message::{ClientMessage, ServerMessage};
use understudy_protocol::{
    ErrorCode, FrameDecoder, FrameError, decode_client, decode_server, stream_of,
};

const SEED: u64 = 0x5eed_0001;

/// Per sample message; there are 16.
const MUTATIONS: u32 = 16_000;

fn payloads() -> Vec<Vec<u8>> {
    let client = common::client_messages();
    let server = common::server_messages();
    let client = client.iter().map(common::payload);
    client.chain(server.iter().map(common::payload)).collect()
}

/// Both decoders on the same bytes; whatever one takes must come back from its own encoding.
fn decode_both(bytes: &[u8]) -> (bool, bool) {
    let client = decode_client(bytes);
    if let Ok(message) = &client {
        let again = decode_client(&common::payload(message)).expect("what was decoded encodes");
        assert!(same_client(message, &again), "{message:?} became {again:?}");
    }
    let server = decode_server(bytes);
    if let Ok(message) = &server {
        let again = decode_server(&common::payload(message)).expect("what was decoded encodes");
        assert!(same_server(message, &again), "{message:?} became {again:?}");
    }
    if let Err(error) = &client {
        assert!(matches!(
            error.code,
            ErrorCode::Malformed | ErrorCode::InvalidRequest
        ));
        assert_eq!(
            error.code == ErrorCode::InvalidRequest,
            is_bad_submit(bytes),
            "{error}"
        );
    }
    (client.is_ok(), server.is_ok())
}

fn is_bad_submit(bytes: &[u8]) -> bool {
    stream_of(bytes).is_some()
        && understudy_protocol::scan::scan(bytes, usize::MAX)
            .is_ok_and(|seen| seen.kind == "submit")
        && decode_client(bytes).is_err()
}

/// Equal to the bit: a damaged number may be no number, which is not equal to itself.
fn same_client(one: &ClientMessage, two: &ClientMessage) -> bool {
    common::payload(one) == common::payload(two)
}

fn same_server(one: &ServerMessage, two: &ServerMessage) -> bool {
    common::payload(one) == common::payload(two)
}

#[test]
fn damaged_messages_are_refused_or_read_but_never_panic() {
    let samples = payloads();
    let mut rng = Rng::with_seed(SEED);
    let (mut taken, mut refused) = (0, 0);
    for sample in &samples {
        for _ in 0..MUTATIONS {
            let bytes = damage(&mut rng, sample, &samples);
            let (client, server) = decode_both(&bytes);
            taken += u32::from(client || server);
            refused += u32::from(!client && !server);
        }
    }
    assert!(
        taken + refused >= 200_000,
        "{} mutations only",
        taken + refused
    );
    // Both happen often, or the damage is of no use.
    assert!(
        taken > 5_000 && refused > 100_000,
        "{taken} taken, {refused} refused (seed {SEED:#x})"
    );
}

#[test]
fn every_single_bit_flip_is_harmless() {
    for sample in payloads() {
        for bit in 0..sample.len() * 8 {
            let mut bytes = sample.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            decode_both(&bytes);
        }
    }
}

#[test]
fn every_truncation_is_refused() {
    for sample in payloads() {
        for len in 0..sample.len() {
            assert_eq!(decode_both(&sample[..len]), (false, false));
        }
    }
}

#[test]
fn random_streams_end_in_frames_or_an_error() {
    let mut rng = Rng::with_seed(SEED);
    let samples = payloads();
    let mut errors = 0;
    for _ in 0..2_000 {
        let mut decoder = FrameDecoder::new(4096);
        let mut failed = None;
        for _ in 0..rng.u32(1..20) {
            let sample = &samples[rng.usize(..samples.len())];
            let mut piece = (sample.len() as u32).to_be_bytes().to_vec();
            piece.extend_from_slice(sample);
            if rng.u32(..10) == 0 {
                piece = damage(&mut rng, &piece, &samples);
            }
            decoder.extend(&piece);
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => {
                        assert!(failed.is_none() && !frame.is_empty() && frame.len() <= 4096);
                        decode_both(&frame);
                    }
                    Ok(None) => break,
                    Err(error) => {
                        assert!(
                            failed.is_none_or(|first| first == error),
                            "an error changed"
                        );
                        failed = Some(error);
                        break;
                    }
                }
            }
            assert!(decoder.buffered_bytes() <= 4096 + 4 + 4096 || failed.is_some());
        }
        errors += u32::from(failed.is_some());
    }
    assert!(errors > 100, "{errors} broken streams only");
}

#[test]
fn another_protocol_is_found_at_its_first_bytes() {
    let starts: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00",
        b"SSH-2.0-",
        b"PRI * HTTP/2.0",
    ];
    for start in starts {
        let mut decoder = FrameDecoder::new(16 << 20);
        decoder.extend(&start[..4]);
        let error = decoder.next_frame().unwrap_err();
        assert!(
            matches!(error, FrameError::TooLarge { .. }),
            "{start:?}: {error}"
        );
    }
}

#[test]
fn lists_beyond_the_item_limit_are_refused() {
    let mut bytes = b"\x83\xa4type\xa6submit\xa6stream\x01\xa4stop".to_vec();
    bytes.push(0xdd);
    bytes.extend_from_slice(&70_000u32.to_be_bytes());
    bytes.extend(std::iter::repeat_n(0xa0, 70_000));
    assert_eq!(
        decode_client(&bytes).unwrap_err().code,
        ErrorCode::Malformed
    );
}
