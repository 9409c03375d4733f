//! A small pool of persistent threads for the kernels.
//!
//! ```text
//! ticket (u64):   tasks (32 bits) | next (32 bits)
//! ```
//!
//! One job runs at a time. A thread claims a task by adding 1 to the ticket, which tells it in the same instant whether the job
//! has tasks left; so a thread that comes late either helps with the job that is current or goes away empty-handed, and a job never waits for
//! a thread that has not claimed anything (on a busy machine the caller just does all the work itself).
//!
//! Invariants: `run` returns only after every task has finished; a task runs exactly once; which thread runs it is open,
//! so a task must own what it writes. Waiting threads spin for a bounded time, then sleep.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

const FIELD_BITS: u32 = 32;
const FIELD_MASK: u64 = (1 << FIELD_BITS) - 1;
/// Tasks of one job at most; half the field, so that empty-handed claims cannot run over.
const MAX_TASKS: usize = 1 << (FIELD_BITS - 1);
/// How often a waiting thread looks before it sleeps: some tens of microseconds, the gap between two products of a step.
const SPINS_BEFORE_SLEEP: u32 = 4000;
/// How often the caller looks for the last task before it starts to give up its time slices.
const SPINS_BEFORE_YIELD: u32 = 4000;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

struct Shared {
    ticket: AtomicU64,
    /// Address of the current job's `&Task` on the caller's stack; valid while a claimed task is unfinished.
    job: AtomicUsize,
    finished: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    sleepers: Mutex<usize>,
    wake: Condvar,
    /// Fast view of `sleepers > 0`, so that publishing a job takes no lock while everyone spins.
    asleep: AtomicUsize,
}

/// Threads that run the tasks of one job at a time.
pub struct Pool {
    shared: Arc<Shared>,
    /// One job at a time; only contended if two owners share the pool.
    running: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} threads)", self.threads())
    }
}

impl Pool {
    /// A pool in which up to `threads` threads work at once, the caller among them. With 1, no thread is started. Where the
    /// system refuses a thread, the pool has fewer: that costs speed only.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            job: AtomicUsize::new(0),
            finished: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: Mutex::new(0),
            wake: Condvar::new(),
            asleep: AtomicUsize::new(0),
        });
        let workers = (1..threads.max(1))
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                let worker = std::thread::Builder::new().name(format!("kernel-{index}"));
                worker.spawn(move || shared.work()).ok()
            })
            .collect();
        Self {
            shared,
            running: Mutex::new(()),
            workers,
        }
    }

    /// How many threads may work at once, the caller among them.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0)`, ..., `task(tasks - 1)`, each once, and returns when all are done. Must not be called from within a task.
    ///
    /// # Panics
    /// If a task panicked.
    pub fn run(&self, tasks: usize, task: &Task<'_>) {
        if self.workers.is_empty() || tasks <= 1 {
            for index in 0..tasks {
                task(index);
            }
            return;
        }
        assert!(
            tasks <= MAX_TASKS,
            "{tasks} tasks in one job; at most {MAX_TASKS}"
        );
        let _one_job = lock(&self.running);
        let shared = &*self.shared;
        shared.finished.store(0, Ordering::Relaxed);
        shared
            .job
            .store((&raw const task).expose_provenance(), Ordering::Relaxed);
        // Publishes job and counter to whoever claims a task. SeqCst: ordered against a sleeper's last look.
        shared
            .ticket
            .store((tasks as u64) << FIELD_BITS, Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.sleepers));
            shared.wake.notify_all();
        }
        shared.claim_and_run();
        let mut looks = 0;
        while shared.finished.load(Ordering::Acquire) < tasks {
            looks += 1;
            if looks < SPINS_BEFORE_YIELD {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        assert!(
            !shared.panicked.swap(false, Ordering::Relaxed),
            "a kernel task panicked"
        );
    }
}

impl Shared {
    /// Runs tasks of the current job until none is left to claim.
    fn claim_and_run(&self) {
        loop {
            let ticket = self.ticket.fetch_add(1, Ordering::AcqRel);
            let (tasks, next) = (ticket >> FIELD_BITS, ticket & FIELD_MASK);
            if next >= tasks {
                return;
            }
            // SAFETY: the claim succeeded, so `run` waits for it: its `task` is alive, and was published with the ticket.
            let task = unsafe {
                *std::ptr::with_exposed_provenance::<&Task<'_>>(self.job.load(Ordering::Relaxed))
            };
            if catch_unwind(AssertUnwindSafe(|| task(next as usize))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.finished.fetch_add(1, Ordering::Release);
        }
    }

    fn has_tasks(&self) -> bool {
        let ticket = self.ticket.load(Ordering::SeqCst);
        (ticket & FIELD_MASK) < (ticket >> FIELD_BITS)
    }

    /// The life of a worker thread.
    fn work(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            if self.has_tasks() {
                self.claim_and_run();
                continue;
            }
            let spun = (0..SPINS_BEFORE_SLEEP).any(|_| {
                std::hint::spin_loop();
                self.has_tasks()
            });
            if !spun {
                self.sleep();
            }
        }
    }

    /// Sleeps until there are tasks or the pool is dropped.
    fn sleep(&self) {
        let mut sleepers = lock(&self.sleepers);
        *sleepers += 1;
        self.asleep.fetch_add(1, Ordering::SeqCst);
        while !self.has_tasks() && !self.stop.load(Ordering::SeqCst) {
            sleepers = self
                .wake
                .wait(sleepers)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *sleepers -= 1;
        self.asleep.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleepers));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches its tasks' panics; there is nothing to learn from joining but that it is gone.
            let _ = worker.join();
        }
    }
}

/// No code can panic while it holds one of these locks, so a poisoned one is still sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once() {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads);
            for tasks in (0..200).chain([4096]) {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts.iter().all(|c| c.load(Ordering::Relaxed) == 1),
                    "{threads} threads, {tasks} tasks"
                );
            }
        }
    }

    #[test]
    fn thousands_of_jobs_from_several_callers() {
        let pool = Pool::new(3);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for job in 0..5000_usize {
                        let sum = AtomicUsize::new(0);
                        pool.run(job % 9, &|i| {
                            sum.fetch_add(i + 1, Ordering::Relaxed);
                        });
                        let n = job % 9;
                        assert_eq!(sum.into_inner(), n * (n + 1) / 2);
                    }
                });
            }
        });
    }

    #[test]
    fn a_sleeping_pool_wakes_up() {
        let pool = Pool::new(2);
        for _ in 0..20 {
            // Wait for the condition that the worker sleeps, not for a time.
            let begun = std::time::Instant::now();
            while pool.shared.asleep.load(Ordering::SeqCst) == 0 {
                assert!(
                    begun.elapsed().as_secs() < 60,
                    "the worker does not go to sleep"
                );
                std::thread::yield_now();
            }
            let barrier = std::sync::Barrier::new(2);
            // Two tasks that meet: only possible if the worker woke up and took one.
            pool.run(2, &|_| {
                barrier.wait();
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, &|i| assert!(i != 3, "task three"))
        }));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(8, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 28);
    }
}
