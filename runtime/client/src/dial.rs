//! One attempt to reach one gateway: TCP and handshake, within one deadline.

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use understudy_protocol::handshake::MAX_CLIENT_NAME_BYTES;
use understudy_protocol::message::{ClientMessage, Limits, ServerMessage};
use understudy_protocol::{
    ErrorBody, ErrorCode, FrameDecoder, PROTOCOL_VERSION, decode_server, encode,
};

use crate::error::LostReason;
use crate::options::Options;

/// A connection whose handshake is done.
pub(crate) struct Greeted {
    pub socket: TcpStream,
    /// Holds what came after the welcome.
    pub decoder: FrameDecoder,
    pub limits: Limits,
    pub node: String,
}

/// Connects to `address`, says hello, and waits for the welcome.
pub(crate) async fn dial(address: &str, options: &Options) -> Result<Greeted, LostReason> {
    tokio::time::timeout(options.connect_timeout, greet(address, options))
        .await
        .unwrap_or(Err(LostReason::Silent(options.connect_timeout)))
}

async fn greet(address: &str, options: &Options) -> Result<Greeted, LostReason> {
    let mut socket = TcpStream::connect(address).await?;
    // Small frames each way: Nagle's algorithm would hold them back for up to 40 ms.
    socket.set_nodelay(true)?;
    let mut out = BytesMut::new();
    encode(&hello(options), &mut out).map_err(|error| LostReason::Protocol(error.to_string()))?;
    socket.write_all(&out).await?;
    let mut decoder = FrameDecoder::new(options.max_frame_bytes as usize);
    loop {
        if let Some(payload) = decoder.next_frame().map_err(broken)? {
            return welcome(&payload, socket, decoder);
        }
        if socket.read_buf(decoder.buffer_mut()).await? == 0 {
            return Err(LostReason::Closed);
        }
    }
}

fn hello(options: &Options) -> ClientMessage {
    let mut name = options.client_name.clone();
    name.truncate(name.floor_char_boundary(MAX_CLIENT_NAME_BYTES));
    ClientMessage::Hello {
        version: PROTOCOL_VERSION,
        client: Some(name),
        token: options.token.clone(),
    }
}

fn welcome(
    payload: &[u8],
    socket: TcpStream,
    decoder: FrameDecoder,
) -> Result<Greeted, LostReason> {
    match decode_server(payload).map_err(broken)? {
        ServerMessage::Welcome {
            version,
            node,
            limits,
            ..
        } => match version {
            PROTOCOL_VERSION => Ok(Greeted {
                socket,
                decoder,
                limits,
                node,
            }),
            other => Err(LostReason::Refused(ErrorBody::new(
                ErrorCode::UnsupportedVersion,
                format!(
                    "gateway chose protocol version {other}, this client speaks {PROTOCOL_VERSION}"
                ),
            ))),
        },
        ServerMessage::Error { error, .. } => Err(LostReason::Refused(error)),
        _ => Err(LostReason::Protocol(
            "first message is no welcome".to_owned(),
        )),
    }
}

fn broken(error: impl std::fmt::Display) -> LostReason {
    LostReason::Protocol(error.to_string())
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn small_frames_are_not_held_back() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let answer = tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            let welcome = ServerMessage::Welcome {
                version: PROTOCOL_VERSION,
                node: "a".to_owned(),
                server: "test".to_owned(),
                limits: Limits {
                    max_frame_bytes: 1,
                    max_streams: 1,
                    max_credit: 1,
                },
            };
            let mut out = BytesMut::new();
            encode(&welcome, &mut out).unwrap();
            socket.write_all(&out).await.unwrap();
        });
        let Ok(greeted) = dial(&address, &Options::default()).await else {
            panic!("no handshake");
        };
        assert!(greeted.socket.nodelay().unwrap());
        answer.await.unwrap();
    }
}
