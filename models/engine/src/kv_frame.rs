//! A block of the KV cache as bytes, on its way to another engine or to a store.
//!
//! ```text
//!  0      4         8             24       40     56       120      124      124 + length
//!  +------+---------+-------------+--------+------+--------+--------+--------+----------+
//!  | UKVB | version | fingerprint | parent | hash | tokens | length | bytes  | checksum |
//!  +------+---------+-------------+--------+------+--------+--------+--------+----------+
//! ```
//!
//! Numbers are little-endian. `fingerprint` is the first 16 bytes of its SHA-256, `tokens` are the 16 ids, `bytes` what the
//! runner exported, and the checksum is the CRC-32C of everything before it.
//!
//! Invariant: a frame is taken only if it proves what it is: `hash` must be that of `parent` and `tokens`, and the
//! fingerprint the engine's own. A checksum finds damage, not malice: frames come from engines of the same cluster.

use sha2::{Digest, Sha256};

use crate::{
    blocks::{BlockHash, Content},
    runner::{BLOCK, StepError},
};

const MAGIC: [u8; 4] = *b"UKVB";
/// Raised whenever the format changes.
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 124;
const CHECKSUM_BYTES: usize = 4;

/// Why a block was not exported or imported. The cache is as it was.
#[derive(Debug, thiserror::Error)]
pub enum KvTransferError {
    /// No block of this content is here (any more).
    #[error("no block {0:?} is cached here")]
    Unknown(BlockHash),
    /// Shorter than a header, or of another length than the header says.
    #[error("a block frame of {got} bytes; it should have {expected}")]
    Length { expected: usize, got: usize },
    #[error("not a block frame: it begins with {0:02x?}")]
    Magic([u8; 4]),
    #[error("a block frame of version {0}; this engine knows version {VERSION}")]
    Version(u32),
    /// The bytes were changed on the way.
    #[error("a damaged block frame: checksum {stated:#010x}, computed {computed:#010x}")]
    Checksum { stated: u32, computed: u32 },
    /// Made by another model, or with other numerics.
    #[error("a block of an engine with another fingerprint")]
    Fingerprint,
    /// The name is not that of the content.
    #[error("a block frame that says {stated:?} holds {computed:?}")]
    Hash {
        stated: BlockHash,
        computed: BlockHash,
    },
    /// Every block is used by a sequence.
    #[error("all {blocks} blocks of the cache are in use")]
    NoRoom { blocks: usize },
    /// The runner failed; the engine cannot go on.
    #[error(transparent)]
    Runner(#[from] StepError),
}

impl KvTransferError {
    /// Whether the same may work later.
    #[must_use]
    pub fn is_retriable(&self) -> bool {
        matches!(self, Self::NoRoom { .. })
    }
}

/// Writes everything before the runner's bytes, of which there will be `length`.
pub fn write_header(fingerprint: &str, content: &Content, length: usize, out: &mut Vec<u8>) {
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend(short_fingerprint(fingerprint));
    out.extend(content.parent.0);
    out.extend(content.hash.0);
    content
        .tokens
        .iter()
        .for_each(|id| out.extend(id.to_le_bytes()));
    out.extend((length as u32).to_le_bytes());
}

/// Closes the frame that begins at `start`.
pub fn write_checksum(start: usize, out: &mut Vec<u8>) {
    let checksum = crc32c(&out[start..]);
    out.extend(checksum.to_le_bytes());
}

/// Checks a frame from front to back; gives what it holds and the runner's bytes.
///
/// # Errors
/// [`KvTransferError`], all but those of the cache.
pub fn read<'a>(
    frame: &'a [u8],
    fingerprint: &str,
    length: usize,
) -> Result<(Content, &'a [u8]), KvTransferError> {
    let expected = HEADER_BYTES + length + CHECKSUM_BYTES;
    let mut rest = frame;
    let wrong_length = KvTransferError::Length {
        expected,
        got: frame.len(),
    };
    let Some(magic) = take(&mut rest) else {
        return Err(wrong_length);
    };
    if magic != MAGIC {
        return Err(KvTransferError::Magic(magic));
    }
    let Some(version) = take(&mut rest).map(u32::from_le_bytes) else {
        return Err(wrong_length);
    };
    if version != VERSION {
        return Err(KvTransferError::Version(version));
    }
    let (Some(theirs), Some(parent), Some(stated)) =
        (take(&mut rest), take(&mut rest), take(&mut rest))
    else {
        return Err(wrong_length);
    };
    let (Some(tokens), Some(said)) = (take::<{ 4 * BLOCK }>(&mut rest), take(&mut rest)) else {
        return Err(wrong_length);
    };
    // Another model's blocks have another size; that is said first, since it is the reason.
    if theirs != short_fingerprint(fingerprint) {
        return Err(KvTransferError::Fingerprint);
    }
    if frame.len() != expected || u32::from_le_bytes(said) as usize != length {
        return Err(wrong_length);
    }
    let (bytes, checksum) = rest.split_at(length);
    check_sum(&frame[..expected - CHECKSUM_BYTES], checksum)?;
    let words = tokens.as_chunks::<4>().0;
    let tokens = std::array::from_fn(|index| u32::from_le_bytes(words[index]));
    let (stated, parent) = (BlockHash(stated), BlockHash(parent));
    let computed = parent.child(&tokens);
    if stated != computed {
        return Err(KvTransferError::Hash { stated, computed });
    }
    let hash = stated;
    Ok((
        Content {
            hash,
            parent,
            tokens,
        },
        bytes,
    ))
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, left) = rest.split_first_chunk()?;
    *rest = left;
    Some(*taken)
}

