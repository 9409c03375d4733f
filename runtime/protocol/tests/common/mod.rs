//! One full sample of every message, and a walk over encoded ones.

#![allow(dead_code, reason = "each test binary uses a part")]

pub mod mutate;

use std::collections::BTreeMap;

use bytes::BytesMut;
use serde::{Deserialize, Serialize};
use understudy_protocol::frame::HEADER_BYTES;
use understudy_protocol::message::*;
use understudy_protocol::{ErrorBody, ErrorCode, RequestId, encode};

/// Every code that a server sends; the match makes a new one fail to compile until it is here.
pub fn codes() -> Vec<ErrorCode> {
    use ErrorCode::*;
    let all = vec![
        UnsupportedVersion,
        Unauthorized,
        FrameTooLarge,
        Malformed,
        OutOfOrder,
        Timeout,
        InvalidRequest,
        UnknownModel,
        UnknownRequest,
        Overloaded,
        Unavailable,
        DeadlineExceeded,
        AttemptsExhausted,
        ShuttingDown,
        Internal,
    ];
    match all[0] {
        UnsupportedVersion | Unauthorized | FrameTooLarge | Malformed | OutOfOrder | Timeout
        | InvalidRequest | UnknownModel | UnknownRequest | Overloaded | Unavailable
        | DeadlineExceeded | AttemptsExhausted | ShuttingDown | Internal | Unknown => all,
    }
}

