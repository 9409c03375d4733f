//! The client wire protocol of Understudy, sans-IO: see `docs/protocol.md`.

pub mod codec;
pub mod credit;
pub mod error;
pub mod frame;
pub mod handshake;
pub mod id;
pub mod message;
pub mod scan;
mod strict;
mod wire;

pub use codec::{EncodeError, decode_client, decode_server, encode, stream_of};
pub use credit::{CreditBalance, CreditWindow};
pub use error::{ErrorBody, ErrorCode};
pub use frame::{FrameDecoder, FrameError};
pub use handshake::{AccessTokens, ConnectionRules, Step};
pub use id::{Position, RequestId};

/// The version of the protocol that this crate speaks.
pub const PROTOCOL_VERSION: u32 = 1;