fn check_sum(covered: &[u8], stated: &[u8]) -> Result<(), KvTransferError> {
    let stated = stated.try_into().map_or(0, u32::from_le_bytes);
    let computed = crc32c(covered);
    if stated == computed {
        Ok(())
    } else {
        Err(KvTransferError::Checksum { stated, computed })
    }
}

fn short_fingerprint(fingerprint: &str) -> [u8; 16] {
    let mut short = [0; 16];
    short.copy_from_slice(&Sha256::digest(fingerprint)[..16]);
    short
}

/// Castagnoli's polynomial, bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// `TABLES[k][b]`: what byte `b` does to the checksum with `k` more bytes after it.
static TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            value = (value >> 1) ^ (POLYNOMIAL * (value & 1));
            bit += 1;
        }
        tables[0][byte] = value;
        byte += 1;
    }
    let mut after = 1;
    while after < 8 {
        let mut byte = 0;
        while byte < 256 {
            let value = tables[after - 1][byte];
            tables[after][byte] = (value >> 8) ^ tables[0][(value & 0xff) as usize];
            byte += 1;
        }
        after += 1;
    }
    tables
}

/// CRC-32C (RFC 3720), eight bytes at a time.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    let (words, tail) = bytes.as_chunks::<8>();
    let mut crc = u32::MAX;
    for word in words {
        let mixed = u64::from_le_bytes(*word) ^ u64::from(crc);
        crc = (0..8).fold(0, |crc, byte| {
            crc ^ TABLES[7 - byte][(mixed >> (8 * byte)) as usize & 0xff]
        });
    }
    for &byte in tail {
        crc = (crc >> 8) ^ TABLES[0][((crc ^ u32::from(byte)) & 0xff) as usize];
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Vec<u8> {
        let parent = BlockHash::root("model", 7);
        let tokens = std::array::from_fn(|index| 1000 + index as u32);
        let content = Content {
            hash: parent.child(&tokens),
            parent,
            tokens,
        };
        let mut out = Vec::new();
        write_header("model", &content, 40, &mut out);
        out.extend((0..40).collect::<Vec<u8>>());
        write_checksum(0, &mut out);
        out
    }

    /// RFC 3720, B.4, and the usual check value.
    #[test]
    fn known_checksums() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
    }

    #[test]
    fn a_frame_gives_back_what_was_put_in() {
        let frame = frame();
        let (content, bytes) = read(&frame, "model", 40).unwrap();
        assert_eq!(content.tokens[15], 1015);
        assert_eq!(bytes, (0..40).collect::<Vec<u8>>());
    }

    #[test]
    fn every_changed_bit_and_every_cut_is_found() {
        let whole = frame();
        for cut in 0..whole.len() {
            assert!(read(&whole[..cut], "model", 40).is_err(), "{cut}");
        }
        for index in 0..whole.len() {
            for bit in 0..8 {
                let mut changed = whole.clone();
                changed[index] ^= 1 << bit;
                assert!(read(&changed, "model", 40).is_err(), "{index}");
            }
        }
    }

    #[test]
    fn errors_name_the_reason() {
        let whole = frame();
        let read = |frame: &[u8], model, length| read(frame, model, length).unwrap_err();
        assert!(matches!(
            read(&whole, "other", 99),
            KvTransferError::Fingerprint
        ));
        assert!(matches!(
            read(&whole, "model", 41),
            KvTransferError::Length {
                expected: 169,
                got: 168
            }
        ));
        assert!(matches!(
            read(b"HTTP/1.1", "model", 40),
            KvTransferError::Magic(_)
        ));
        // With a checksum that fits, the content still has to fit its name.
        let mut forged = whole[..whole.len() - 4].to_vec();
        forged[56] ^= 1;
        write_checksum(0, &mut forged);
        assert!(matches!(
            read(&forged, "model", 40),
            KvTransferError::Hash { .. }
        ));
        forged[4] = 9;
        assert!(matches!(
            read(&forged, "model", 40),
            KvTransferError::Version(9)
        ));
    }
}
