//! Frames: how messages are cut out of a byte stream, sans-IO.
//!
//! ```text
//!  0        1        2        3        4                     4 + length
//! +--------+--------+--------+--------+---------------------+
//! |  length: u32, big-endian          |  payload            |
//! +--------+--------+--------+--------+---------------------+
//! ```
//!
//! The header is the length alone: the kind of a message stands in its payload, and the version is agreed upon once, in
//! the handshake. A peer that speaks something else is found at once, because its first four bytes (`GET `, a TLS
//! hello) read as a length far above any limit.
//!
//! Invariant: a length field allocates nothing. It is compared with the limit as soon as its four bytes are there, and
//! the buffer then grows with the bytes that arrive, at most [`READ_CHUNK_BYTES`] ahead of them.

use bytes::{Buf, Bytes, BytesMut};

use crate::error::{ErrorBody, ErrorCode};

/// Bytes of the length field before each payload.
pub const HEADER_BYTES: usize = 4;

/// Free room that [`FrameDecoder::buffer_mut`] provides for the next read.
pub const READ_CHUNK_BYTES: usize = 16 * 1024;

/// Bytes that are no frame of this protocol. The stream cannot be read further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error(
        "frame of {len} bytes is over the limit of {max}; send smaller messages, and check that this port speaks this protocol"
    )]
    TooLarge { len: usize, max: usize },
    #[error("frame without payload; every frame holds one message")]
    Empty,
    #[error("connection ended inside a frame, after {have} bytes of it")]
    Truncated { have: usize },
}

impl FrameError {
    /// The code that tells the peer about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::TooLarge { .. } => ErrorCode::FrameTooLarge,
            Self::Empty | Self::Truncated { .. } => ErrorCode::Malformed,
        }
    }
}

impl From<FrameError> for ErrorBody {
    fn from(error: FrameError) -> Self {
        ErrorBody::new(error.code(), error.to_string())
    }
}

/// Cuts frames out of received bytes.
///
/// Read into [`buffer_mut`](Self::buffer_mut) (or call [`extend`](Self::extend)), then take frames until there is none:
/// with that order the buffer holds at most one frame and one read.
#[derive(Debug)]
pub struct FrameDecoder {
    buffer: BytesMut,
    max_frame_bytes: usize,
    /// After an error there is no next frame: the position in the stream is lost.
    failed: Option<FrameError>,
}

impl FrameDecoder {
    /// A decoder that refuses payloads over `max_frame_bytes`.
    pub fn new(max_frame_bytes: usize) -> Self {
        Self {
            buffer: BytesMut::new(),
            max_frame_bytes,
            failed: None,
        }
    }

    /// Changes the limit, for the frames whose length has not been looked at yet.
    pub fn set_max_frame_bytes(&mut self, max_frame_bytes: usize) {
        self.max_frame_bytes = max_frame_bytes;
    }

    /// Appends received bytes.
    pub fn extend(&mut self, received: &[u8]) {
        self.buffer.extend_from_slice(received);
    }

    /// The buffer to append received bytes to, with room for a read: made for tokio's `read_buf`.
    pub fn buffer_mut(&mut self) -> &mut BytesMut {
        self.buffer.reserve(READ_CHUNK_BYTES);
        &mut self.buffer
    }

    /// Bytes received and not yet taken.
    pub fn buffered_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// The payload of the next frame, or `None` until more bytes arrive. An error stays: the connection must be closed.
    pub fn next_frame(&mut self) -> Result<Option<Bytes>, FrameError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let Some(len) = self.next_len() else {
            return Ok(None);
        };
        if let Err(error) = self.check_len(len) {
            self.failed = Some(error);
            self.buffer = BytesMut::new();
            return Err(error);
        }
        if self.buffer.len() < HEADER_BYTES + len {
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        Ok(Some(self.buffer.split_to(len).freeze()))
    }

    /// To be called at the end of the stream: an error where it cut a frame in two.
    pub fn finish(&self) -> Result<(), FrameError> {
        match self.buffer.len() {
            0 => Ok(()),
            have => Err(FrameError::Truncated { have }),
        }
    }

    fn next_len(&self) -> Option<usize> {
        let header = self.buffer.first_chunk::<HEADER_BYTES>()?;
        Some(u32::from_be_bytes(*header) as usize)
    }

    fn check_len(&self, len: usize) -> Result<(), FrameError> {
        match len {
            0 => Err(FrameError::Empty),
            len if len > self.max_frame_bytes => Err(FrameError::TooLarge {
                len,
                max: self.max_frame_bytes,
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u32).to_be_bytes().to_vec();
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn frames_come_out_whole_however_the_bytes_are_cut() {
        let payloads: [&[u8]; 3] = [b"a", b"bcd", &[7; 300]];
        let stream: Vec<u8> = payloads.iter().flat_map(|p| frame(p)).collect();
        for step in 1..stream.len() {
            let mut decoder = FrameDecoder::new(300);
            let mut seen = Vec::new();
            for piece in stream.chunks(step) {
                decoder.extend(piece);
                while let Some(payload) = decoder.next_frame().unwrap() {
                    seen.push(payload);
                }
            }
            assert_eq!(seen, payloads, "cut every {step} bytes");
            assert_eq!(decoder.finish(), Ok(()));
        }
    }

    #[test]
    fn a_length_is_judged_from_its_four_bytes_alone() {
        let mut decoder = FrameDecoder::new(10);
        decoder.extend(&[0, 0, 0]);
        assert_eq!(decoder.next_frame(), Ok(None));
        decoder.extend(&[11]);
        let error = FrameError::TooLarge { len: 11, max: 10 };
        assert_eq!(decoder.next_frame(), Err(error));
        assert_eq!(error.code(), ErrorCode::FrameTooLarge);
    }

    #[test]
    fn the_limit_itself_is_allowed() {
        let mut decoder = FrameDecoder::new(10);
        decoder.extend(&frame(&[1; 10]));
        assert_eq!(decoder.next_frame().unwrap().unwrap().len(), 10);
    }

    #[test]
    fn a_claimed_length_grows_the_buffer_by_a_chunk_only() {
        let mut decoder = FrameDecoder::new(u32::MAX as usize);
        decoder.extend(&u32::MAX.to_be_bytes());
        assert_eq!(decoder.next_frame(), Ok(None));
        assert!(decoder.buffer_mut().capacity() <= 2 * READ_CHUNK_BYTES);
    }

    #[test]
    fn an_error_stays() {
        let mut decoder = FrameDecoder::new(10);
        decoder.extend(&[0, 0, 0, 0]);
        assert_eq!(decoder.next_frame(), Err(FrameError::Empty));
        decoder.extend(&frame(b"ok"));
        assert_eq!(decoder.next_frame(), Err(FrameError::Empty));
    }

    #[test]
    fn an_end_inside_a_frame_is_an_error() {
        let mut decoder = FrameDecoder::new(10);
        decoder.extend(&[0, 0, 0, 2, 1]);
        assert_eq!(decoder.next_frame(), Ok(None));
        assert_eq!(decoder.finish(), Err(FrameError::Truncated { have: 5 }));
    }
}
