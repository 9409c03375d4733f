//! The socket of a session, from its first byte to its last.
//!
//! How a connection ends:
//! * The client closes its side. It may go on reading: streams in flight are served to their ends, then the socket is
//!   closed.
//! * One side breaks it off with an error without a stream. The error is the last thing written, and the write side is
//!   shut down behind it. Then input is read and dropped for a while: to close a socket with unread input resets the
//!   connection, and a client that is still writing would never get to read the error.
//! * The client is gone, or takes nothing for too long: at once.

use std::time::Duration;

use bytes::BytesMut;
use ractor::ActorRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinHandle};
use tokio::time::timeout;
use understudy_protocol::ErrorBody;
use understudy_protocol::codec;
use understudy_protocol::message::ServerMessage;

use super::SessionMsg;
use super::reader::{ReadEnd, Reader};
use super::writer::{self, Writer, Written};
use crate::gateway::ConnectionPlace;

/// How long a connection that is closed with an error goes on reading what the client had sent before it knew.
pub(super) const LINGER: Duration = Duration::from_secs(1);

/// Bytes that it reads so at most.
const LINGER_BYTES: usize = 16 * 1024 * 1024;

/// Bytes that are read and dropped in one go.
const DISCARD_CHUNK_BYTES: usize = 16 * 1024;

pub(super) struct Connection {
    pub socket: TcpStream,
    pub reader: Reader,
    pub writer: Writer,
    pub session: ActorRef<SessionMsg>,
    /// Resolves when the session is gone.
    pub stopped: oneshot::Receiver<()>,
    /// Counts the connection for as long as its socket is open.
    pub place: ConnectionPlace,
}

/// Why nothing is read from a connection any more.
enum End {
    Read(ReadEnd),
    Written(Result<Written, JoinError>),
    SessionGone,
}

impl Connection {
    pub async fn run(self) {
        let Self {
            socket,
            reader,
            writer,
            session,
            mut stopped,
            place: _place,
        } = self;
        let limit = writer.limit + LINGER;
        let (mut read, write) = socket.into_split();
        let mut writing = tokio::spawn(writer.run(write));
        let end = tokio::select! {
            end = reader.run(&mut read) => End::Read(end),
            written = &mut writing => End::Written(written),
            _ = &mut stopped => End::SessionGone,
        };
        match end {
            End::Read(ReadEnd::InputEnded) => {
                session.cast(SessionMsg::InputEnded).ok();
                tokio::select! {
                    _ = &mut writing => {}
                    _ = &mut stopped => { timeout(LINGER, &mut writing).await.ok(); }
                }
            }
            End::Read(ReadEnd::Refused) => {
                session.cast(SessionMsg::Closed).ok();
                timeout(limit, part(&mut read, Some(&mut writing)))
                    .await
                    .ok();
            }
            End::Written(Ok(Written::LastWord)) => {
                session.cast(SessionMsg::Closed).ok();
                part(&mut read, None).await;
            }
            End::Written(_) | End::Read(ReadEnd::Broken) => {}
            // What is queued may still go out.
            End::SessionGone => {
                timeout(LINGER, &mut writing).await.ok();
            }
        }
        writing.abort();
        session.cast(SessionMsg::Closed).ok();
    }
}

/// Tells a client that there is no place for it, and closes.
pub(crate) async fn turn_away(socket: TcpStream, error: ErrorBody, limit: Duration) {
    let (stream, request) = (None, None);
    let message = ServerMessage::Error {
        stream,
        request,
        error,
    };
    let mut bytes = BytesMut::new();
    if codec::encode(&message, &mut bytes).is_err() {
        return;
    }
    let (mut read, mut write) = socket.into_split();
    if writer::write(&mut write, &mut bytes, limit).await.is_ok() {
        write.shutdown().await.ok();
        part(&mut read, None).await;
    }
}

/// Reads and drops input: while the last word is being written, if it still is, and for [`LINGER`] after that.
async fn part(read: &mut OwnedReadHalf, writing: Option<&mut JoinHandle<Written>>) {
    let discarding = discard(read);
    tokio::pin!(discarding);
    let mut input_ended = false;
    if let Some(writing) = writing {
        tokio::select! {
            _ = &mut *writing => {}
            () = &mut discarding => {
                input_ended = true;
                writing.await.ok();
            }
        }
    }
    if !input_ended {
        timeout(LINGER, discarding).await.ok();
    }
}

async fn discard(read: &mut (impl AsyncRead + Unpin)) {
    let mut chunk = vec![0; DISCARD_CHUNK_BYTES];
    let mut left = LINGER_BYTES;
    while left > 0 {
        match read.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(size) => left = left.saturating_sub(size),
        }
    }
}