/// Every client message with every field set, and further forms of some.
pub fn client_messages() -> Vec<ClientMessage> {
    let all = vec![
        ClientMessage::Hello {
            version: 1,
            client: Some("sample/1.0".to_owned()),
            token: Some("secret".to_owned()),
        },
        ClientMessage::Submit(submit(Input::Prompt("Grüße, 世界".to_owned()))),
        ClientMessage::Submit(submit(Input::TokenIds(vec![0, 127, 128, 65_536, u32::MAX]))),
        ClientMessage::Submit(submit(Input::Messages(vec![ChatMessage {
            role: "user".to_owned(),
            content: "hi".to_owned(),
        }]))),
        ClientMessage::Cancel { stream: 7 },
        ClientMessage::Resume {
            stream: 8,
            request: RequestId(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
            next_position: 300,
            credit: 64,
        },
        ClientMessage::Credit {
            stream: 7,
            tokens: 32,
        },
        ClientMessage::Ping { nonce: u64::MAX },
        ClientMessage::Status {},
    ];
    match all[0] {
        ClientMessage::Hello { .. }
        | ClientMessage::Submit(_)
        | ClientMessage::Cancel { .. }
        | ClientMessage::Resume { .. }
        | ClientMessage::Credit { .. }
        | ClientMessage::Ping { .. }
        | ClientMessage::Status {} => all,
    }
}

/// Every server message with every field set.
pub fn server_messages() -> Vec<ServerMessage> {
    let all = vec![
        ServerMessage::Welcome {
            version: 1,
            node: "a".to_owned(),
            server: "understudy/0.1.0".to_owned(),
            limits: Limits {
                max_frame_bytes: 4 << 20,
                max_streams: 128,
                max_credit: 4_096,
            },
        },
        ServerMessage::Accepted {
            stream: 7,
            request: RequestId(u128::MAX - 1),
            prompt_tokens: 5,
            seed: u64::MAX,
        },
        ServerMessage::Token(TokenEvent {
            stream: 7,
            position: 41,
            id: 65_535,
            text: "é".to_owned(),
            logprob: Some(-0.1),
            top_logprobs: vec![TopLogprob {
                id: 3,
                logprob: -1.5e-20,
            }],
        }),
        ServerMessage::Finished {
            stream: 7,
            finish_reason: FinishReason::Stop,
            usage: Usage {
                prompt_tokens: 5,
                completion_tokens: 42,
            },
            text: "!".to_owned(),
        },
        ServerMessage::Error {
            stream: Some(7),
            request: Some(RequestId(1)),
            error: ErrorBody {
                code: ErrorCode::DeadlineExceeded,
                message: "too late".to_owned(),
                retriable: false,
                stage: Some("queued".to_owned()),
                retry_after_ms: Some(500),
            },
        },
        ServerMessage::Pong { nonce: 1 << 40 },
        ServerMessage::Status(status()),
    ];
    match all[0] {
        ServerMessage::Welcome { .. }
        | ServerMessage::Accepted { .. }
        | ServerMessage::Token(_)
        | ServerMessage::Finished { .. }
        | ServerMessage::Error { .. }
        | ServerMessage::Pong { .. }
        | ServerMessage::Status(_) => all,
    }
}

fn submit(input: Input) -> Submit {
    Submit {
        stream: 7,
        model: Some("demo".to_owned()),
        input,
        sampling: Sampling {
            temperature: Some(0.8),
            top_p: Some(0.95),
            top_k: Some(40),
            min_p: Some(0.05),
            repetition_penalty: Some(1.1),
            presence_penalty: Some(-0.5),
            frequency_penalty: Some(0.25),
            seed: Some(u64::MAX),
            max_tokens: Some(100),
            min_tokens: Some(1),
            stop_token_ids: vec![2, 70_000],
            ignore_eos: true,
            logprobs: true,
            top_logprobs: 5,
            ..Sampling::default()
        },
        stop: vec!["\n\n".to_owned()],
        include_stop: true,
        deadline_ms: Some(1 << 33),
        resumable: true,
        priority: 0,
        credit: 64,
    }
}

fn status() -> ClusterStatus {
    ClusterStatus {
        cluster: "local".to_owned(),
        node: "a".to_owned(),
        version: "0.1.0".to_owned(),
        nodes: vec![NodeStatus {
            name: "b".to_owned(),
            incarnation: "1f".to_owned(),
            state: "alive".to_owned(),
            roles: vec!["host".to_owned()],
            address: "127.0.0.1:7601".to_owned(),
            last_heard_ms: Some(12),
        }],
        replicas: vec![ReplicaStatus {
            model: "demo".to_owned(),
            node: "b".to_owned(),
            replica: 1,
            state: "ready".to_owned(),
            in_flight: 3,
            workers: vec![WorkerStatus {
                shard: 0,
                state: "ready".to_owned(),
                engine_pid: Some(4321),
                device: "cpu".to_owned(),
                restarts: 2,
                last_error: Some("killed by signal 9".to_owned()),
                running: 3,
                waiting: 1,
                kv_used_tokens: 900,
                kv_capacity_tokens: 65_536,
                rss_bytes: 1 << 33,
                fingerprint: "c0ffee".to_owned(),
            }],
        }],
        requests_in_flight: 3,
        requests_kept: 9,
        requests_kept_bytes: 12_345,
    }
}

pub fn frame(message: &impl Serialize) -> Vec<u8> {
    let mut out = BytesMut::new();
    encode(message, &mut out).unwrap();
    out.to_vec()
}

pub fn payload(message: &impl Serialize) -> Vec<u8> {
    frame(message)[HEADER_BYTES..].to_vec()
}

/// Any MessagePack value of the kinds that messages hold.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Value {
    Bool(bool),
    Unsigned(u64),
    Float(f64),
    Text(String),
    Array(Vec<Value>),
    Map(BTreeMap<String, Value>),
}

impl Value {
    pub fn of(message: &impl Serialize) -> Self {
        rmp_serde::from_slice(&payload(message)).unwrap()
    }

    /// All keys at all levels.
    pub fn keys(&self, found: &mut Vec<String>) {
        match self {
            Value::Array(values) => values.iter().for_each(|value| value.keys(found)),
            Value::Map(entries) => {
                for (key, value) in entries {
                    found.push(key.clone());
                    value.keys(found);
                }
            }
            _ => {}
        }
    }

    pub fn kind(&self) -> &str {
        match self {
            Value::Map(entries) => match &entries["type"] {
                Value::Text(kind) => kind,
                _ => panic!("type is no text"),
            },
            _ => panic!("no map"),
        }
    }
}

/// `-> Vec<bytes>` of rows as [`hex_dump`] writes them.
pub fn parse_hex(text: &str) -> Vec<u8> {
    text.split_whitespace()
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect()
}

/// Rows of 16 bytes: hexadecimal, two blanks, what is printable.
pub fn hex_dump(bytes: &[u8]) -> String {
    let mut dump = String::new();
    for row in bytes.chunks(16) {
        let hex: Vec<String> = row.iter().map(|byte| format!("{byte:02x}")).collect();
        let shown: String = row
            .iter()
            .map(|&byte| {
                if (0x20..0x7f).contains(&byte) {
                    char::from(byte)
                } else {
                    '.'
                }
            })
            .collect();
        dump.push_str(&format!("  {:<47}  {shown}\n", hex.join(" ")));
    }
    dump
}

