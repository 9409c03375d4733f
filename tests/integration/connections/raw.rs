//! A client that does only what it is told, and the messages that it is told to send.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use understudy_protocol::message::{ClientMessage, Input, Limits, Sampling, ServerMessage, Submit};
use understudy_protocol::{ErrorBody, FrameDecoder, decode_server, encode};
use understudy_tests::TestCluster;

use super::PATIENCE;

/// A client that does only what it is told.
pub struct Raw {
    pub socket: TcpStream,
    decoder: FrameDecoder,
}

impl Raw {
    pub async fn connect(cluster: &TestCluster) -> Self {
        let socket = TcpStream::connect(cluster.address()).await;
        Self {
            socket: socket.expect("a connection"),
            decoder: FrameDecoder::new(16 << 20),
        }
    }

    pub async fn greeted(cluster: &TestCluster) -> Self {
        let mut raw = Self::connect(cluster).await;
        raw.send(&[hello()]).await;
        raw.welcome().await;
        raw
    }

    pub async fn welcome(&mut self) -> Limits {
        match self.next().await {
            Some(ServerMessage::Welcome { limits, .. }) => limits,
            other => panic!("no welcome: {other:?}"),
        }
    }

    pub async fn send(&mut self, messages: &[ClientMessage]) {
        let mut bytes = Default::default();
        for message in messages {
            encode(message, &mut bytes).expect("a frame");
        }
        self.socket.write_all(&bytes).await.expect("sent");
    }

    /// The next message, or None at the end. A connection that is reset fails the test.
    pub async fn next(&mut self) -> Option<ServerMessage> {
        loop {
            if let Some(frame) = self.decoder.next_frame().expect("frames") {
                return Some(decode_server(&frame).expect("a message"));
            }
            let reading = self.socket.read_buf(self.decoder.buffer_mut());
            let read = timeout(PATIENCE, reading).await.expect("in time");
            if read.expect("no reset") == 0 {
                return None;
            }
        }
    }

    /// The connection's last word, and then its end.
    pub async fn last_word(&mut self) -> ErrorBody {
        let word = self.next().await;
        let Some(ServerMessage::Error {
            stream: None,
            error,
            ..
        }) = word
        else {
            panic!("not the connection's error: {word:?}");
        };
        assert_eq!(self.next().await, None);
        error
    }

    /// The error that a stream ends with, as its first event.
    pub async fn refusal(&mut self, number: u32) -> ErrorBody {
        match self.next().await {
            Some(ServerMessage::Error {
                stream: Some(stream),
                error,
                ..
            }) if stream == number => error,
            other => panic!("stream {number} is not refused: {other:?}"),
        }
    }

    /// Reads a stream to its end, from `accepted` on: the positions of its tokens, and its terminal event.
    pub async fn whole_stream(&mut self, number: u32) -> (Vec<u32>, ServerMessage) {
        let first = self.next().await;
        assert!(
            matches!(first, Some(ServerMessage::Accepted { stream, .. }) if stream == number),
            "{first:?}"
        );
        let mut positions = Vec::new();
        loop {
            match self.next().await.expect("a terminal event") {
                ServerMessage::Token(token) => positions.push(token.position),
                end => return (positions, end),
            }
        }
    }
}

pub fn hello() -> ClientMessage {
    ClientMessage::Hello {
        version: 1,
        client: None,
        token: None,
    }
}

pub fn submit(stream: u32, input: Input, max_tokens: u32) -> ClientMessage {
    let sampling = Sampling {
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        ..Sampling::default()
    };
    ClientMessage::Submit(Submit {
        stream,
        model: None,
        input,
        sampling,
        stop: Vec::new(),
        include_stop: false,
        deadline_ms: None,
        resumable: false,
        priority: 0,
        credit: 4096,
    })
}

pub fn count() -> Input {
    Input::Prompt("Count from 1 to 9:".into())
}
