//! Length-prefixed MessagePack frames: blocking on the engine's side, incremental on the node's.
//!
//! Invariant: no byte of a body is buffered before its length is known to be within [`MAX_FRAME_BYTES`], and nothing is
//! allocated on the word of a length field: buffers grow with the bytes that really arrive.

use std::io::{ErrorKind, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

use crate::frame::MAX_FRAME_BYTES;

/// Bytes of the length field.
const HEADER_BYTES: usize = 4;

/// Read at most this much at a time.
const READ_BYTES: usize = 64 * 1024;

/// A decoder keeps no more spare capacity than this once it has run empty, so that one large prompt is not paid for ever.
const KEEP_CAPACITY_BYTES: usize = 256 * 1024;

/// Why a frame could not be written or read. None of these is cured by trying again on the same stream.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The peer states, or we were asked to send, a frame above the limit.
    #[error("frame of {bytes} bytes is above the limit of {MAX_FRAME_BYTES} bytes")]
    TooLarge { bytes: usize },
    /// An empty body cannot be a MessagePack map.
    #[error("frame of length 0; every frame holds a MessagePack map")]
    Empty,
    /// The body is not the message that this build expects.
    #[error("malformed frame of {bytes} bytes: {source}")]
    Malformed {
        bytes: usize,
        source: rmp_serde::decode::Error,
    },
    /// A message of ours does not serialize: a programming error, reported rather than panicked on.
    #[error("cannot encode frame: {0}")]
    Encode(#[from] rmp_serde::encode::Error),
    /// The stream ended inside a frame.
    #[error("stream ended inside a frame, {missing} bytes short")]
    Truncated { missing: usize },
    /// The stream itself failed.
    #[error("frame stream failed: {0}")]
    Io(#[from] std::io::Error),
}

/// Appends one whole frame to `out`. On an error `out` is as it was.
///
/// # Errors
/// [`CodecError::TooLarge`], [`CodecError::Encode`].
pub fn encode_into<T: Serialize>(message: &T, out: &mut Vec<u8>) -> Result<(), CodecError> {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_BYTES]);
    let written = rmp_serde::encode::write_named(out, message);
    let bytes = out.len() - start - HEADER_BYTES;
    if let Err(error) = written {
        out.truncate(start);
        return Err(error.into());
    }
    if bytes > MAX_FRAME_BYTES {
        out.truncate(start);
        return Err(CodecError::TooLarge { bytes });
    }
    out[start..start + HEADER_BYTES].copy_from_slice(&(bytes as u32).to_be_bytes());
    Ok(())
}

/// One whole frame as bytes.
///
/// # Errors
/// As [`encode_into`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, CodecError> {
    let mut out = Vec::new();
    encode_into(message, &mut out)?;
    Ok(out)
}

/// Writes one frame with a single `write_all`. `scratch` is reused between calls.
///
/// # Errors
/// As [`encode_into`], and [`CodecError::Io`].
pub fn write_frame<T: Serialize>(
    writer: &mut impl Write,
    message: &T,
    scratch: &mut Vec<u8>,
) -> Result<(), CodecError> {
    scratch.clear();
    encode_into(message, scratch)?;
    writer.write_all(scratch)?;
    Ok(())
}

/// Cuts a byte stream into frames: feed bytes as they come, take messages while there are any.
///
/// ```
/// use understudy_engine_core::{codec, frame::EngineCommand};
/// let bytes = codec::encode(&EngineCommand::Shutdown).unwrap();
/// let mut decoder = codec::FrameDecoder::new();
/// decoder.feed(&bytes[..5]).unwrap();
/// assert_eq!(decoder.next_frame::<EngineCommand>().unwrap(), None);
/// decoder.feed(&bytes[5..]).unwrap();
/// assert_eq!(decoder.next_frame().unwrap(), Some(EngineCommand::Shutdown));
/// ```
#[derive(Debug, Default)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    /// Bytes at the front of `buffer` that are already taken.
    taken: usize,
}

