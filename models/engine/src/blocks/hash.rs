//! The name of a block's content: a hash of everything that its keys and values depend on.
//!
//! ```text
//! root  = H(domain, salt, fingerprint)          fingerprint: weights, numerics, shard plan
//! block = H(hash of the block before, or root; its 16 token ids)
//! ```
//!
//! H is SHA-256, cut to 128 bits: a collision would hand one request the keys of another, so it must not be possible to
//! make one.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::runner::BLOCK;

/// Raised when the meaning of the hash changes.
const DOMAIN: &[u8] = b"understudy-kv-1\0";

/// Names the content of a block, in every engine with the same fingerprint.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 16]);

impl BlockHash {
    /// The parent of a sequence's first block.
    #[must_use]
    pub fn root(fingerprint: &str, salt: u128) -> Self {
        let hash = Sha256::new()
            .chain_update(DOMAIN)
            .chain_update(salt.to_le_bytes())
            .chain_update(fingerprint);
        Self::cut(hash)
    }

    /// The block with these tokens after this one.
    #[must_use]
    pub fn child(self, tokens: &[u32; BLOCK]) -> Self {
        let mut bytes = [0; 4 * BLOCK];
        for (place, token) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(tokens) {
            *place = token.to_le_bytes();
        }
        Self::cut(Sha256::new().chain_update(self.0).chain_update(bytes))
    }

    fn cut(hash: Sha256) -> Self {
        let mut cut = [0; 16];
        cut.copy_from_slice(&hash.finalize()[..16]);
        Self(cut)
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_keys_depend_on_changes_the_name() {
        let root = BlockHash::root("model", 0);
        let tokens: [u32; BLOCK] = std::array::from_fn(|index| index as u32);
        let block = root.child(&tokens);
        assert_eq!(block, BlockHash::root("model", 0).child(&tokens));
        let mut other = tokens;
        other[15] += 1;
        for different in [
            root.child(&other),
            block.child(&tokens),
            BlockHash::root("model", 1).child(&tokens),
            BlockHash::root("modem", 0).child(&tokens),
        ] {
            assert_ne!(block, different);
        }
    }
}
