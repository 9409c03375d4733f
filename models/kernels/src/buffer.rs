//! Memory for weights and caches: zeroed, aligned to a cache line, untouched until used, and on huge pages where the system has them;
//! and views of memory that belongs to somebody else, such as a mapped file of packed weights.
//!
//! Invariant: allocation touches no page. A KV cache for the full context costs physical memory only for the positions in use.

use std::ops::Deref;
use std::sync::Arc;

/// Bytes of a cache line, and the alignment of the first element.
pub const LINE_BYTES: usize = 64;
/// From this size on, huge pages save more page-table walks than they may waste.
const HUGE_BYTES: usize = 4 << 20;

/// A fixed-length, zero-initialised slice whose first element is aligned to 64 bytes.
pub struct Buffer<T> {
    /// Comes from `calloc`, which does not touch fresh pages; longer than `len` by the alignment's slack.
    memory: Vec<T>,
    first: usize,
    len: usize,
}

/// Plain numbers, for which all-zero bytes are a value.
pub trait Element: Copy + Default {}
impl Element for f32 {}
impl Element for i32 {}
impl Element for u32 {}
impl Element for u16 {}
impl Element for u8 {}

impl<T: Element> Buffer<T> {
    /// `len` zeros.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let slack = LINE_BYTES / size_of::<T>();
        // `vec!` of a zero value is the standard library's road to `calloc`.
        let memory = vec![T::default(); len + slack];
        let misaligned = memory.as_ptr().addr() % LINE_BYTES;
        let first = if misaligned == 0 {
            0
        } else {
            (LINE_BYTES - misaligned) / size_of::<T>()
        };
        let buffer = Self { memory, first, len };
        buffer.advise_huge_pages();
        buffer
    }

    /// Asks for transparent huge pages; a refusal costs speed only.
    fn advise_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        if self.len * size_of::<T>() >= HUGE_BYTES {
            const PAGE: usize = 4096;
            const MADV_HUGEPAGE: i32 = 14;
            unsafe extern "C" {
                fn madvise(address: *mut core::ffi::c_void, length: usize, advice: i32) -> i32;
            }
            let start = self.memory.as_ptr().addr().next_multiple_of(PAGE);
            let end =
                (self.memory.as_ptr().addr() + self.memory.len() * size_of::<T>()) / PAGE * PAGE;
            // SAFETY: the pages lie within this allocation, and the advice does not change their contents.
            let _ = unsafe {
                madvise(
                    self.memory.as_ptr().with_addr(start).cast_mut().cast(),
                    end - start,
                    MADV_HUGEPAGE,
                )
            };
        }
    }
}

/// Memory that outlives every view of it: a [`Buffer`], a mapped file.
pub type SharedMemory = Arc<dyn Deref<Target = [u8]> + Send + Sync>;

/// A read-only range of shared memory that starts at a multiple of 64 bytes. A clone is another view of the same memory.
#[derive(Clone)]
pub struct Bytes {
    owner: SharedMemory,
    offset: usize,
    len: usize,
}

impl Bytes {
    /// `len` bytes of `owner` from `offset` on.
    ///
    /// # Panics
    /// If the range leaves the memory or does not start at a multiple of [`LINE_BYTES`].
    #[must_use]
    pub fn shared(owner: SharedMemory, offset: usize, len: usize) -> Self {
        let bytes = Self { owner, offset, len };
        let address = bytes.as_ptr().addr();
        assert!(
            address.is_multiple_of(LINE_BYTES),
            "memory at {address:#x} is not aligned to {LINE_BYTES} bytes"
        );
        bytes
    }
}

impl From<Buffer<u8>> for Bytes {
    fn from(buffer: Buffer<u8>) -> Self {
        let len = buffer.len();
        Self::shared(Arc::new(buffer), 0, len)
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.owner[self.offset..][..self.len]
    }
}

/// Bytes as numbers of the machine's byte order.
///
/// # Panics
/// If they are not aligned for `T` or no whole number of them.
pub(crate) fn numbers<T: Element>(bytes: &[u8]) -> &[T] {
    // SAFETY: all `Element`s are plain numbers, for which all bit patterns are values.
    let (before, values, after) = unsafe { bytes.align_to() };
    assert!(before.is_empty() && after.is_empty(), "misaligned numbers");
    values
}

/// [`numbers`], to be written.
///
/// # Panics
/// As [`numbers`].
pub(crate) fn numbers_mut<T: Element>(bytes: &mut [u8]) -> &mut [T] {
    // SAFETY: as above.
    let (before, values, after) = unsafe { bytes.align_to_mut() };
    assert!(before.is_empty() && after.is_empty(), "misaligned numbers");
    values
}

/// A mutable slice that tasks cut disjoint pieces from.
pub(crate) struct Pieces<T> {
    start: *mut T,
    len: usize,
}
// SAFETY: see `piece`.
unsafe impl<T: Element + Send> Sync for Pieces<T> {}

impl<T: Element> Pieces<T> {
    pub fn new(slice: &mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
        }
    }

    /// # Safety
    /// No element may be in two pieces at the same time, and the slice must be alive.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn piece(&self, range: std::ops::Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.memory[self.first..self.first + self.len]
    }
}

impl<T> std::ops::DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.first..self.first + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_zeroed_aligned_and_of_the_asked_length() {
        for len in [0, 1, 7, 48, 5000, 3 << 20] {
            let buffer = Buffer::<f32>::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr().addr() % 64, 0);
            assert!(buffer.iter().all(|x| *x == 0.0));
            let narrow = Buffer::<u16>::zeroed(len);
            assert_eq!((narrow.len(), narrow.as_ptr().addr() % 64), (len, 0));
        }
    }

    #[test]
    fn views_share_their_memory_and_know_their_range() {
        let mut buffer = Buffer::<u8>::zeroed(256);
        buffer[64..72].copy_from_slice(&[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        let owner: SharedMemory = Arc::new(buffer);
        let view = Bytes::shared(Arc::clone(&owner), 64, 8);
        assert_eq!(numbers::<i32>(&view.clone()), [1, -1]);
        assert_eq!(view.as_ptr(), owner[64..].as_ptr());
    }

    #[test]
    #[should_panic(expected = "is not aligned to 64 bytes")]
    fn a_misaligned_view_is_refused() {
        let _ = Bytes::shared(Arc::new(Buffer::<u8>::zeroed(256)), 32, 8);
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn a_view_beyond_the_memory_is_refused() {
        let _ = Bytes::shared(Arc::new(Buffer::<u8>::zeroed(256)), 192, 65);
    }
}
