//! The engine process: one socket to its node, one thread for the model, and two that never wait for it.
//!
//! ```text
//!            +--------+  inbox   +--------------+
//!  socket ──>| reader |─────────>| model thread |── Step, AttemptFailed ──┐
//!            +--------+          +--------------+                         v
//!                 │ Full          +-----------+── Heartbeat, Loading ──> writer (a mutex) ──> socket
//!                 └───────────────| heartbeat |                           ^
//!                                 +-----------+───────────────────────────┘
//! ```
//!
//! The model thread is the one that calls [`serve`]: a [`ModelRunner`] need not be `Send`. While it is stuck in a step
//! the heartbeat goes on with the same watermark, which is how a node tells a hang from a death; while a step is merely
//! long the runner moves the watermark ([`Ticks`](crate::runner::Ticks)).
//!
//! Invariant: the process ends as soon as its socket does, even in the middle of a step: the reader ends it with
//! `_exit`. It owns nothing that needs a tidy end; every exit is a crash that its node knows how to follow.

mod inbox;
mod status;
mod threads;
mod waits;

use std::{
    mem::ManuallyDrop,
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use crate::{
    codec::CodecError,
    frame::{AttemptId, ENGINE_PROTOCOL, EngineEvent, EngineInfo},
    runner::{BLOCK, ModelInfo, ModelRunner},
    scheduler::{Scheduler, SchedulerOptions, StepOutcome},
};
use inbox::{Inbox, Work};
pub use status::ExitStatus;
use threads::Link;
use waits::Waits;

/// What [`serve`] needs to know besides the model.
#[derive(Debug, Clone, Copy, Default)]
pub struct ServeOptions {
    pub scheduler: SchedulerOptions,
}

/// A socket that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The number names no open file of this process.
    #[error(
        "file descriptor {fd} is not open: {source}; engines are started by a node, which passes its socket"
    )]
    NotOpen { fd: RawFd, source: nix::Error },
    /// It names something else.
    #[error("file descriptor {fd} is not a Unix socket: {source}")]
    NotASocket { fd: RawFd, source: std::io::Error },
    /// A thread could not be started, or the socket not be shared.
    #[error("cannot set up the engine's threads: {0}")]
    SetUp(#[from] std::io::Error),
}

/// Takes over the socket that the node has passed as descriptor `fd`, and keeps it from children of ours.
///
/// The number must be the one of the command line, taken once: whatever is open under it is closed with the stream.
///
/// # Errors
/// [`SocketError`].
pub fn inherited_socket(fd: RawFd) -> Result<UnixStream, SocketError> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    if fd < 0 {
        return Err(SocketError::NotOpen {
            fd,
            source: nix::Error::EBADF,
        });
    }
    // SAFETY: only queried; a number that is not open gives EBADF.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|source| SocketError::NotOpen { fd, source })?;
    // SAFETY: it is open, and by the contract of the command line it was passed for us to own.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    stream
        .local_addr()
        .map_err(|source| SocketError::NotASocket { fd, source })?;
    // A node with an event loop may have made the pair non-blocking; our threads are meant to block.
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Serves a node until it asks for the end, or something fails. Blocks; the model is loaded and run on this thread.
///
/// `loader` gets a function to report progress with (0.0 ..= 1.0), and says in words what is wrong if it fails.
/// If the socket closes, the process ends from within, and this function does not return. When it does, end the process
/// with [`ExitStatus::exit_now`]: the other threads still hold the socket, and a device library may hang in its destructors.
///
/// # Errors
/// [`SocketError::SetUp`] before anything was sent.
pub fn serve(
    socket: UnixStream,
    options: ServeOptions,
    loader: impl FnOnce(&mut dyn FnMut(f32)) -> Result<Box<dyn ModelRunner>, String>,
) -> Result<ExitStatus, SocketError> {
    let started = Instant::now();
    die_with_parent();
    let inbox = Arc::new(Inbox::new(options.scheduler.max_waiting));
    let link = Arc::new(Link::new(socket.try_clone()?));
    threads::spawn_reader(socket, Arc::clone(&link), Arc::clone(&inbox))?;
    threads::spawn_heartbeat(Arc::clone(&link))?;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let runner = loader(&mut |progress| link.progress(progress))
            .map_err(|message| (ExitStatus::LoadFailed, message))?;
        run(runner, options, &inbox, &link, started)
    }));
    let (status, message) = match outcome {
        Ok(Ok(never)) => match never {},
        Ok(Err(failure)) => failure,
        Err(panic) => (
            ExitStatus::Panicked,
            format!(
                "the model thread panicked: {}",
                crate::runner::panic_text(&*panic)
            ),
        ),
    };
    if !link.fatal(message) {
        threads::park_for_ever();
    }
    Ok(status)
}

