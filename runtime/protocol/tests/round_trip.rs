//! Messages survive the wire exactly: random ones, in any key order, against the derived deserializer too.

mod common;

use common::Value;
use fastrand::Rng;
use understudy_protocol::message::*;
use understudy_protocol::{ErrorBody, ErrorCode, RequestId, decode_client, decode_server};

const SEED: u64 = 0x5eed_0002;
const ROUNDS: u32 = 20_000;

fn text(rng: &mut Rng, max: usize) -> String {
    let len = rng.usize(..=max);
    (0..len).map(|_| rng.char(..)).collect()
}

fn maybe<T>(rng: &mut Rng, make: impl FnOnce(&mut Rng) -> T) -> Option<T> {
    rng.bool().then(|| make(rng))
}

fn list<T>(rng: &mut Rng, max: usize, mut make: impl FnMut(&mut Rng) -> T) -> Vec<T> {
    let len = rng.usize(..=max);
    (0..len).map(|_| make(rng)).collect()
}

/// Integers of every width, which MessagePack writes differently.
fn int(rng: &mut Rng) -> u64 {
    rng.u64(..) >> rng.u32(..64)
}

fn small(rng: &mut Rng) -> u32 {
    rng.u32(..) >> rng.u32(..32)
}

/// Any bits but those of a NaN, which is not equal to itself; NaNs are compared below.
fn float(rng: &mut Rng) -> f32 {
    let float = f32::from_bits(rng.u32(..));
    if float.is_nan() {
        f32::MIN_POSITIVE / 3.0
    } else {
        float
    }
}

fn sampling(rng: &mut Rng) -> Sampling {
    Sampling {
        temperature: maybe(rng, float),
        top_p: maybe(rng, float),
        top_k: maybe(rng, small),
        min_p: maybe(rng, float),
        repetition_penalty: maybe(rng, float),
        presence_penalty: maybe(rng, float),
        frequency_penalty: maybe(rng, float),
        seed: maybe(rng, int),
        max_tokens: maybe(rng, small),
        min_tokens: maybe(rng, small),
        stop_token_ids: list(rng, 20, small),
        ignore_eos: rng.bool(),
        logprobs: rng.bool(),
        top_logprobs: small(rng),
        logit_bias: list(rng, 5, |rng| (small(rng), rng.f32() * 9.0 - 4.5)),
        allowed_token_ids: maybe(rng, |rng| list(rng, 9, small)),
        speculate: rng.u32(..3),
    }
}

fn input(rng: &mut Rng) -> Input {
    match rng.u32(..3) {
        0 => Input::Prompt(text(rng, 400)),
        1 => Input::TokenIds(list(rng, 400, small)),
        _ => Input::Messages(list(rng, 20, |rng| ChatMessage {
            role: text(rng, 10),
            content: text(rng, 100),
        })),
    }
}

fn client(rng: &mut Rng) -> ClientMessage {
    match rng.u32(..7) {
        0 => ClientMessage::Hello {
            version: small(rng),
            client: maybe(rng, |rng| text(rng, 40)),
            token: maybe(rng, |rng| text(rng, 40)),
        },
        1 => ClientMessage::Submit(Submit {
            stream: small(rng),
            model: maybe(rng, |rng| text(rng, 20)),
            input: input(rng),
            sampling: sampling(rng),
            stop: list(rng, 16, |rng| text(rng, 40)),
            include_stop: rng.bool(),
            deadline_ms: maybe(rng, int),
            resumable: rng.bool(),
            priority: rng.i32(-2..3),
            credit: small(rng),
        }),
        2 => ClientMessage::Cancel { stream: small(rng) },
        3 => ClientMessage::Resume {
            stream: small(rng),
            request: RequestId(rng.u128(..)),
            next_position: small(rng),
            credit: small(rng),
        },
        4 => ClientMessage::Credit {
            stream: small(rng),
            tokens: small(rng),
        },
        5 => ClientMessage::Ping { nonce: int(rng) },
        _ => ClientMessage::Status {},
    }
}

