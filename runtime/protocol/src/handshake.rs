//! The rules of a connection, from the server's side: who may speak, in which order, and how many streams at once.
//!
//! ```text
//!            hello, good            submit, resume, cancel, credit, ping, status
//!   Opened ─────────────▶ Greeted ──────────────────────────────────────────────┐
//!     │                      │  ▲───────────────────────────────────────────────┘
//!     │ anything else        │ a second hello, a stream number that is in use
//!     ▼                      ▼
//!   Closed ◀─────────────────┘
//! ```
//!
//! Pure: no clock, no socket. The server asks [`ConnectionRules::receive`] what to do with each decoded message, and
//! tells [`ConnectionRules::ended`] when it has sent a stream's terminal event, be it the one of a refusal.
//!
//! Invariant: nothing but `hello` is looked at before the token has been checked; at most `max_streams` streams are in
//! flight at any time; and a number is busy from the message that names it until its terminal event has been sent, so
//! that no terminal event can be taken for the one of a later stream.

use std::collections::HashSet;

use crate::PROTOCOL_VERSION;
use crate::error::{ErrorBody, ErrorCode};
use crate::message::{ClientMessage, Limits};

/// Lowest version that this crate can serve.
pub const MIN_PROTOCOL_VERSION: u32 = 1;

/// Longest `client` text in a hello, in bytes.
pub const MAX_CLIENT_NAME_BYTES: usize = 128;

/// Largest frame before the welcome, in bytes: a hello with a long name and a long token fits many times. Nobody who
/// has not shown a token makes a server hold more.
pub const HANDSHAKE_FRAME_BYTES: usize = 4096;

/// What the server does with a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Answer with `welcome` and this version; the message needs nothing else.
    Welcome { version: u32 },
    /// Act on it.
    Deliver,
    /// Drop it: it is about a stream that has ended (which the client could not know yet) or never was.
    Ignore,
    /// Answer with this error on this stream, and call [`ConnectionRules::ended`] when it is sent; the connection goes on.
    Refuse { stream: u32, error: ErrorBody },
    /// Answer with this error without a stream, then close the connection.
    Close(ErrorBody),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Opened,
    Greeted,
    Closed,
}

/// One connection's state. Create one for each accepted connection.
#[derive(Debug)]
pub struct ConnectionRules {
    state: State,
    tokens: AccessTokens,
    max_streams: usize,
    in_flight: HashSet<u32>,
    /// Numbers whose refusal is on its way. As many as the server lets answers wait.
    refused: HashSet<u32>,
}

impl ConnectionRules {
    pub fn new(tokens: AccessTokens, limits: &Limits) -> Self {
        Self {
            state: State::Opened,
            tokens,
            max_streams: limits.max_streams as usize,
            in_flight: HashSet::new(),
            refused: HashSet::new(),
        }
    }

    /// Whether the handshake is done: before it, a short time limit and a small frame limit are in place.
    pub fn is_greeted(&self) -> bool {
        self.state == State::Greeted
    }

    /// Whether the stream is in flight.
    pub fn is_in_flight(&self, stream: u32) -> bool {
        self.in_flight.contains(&stream)
    }

    /// Judges a `submit` on `stream` that is no good, for a reason that the rules do not know: `error` ends that stream
    /// only, if the client might have begun it now.
    pub fn refuse(&mut self, stream: u32, error: ErrorBody) -> Step {
        let step = match self.state {
            State::Opened => out_of_order("the first message must be hello"),
            State::Closed => out_of_order("the connection has been closed"),
            State::Greeted if self.is_busy(stream) => busy(stream),
            State::Greeted => {
                self.refused.insert(stream);
                Step::Refuse { stream, error }
            }
        };
        self.note(step)
    }

    /// Streams in flight.
    pub fn streams(&self) -> usize {
        self.in_flight.len()
    }

