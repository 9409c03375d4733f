//! How much waits to be written on one connection, and who waits for that to become less.
//!
//! Credit counts events, not bytes, and it is what the client says. So streams also look whether their connection is
//! full before they show more: the log of a request is the buffer, not the connection's queue.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use understudy_protocol::message::ServerMessage;

/// Above this, streams hold their events back. What is queued goes beyond it by one turn of each stream at most.
pub const FULL_BYTES: usize = 1 << 20;

type Waker = Box<dyn FnOnce() + Send>;

/// See the module.
#[derive(Default)]
pub(super) struct Room {
    queued: AtomicUsize,
    /// At most one for each stream.
    waiting: Mutex<Vec<Waker>>,
}

impl Room {
    pub(super) fn queued(&self) -> usize {
        self.queued.load(Relaxed)
    }

    pub(super) fn is_full(&self) -> bool {
        self.queued() >= FULL_BYTES
    }

    pub(super) fn add(&self, bytes: usize) {
        self.queued.fetch_add(bytes, Relaxed);
    }

    /// That much was written. Whoever waits is woken with half of the room free, not one by one with each write.
    pub(super) fn free(&self, bytes: usize) {
        let before = self.queued.fetch_sub(bytes, Relaxed);
        if before - bytes < FULL_BYTES / 2 {
            let waiting = std::mem::take(&mut *self.lock());
            waiting.into_iter().for_each(|wake| wake());
        }
    }

    /// Calls `wake` when there is room again: at once if there is.
    pub(super) fn when_free(&self, wake: impl FnOnce() + Send + 'static) {
        let mut waiting = self.lock();
        // The writer frees first and looks for who waits second: looked at under the lock, no wake-up is missed.
        if self.queued() < FULL_BYTES / 2 {
            drop(waiting);
            return wake();
        }
        waiting.push(Box::new(wake));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Waker>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Room {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Room")
            .field("queued", &self.queued())
            .finish_non_exhaustive()
    }
}

/// About what a message takes in memory while it waits.
pub(super) fn weight(message: &ServerMessage) -> usize {
    let more = match message {
        ServerMessage::Token(event) => {
            event.text.len() + size_of_val(event.top_logprobs.as_slice())
        }
        ServerMessage::Finished { text, .. } => text.len(),
        ServerMessage::Error { error, .. } => error.message.len(),
        _ => 0,
    };
    size_of::<super::Outgoing>() + more
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn who_waits_is_woken_once_and_late_enough() {
        let room = Room::default();
        let woken = Arc::new(AtomicUsize::new(0));
        let wake = || {
            let woken = woken.clone();
            move || {
                woken.fetch_add(1, Relaxed);
            }
        };
        room.add(FULL_BYTES);
        assert!(room.is_full());
        room.when_free(wake());
        room.when_free(wake());
        room.free(FULL_BYTES / 2);
        assert_eq!(woken.load(Relaxed), 0, "not while it is half full");
        room.free(1);
        assert_eq!(woken.load(Relaxed), 2);
        room.free(1);
        assert_eq!(woken.load(Relaxed), 2);
        room.when_free(wake());
        assert_eq!(woken.load(Relaxed), 3, "at once");
    }
}
