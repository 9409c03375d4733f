//! The way of a log line from whoever logs to where it is written: a bounded buffer, and a thread that empties it.
//!
//! Invariant: who logs never waits for a disk, a terminal or a pipe. When what is written to stands still, lines are
//! kept up to [`MAX_QUEUED_BYTES`], then dropped and counted; heartbeats and requests go on.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait to be written, in bytes: some 20,000 lines. As much again may be on its way into the file.
pub const MAX_QUEUED_BYTES: usize = 4 << 20;
/// Longest wait for the last lines when logging ends; after that the process ends without them.
pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// What the buffers keep when they are empty.
const KEPT_BYTES: usize = 64 << 10;

/// Lines dropped since the process started. A process has one log.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Log lines dropped since the process started, because they could not be written fast enough or not at all.
pub fn dropped_lines() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Takes lines, and has them written. Clones share one buffer; the thread ends when the last of them is gone.
#[derive(Clone)]
pub(crate) struct Sink(Arc<Owner>);

/// Dropped with the last [`Sink`].
struct Owner(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is something to write, or nothing will ever come.
    filled: Condvar,
    /// Everything is written.
    emptied: Condvar,
}

#[derive(Default)]
struct State {
    lines: Vec<u8>,
    is_writing: bool,
    is_closed: bool,
    /// Lines dropped since the log last said so.
    missing: u64,
}

impl Sink {
    /// Starts the thread that writes to `out`.
    pub(crate) fn to(out: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let written = shared.clone();
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || written.write_to(out))?;
        Ok(Self(Arc::new(Owner(shared))))
    }

    /// Waits until everything is written, but not longer than `limit`. Returns whether it is.
    pub(crate) fn flush(&self, limit: Duration) -> bool {
        let shared = &self.0.0;
        let busy = |state: &mut State| state.is_writing || !state.lines.is_empty();
        let waited = shared
            .emptied
            .wait_timeout_while(shared.lock(), limit, busy)
            .unwrap_or_else(PoisonError::into_inner);
        !waited.1.timed_out()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.filled.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.lock();
        if state.lines.len() + line.len() > MAX_QUEUED_BYTES {
            state.missing += 1;
            DROPPED.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.lines.extend_from_slice(line);
        self.filled.notify_one();
    }

    fn write_to(&self, mut out: impl Write) {
        let mut batch = Vec::new();
        while let Some(missing) = self.next_batch(&mut batch) {
            if out.write_all(&batch).and_then(|()| out.flush()).is_err() {
                // A full disk, or a terminal that is gone. There is nowhere left to say so.
                let lines = batch.iter().filter(|byte| **byte == b'\n').count() as u64;
                DROPPED.fetch_add(lines, Ordering::Relaxed);
            }
            batch.clear();
            batch.shrink_to(KEPT_BYTES);
            if missing > 0 {
                tracing::warn!(
                    lines = missing,
                    "log lines are missing here: they came faster than they could be written"
                );
            }
        }
    }

    /// Waits for lines and takes them all; returns how many were dropped after them. `None` at the end.
    fn next_batch(&self, batch: &mut Vec<u8>) -> Option<u64> {
        let mut state = self.lock();
        state.is_writing = false;
        if state.lines.is_empty() {
            self.emptied.notify_all();
        }
        let waits = |state: &mut State| state.lines.is_empty() && !state.is_closed;
        let mut state = self
            .filled
            .wait_while(state, waits)
            .unwrap_or_else(PoisonError::into_inner);
        if state.lines.is_empty() {
            return None;
        }
        std::mem::swap(batch, &mut state.lines);
        state.is_writing = true;
        Some(std::mem::take(&mut state.missing))
    }
}

/// Takes one line at a time, as the formatter of `tracing-subscriber` writes them.
pub(crate) struct Line<'s>(&'s Shared);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'s> MakeWriter<'s> for Sink {
    type Writer = Line<'s>;

    fn make_writer(&'s self) -> Line<'s> {
        Line(&self.0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Says when it is asked to write, then waits until it may.
    struct Gate {
        asked: Sender<Vec<u8>>,
        open: Receiver<()>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.asked.send(bytes.to_vec());
            // A closed channel is an open gate.
            let _ = self.open.recv();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn gate() -> (Sink, Receiver<Vec<u8>>, Sender<()>) {
        let (asked, written) = channel();
        let (opener, open) = channel();
        (
            Sink::to(Gate { asked, open }).expect("a thread"),
            written,
            opener,
        )
    }

    fn log(sink: &Sink, line: &str) {
        sink.make_writer()
            .write_all(line.as_bytes())
            .expect("taken");
    }

    #[test]
    fn a_blocked_output_holds_nobody_up_and_costs_bounded_memory() {
        let (sink, written, opener) = gate();
        log(&sink, "first\n");
        assert_eq!(written.recv().expect("asked"), b"first\n");
        // The gate is shut, and stays so while ten times more is logged than is kept.
        let before = dropped_lines();
        let line = "x".repeat(1023) + "\n";
        let count = 10 * MAX_QUEUED_BYTES / line.len();
        for _ in 0..count {
            log(&sink, &line);
        }
        assert!(!sink.flush(Duration::from_millis(10)), "nothing is written");
        let kept = MAX_QUEUED_BYTES / line.len();
        assert!(dropped_lines() - before >= (count - kept) as u64);
        assert_eq!(sink.0.0.lock().lines.len(), kept * line.len());
        drop(opener);
        assert!(sink.flush(Duration::from_secs(20)), "it goes on");
        assert_eq!(written.recv().expect("asked").len(), kept * line.len());
    }

    #[test]
    fn everything_is_written_in_order_before_a_flush_returns() {
        let (sink, written, opener) = gate();
        drop(opener);
        let mut all = String::new();
        for number in 0..5000 {
            let line = format!("line {number}\n");
            log(&sink, &line);
            all += &line;
        }
        assert!(sink.flush(Duration::from_secs(20)));
        assert_eq!(
            written.try_iter().flatten().collect::<Vec<_>>(),
            all.as_bytes()
        );
    }

    #[test]
    fn the_thread_writes_the_rest_and_ends_with_the_last_handle() {
        let (sink, written, opener) = gate();
        let other = sink.clone();
        log(&sink, "one\n");
        log(&other, "two\n");
        drop((sink, other, opener));
        let all: Vec<u8> = written.iter().flatten().collect();
        assert_eq!(all, b"one\ntwo\n", "and the channel is closed");
    }
}