    /// Judges the next message. After [`Step::Close`] every message is answered with it again.
    pub fn receive(&mut self, message: &ClientMessage) -> Step {
        let step = match (self.state, message) {
            (
                State::Opened,
                ClientMessage::Hello {
                    version,
                    client,
                    token,
                },
            ) => self.greet(*version, client.as_deref(), token.as_deref()),
            (State::Opened, _) => out_of_order("the first message must be hello"),
            (State::Greeted, ClientMessage::Hello { .. }) => {
                out_of_order("hello came twice; a connection is greeted once")
            }
            (State::Greeted, ClientMessage::Submit(submit)) => self.open(submit.stream),
            (State::Greeted, ClientMessage::Resume { stream, .. }) => self.open(*stream),
            (State::Greeted, ClientMessage::Cancel { stream })
            | (State::Greeted, ClientMessage::Credit { stream, .. }) => self.about(*stream),
            (State::Greeted, ClientMessage::Ping { .. } | ClientMessage::Status {}) => {
                Step::Deliver
            }
            (State::Closed, _) => out_of_order("the connection has been closed"),
        };
        self.note(step)
    }

    /// Notes that a stream's terminal event has been sent, so that its number may be used again.
    pub fn ended(&mut self, stream: u32) {
        self.in_flight.remove(&stream);
        self.refused.remove(&stream);
    }

    fn note(&mut self, step: Step) -> Step {
        if matches!(step, Step::Close(_)) {
            self.state = State::Closed;
        }
        step
    }

    fn is_busy(&self, stream: u32) -> bool {
        self.in_flight.contains(&stream) || self.refused.contains(&stream)
    }

    fn greet(&mut self, version: u32, client: Option<&str>, token: Option<&str>) -> Step {
        if client.is_some_and(|name| name.len() > MAX_CLIENT_NAME_BYTES) {
            return Step::Close(ErrorBody::new(
                ErrorCode::Malformed,
                format!("client name in hello is longer than {MAX_CLIENT_NAME_BYTES} bytes"),
            ));
        }
        let version = match negotiate(version) {
            Ok(version) => version,
            Err(error) => return Step::Close(error),
        };
        if !self.tokens.admit(token) {
            return Step::Close(ErrorBody::new(
                ErrorCode::Unauthorized,
                "access token is missing or wrong; give one that this gateway is configured with",
            ));
        }
        self.state = State::Greeted;
        Step::Welcome { version }
    }

    fn open(&mut self, stream: u32) -> Step {
        if self.is_busy(stream) {
            return busy(stream);
        }
        if self.in_flight.len() >= self.max_streams {
            let max = self.max_streams;
            let error = ErrorBody::new(
                ErrorCode::Overloaded,
                format!(
                    "connection has its {max} streams in flight; wait for one to end, or open another connection"
                ),
            );
            self.refused.insert(stream);
            return Step::Refuse { stream, error };
        }
        self.in_flight.insert(stream);
        Step::Deliver
    }

    fn about(&self, stream: u32) -> Step {
        if self.in_flight.contains(&stream) {
            Step::Deliver
        } else {
            Step::Ignore
        }
    }
}

/// The version to use with a client whose highest is `client`.
pub fn negotiate(client: u32) -> Result<u32, ErrorBody> {
    match client.min(PROTOCOL_VERSION) {
        version if version >= MIN_PROTOCOL_VERSION => Ok(version),
        _ => Err(ErrorBody::new(
            ErrorCode::UnsupportedVersion,
            format!(
                "client speaks protocol version {client} at most, this server {MIN_PROTOCOL_VERSION} to {PROTOCOL_VERSION}; update the client"
            ),
        )),
    }
}

/// The access tokens a gateway takes; with none, it takes every client.
#[derive(Clone, Default)]
pub struct AccessTokens(Vec<String>);

impl AccessTokens {
    /// Several may be valid at once, so that one can be replaced without a gap.
    pub fn new(tokens: impl IntoIterator<Item = String>) -> Self {
        Self(tokens.into_iter().collect())
    }

    /// Whether a client that shows `token` may come in. The time it takes depends on the lengths only.
    pub fn admit(&self, token: Option<&str>) -> bool {
        let shown = token.unwrap_or_default().as_bytes();
        let mut matched = false;
        for known in &self.0 {
            matched |= equal_in_constant_time(known.as_bytes(), shown);
        }
        self.0.is_empty() || (token.is_some() && matched)
    }
}

