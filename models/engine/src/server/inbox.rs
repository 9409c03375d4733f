//! Commands on their way from the reader to the model thread.
//!
//! The reader must never wait for the model thread, or it would not see the socket close. So the inbox answers at once:
//! a start beyond its bound is refused, and a cancel is kept only for an attempt that is known, once.
//!
//! Invariant: at most `max_sequences + max_waiting` attempts are live (queued here, waiting or running), so starts and cancels in
//! the queue are bounded by it.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::frame::{AttemptError, AttemptId, StartAttempt};

/// An idle model thread looks around at least this often, although every command wakes it.
const IDLE_WAIT: Duration = Duration::from_secs(1);

/// What the model thread is to do between two steps.
#[derive(Debug)]
pub enum Work {
    Start {
        start: Box<StartAttempt>,
        arrived: Instant,
    },
    Cancel(AttemptId),
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Work>,
    live: HashSet<AttemptId>,
    /// 0 until the model is loaded.
    max_sequences: usize,
}

/// The queue itself; see the module.
#[derive(Debug)]
pub struct Inbox {
    max_waiting: usize,
    state: Mutex<State>,
    filled: Condvar,
}

impl Inbox {
    /// An empty inbox.
    pub fn new(max_waiting: usize) -> Self {
        Self {
            max_waiting,
            state: Mutex::default(),
            filled: Condvar::new(),
        }
    }

    /// Raises the bound, once the number of sequences that can run is known.
    pub fn set_max_sequences(&self, max_sequences: usize) {
        self.lock().max_sequences = max_sequences;
    }

    /// Queues an attempt. One that is live already is dropped: starting is idempotent.
    ///
    /// # Errors
    /// [`AttemptError::Full`].
    pub fn start(&self, start: StartAttempt) -> Result<(), AttemptError> {
        let mut state = self.lock();
        if state.live.contains(&start.attempt) {
            return Ok(());
        }
        // A later epoch of a live request replaces the earlier one, and so takes no further place.
        let replaces = state
            .live
            .iter()
            .any(|live| live.request == start.attempt.request);
        let capacity = state.max_sequences + self.max_waiting;
        if state.live.len() >= capacity && !replaces || state.live.len() > 2 * capacity {
            let running = state.live.len().min(state.max_sequences);
            return Err(AttemptError::Full {
                running: running as u32,
                waiting: (state.live.len() - running) as u32,
                limit: self.max_waiting as u32,
            });
        }
        state.live.insert(start.attempt);
        state.queue.push_back(Work::Start {
            start: Box::new(start),
            arrived: Instant::now(),
        });
        self.filled.notify_one();
        Ok(())
    }

    /// Queues a cancel, or takes the attempt out of the queue if it has not left it.
    pub fn cancel(&self, attempt: AttemptId) {
        let mut state = self.lock();
        let queued =
            |work: &Work| matches!(work, Work::Start { start, .. } if start.attempt == attempt);
        if let Some(index) = state.queue.iter().position(queued) {
            state.queue.remove(index);
            state.live.remove(&attempt);
        } else if state.live.remove(&attempt) {
            state.queue.push_back(Work::Cancel(attempt));
            self.filled.notify_one();
        }
    }

    /// Everything queued. With `wait`, sleeps until there is something, or for a second.
    pub fn take(&self, wait: bool) -> VecDeque<Work> {
        let mut state = self.lock();
        if wait && state.queue.is_empty() {
            let waited = self
                .filled
                .wait_timeout_while(state, IDLE_WAIT, |state| state.queue.is_empty());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        std::mem::take(&mut state.queue)
    }

    /// Attempts that are over make room for others.
    pub fn forget(&self, ended: &mut Vec<AttemptId>) {
        if !ended.is_empty() {
            let mut state = self.lock();
            for attempt in ended.drain(..) {
                state.live.remove(&attempt);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere ends the process by its own way; the state is whole between any two operations.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::SamplingParams;

    fn start(request: u128, epoch: u32) -> StartAttempt {
        StartAttempt {
            attempt: AttemptId { request, epoch },
            prompt: vec![1],
            committed: vec![],
            expect_logprobs: vec![],
            suspect: false,
            priority: 0,
            fork_of: None,
            cache_salt: 0,
            sampling: SamplingParams::default(),
        }
    }

    #[test]
    fn live_attempts_are_bounded_until_they_are_forgotten() {
        let inbox = Inbox::new(2);
        inbox.start(start(1, 1)).unwrap();
        inbox.start(start(2, 1)).unwrap();
        assert!(matches!(
            inbox.start(start(3, 1)),
            Err(AttemptError::Full { .. })
        ));
        assert_eq!(inbox.take(false).len(), 2);
        assert!(inbox.start(start(3, 1)).is_err(), "taken is still live");
        inbox.forget(&mut vec![AttemptId {
            request: 1,
            epoch: 1,
        }]);
        inbox.start(start(3, 1)).unwrap();
    }

    #[test]
    fn a_later_epoch_may_replace_a_live_one_at_the_bound() {
        let inbox = Inbox::new(1);
        inbox.start(start(1, 1)).unwrap();
        inbox.start(start(1, 2)).unwrap();
        inbox.start(start(1, 3)).unwrap();
        assert!(inbox.start(start(1, 4)).is_err(), "but not without end");
    }

    #[test]
    fn starts_and_cancels_do_not_pile_up() {
        let inbox = Inbox::new(4);
        for _ in 0..10 {
            inbox.start(start(1, 1)).unwrap();
        }
        inbox.cancel(AttemptId {
            request: 1,
            epoch: 1,
        });
        assert!(
            inbox.take(false).is_empty(),
            "a start that never left cancels out"
        );
        inbox.start(start(1, 1)).unwrap();
        assert_eq!(inbox.take(false).len(), 1);
        for request in 0..10 {
            inbox.cancel(AttemptId { request, epoch: 1 });
            inbox.cancel(AttemptId { request, epoch: 1 });
        }
        assert_eq!(inbox.take(false).len(), 1, "only the live one, once");
    }
}
