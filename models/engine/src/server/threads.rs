//! The reader and the heartbeat, and what they share with the model thread: the socket's write half and a few counters.

use std::{
    fs,
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread,
    time::Duration,
};

use super::{inbox::Inbox, status::ExitStatus};
use crate::{
    codec::{self, CodecError, FrameReader},
    frame::{EngineCommand, EngineEvent, EngineHealth, EngineInfo, HEARTBEAT_INTERVAL_MS},
    runner::Ticks,
    scheduler::Scheduler,
};

/// Heartbeat intervals between two reports of a load in progress.
const LOADING_EVERY: u32 = 3;

/// How long a node may take to read the last event.
const LAST_WORD_TIMEOUT: Duration = Duration::from_secs(1);

/// How far the process is, as far as the node may know. Guarded by the writer's lock, so that events keep their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Loading,
    Ready,
    /// `Fatal` is sent: nothing follows it.
    Over,
}

struct Writer {
    socket: UnixStream,
    scratch: Vec<u8>,
    phase: Phase,
}

/// Counters that the heartbeat reads while the model thread may be stuck. Each is a value of its own; a heartbeat may
/// mix two steps.
#[derive(Default)]
struct Counters {
    progress: AtomicU32,
    steps: AtomicU64,
    /// Moved by the runner within a step.
    ticks: Ticks,
    busy: AtomicBool,
    running: AtomicU32,
    waiting: AtomicU32,
    kv_used_tokens: AtomicU64,
    prompt_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    replayed_tokens: AtomicU64,
    close_logprobs: AtomicU64,
    kv_blocks_used: AtomicU32,
    kv_blocks_cached: AtomicU32,
    kv_blocks_total: AtomicU32,
    prefix_hit_tokens: AtomicU64,
    preemptions: AtomicU64,
    drafted_tokens: AtomicU64,
    accepted_tokens: AtomicU64,
}

/// The way to the node, shared by all threads. A node that does not read makes all of them wait, which is the
/// backpressure; when it goes away, writing fails and the reader sees the end.
pub struct Link {
    writer: Mutex<Writer>,
    counters: Counters,
    /// Set by the first thread that reports a fault: its exit code counts, and it ends the process.
    faulted: AtomicBool,
}

impl Link {
    pub fn new(socket: UnixStream) -> Self {
        let writer = Writer {
            socket,
            scratch: Vec::new(),
            phase: Phase::Loading,
        };
        Self {
            writer: Mutex::new(writer),
            counters: Counters::default(),
            faulted: AtomicBool::new(false),
        }
    }

    /// Notes how much is loaded; the heartbeat thread reports it.
    pub fn progress(&self, progress: f32) {
        self.counters
            .progress
            .store(progress.clamp(0.0, 1.0).to_bits(), Relaxed);
    }

    /// Tells the node that loading is over; no `Loading` follows.
    pub fn ready(&self, info: EngineInfo) -> Result<(), CodecError> {
        let mut writer = self.lock();
        writer.phase = Phase::Ready;
        writer.send(&EngineEvent::Ready(info))
    }

    /// The last event. Errors are of no use any more. Returns whether the process is the caller's to end; if not, another
    /// thread has said what its end is, and is about to bring it.
    #[must_use]
    pub fn fatal(&self, message: String) -> bool {
        // Before the node hears of it: it may close the socket at once, and the reader must know why.
        if self.faulted.swap(true, SeqCst) {
            return false;
        }
        let mut writer = self.lock();
        // The node may be the reason why we fail; it learns the rest from the exit code.
        let _ = writer.socket.set_write_timeout(Some(LAST_WORD_TIMEOUT));
        let _ = writer.send(&EngineEvent::Fatal { message });
        writer.phase = Phase::Over;
        true
    }

    pub fn send(&self, event: &EngineEvent) -> Result<(), CodecError> {
        self.lock().send(event)
    }

    /// Makes the model thread's state visible to the heartbeat.
    pub fn publish(&self, scheduler: &Scheduler, steps: u64) {
        let (counters, totals) = (&self.counters, scheduler.totals());
        counters.busy.store(scheduler.has_work(), Relaxed);
        counters.steps.store(steps, Relaxed);
        counters
            .running
            .store(scheduler.running_len() as u32, Relaxed);
        counters
            .waiting
            .store(scheduler.waiting_len() as u32, Relaxed);
        counters
            .kv_used_tokens
            .store(scheduler.kv_used_tokens(), Relaxed);
        counters.prompt_tokens.store(totals.prompt_tokens, Relaxed);
        counters
            .generated_tokens
            .store(totals.generated_tokens, Relaxed);
        counters
            .replayed_tokens
            .store(totals.replayed_tokens, Relaxed);
        counters
            .close_logprobs
            .store(totals.close_logprobs, Relaxed);
        let blocks = scheduler.block_counts();
        counters.kv_blocks_used.store(blocks.used as u32, Relaxed);
        counters
            .kv_blocks_cached
            .store(blocks.cached as u32, Relaxed);
        counters
            .kv_blocks_total
            .store(blocks.total() as u32, Relaxed);
        counters
            .prefix_hit_tokens
            .store(totals.prefix_hit_tokens, Relaxed);
        counters.preemptions.store(totals.preemptions, Relaxed);
        counters
            .drafted_tokens
            .store(totals.drafted_tokens, Relaxed);
        counters
            .accepted_tokens
            .store(totals.accepted_tokens, Relaxed);
    }

