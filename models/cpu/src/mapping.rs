//! A file mapped at an address where huge pages fit, and asked for them.
//!
//! Files of `/dev/shm` get huge pages only where that file system was mounted so, which is nowhere the default; `MADV_COLLAPSE` (Linux 6.1)
//! makes them all the same, if the mapping is aligned. Where that is refused the pages stay small: the same bits, more slowly read.

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;

/// A huge page of x86-64 and of 64-bit Arm with small base pages.
const HUGE_PAGE: usize = 2 << 20;

/// All of a file, shared.
pub struct Mapping {
    start: *mut u8,
    len: usize,
    writable: bool,
}

// SAFETY: plain memory that nobody else changes; see `Mapping::of`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `file`.
    ///
    /// # Errors
    /// What the system says.
    ///
    /// # Safety
    /// Nobody else may write to the file, or shorten it, while it is mapped.
    pub unsafe fn of(file: &File, len: usize, writable: bool) -> io::Result<Self> {
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let reserved = len.next_multiple_of(HUGE_PAGE) + HUGE_PAGE;
        // SAFETY: a fresh range of addresses, into which the file is then mapped at an aligned place; the rest is given back.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let range = libc::mmap(
                std::ptr::null_mut(),
                reserved,
                libc::PROT_NONE,
                flags,
                -1,
                0,
            );
            if range == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let aligned = range.map_addr(|address| address.next_multiple_of(HUGE_PAGE));
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            let start = libc::mmap(aligned, len, protection, flags, file.as_raw_fd(), 0);
            if start == libc::MAP_FAILED {
                let error = io::Error::last_os_error();
                libc::munmap(range, reserved);
                return Err(error);
            }
            let before = aligned.addr() - range.addr();
            if before > 0 {
                libc::munmap(range, before);
            }
            let end = len.next_multiple_of(page_bytes());
            libc::munmap(start.byte_add(end), reserved - before - end);
            Ok(Self {
                start: start.cast(),
                len,
                writable,
            })
        }
    }

    /// Takes memory for every page now.
    ///
    /// # Errors
    /// If there is not enough: later, a write would end the process.
    pub fn populate(&self) -> io::Result<()> {
        self.advise(libc::MADV_POPULATE_WRITE)
    }

    /// Asks for huge pages; a refusal costs speed only.
    pub fn collapse(&self) {
        const MADV_COLLAPSE: i32 = 25;
        let _ = self.advise(MADV_COLLAPSE);
    }

    fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: our own mapping; neither advice changes its contents.
        match unsafe { libc::madvise(self.start.cast(), self.len, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn page_bytes() -> usize {
    // SAFETY: a query.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

impl Deref for Mapping {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: mapped for as long as this lives.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl DerefMut for Mapping {
    fn deref_mut(&mut self) -> &mut [u8] {
        assert!(self.writable, "a mapping for reading");
        // SAFETY: as above, and writable.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody refers to it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}