fn server(rng: &mut Rng) -> ServerMessage {
    match rng.u32(..6) {
        0 => ServerMessage::Welcome {
            version: small(rng),
            node: text(rng, 20),
            server: text(rng, 20),
            limits: Limits {
                max_frame_bytes: small(rng),
                max_streams: small(rng),
                max_credit: small(rng),
            },
        },
        1 => ServerMessage::Accepted {
            stream: small(rng),
            request: RequestId(rng.u128(..) >> rng.u32(..128)),
            prompt_tokens: small(rng),
            seed: int(rng),
        },
        2 => ServerMessage::Token(TokenEvent {
            stream: small(rng),
            position: small(rng),
            id: small(rng),
            text: text(rng, 20),
            logprob: maybe(rng, float),
            top_logprobs: list(rng, 20, |rng| TopLogprob {
                id: small(rng),
                logprob: float(rng),
            }),
        }),
        3 => ServerMessage::Finished {
            stream: small(rng),
            finish_reason: [
                FinishReason::Stop,
                FinishReason::Length,
                FinishReason::Cancelled,
            ][rng.usize(..3)],
            usage: Usage {
                prompt_tokens: small(rng),
                completion_tokens: small(rng),
            },
            text: text(rng, 20),
        },
        4 => ServerMessage::Error {
            stream: maybe(rng, small),
            request: maybe(rng, |rng| RequestId(rng.u128(..))),
            error: ErrorBody {
                code: rng.choice(common::codes()).expect("codes"),
                message: text(rng, 100),
                retriable: rng.bool(),
                stage: maybe(rng, |rng| text(rng, 10)),
                retry_after_ms: maybe(rng, int),
            },
        },
        _ => ServerMessage::Pong { nonce: int(rng) },
    }
}

#[test]
fn random_messages_round_trip() {
    let mut rng = Rng::with_seed(SEED);
    for _ in 0..ROUNDS {
        let message = client(&mut rng);
        assert_eq!(
            decode_client(&common::payload(&message)).as_ref(),
            Ok(&message)
        );
        let message = server(&mut rng);
        assert_eq!(
            decode_server(&common::payload(&message)).as_ref(),
            Ok(&message)
        );
    }
}

/// The direct way of reading a message gives what the derived one gives.
#[test]
fn the_derived_deserializer_agrees() {
    let mut rng = Rng::with_seed(SEED);
    for _ in 0..ROUNDS / 10 {
        let message = client(&mut rng);
        let derived: ClientMessage = rmp_serde::from_slice(&common::payload(&message)).unwrap();
        assert_eq!(derived, message);
        let message = server(&mut rng);
        let derived: ServerMessage = rmp_serde::from_slice(&common::payload(&message)).unwrap();
        assert_eq!(derived, message);
    }
    for message in common::server_messages() {
        let derived: ServerMessage = rmp_serde::from_slice(&common::payload(&message)).unwrap();
        assert_eq!(derived, message);
    }
}

#[test]
fn every_bit_pattern_of_a_logprob_survives() {
    let mut rng = Rng::with_seed(SEED);
    let special = [
        0,
        1 << 31,
        1,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0x7f80_0001,
        0xffff_ffff,
    ];
    let random: Vec<u32> = (0..10_000).map(|_| rng.u32(..)).collect();
    for bits in special.into_iter().chain(random) {
        let message = ServerMessage::Token(TokenEvent {
            stream: 1,
            position: 0,
            id: 0,
            text: String::new(),
            logprob: Some(f32::from_bits(bits)),
            top_logprobs: vec![TopLogprob {
                id: 1,
                logprob: f32::from_bits(!bits),
            }],
        });
        let Ok(ServerMessage::Token(event)) = decode_server(&common::payload(&message)) else {
            panic!("no token event");
        };
        assert_eq!(event.logprob.map(f32::to_bits), Some(bits));
        assert_eq!(event.top_logprobs[0].logprob.to_bits(), !bits);
    }
}

/// A message rewritten with its keys in another order, and with keys that nobody knows.
#[test]
fn key_order_and_unknown_keys_do_not_matter() {
    let canonical = ClientMessage::Credit {
        stream: 300,
        tokens: 5,
    };
    let orders: [&[u8]; 4] = [
        b"\x83\xa4type\xa6credit\xa6stream\xcd\x01\x2c\xa6tokens\x05",
        b"\x83\xa6tokens\x05\xa6stream\xcd\x01\x2c\xa4type\xa6credit",
        b"\x84\xa6tokens\xcc\x05\xa3new\x92\x81\xa1k\xc3\xc0\xa6stream\xd1\x01\x2c\xa4type\xa6credit",
        b"\xde\x00\x03\xd9\x06tokens\xd3\x00\x00\x00\x00\x00\x00\x00\x05\xa4type\xa6credit\xa6stream\xce\x00\x00\x01\x2c",
    ];
    for bytes in orders {
        assert_eq!(decode_client(bytes).as_ref(), Ok(&canonical), "{bytes:x?}");
    }
}

