//! At most one launcher per cluster and machine.
//!
//! The kernel drops the lock with its holder, however that ends, so a stale file never stops a launch.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::pidfile::ProcessId;

/// How often a held lock is tried while its release is awaited.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The lock, held until dropped.
#[derive(Debug)]
pub struct LauncherLock {
    _file: File,
}

/// What taking the lock came to.
pub enum Attempt {
    Taken(LauncherLock),
    /// Another launcher has it: its pid, unless that launcher has only just begun.
    Held(Option<u32>),
}

/// The lock file of a cluster's run folder.
pub fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("launcher.lock")
}

/// Takes the lock, and writes this process into the file. The folder must be there.
pub fn take(run_dir: &Path) -> io::Result<Attempt> {
    let path = path(run_dir);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(Attempt::Held(holder_pid(&path))),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())?;
    Ok(Attempt::Taken(LauncherLock { _file: file }))
}

/// The launcher that holds the lock now.
pub fn holder(run_dir: &Path) -> Option<ProcessId> {
    if is_free(run_dir) {
        return None;
    }
    holder_pid(&path(run_dir)).and_then(ProcessId::of)
}

/// Waits until nobody holds the lock; `false` when somebody still does at the end of `timeout`.
pub async fn wait_free(run_dir: &Path, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    while !is_free(run_dir) {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    true
}

/// Looks without disturbing: a shared lock, given back at once.
fn is_free(run_dir: &Path) -> bool {
    let Ok(file) = File::open(path(run_dir)) else {
        return true;
    };
    !matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

fn holder_pid(path: &Path) -> Option<u32> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_second_launcher_learns_of_the_first() {
        let folder = std::env::temp_dir().join(format!("understudy-lock-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        assert_eq!(holder(&folder), None);
        let Ok(Attempt::Taken(first)) = take(&folder) else {
            panic!("free")
        };
        assert!(matches!(take(&folder), Ok(Attempt::Held(Some(pid))) if pid == std::process::id()));
        assert_eq!(
            holder(&folder).map(|process| process.pid),
            Some(std::process::id())
        );
        assert!(!wait_free(&folder, Duration::from_millis(50)).await);
        drop(first);
        assert_eq!(holder(&folder), None, "the file stays, the lock does not");
        assert!(wait_free(&folder, Duration::from_secs(5)).await);
        assert!(matches!(take(&folder), Ok(Attempt::Taken(_))));
        std::fs::remove_dir_all(&folder).expect("removed");
    }
}
