//! Starting and stopping a whole cluster: `understudy up`, `down`, `ps` and `logs`.
//!
//! The launcher starts one `understudy node` for each `[[node]]` of a configuration (here, or over ssh where the node
//! names a destination), waits until every replica is ready, streams one sample, and then supervises the node
//! processes until it is told to stop. `--detach` runs the same launcher in the background.
//!
//! Invariants: one launcher per cluster and machine (a kernel lock, see [`lock`]); whatever way a launch ends, short of
//! SIGKILL for the launcher itself, none of its processes is left; after such a SIGKILL the next `up` or `down` finds the
//! processes by their pid files and stops them, and nobody else's (see [`pidfile`]).

mod cookie;
mod detach;
mod down;
mod last_words;
mod local;
mod lock;
mod logs;
mod pidfile;
mod plan;
mod ports;
mod ps;
mod ready;
mod remote;
mod restart;
mod rotate;
mod sample;
mod scripts;
mod shell;
mod ssh;
mod supervise;
mod up;
mod words;

#[cfg(test)]
mod scripts_test;

pub use down::{DownArgs, down};
pub use logs::{LogsArgs, logs};
pub use ps::{PsArgs, ps};
pub use up::{UpArgs, up};

use std::io::Write as _;

/// A line for the person who launches; a closed terminal or pipe is not worth an error.
fn say(text: impl AsRef<str>) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", text.as_ref()).and_then(|()| out.flush());
}