#[test]
fn what_other_encoders_write_for_numbers_is_taken() {
    // temperature as float 64, top_p as an integer.
    let bytes = b"\x84\xa4type\xa6submit\xa6stream\x01\xa5input\x81\xa6prompt\xa1x\xa8sampling\x82\
        \xabtemperature\xcb\x3f\xe0\x00\x00\x00\x00\x00\x00\xa5top_p\x01";
    let Ok(ClientMessage::Submit(submit)) = decode_client(bytes) else {
        panic!("not taken");
    };
    assert_eq!(submit.sampling.temperature, Some(0.5));
    assert_eq!(submit.sampling.top_p, Some(1.0));
    assert_eq!(submit.credit, default_credit());
}

#[test]
fn a_mistyped_sampling_parameter_is_told() {
    let bytes = b"\x84\xa4type\xa6submit\xa6stream\x01\xa5input\x81\xa6prompt\xa1x\xa8sampling\x81\xaatemprature\x01";
    let error = decode_client(bytes).unwrap_err();
    assert!(error.message.contains("temprature"), "{}", error.message);
}

/// The library's deserializer would take each of these.
#[test]
fn arrays_for_maps_and_binary_for_text_are_refused() {
    let submit = |input: &[u8], sampling: &[u8]| {
        let start = b"\x84\xa4type\xa6submit\xa6stream\x01\xa5input";
        let message = [start, input, b"\xa8sampling", sampling].concat();
        decode_client(&message)
    };
    let prompt = b"\x81\xa6prompt\xa1x";
    assert!(submit(prompt, b"\x80").is_ok());
    let messages = b"\x81\xa8messages\x91\x82\xa4role\xa4user\xa7content\xa2hi";
    assert!(submit(messages, b"\x80").is_ok());
    let refused: [(&str, &[u8], &[u8], &str); 5] = [
        ("input as an array", b"\x91\xa6prompt", b"\x80", "a map"),
        ("input as text", b"\xa6prompt", b"\x80", "a map"),
        (
            "two inputs",
            b"\x82\xa6prompt\xa1x\xa9token_ids\x91\x01",
            b"\x80",
            "one key",
        ),
        ("sampling as an array", prompt, b"\x91\xc0", "a map"),
        (
            "a message as an array",
            b"\x81\xa8messages\x91\x92\xa4user\xa2hi",
            b"\x80",
            "a map",
        ),
    ];
    for (what, input, sampling, said) in refused {
        let error = submit(input, sampling).expect_err(what);
        assert_eq!(error.code, ErrorCode::InvalidRequest, "{what}");
        assert!(error.message.contains(said), "{what}: {}", error.message);
    }
    let binary = submit(b"\x81\xa6prompt\xc4\x01x", b"\x80").expect_err("binary");
    assert_eq!(binary.code, ErrorCode::Malformed);
}

/// A newer server may say more than this crate knows.
#[test]
fn unknown_codes_and_reasons_are_taken() {
    let error =
        b"\x85\xa4type\xa5error\xa6stream\x01\xa4code\xa8too_warm\xa7message\xa1x\xa9retriable\xc3";
    let Ok(ServerMessage::Error { error, .. }) = decode_server(error) else {
        panic!("not taken");
    };
    assert_eq!(error.code, ErrorCode::Unknown);
    assert!(error.retriable, "what the server says counts");
    let finished = b"\x84\xa4type\xa8finished\xa6stream\x01\xadfinish_reason\xa5tired\xa5usage\x82\xadprompt_tokens\x01\xb1completion_tokens\x02";
    let Ok(ServerMessage::Finished { finish_reason, .. }) = decode_server(finished) else {
        panic!("not taken");
    };
    assert_eq!(finish_reason, FinishReason::Stop);
}

#[test]
fn absent_options_are_not_written() {
    let mut keys = Vec::new();
    let message = ServerMessage::Error {
        stream: None,
        request: None,
        error: ErrorBody::new(ErrorCode::Internal, "x"),
    };
    Value::of(&message).keys(&mut keys);
    keys.sort();
    assert_eq!(keys, ["code", "message", "retriable", "type"]);
}