    /// What the runner shall move while it computes.
    pub fn ticks(&self) -> Ticks {
        self.counters.ticks.clone()
    }

    /// To be called with the writer locked: then a report that follows a step on the wire counts that step.
    fn health(&self, rss_bytes: u64) -> EngineHealth {
        let counters = &self.counters;
        EngineHealth {
            // Both only grow, so the sum does.
            steps: counters.steps.load(Relaxed) + counters.ticks.count(),
            busy: counters.busy.load(Relaxed),
            running: counters.running.load(Relaxed),
            waiting: counters.waiting.load(Relaxed),
            kv_used_tokens: counters.kv_used_tokens.load(Relaxed),
            prompt_tokens: counters.prompt_tokens.load(Relaxed),
            generated_tokens: counters.generated_tokens.load(Relaxed),
            replayed_tokens: counters.replayed_tokens.load(Relaxed),
            close_logprobs: counters.close_logprobs.load(Relaxed),
            kv_blocks_used: counters.kv_blocks_used.load(Relaxed),
            kv_blocks_cached: counters.kv_blocks_cached.load(Relaxed),
            kv_blocks_total: counters.kv_blocks_total.load(Relaxed),
            prefix_hit_tokens: counters.prefix_hit_tokens.load(Relaxed),
            preemptions: counters.preemptions.load(Relaxed),
            drafted_tokens: counters.drafted_tokens.load(Relaxed),
            accepted_tokens: counters.accepted_tokens.load(Relaxed),
            rss_bytes,
        }
    }

    /// One periodic report: of the load while it lasts, of the engine's health after it.
    fn beat(&self, tick: u32) -> Result<(), CodecError> {
        let rss_bytes = rss_bytes();
        let mut writer = self.lock();
        match writer.phase {
            Phase::Loading if tick.is_multiple_of(LOADING_EVERY) => {
                let progress = f32::from_bits(self.counters.progress.load(Relaxed));
                writer.send(&EngineEvent::Loading { progress })
            }
            Phase::Ready => writer.send(&EngineEvent::Heartbeat(self.health(rss_bytes))),
            Phase::Loading | Phase::Over => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writer {
    fn send(&mut self, event: &EngineEvent) -> Result<(), CodecError> {
        if self.phase == Phase::Over {
            return Ok(());
        }
        codec::write_frame(&mut self.socket, event, &mut self.scratch)
    }
}

/// Starts the thread that turns bytes into commands, and ends the process when they end.
pub fn spawn_reader(socket: UnixStream, link: Arc<Link>, inbox: Arc<Inbox>) -> std::io::Result<()> {
    thread::Builder::new()
        .name("reader".to_owned())
        .spawn(move || {
            let (status, ours) = match read_commands(socket, &link, &inbox) {
                // A reset is how a killed node's socket may look; it is an end like any other.
                Ok(()) | Err(CodecError::Io(_) | CodecError::Truncated { .. }) => {
                    (ExitStatus::Done, !link.faulted.load(SeqCst))
                }
                Err(error) => {
                    let message = format!("the node sent something that is no command: {error}");
                    (ExitStatus::BadFrame, link.fatal(message))
                }
            };
            if ours {
                status.exit_now();
            }
            // A node that has read `Fatal` closes the socket. The exit code must be the fault's all the same: whoever reported it
            // is on its way out of the process.
            park_for_ever()
        })?;
    Ok(())
}

pub fn park_for_ever() -> ! {
    loop {
        thread::park();
    }
}

/// Returns when the socket closes, or the node asks for the end.
fn read_commands(socket: UnixStream, link: &Link, inbox: &Inbox) -> Result<(), CodecError> {
    let mut frames = FrameReader::new(socket);
    while let Some(command) = frames.read()? {
        match command {
            EngineCommand::Start(start) => {
                let attempt = start.attempt;
                if let Err(error) = inbox.start(start) {
                    link.send(&EngineEvent::AttemptFailed { attempt, error })?;
                }
            }
            EngineCommand::Cancel { attempt } => inbox.cancel(attempt),
            EngineCommand::Shutdown => return Ok(()),
        }
    }
    Ok(())
}

/// Starts the thread that proves life. It ends when the node is gone; the reader ends the process then.
pub fn spawn_heartbeat(link: Arc<Link>) -> std::io::Result<()> {
    thread::Builder::new()
        .name("heartbeat".to_owned())
        .spawn(move || {
            for tick in 0_u32.. {
                if link.beat(tick).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(HEARTBEAT_INTERVAL_MS));
            }
        })?;
    Ok(())
}

/// Resident memory of this process; 0 if the kernel does not say.
fn rss_bytes() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|statm| statm.split(' ').nth(1)?.parse().ok());
    // SAFETY: a query without side effects.
    let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    pages.unwrap_or(0_u64) * u64::try_from(page_bytes).unwrap_or(0)
}