impl FrameDecoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes. The length of the frame they begin or belong to is checked before they are kept; take all frames
    /// ([`Self::next_frame`]) between two calls, so that at most one partial frame plus `bytes` is held.
    ///
    /// # Errors
    /// [`CodecError::TooLarge`] or [`CodecError::Empty`]: the stream cannot be used any more.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), CodecError> {
        self.reclaim();
        // Only a header that these bytes complete can be new; later headers are checked when they come to the front.
        let held = self.buffer.len() - self.taken;
        if held < HEADER_BYTES {
            let mut header = [0; HEADER_BYTES];
            let fresh = bytes.len().min(HEADER_BYTES - held);
            header[..held].copy_from_slice(&self.buffer[self.taken..]);
            header[held..held + fresh].copy_from_slice(&bytes[..fresh]);
            if held + fresh == HEADER_BYTES {
                check_length(header)?;
            }
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// Takes the next whole message, or `None` until more bytes are fed.
    ///
    /// # Errors
    /// Any error means that the stream cannot be used any more.
    pub fn next_frame<T: DeserializeOwned>(&mut self) -> Result<Option<T>, CodecError> {
        let pending = &self.buffer[self.taken..];
        let Some(header) = pending.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = check_length(*header)?;
        let Some(body) = pending.get(HEADER_BYTES..HEADER_BYTES + length) else {
            return Ok(None);
        };
        let message = decode_body(body)?;
        self.taken += HEADER_BYTES + length;
        Ok(Some(message))
    }

    /// Bytes of a frame that has begun and is not whole yet; 0 at a frame boundary.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.buffer.len() - self.taken
    }

    /// How many bytes the frame that has begun still lacks; at least 1 while there is one.
    #[must_use]
    pub fn missing_bytes(&self) -> usize {
        let pending = &self.buffer[self.taken..];
        match pending.first_chunk::<HEADER_BYTES>() {
            None => HEADER_BYTES - pending.len(),
            Some(header) => {
                (HEADER_BYTES + u32::from_be_bytes(*header) as usize).saturating_sub(pending.len())
            }
        }
    }

    fn reclaim(&mut self) {
        if self.taken == self.buffer.len() {
            self.buffer.clear();
            self.buffer.shrink_to(KEEP_CAPACITY_BYTES);
        } else if self.taken > 0 {
            self.buffer.drain(..self.taken);
        }
        self.taken = 0;
    }
}

/// Blocking reader of frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    decoder: FrameDecoder,
    chunk: Box<[u8]>,
}

impl<R: Read> FrameReader<R> {
    /// Reads frames from `stream`.
    pub fn new(stream: R) -> Self {
        Self {
            stream,
            decoder: FrameDecoder::new(),
            chunk: vec![0; READ_BYTES].into_boxed_slice(),
        }
    }

