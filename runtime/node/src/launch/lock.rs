//! At most one launcher per cluster and machine, and no launch while `down` is at work.
//!
//! The kernel drops the lock with its holder, however that ends, so a stale file never stops a launch. The file names the
//! holder as a pid file does, by pid and start time: whatever a stale or half-written one says, no signal goes to a
//! process that only has the pid of a launcher.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::pidfile::{self, ProcessId};

/// How often a held lock is tried while its release is awaited.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// A lock that is held without a holder's name in its file: somebody only looks (see [`is_free`]), or the holder has just
/// taken it and is about to write. Both are over long before this.
const NAMELESS_TIMEOUT: Duration = Duration::from_secs(1);

/// What the lock is held for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To run the cluster.
    Launch,
    /// To stop what a launcher has left.
    Down,
}

impl Purpose {
    /// The word in the file, behind the process.
    fn word(self) -> &'static str {
        match self {
            Purpose::Launch => "up",
            Purpose::Down => "down",
        }
    }
}

/// Who holds the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    pub process: ProcessId,
    pub purpose: Purpose,
}

/// The lock, held until dropped.
#[derive(Debug)]
pub struct LauncherLock {
    _file: File,
}

/// What taking the lock came to.
#[derive(Debug)]
pub enum Attempt {
    Taken(LauncherLock),
    /// Another process has it; `None` where the file does not say which.
    Held(Option<Holder>),
}

/// The lock file of a cluster's run folder.
pub fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("launcher.lock")
}

/// Takes the lock, and writes this process into the file. The folder must be there.
pub async fn take(run_dir: &Path, purpose: Purpose) -> io::Result<Attempt> {
    let path = path(run_dir);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)?;
    let deadline = Instant::now() + NAMELESS_TIMEOUT;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let holder = read(&path);
        if holder.is_some() || Instant::now() >= deadline {
            return Ok(Attempt::Held(holder));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    let me = ProcessId::of(std::process::id())
        .ok_or_else(|| io::Error::other("/proc does not show this process"))?;
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{me} {}", purpose.word())?;
    Ok(Attempt::Taken(LauncherLock { _file: file }))
}

/// Who holds the lock now, if anyone does and the file says who.
pub async fn holder(run_dir: &Path) -> Option<Holder> {
    let deadline = Instant::now() + NAMELESS_TIMEOUT;
    loop {
        if is_free(run_dir) {
            return None;
        }
        let holder = read(&path(run_dir));
        if holder.is_some() || Instant::now() >= deadline {
            return holder;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
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

/// Looks almost without disturbing: a shared lock, given back at once.
fn is_free(run_dir: &Path) -> bool {
    let Ok(file) = File::open(path(run_dir)) else {
        return true;
    };
    !matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// The process that the file names, if that very process runs.
fn read(path: &Path) -> Option<Holder> {
    let text = std::fs::read_to_string(path).ok()?;
    let (process, word) = text.trim().rsplit_once(' ')?;
    let purpose = [Purpose::Launch, Purpose::Down]
        .into_iter()
        .find(|purpose| purpose.word() == word)?;
    let process = pidfile::parse(process).filter(|process| process.is_alive())?;
    Some(Holder { process, purpose })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder =
            std::env::temp_dir().join(format!("understudy-lock-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        folder
    }

    fn me() -> ProcessId {
        ProcessId::of(std::process::id()).expect("this process runs")
    }

    #[tokio::test]
    async fn the_second_launcher_learns_of_the_first() {
        let folder = folder("second");
        assert_eq!(holder(&folder).await, None);
        for purpose in [Purpose::Launch, Purpose::Down] {
            let Ok(Attempt::Taken(first)) = take(&folder, purpose).await else {
                panic!("free")
            };
            let expected = Some(Holder {
                process: me(),
                purpose,
            });
            let second = take(&folder, Purpose::Launch).await;
            assert!(matches!(second, Ok(Attempt::Held(found)) if found == expected));
            assert_eq!(holder(&folder).await, expected);
            assert!(!wait_free(&folder, Duration::from_millis(50)).await);
            drop(first);
            assert_eq!(
                holder(&folder).await,
                None,
                "the file stays, the lock does not"
            );
            assert!(wait_free(&folder, Duration::from_secs(5)).await);
        }
        std::fs::remove_dir_all(&folder).expect("removed");
    }

    /// A holder that has not written itself down yet leaves what an earlier one wrote, whose pid may be another's now.
    #[tokio::test]
    async fn a_pid_alone_names_nobody() {
        let folder = folder("stale");
        let file = File::create(path(&folder)).expect("made");
        file.try_lock().expect("free");
        let stale = ProcessId {
            start_ticks: me().start_ticks + 1,
            ..me()
        };
        for text in [
            String::new(),
            format!("{}\n", me().pid),
            format!("{stale} up\n"),
            format!("{} other\n", me()),
        ] {
            std::fs::write(path(&folder), &text).expect("written");
            assert_eq!(holder(&folder).await, None, "{text:?}");
            let attempt = take(&folder, Purpose::Launch).await;
            assert!(matches!(attempt, Ok(Attempt::Held(None))), "{text:?}");
        }
        std::fs::remove_dir_all(&folder).expect("removed");
    }

    /// `ps` or `status` at the wrong moment must not look like another launcher.
    #[tokio::test]
    async fn somebody_who_only_looks_is_waited_for() {
        let folder = folder("looked-at");
        let file = File::create(path(&folder)).expect("made");
        file.try_lock_shared().expect("free");
        let (attempt, ()) = tokio::join!(take(&folder, Purpose::Launch), async {
            tokio::task::yield_now().await;
            file.unlock().expect("given back");
        });
        assert!(matches!(attempt, Ok(Attempt::Taken(_))), "{attempt:?}");
        std::fs::remove_dir_all(&folder).expect("removed");
    }
}
