//! What is said of a panic: where it happened, and nothing else.
//!
//! The standard hook prints the message. A message is made from whatever values were at hand, and these may hold a
//! client's prompt: `called unwrap() on an Err value: InvalidToken("…")`.

use std::panic::PanicHookInfo;
use std::time::Duration;

use crate::logging::LogGuard;

/// How long a panicking thread waits for its line to be written: the process may be about to end.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(250);

/// Logs panics with their thread and location from now on, and keeps their messages out of the log and off the terminal.
pub fn install_panic_hook(logs: &LogGuard) {
    let logs = logs.clone();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        logs.flush(FLUSH_TIMEOUT);
    }));
}

fn report(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let location = panic.location().map(ToString::to_string);
    tracing::error!(
        thread = thread.name().unwrap_or("unnamed"),
        location = location.as_deref().unwrap_or("unknown"),
        "a thread panicked; its message is withheld, because it may quote what clients sent"
    );
}