    /// The next message, or `None` when the stream ended at a frame boundary.
    ///
    /// # Errors
    /// Any error means that the stream cannot be used any more.
    pub fn read<T: DeserializeOwned>(&mut self) -> Result<Option<T>, CodecError> {
        loop {
            if let Some(message) = self.decoder.next_frame()? {
                return Ok(Some(message));
            }
            match self.stream.read(&mut self.chunk) {
                Ok(0) if self.decoder.pending_bytes() == 0 => return Ok(None),
                Ok(0) => {
                    return Err(CodecError::Truncated {
                        missing: self.decoder.missing_bytes(),
                    });
                }
                Ok(n) => self.decoder.feed(&self.chunk[..n])?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn check_length(header: [u8; HEADER_BYTES]) -> Result<usize, CodecError> {
    match u32::from_be_bytes(header) as usize {
        0 => Err(CodecError::Empty),
        bytes if bytes > MAX_FRAME_BYTES => Err(CodecError::TooLarge { bytes }),
        bytes => Ok(bytes),
    }
}

/// Decodes exactly one message; bytes after it are an error, not ignored.
fn decode_body<T: DeserializeOwned>(body: &[u8]) -> Result<T, CodecError> {
    let malformed = |source| CodecError::Malformed {
        bytes: body.len(),
        source,
    };
    let mut rest = body;
    let message =
        T::deserialize(&mut rmp_serde::Deserializer::new(&mut rest)).map_err(malformed)?;
    let rest = rest.len();
    if rest > 0 {
        return Err(malformed(rmp_serde::decode::Error::Uncategorized(format!(
            "{rest} bytes after the message"
        ))));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{
        AttemptError, AttemptId, EngineCommand, EngineEvent, EngineHealth, OutputToken,
        SamplingParams, StartAttempt, StepToken,
    };

    fn attempt() -> AttemptId {
        AttemptId {
            request: u128::MAX - 5,
            epoch: 3,
        }
    }

    fn commands() -> Vec<EngineCommand> {
        vec![
            EngineCommand::Start(StartAttempt {
                attempt: attempt(),
                prompt: (0..5000).collect(),
                committed: vec![1, 2, u32::MAX],
                expect_logprobs: vec![-0.5, f32::MIN_POSITIVE],
                suspect: false,
                priority: 0,
                fork_of: None,
                cache_salt: 0,
                sampling: SamplingParams {
                    seed: u64::MAX,
                    stop_token_ids: vec![9],
                    ..SamplingParams::default()
                },
            }),
            EngineCommand::Cancel { attempt: attempt() },
            EngineCommand::Shutdown,
        ]
    }

    #[test]
    fn frames_survive_every_cut_of_the_stream() {
        let commands = commands();
        let mut bytes = Vec::new();
        for command in &commands {
            encode_into(command, &mut bytes).unwrap();
        }
        for step in [1, 2, 3, 5, 64, 4096, bytes.len()] {
            let mut decoder = FrameDecoder::new();
            let mut got = Vec::new();
            for part in bytes.chunks(step) {
                decoder.feed(part).unwrap();
                while let Some(command) = decoder.next_frame::<EngineCommand>().unwrap() {
                    got.push(command);
                }
            }
            assert_eq!(got, commands, "fed {step} bytes at a time");
            assert_eq!(decoder.pending_bytes(), 0);
        }
    }

    #[test]
    fn events_keep_the_bits_of_logprobs() {
        let logprob = f32::from_bits(0xbf12_3457);
        let event = EngineEvent::Step {
            step: 9,
            prompt_tokens: 3,
            tokens: vec![StepToken {
                attempt: attempt(),
                position: 4,
                token: OutputToken {
                    id: 7,
                    logprob,
                    top: vec![(7, logprob), (1, -3.0)],
                },
                finish: None,
                waited_ms: Some(12),
            }],
        };
        let bytes = encode(&event).unwrap();
        let mut reader = FrameReader::new(&bytes[..]);
        assert_eq!(reader.read::<EngineEvent>().unwrap(), Some(event));
        assert_eq!(reader.read::<EngineEvent>().unwrap(), None);
        let failed = EngineEvent::AttemptFailed {
            attempt: attempt(),
            error: AttemptError::ReplayMismatch {
                position: 1,
                expected: 2,
                actual: 3,
            },
        };
        for event in [failed, EngineEvent::Heartbeat(EngineHealth::default())] {
            let bytes = encode(&event).unwrap();
            assert_eq!(
                FrameReader::new(&bytes[..]).read::<EngineEvent>().unwrap(),
                Some(event)
            );
        }
    }

    #[test]
    fn fields_that_may_be_absent_are() {
        let event = EngineEvent::Step {
            step: 1,
            prompt_tokens: 0,
            tokens: vec![StepToken {
                attempt: attempt(),
                position: 0,
                token: OutputToken {
                    id: 7,
                    logprob: -0.5,
                    top: vec![],
                },
                finish: None,
                waited_ms: None,
            }],
        };
        let mut frame = encode(&event).unwrap();
        let has = |frame: &[u8], name: &[u8]| frame.windows(name.len()).any(|part| part == name);
        assert!(!has(&frame, b"waited_ms") && !has(&frame, b"top"));
        // The step's map of three entries, less the one that an engine may leave out.
        let name = b"\xadprompt_tokens\x00";
        let at = frame.windows(name.len()).position(|part| part == name);
        let at = at.expect("the entry");
        frame.drain(at..at + name.len());
        frame[3] -= name.len() as u8;
        let map = frame.iter().position(|&byte| byte == 0x83);
        frame[map.expect("a map of three")] = 0x82;
        let read = FrameReader::new(&frame[..]).read::<EngineEvent>();
        assert_eq!(read.unwrap(), Some(event));
    }

    #[test]
    fn a_length_above_the_limit_is_refused_before_its_body_arrives() {
        let mut decoder = FrameDecoder::new();
        decoder.feed(&[0xff]).unwrap();
        let error = decoder.feed(&[0xff, 0xff, 0xff]).unwrap_err();
        assert!(
            matches!(error, CodecError::TooLarge { bytes: 0xffff_ffff }),
            "{error}"
        );
        assert!(decoder.buffer.capacity() < 64);
        assert!(matches!(
            FrameDecoder::new().feed(&[0, 0, 0, 0]),
            Err(CodecError::Empty)
        ));
        // The second header of one feed is checked when its turn comes.
        let mut bytes = encode(&EngineCommand::Shutdown).unwrap();
        bytes.extend([0xff; 4]);
        decoder = FrameDecoder::new();
        decoder.feed(&bytes).unwrap();
        assert_eq!(decoder.next_frame().unwrap(), Some(EngineCommand::Shutdown));
        assert!(decoder.next_frame::<EngineCommand>().is_err());
    }

    #[test]
    fn a_frame_that_is_too_large_is_not_sent() {
        let command = EngineCommand::Start(StartAttempt {
            attempt: attempt(),
            prompt: vec![u32::MAX; 4_000_000],
            committed: vec![],
            expect_logprobs: vec![],
            suspect: false,
            priority: 0,
            fork_of: None,
            cache_salt: 0,
            sampling: SamplingParams::default(),
        });
        let mut out = vec![1, 2, 3];
        assert!(matches!(
            encode_into(&command, &mut out),
            Err(CodecError::TooLarge { .. })
        ));
        assert_eq!(out, [1, 2, 3]);
    }

    #[test]
    fn malformed_and_truncated_frames_are_errors() {
        let whole = encode(&EngineCommand::Cancel { attempt: attempt() }).unwrap();
        let error = FrameReader::new(&whole[..whole.len() - 1])
            .read::<EngineCommand>()
            .unwrap_err();
        assert!(
            matches!(error, CodecError::Truncated { missing: 1 }),
            "{error}"
        );
        let mut trailing = whole.clone();
        trailing.push(0xc0);
        trailing[3] += 1;
        assert!(matches!(
            FrameReader::new(&trailing[..]).read::<EngineCommand>(),
            Err(CodecError::Malformed { .. })
        ));
        // 2 is MessagePack's other spelling of the third variant, which carries no data.
        for byte in (0..=255_u8).filter(|&byte| byte != 2) {
            let frame = [0, 0, 0, 1, byte];
            assert!(
                FrameReader::new(&frame[..])
                    .read::<EngineCommand>()
                    .is_err(),
                "body {byte:#x}"
            );
        }
    }

    #[test]
    fn no_mutation_of_a_frame_panics() {
        let mut bytes = Vec::new();
        for command in commands().iter().skip(1) {
            encode_into(command, &mut bytes).unwrap();
        }
        encode_into(&commands()[0], &mut bytes).unwrap();
        bytes.truncate(400);
        for index in 0..bytes.len() {
            for bit in 0..8 {
                let mut mutated = bytes.clone();
                mutated[index] ^= 1 << bit;
                let mut reader = FrameReader::new(&mutated[..]);
                while let Ok(Some(_)) = reader.read::<EngineCommand>() {}
            }
        }
    }
}
