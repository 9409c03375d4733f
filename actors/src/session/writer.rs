//! The writing side of a connection.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use understudy_protocol::codec::{self, EncodeError};
use understudy_protocol::message::ServerMessage;
use understudy_telemetry::gauges::QueueBytes;

use crate::outbox::{Outgoing, Queue, SharedRules};

/// Bytes that the writer gathers before it writes them in one go.
const WRITE_BATCH_BYTES: usize = 64 * 1024;

/// How the writing ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// Nobody is left who could send anything.
    Everything,
    /// An error without a stream, and so the last message. The write side is shut down behind it.
    LastWord,
    /// The client is gone, or takes nothing.
    Broken,
}

pub(super) struct Writer {
    pub queue: Queue,
    pub rules: SharedRules,
    /// How long the client may take nothing.
    pub limit: Duration,
    /// For the gauge of what waits on all connections.
    pub waiting: QueueBytes,
}

impl Writer {
    /// Writes what the queue holds, in batches, until there is an end to it.
    pub async fn run(mut self, mut socket: impl AsyncWrite + Unpin) -> Written {
        let mut bytes = BytesMut::new();
        let mut waiting = self.waiting.share();
        while let Some(first) = self.queue.next().await {
            waiting.set(self.queue.queued() as u64);
            let (is_last, weight) = match self.gather(first, &mut bytes) {
                Ok(gathered) => gathered,
                Err(error) => {
                    // A message of ours that the protocol cannot carry: the stream would have a gap, so it ends here.
                    tracing::error!(%error, "message to a client could not be encoded");
                    return Written::Broken;
                }
            };
            if write(&mut socket, &mut bytes, self.limit).await.is_err() {
                return Written::Broken;
            }
            self.queue.written(weight);
            waiting.set(self.queue.queued() as u64);
            if is_last {
                socket.shutdown().await.ok();
                return Written::LastWord;
            }
        }
        socket.shutdown().await.ok();
        Written::Everything
    }

    /// Encodes `first` and what waits behind it, up to a batch or to the connection's last word. Returns whether that is
    /// in it, and what all of it weighed.
    fn gather(
        &mut self,
        first: (Outgoing, usize),
        bytes: &mut BytesMut,
    ) -> Result<(bool, usize), EncodeError> {
        let mut total = 0;
        let mut next = Some(first);
        while let Some((Outgoing { message, .. }, weight)) = next {
            total += weight;
            codec::encode(&message, bytes)?;
            match message {
                // The number of a stream is free again when its end is written: not sooner, or a client that does not
                // read could begin streams without limit; not later, or it could use the number before we know that it
                // may.
                ServerMessage::Finished { stream, .. }
                | ServerMessage::Error {
                    stream: Some(stream),
                    ..
                } => self.rules.lock().ended(stream),
                // What requests still send to their streams is not for a connection that has ended.
                ServerMessage::Error { stream: None, .. } => return Ok((true, total)),
                _ => {}
            }
            next = match bytes.len() {
                0..WRITE_BATCH_BYTES => self.queue.next_now(),
                _ => None,
            };
        }
        Ok((false, total))
    }
}

/// Writes all of `bytes`. The limit is for each bit of progress: a slow client is served, one that takes nothing is not.
pub(super) async fn write(
    socket: &mut (impl AsyncWrite + Unpin),
    bytes: &mut BytesMut,
    limit: Duration,
) -> io::Result<()> {
    while !bytes.is_empty() {
        match timeout(limit, socket.write_buf(bytes)).await {
            Ok(Ok(0)) | Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::Answers;
    use tokio::io::AsyncReadExt;
    use tokio::time::{Instant, sleep};
    use understudy_protocol::handshake::{AccessTokens, ConnectionRules};
    use understudy_protocol::message::Limits;
    use understudy_protocol::{ErrorBody, ErrorCode, FrameDecoder, decode_server};

    const LIMIT: Duration = Duration::from_secs(1);

    fn writer() -> (Answers, Writer) {
        let limits = Limits {
            max_frame_bytes: 4096,
            max_streams: 1,
            max_credit: 1,
        };
        let (answers, queue) = Answers::new();
        let rules = ConnectionRules::new(AccessTokens::default(), &limits);
        let rules = SharedRules::new(rules);
        let limit = LIMIT;
        (
            answers,
            Writer {
                queue,
                rules,
                limit,
                waiting: QueueBytes::new(understudy_telemetry::record::Queue::ClientOut),
            },
        )
    }

    fn messages(bytes: &[u8]) -> Vec<ServerMessage> {
        let mut decoder = FrameDecoder::new(usize::MAX);
        decoder.extend(bytes);
        std::iter::from_fn(|| decoder.next_frame().unwrap())
            .map(|frame| decode_server(&frame).unwrap())
            .collect()
    }

    /// A batch may take longer than the limit, if bytes go out all the time.
    #[tokio::test]
    async fn a_slow_client_is_served_and_one_that_takes_nothing_is_not() {
        let (answers, writer) = writer();
        let (ours, mut theirs) = tokio::io::duplex(16);
        let pongs: Vec<_> = (0..40).map(|nonce| ServerMessage::Pong { nonce }).collect();
        for pong in pongs.clone() {
            assert!(answers.answer(pong).await);
        }
        drop(answers);
        let writing = tokio::spawn(writer.run(ours));
        let (mut taken, started) = (Vec::new(), Instant::now());
        while theirs.read_buf(&mut taken).await.unwrap() > 0 {
            // The client is that slow.
            sleep(LIMIT / 20).await;
        }
        assert!(started.elapsed() > LIMIT, "that was too fast to tell");
        assert_eq!(messages(&taken), pongs);
        assert_eq!(writing.await.unwrap(), Written::Everything);

        let (answers, writer) = self::writer();
        let (ours, _theirs) = tokio::io::duplex(16);
        for pong in pongs {
            answers.answer(pong).await;
        }
        let writing = timeout(10 * LIMIT, writer.run(ours));
        assert_eq!(writing.await.unwrap(), Written::Broken);
    }

    #[tokio::test]
    async fn nothing_is_written_after_the_connections_last_word() {
        let (answers, writer) = writer();
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let error = ErrorBody::new(ErrorCode::Malformed, "x");
        answers.answer(ServerMessage::Pong { nonce: 1 }).await;
        answers.close(error.clone());
        answers.answer(ServerMessage::Pong { nonce: 2 }).await;
        drop(answers);
        assert_eq!(writer.run(ours).await, Written::LastWord);
        let mut taken = Vec::new();
        theirs.read_to_end(&mut taken).await.unwrap();
        let last = ServerMessage::Error {
            stream: None,
            request: None,
            error,
        };
        assert_eq!(messages(&taken), [ServerMessage::Pong { nonce: 1 }, last]);
    }
}
