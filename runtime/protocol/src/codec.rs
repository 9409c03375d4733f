//! Messages to bytes and back: MessagePack maps with named fields.
//!
//! Invariants: no bytes make decoding panic, recurse without bound, or allocate more than [`max_decode_bytes`]; and no
//! error text repeats a string value that the peer sent, because that may be a prompt.

use bytes::{BufMut, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{ErrorBody, ErrorCode};
use crate::frame::HEADER_BYTES;
use crate::message::{ClientMessage, ClusterStatus, ServerMessage, Submit, TokenEvent};
use crate::scan::{Envelope, MAX_CLIENT_ITEMS, scan};
use crate::wire;

/// Bytes of memory that one item of a message takes at most, room that its array keeps for growth included.
const ITEM_BYTES: usize = 128;

/// Bytes that decoding a client's message of `payload` bytes allocates at most: each number in an array takes 4 bytes,
/// twice while the array grows, strings take their length, and the items themselves are limited in number.
pub const fn max_decode_bytes(payload: usize) -> usize {
    let items = if payload < MAX_CLIENT_ITEMS {
        payload
    } else {
        MAX_CLIENT_ITEMS
    };
    8 * payload + ITEM_BYTES * items + 4096
}

/// Longest part of a deserializer's complaint that is passed on, in bytes.
const MAX_DETAIL_BYTES: usize = 400;

/// A message that cannot be put into a frame.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    #[error("message cannot be written as MessagePack: {0}")]
    Unserializable(#[from] rmp_serde::encode::Error),
    #[error("message of {len} bytes does not fit a frame, whose length has 32 bits")]
    TooLarge { len: usize },
}

/// Appends `message` to `out` as one frame, header included, and returns the frame's size in bytes. On an error `out`
/// is as before.
pub fn encode(message: &impl Serialize, out: &mut BytesMut) -> Result<usize, EncodeError> {
    let start = out.len();
    out.put_u32(0);
    let written = write_payload(message, out, start);
    if written.is_err() {
        out.truncate(start);
    }
    written
}

fn write_payload(
    message: &impl Serialize,
    out: &mut BytesMut,
    start: usize,
) -> Result<usize, EncodeError> {
    let mut serializer = rmp_serde::Serializer::new((&mut *out).writer()).with_struct_map();
    message.serialize(&mut serializer)?;
    let size = out.len() - start;
    let len = size - HEADER_BYTES;
    let header = u32::try_from(len).map_err(|_| EncodeError::TooLarge { len })?;
    out[start..start + HEADER_BYTES].copy_from_slice(&header.to_be_bytes());
    Ok(size)
}

/// The message in one frame's payload, for a server.
///
/// The code of an error is `malformed`, which closes the connection, with one exception: a `submit` whose envelope and
/// `stream` can be read but whose other fields are wrong gives `invalid_request`, which ends that stream only (see
/// [`stream_of`]).
pub fn decode_client(payload: &[u8]) -> Result<ClientMessage, ErrorBody> {
    let envelope = open(payload, MAX_CLIENT_ITEMS)?;
    match envelope.kind {
        "hello" => read::<wire::Hello>(payload).map(Into::into),
        "submit" => read::<Submit>(payload).map(ClientMessage::Submit),
        "cancel" => read::<wire::Cancel>(payload).map(Into::into),
        "resume" => read::<wire::Resume>(payload).map(Into::into),
        "credit" => read::<wire::Credit>(payload).map(Into::into),
        "ping" => read::<wire::Nonce>(payload).map(Into::into),
        "status" => read::<wire::Nothing>(payload).map(Into::into),
        _ => return Err(unknown_type()),
    }
    .map_err(|error| describe(envelope, &error))
}

/// The message in one frame's payload, for a client. How many items it may have is left to the frame limit: the state
/// of a large cluster is large.
pub fn decode_server(payload: &[u8]) -> Result<ServerMessage, ErrorBody> {
    let envelope = open(payload, usize::MAX)?;
    match envelope.kind {
        "welcome" => read::<wire::Welcome>(payload).map(Into::into),
        "accepted" => read::<wire::Accepted>(payload).map(Into::into),
        "token" => read::<TokenEvent>(payload).map(ServerMessage::Token),
        "finished" => read::<wire::Finished>(payload).map(Into::into),
        "error" => read::<wire::Failed>(payload).map(Into::into),
        "pong" => read::<wire::Nonce>(payload).map(Into::into),
        "status" => read::<ClusterStatus>(payload).map(ServerMessage::Status),
        _ => return Err(unknown_type()),
    }
    .map_err(|error| describe(envelope, &error))
}

/// The `stream` of a payload, where it is a well-formed message that has one: to address an `invalid_request`.
pub fn stream_of(payload: &[u8]) -> Option<u32> {
    scan(payload, MAX_CLIENT_ITEMS).ok()?.stream
}

fn open(payload: &[u8], max_items: usize) -> Result<Envelope<'_>, ErrorBody> {
    scan(payload, max_items).map_err(|error| malformed(format!("frame is no message: {error}")))
}