/// Shows how many there are, never what they are.
impl std::fmt::Debug for AccessTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AccessTokens({})", self.0.len())
    }
}

fn equal_in_constant_time(known: &[u8], shown: &[u8]) -> bool {
    let mut difference = u8::from(known.len() != shown.len());
    for (index, &byte) in shown.iter().enumerate() {
        let other = known.get(index).copied().unwrap_or(!byte);
        difference = std::hint::black_box(difference | (byte ^ other));
    }
    difference == 0
}

fn busy(stream: u32) -> Step {
    out_of_order(&format!(
        "stream {stream} is in flight; use its number again after its terminal event"
    ))
}

fn out_of_order(message: &str) -> Step {
    Step::Close(ErrorBody::new(ErrorCode::OutOfOrder, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::RequestId;
    use crate::message::{Input, Sampling, Submit};

    fn rules(tokens: &[&str], max_streams: u32) -> ConnectionRules {
        let limits = Limits {
            max_frame_bytes: 1024,
            max_streams,
            max_credit: 16,
        };
        ConnectionRules::new(
            AccessTokens::new(tokens.iter().map(|t| t.to_string())),
            &limits,
        )
    }

    fn hello(version: u32, token: Option<&str>) -> ClientMessage {
        ClientMessage::Hello {
            version,
            client: None,
            token: token.map(str::to_owned),
        }
    }

    fn submit(stream: u32) -> ClientMessage {
        ClientMessage::Submit(Submit {
            stream,
            model: None,
            input: Input::TokenIds(vec![1]),
            sampling: Sampling::default(),
            stop: Vec::new(),
            include_stop: false,
            deadline_ms: None,
            resumable: false,
            priority: 0,
            credit: 1,
        })
    }

    fn code(step: Step) -> ErrorCode {
        match step {
            Step::Close(error) => error.code,
            step => panic!("not closed: {step:?}"),
        }
    }

    #[test]
    fn versions_meet_at_the_lower_one() {
        assert_eq!(negotiate(PROTOCOL_VERSION), Ok(PROTOCOL_VERSION));
        assert_eq!(negotiate(u32::MAX), Ok(PROTOCOL_VERSION));
        assert_eq!(
            negotiate(0).unwrap_err().code,
            ErrorCode::UnsupportedVersion
        );
    }

    #[test]
    fn nothing_goes_before_hello_and_hello_goes_once() {
        assert_eq!(
            code(rules(&[], 1).receive(&submit(1))),
            ErrorCode::OutOfOrder
        );
        let ping = ClientMessage::Ping { nonce: 1 };
        assert_eq!(code(rules(&[], 1).receive(&ping)), ErrorCode::OutOfOrder);

        let mut greeted = rules(&[], 1);
        let welcome = Step::Welcome {
            version: PROTOCOL_VERSION,
        };
        assert_eq!(greeted.receive(&hello(9, None)), welcome);
        assert!(greeted.is_greeted());
        assert_eq!(
            code(greeted.receive(&hello(1, None))),
            ErrorCode::OutOfOrder
        );
        assert_eq!(code(greeted.receive(&submit(1))), ErrorCode::OutOfOrder);
    }

    #[test]
    fn a_token_is_needed_where_one_is_configured() {
        for wrong in [
            None,
            Some(""),
            Some("secre"),
            Some("secret2"),
            Some("Secret"),
        ] {
            let step = rules(&["secret", "other"], 1).receive(&hello(1, wrong));
            assert_eq!(code(step), ErrorCode::Unauthorized, "{wrong:?}");
        }
        for right in ["secret", "other"] {
            let step = rules(&["secret", "other"], 1).receive(&hello(1, Some(right)));
            assert!(matches!(step, Step::Welcome { .. }));
        }
        let open = rules(&[], 1).receive(&hello(1, Some("whatever")));
        assert!(matches!(open, Step::Welcome { .. }));
    }

    #[test]
    fn an_empty_configured_token_does_not_admit_who_shows_none() {
        assert!(!AccessTokens::new([String::new()]).admit(None));
    }

    #[test]
    fn streams_are_counted_and_their_numbers_come_free_again() {
        let mut rules = rules(&[], 2);
        rules.receive(&hello(1, None));
        assert_eq!(rules.receive(&submit(1)), Step::Deliver);
        let resume = ClientMessage::Resume {
            stream: 2,
            request: RequestId(7),
            next_position: 0,
            credit: 1,
        };
        assert_eq!(rules.receive(&resume), Step::Deliver);
        match rules.receive(&submit(3)) {
            Step::Refuse { stream: 3, error } => assert_eq!(error.code, ErrorCode::Overloaded),
            step => panic!("{step:?}"),
        }
        rules.ended(1);
        assert_eq!(rules.receive(&submit(1)), Step::Deliver);
        assert_eq!(rules.streams(), 2);
        assert_eq!(code(rules.receive(&submit(2))), ErrorCode::OutOfOrder);
    }

    /// Until the error is sent. Otherwise the error would end, in the books, the stream that took its number over.
    #[test]
    fn a_refused_number_is_busy_until_its_error_is_sent() {
        let greeted = || {
            let mut rules = rules(&[], 1);
            rules.receive(&hello(1, None));
            rules
        };
        let bad = || ErrorBody::new(ErrorCode::InvalidRequest, "bad");
        // A submit that cannot be read.
        let mut rules = greeted();
        assert!(matches!(rules.refuse(5, bad()), Step::Refuse { .. }));
        assert_eq!(rules.streams(), 0, "it takes no place");
        let credit = ClientMessage::Credit {
            stream: 5,
            tokens: 1,
        };
        assert_eq!(rules.receive(&credit), Step::Ignore);
        rules.ended(5);
        assert_eq!(rules.receive(&submit(5)), Step::Deliver);

        let mut rules = greeted();
        rules.refuse(5, bad());
        assert_eq!(code(rules.receive(&submit(5))), ErrorCode::OutOfOrder);
        let mut rules = greeted();
        rules.refuse(5, bad());
        assert_eq!(code(rules.refuse(5, bad())), ErrorCode::OutOfOrder);

        // One too many.
        let mut rules = greeted();
        rules.receive(&submit(1));
        assert!(matches!(rules.receive(&submit(2)), Step::Refuse { .. }));
        rules.ended(1);
        assert_eq!(code(rules.receive(&submit(2))), ErrorCode::OutOfOrder);
    }

    #[test]
    fn a_bad_submit_ends_the_connection_where_a_good_one_would() {
        let bad = || ErrorBody::new(ErrorCode::InvalidRequest, "bad");
        let mut rules = rules(&[], 2);
        assert_eq!(code(rules.refuse(1, bad())), ErrorCode::OutOfOrder);
        let mut rules = self::rules(&[], 2);
        rules.receive(&hello(1, None));
        rules.receive(&submit(1));
        assert_eq!(code(rules.refuse(1, bad())), ErrorCode::OutOfOrder);
        assert!(!rules.is_greeted());
    }

    #[test]
    fn late_words_about_an_ended_stream_are_dropped() {
        let mut rules = rules(&[], 2);
        rules.receive(&hello(1, None));
        rules.receive(&submit(1));
        let cancel = ClientMessage::Cancel { stream: 1 };
        let credit = ClientMessage::Credit {
            stream: 1,
            tokens: 1,
        };
        assert_eq!(rules.receive(&credit), Step::Deliver);
        assert_eq!(rules.receive(&cancel), Step::Deliver);
        rules.ended(1);
        assert_eq!(rules.receive(&cancel), Step::Ignore);
        assert_eq!(rules.receive(&credit), Step::Ignore);
    }

    #[test]
    fn tokens_do_not_show_in_debug_output() {
        let rules = rules(&["secret"], 1);
        assert!(!format!("{rules:?}").contains("secret"));
    }
}