/// The model thread's life after loading: it ends only by failing.
fn run(
    runner: Box<dyn ModelRunner>,
    options: ServeOptions,
    inbox: &Inbox,
    link: &Link,
    started: Instant,
) -> Result<std::convert::Infallible, (ExitStatus, String)> {
    // Never dropped: after a device fault a destructor may hang, and the node must hear of the fault first.
    let mut runner = ManuallyDrop::new(runner);
    runner.set_ticks(link.ticks());
    let mut scheduler = Scheduler::new(runner.info(), options.scheduler);
    inbox.set_max_sequences(runner.info().max_sequences);
    let send_failed = |error: CodecError| {
        (
            ExitStatus::BadFrame,
            format!("cannot send to the node: {error}"),
        )
    };
    link.ready(engine_info(runner.info(), started))
        .map_err(send_failed)?;
    let mut ended = Vec::new();
    let mut waits = Waits::default();
    let mut steps = 0;
    loop {
        for work in inbox.take(!scheduler.has_work()) {
            let failed = apply(&mut scheduler, work, &mut ended, &mut waits);
            if let Some(event) = failed {
                link.send(&event).map_err(send_failed)?;
            }
        }
        link.publish(&scheduler, steps);
        let begins = Instant::now();
        if let Some(attempt) = scheduler.plan() {
            link.send(&EngineEvent::Alone { attempt })
                .map_err(send_failed)?;
        }
        let outcome = scheduler
            .run(&mut **runner)
            .map_err(|error| (ExitStatus::StepFailed, error.to_string()))?;
        if let Some(mut outcome) = outcome {
            steps += 1;
            waits.step(&mut outcome, begins);
            link.publish(&scheduler, steps);
            let spent = report(outcome, steps, link, &mut ended).map_err(send_failed)?;
            scheduler.recycle(spent);
        }
        waits.forget(&ended);
        inbox.forget(&mut ended);
    }
}

/// Hands one command to the scheduler. Attempts that are over thereby are added to `ended`.
fn apply(
    scheduler: &mut Scheduler,
    work: Work,
    ended: &mut Vec<AttemptId>,
    waits: &mut Waits,
) -> Option<EngineEvent> {
    match work {
        Work::Cancel(attempt) => {
            scheduler.cancel(attempt);
            waits.forget(&[attempt]);
            None
        }
        Work::Start { start, arrived } => {
            let attempt = start.attempt;
            match scheduler.start(*start) {
                Ok(replaced) => {
                    waits.arrived(attempt, arrived);
                    ended.extend(replaced);
                    None
                }
                Err(error) => {
                    ended.push(attempt);
                    Some(EngineEvent::AttemptFailed { attempt, error })
                }
            }
        }
    }
}

/// Sends what a step brought forth. Returns the memory that it came in.
fn report(
    mut outcome: StepOutcome,
    step: u64,
    link: &Link,
    ended: &mut Vec<AttemptId>,
) -> Result<StepOutcome, CodecError> {
    let ended_well = outcome.tokens.iter().filter(|token| token.finish.is_some());
    ended.extend(ended_well.map(|token| token.attempt));
    let event = EngineEvent::Step {
        step,
        prompt_tokens: outcome.prompt_tokens,
        tokens: std::mem::take(&mut outcome.tokens),
    };
    link.send(&event)?;
    if let EngineEvent::Step { tokens, .. } = event {
        outcome.tokens = tokens;
    }
    for (attempt, error) in outcome.failed.drain(..) {
        ended.push(attempt);
        link.send(&EngineEvent::AttemptFailed { attempt, error })?;
    }
    Ok(outcome)
}

fn engine_info(info: &ModelInfo, started: Instant) -> EngineInfo {
    EngineInfo {
        protocol: ENGINE_PROTOCOL,
        pid: std::process::id(),
        architecture: info.architecture.clone(),
        context_length: info.context_length as u32,
        vocab_size: info.vocab_size as u32,
        eos_token_ids: info.eos_token_ids.clone(),
        device: info.device.clone(),
        dtype: info.dtype.clone(),
        max_sequences: info.max_sequences as u32,
        kv_capacity_tokens: (info.kv_blocks * BLOCK) as u64,
        fingerprint: info.fingerprint.clone(),
        load_ms: started.elapsed().as_millis() as u64,
    }
}

/// Asks the kernel to kill this process when the thread that started it ends: the second net under the socket.
fn die_with_parent() {
    // SAFETY: a plain system call that changes only this process's own setting.
    let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    debug_assert_eq!(result, 0, "PR_SET_PDEATHSIG takes any signal");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_no_descriptor_is_an_error() {
        for fd in [-1, -3, i32::MIN] {
            assert!(matches!(
                inherited_socket(fd),
                Err(SocketError::NotOpen { fd: named, .. }) if named == fd
            ));
        }
    }
}