fn read<T: DeserializeOwned>(payload: &[u8]) -> Result<T, rmp_serde::decode::Error> {
    rmp_serde::from_slice(payload)
}

fn malformed(message: String) -> ErrorBody {
    ErrorBody::new(ErrorCode::Malformed, message)
}

fn unknown_type() -> ErrorBody {
    malformed("message has a type that this protocol version does not know".to_owned())
}

/// `envelope.kind` is one of the known types here, so that it can be shown.
fn describe(envelope: Envelope<'_>, error: &rmp_serde::decode::Error) -> ErrorBody {
    let kind = envelope.kind;
    let message = format!(
        "{kind} message is not as docs/protocol.md has it: {}",
        detail(error)
    );
    match (kind, envelope.stream) {
        ("submit", Some(_)) => ErrorBody::new(ErrorCode::InvalidRequest, message),
        _ => malformed(message),
    }
}

/// What the deserializer says, without the values it quotes: only texts that consist of names are passed on.
fn detail(error: &rmp_serde::decode::Error) -> String {
    use rmp_serde::decode::Error;
    let text = match error {
        Error::Syntax(text) | Error::Uncategorized(text) => text.as_str(),
        Error::OutOfRange => "a number is out of range",
        Error::TypeMismatch(_) | Error::LengthMismatch(_) => "a field has another type",
        Error::Utf8Error(_) => "a string is not UTF-8",
        _ => "a value is cut short",
    };
    let names_only = ["missing field", "duplicate field", "unknown field"];
    let safe = match error {
        Error::Syntax(_) | Error::Uncategorized(_) => {
            if names_only.iter().any(|start| text.starts_with(start)) {
                text.to_owned()
            } else {
                // "invalid type: string "<a value>", expected u32": what was expected is a name of ours.
                match text.rsplit_once(", expected ") {
                    Some((_, expected)) => format!("expected {expected}"),
                    None => "a field has a value that is not allowed".to_owned(),
                }
            }
        }
        _ => text.to_owned(),
    };
    clip(safe)
}

fn clip(mut text: String) -> String {
    if text.len() > MAX_DETAIL_BYTES {
        text.truncate(text.floor_char_boundary(MAX_DETAIL_BYTES));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(message: &impl Serialize) -> Vec<u8> {
        let mut out = BytesMut::new();
        encode(message, &mut out).unwrap();
        out[HEADER_BYTES..].to_vec()
    }

    #[test]
    fn an_error_never_repeats_what_the_peer_sent() {
        // `input` should be a map; here it is text, and once a map with a wrong key.
        let secret = "a secret prompt";
        for input in [
            serde_value(&[("input", secret)]),
            serde_value(&[("stop", secret)]),
            serde_value(&[("credit", secret)]),
        ] {
            let error = decode_client(&input).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidRequest);
            assert!(!error.message.contains("secret"), "{}", error.message);
        }
    }

    /// A `submit` on stream 1 with text where other types belong.
    fn serde_value(fields: &[(&str, &str)]) -> Vec<u8> {
        let mut out = vec![0x82 + fields.len() as u8];
        out.extend_from_slice(b"\xa4type\xa6submit\xa6stream\x01");
        for text in fields.iter().flat_map(|&(key, value)| [key, value]) {
            out.push(0xa0 | text.len() as u8);
            out.extend_from_slice(text.as_bytes());
        }
        out
    }

    #[test]
    fn names_of_missing_and_unknown_fields_are_told() {
        let error = decode_client(b"\x81\xa4type\xa4ping").unwrap_err();
        assert_eq!(error.code, ErrorCode::Malformed);
        assert!(
            error.message.contains("missing field `nonce`"),
            "{}",
            error.message
        );
    }

    #[test]
    fn a_bad_submit_ends_its_stream_only() {
        let bytes = serde_value(&[("input", "text")]);
        assert_eq!(
            decode_client(&bytes).unwrap_err().code,
            ErrorCode::InvalidRequest
        );
        assert_eq!(stream_of(&bytes), Some(1));
        let without_stream = b"\x81\xa4type\xa6submit";
        assert_eq!(
            decode_client(without_stream).unwrap_err().code,
            ErrorCode::Malformed
        );
    }

    #[test]
    fn a_failed_encode_leaves_the_buffer_as_it_was() {
        struct Unwritable;
        impl Serialize for Unwritable {
            fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
                Err(serde::ser::Error::custom("no"))
            }
        }
        let mut out = BytesMut::from(&b"before"[..]);
        assert!(encode(&Unwritable, &mut out).is_err());
        assert_eq!(&out[..], b"before");
    }

    #[test]
    fn both_directions_have_a_message_called_status() {
        let ask = payload(&ClientMessage::Status {});
        assert_eq!(decode_client(&ask), Ok(ClientMessage::Status {}));
        let answer = payload(&ServerMessage::Status(ClusterStatus::default()));
        assert_eq!(
            decode_server(&answer),
            Ok(ServerMessage::Status(ClusterStatus::default()))
        );
    }
}