/// The worked exchange of the specification: who sends, and what.
pub fn exchange() -> Vec<Turn> {
    let request = RequestId(0x4f3c_9a1e_77b0_42d8_9e15_0c6a_d2f8_813b);
    let token = |stream, position, id, text: &str, logprob| {
        Turn::Server(ServerMessage::Token(TokenEvent {
            stream,
            position,
            id,
            text: text.to_owned(),
            logprob: Some(logprob),
            top_logprobs: Vec::new(),
        }))
    };
    let accepted = |stream| {
        Turn::Server(ServerMessage::Accepted {
            stream,
            request,
            prompt_tokens: 4,
            seed: 42,
        })
    };
    let accepted_again = Turn::Server(ServerMessage::Accepted {
        stream: 1,
        request: RequestId(0x91d3_08c4_5b6e_f720_1a2b_9f00_37cc_e655),
        prompt_tokens: 4,
        seed: 42,
    });
    let hello = Turn::Client(ClientMessage::Hello {
        version: 1,
        client: None,
        token: Some("s3cret".to_owned()),
    });
    let welcome = Turn::Server(ServerMessage::Welcome {
        version: 1,
        node: "a".to_owned(),
        server: "understudy/0.1.0".to_owned(),
        limits: Limits {
            max_frame_bytes: 4 << 20,
            max_streams: 128,
            max_credit: 4_096,
        },
    });
    let submit = Submit {
        stream: 1,
        model: None,
        input: Input::Prompt("count from 1 to 2".to_owned()),
        sampling: Sampling {
            temperature: Some(0.0),
            seed: Some(42),
            max_tokens: Some(2),
            logprobs: true,
            ..Sampling::default()
        },
        stop: Vec::new(),
        include_stop: false,
        deadline_ms: Some(10_000),
        resumable: true,
        priority: 0,
        credit: 1,
    };
    let another = Turn::Client(ClientMessage::Submit(Submit {
        stream: 2,
        model: Some("other".to_owned()),
        ..submit.clone()
    }));
    let refused = Turn::Server(ServerMessage::Error {
        stream: Some(2),
        request: None,
        error: ErrorBody::new(ErrorCode::UnknownModel, "no model \"other\" is deployed"),
    });
    let finished = |finish_reason, completion_tokens| {
        Turn::Server(ServerMessage::Finished {
            stream: 1,
            finish_reason,
            usage: Usage {
                prompt_tokens: 4,
                completion_tokens,
            },
            text: String::new(),
        })
    };
    let submit = Turn::Client(ClientMessage::Submit(submit));
    vec![
        hello.clone(),
        welcome.clone(),
        submit.clone(),
        accepted(1),
        token(1, 0, 17, "1", -0.25),
        Turn::Client(ClientMessage::Credit {
            stream: 1,
            tokens: 1,
        }),
        Turn::Lost,
        hello,
        welcome,
        Turn::Client(ClientMessage::Resume {
            stream: 1,
            request,
            next_position: 1,
            credit: 64,
        }),
        accepted(1),
        token(1, 1, 300, " 2", -0.001),
        finished(FinishReason::Length, 2),
        another,
        refused,
        submit,
        accepted_again,
        token(1, 0, 17, "1", -0.25),
        Turn::Client(ClientMessage::Cancel { stream: 1 }),
        finished(FinishReason::Cancelled, 1),
    ]
}

#[derive(Clone)]
pub enum Turn {
    Client(ClientMessage),
    Server(ServerMessage),
    /// The connection breaks, and the client connects again.
    Lost,
}

/// The exchange as it stands in the specification.
pub fn exchange_text() -> String {
    let mut text = String::new();
    for turn in exchange() {
        let (who, kind, bytes) = match &turn {
            Turn::Client(message) => ('>', Value::of(message).kind().to_owned(), frame(message)),
            Turn::Server(message) => ('<', Value::of(message).kind().to_owned(), frame(message)),
            Turn::Lost => {
                text.push_str("-- the connection is lost; the client connects again --\n");
                continue;
            }
        };
        text.push_str(&format!("{who} {kind}\n{}", hex_dump(&bytes)));
    }
    text
}
