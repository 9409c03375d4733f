//! Blocks that leave for another engine or a store, and blocks that come from there.
//!
//! Whatever is lost on the way is computed instead: a transfer only ever makes a resume faster.

use super::Scheduler;
use crate::{
    blocks::BlockHash,
    kv_frame::{self, KvTransferError},
    runner::{BLOCK, BlockId, ModelRunner},
};

impl Scheduler {
    /// Appends the frame of a registered block, used or cached, to `out`; on an error `out` is as it was.
    ///
    /// # Errors
    /// [`KvTransferError::Unknown`], [`KvTransferError::Runner`].
    pub fn export(
        &mut self,
        runner: &mut dyn ModelRunner,
        hash: BlockHash,
        out: &mut Vec<u8>,
    ) -> Result<(), KvTransferError> {
        let block = self
            .blocks
            .lookup(hash)
            .ok_or(KvTransferError::Unknown(hash))?;
        let start = out.len();
        self.write_frame(runner, hash, block, out)
            .inspect_err(|_| out.truncate(start))
    }

    /// The frames of the longest known prefix of `tokens`, from the beginning; none if its first block is not here.
    ///
    /// # Errors
    /// [`KvTransferError::Runner`].
    pub fn export_prefix(
        &mut self,
        runner: &mut dyn ModelRunner,
        tokens: &[u32],
        salt: u128,
    ) -> Result<Vec<Vec<u8>>, KvTransferError> {
        let mut frames = Vec::new();
        let root = BlockHash::root(&self.limits.fingerprint, salt);
        let mut parent = root;
        for block in tokens.as_chunks::<BLOCK>().0 {
            parent = self.blocks.hash(root, parent, block);
            let Some(block) = self.blocks.lookup(parent) else {
                break;
            };
            let mut frame = Vec::new();
            self.write_frame(runner, parent, block, &mut frame)?;
            frames.push(frame);
        }
        Ok(frames)
    }

    /// Puts the block of a frame into the cache, for the price of the prefix that was not asked for longest; used blocks stay.
    /// One that is here already is left alone.
    ///
    /// # Errors
    /// [`KvTransferError`]. Nothing has changed then, but that a cached block may be gone after [`KvTransferError::Runner`].
    pub fn import(
        &mut self,
        runner: &mut dyn ModelRunner,
        frame: &[u8],
    ) -> Result<BlockHash, KvTransferError> {
        let (content, bytes) = kv_frame::read(frame, &self.limits.fingerprint, self.block_bytes)?;
        if self.blocks.lookup(content.hash).is_some() {
            return Ok(content.hash);
        }
        // The block may be one that a planned copy still reads from, or writes to in vain.
        self.make_copies(runner)?;
        let block = self.blocks.allocate().ok_or(KvTransferError::NoRoom {
            blocks: self.blocks.counts().total(),
        })?;
        let imported = runner.import_block(block, bytes);
        if imported.is_ok() {
            self.blocks.register(block, content);
        }
        self.blocks.release(block);
        imported?;
        Ok(content.hash)
    }

    fn write_frame(
        &self,
        runner: &mut dyn ModelRunner,
        hash: BlockHash,
        block: BlockId,
        out: &mut Vec<u8>,
    ) -> Result<(), KvTransferError> {
        let content = self
            .blocks
            .content(block)
            .ok_or(KvTransferError::Unknown(hash))?;
        let start = out.len();
        kv_frame::write_header(&self.limits.fingerprint, content, self.block_bytes, out);
        runner.export_block(block, out)?;
        kv_frame::write_checksum(start, out);
        Ok(())
    }
}
