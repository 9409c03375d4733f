//! Memory for weights and caches: zeroed, aligned to a cache line, untouched until used, and on huge pages where the system has them.
//!
//! Invariant: allocation touches no page. A KV cache for the full context costs physical memory only for the positions in use.

/// Bytes of a cache line, and the alignment of the first element.
const LINE_BYTES: usize = 64;
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
impl Element for u16 {}

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

impl<T> std::ops::Deref for Buffer<T> {
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
}
