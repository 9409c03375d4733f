//! What a stream's handle and its task tell each other beside the events: small facts, each written by one side.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::SeqCst};
use std::sync::{Mutex, OnceLock, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;
use understudy_protocol::RequestId;

/// The caller holds the handle.
const HELD: u8 = 0;
/// The caller has dropped it: nobody wants the request any more.
const DROPPED: u8 = 1;
/// The caller has left the request to go on without a reader.
const DETACHED: u8 = 2;

pub(super) struct Shared {
    /// Wakes the task: something below that the handle writes has changed.
    changed: Notify,
    // Written by the handle:
    handle: AtomicU8,
    cancelled: AtomicBool,
    /// The first position that the caller has not been given.
    taken: AtomicU32,
    // Written by the task:
    /// The handle wakes the task when it has taken the tokens before this position.
    wake_at: AtomicU32,
    request: OnceLock<RequestId>,
    recoveries: AtomicU32,
    /// Since when a connection holds the request; `None` in recovery.
    attached_at: Mutex<Option<Instant>>,
}

impl Shared {
    pub fn new(request: Option<RequestId>, next_position: u32) -> Self {
        Self {
            changed: Notify::new(),
            handle: AtomicU8::new(HELD),
            cancelled: AtomicBool::new(false),
            taken: AtomicU32::new(next_position),
            wake_at: AtomicU32::new(next_position),
            request: request.map_or_else(OnceLock::new, OnceLock::from),
            recoveries: AtomicU32::new(0),
            attached_at: Mutex::new(None),
        }
    }

    pub fn request(&self) -> Option<RequestId> {
        self.request.get().copied()
    }

    pub fn set_request(&self, request: RequestId) {
        let _ = self.request.set(request);
    }

    pub fn recoveries(&self) -> u32 {
        self.recoveries.load(SeqCst)
    }

    pub fn count_recovery(&self) {
        self.recoveries.fetch_add(1, SeqCst);
    }

    pub fn attached_at(&self) -> Option<Instant> {
        *self.lock_attached_at()
    }

    pub fn set_attached_at(&self, at: Option<Instant>) {
        *self.lock_attached_at() = at;
    }

    fn lock_attached_at(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.attached_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The handle has given the caller the tokens before `position`.
    pub fn take(&self, position: u32) {
        self.taken.store(position, SeqCst);
        // Stored above before it is read here, and the other way round in the task: one of both sees the other's.
        if position >= self.wake_at.load(SeqCst) {
            self.changed.notify_one();
        }
    }

    pub fn taken(&self) -> u32 {
        self.taken.load(SeqCst)
    }

    /// Has the task woken when the tokens before `position` are taken; it must look at [`taken`](Self::taken) once more
    /// after this.
    pub fn wake_at(&self, position: u32) {
        self.wake_at.store(position, SeqCst);
    }

    pub fn cancel(&self) {
        self.cancelled.store(true, SeqCst);
        self.changed.notify_one();
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(SeqCst)
    }

    /// The handle goes: with its request, or without.
    pub fn leave(&self, detached: bool) {
        let how = if detached { DETACHED } else { DROPPED };
        // The first word counts: a detached handle is dropped right after.
        let _ = self.handle.compare_exchange(HELD, how, SeqCst, SeqCst);
        self.changed.notify_one();
    }

    pub fn is_left(&self) -> bool {
        self.handle.load(SeqCst) != HELD
    }

    pub fn is_detached(&self) -> bool {
        self.handle.load(SeqCst) == DETACHED
    }

    /// Until the handle has written something, possibly before this call. For the task alone.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Until the handle has gone, or wants the request cancelled, which it did not `before`. For the task alone.
    pub async fn new_wish(&self, cancelled_before: bool) {
        while !self.is_left() && self.is_cancelled() == cancelled_before {
            self.changed().await;
        }
    }
}
