//! Processes that outlive the one that started them: a pid together with the moment the process began.
//!
//! Invariant: a signal is sent only to a process whose start time equals the recorded one, so that a stale file, or a
//! pid that the kernel has given to someone else since, harms nobody.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// How often a process that is not our child is looked at while its end is awaited.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A process, told apart from any later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessId {
    pub pid: u32,
    /// Clock ticks between the machine's start and the process's: field 22 of `/proc/<pid>/stat`.
    pub start_ticks: u64,
}

impl std::fmt::Display for ProcessId {
    /// As in a pid file.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.pid, self.start_ticks)
    }
}

/// What of `/proc/<pid>/stat` matters here.
struct Stat {
    state: char,
    group: i32,
    start_ticks: u64,
}

impl ProcessId {
    /// The process that has this pid now; `None` when there is none, or only its zombie.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = read_stat(pid)?;
        (!matches!(stat.state, 'Z' | 'X')).then_some(Self {
            pid,
            start_ticks: stat.start_ticks,
        })
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal, if it still runs. A process that ends meanwhile is no error.
    pub fn signal(self, signal: Signal) -> io::Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(self.nix_pid(), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Kills what is left of the process group that it led.
    pub fn kill_group(self) {
        let leads_nothing = !group_has_members(self.nix_pid().as_raw());
        if leads_nothing || ProcessId::of(self.pid).is_some_and(|now| now != self) {
            return;
        }
        // ESRCH: the last member ended between the look and the signal.
        let _ = killpg(self.nix_pid(), Signal::SIGKILL);
    }

    /// Waits until it is gone; `false` when it still runs at the end of `timeout`.
    pub async fn wait_gone(self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while self.is_alive() {
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        true
    }

    /// SIGTERM, then, after `grace`, SIGKILL for its whole group. Returns whether the grace was enough.
    pub async fn stop(self, grace: Duration) -> io::Result<bool> {
        self.signal(Signal::SIGTERM)?;
        let graceful = self.wait_gone(grace).await;
        self.signal(Signal::SIGKILL)?;
        self.kill_group();
        // Bounded: SIGKILL is obeyed as soon as the kernel runs the process again.
        self.wait_gone(Duration::from_secs(5)).await;
        Ok(graceful)
    }

    fn nix_pid(self) -> Pid {
        Pid::from_raw(i32::try_from(self.pid).unwrap_or(i32::MAX))
    }
}

fn read_stat(pid: u32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name of the program stands in brackets and may hold anything, brackets included; fields are counted after it.
fn parse_stat(stat: &str) -> Option<Stat> {
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let group = fields.nth(1)?.parse().ok()?;
    let start_ticks = fields.nth(16)?.parse().ok()?;
    Some(Stat {
        state,
        group,
        start_ticks,
    })
}

fn group_has_members(group: i32) -> bool {
    let Ok(entries) = fs::read_dir("/proc") else {
        return false;
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(read_stat)
        .any(|stat| stat.group == group && stat.state != 'Z')
}

/// A file that names a process: `<pid> <start ticks>`.
#[derive(Debug, Clone)]
pub struct PidFile(pub PathBuf);

impl PidFile {
    /// The process it names, if that process still runs. A missing, damaged or stale file names none.
    pub fn running(&self) -> Option<ProcessId> {
        let text = fs::read_to_string(&self.0).ok()?;
        parse(&text).filter(|process| process.is_alive())
    }

    /// Takes the room for a new version, before there is a process to write down: a full disk is found out while nothing
    /// has to be undone. The present version stays until [`Draft::commit`].
    pub fn draft(&self) -> io::Result<Draft> {
        let told = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("cannot write {}: {error}", self.0.display()),
            )
        };
        let temporary = temporary(&self.0);
        let file = create_private(&temporary).map_err(told)?;
        let draft = Draft {
            file,
            temporary,
            path: self.0.clone(),
        };
        draft.fill("").map_err(told)?;
        Ok(draft)
    }

    /// Writes it so that a reader finds the old content or the new one, never half.
    #[cfg(test)]
    pub fn write(&self, process: ProcessId) -> io::Result<()> {
        self.draft()?.commit(process)
    }

    /// Removes it; it need not be there.
    pub fn remove(&self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A new version of a pid file, of its full length, that does not bear its name yet.
#[derive(Debug)]
pub struct Draft {
    file: fs::File,
    temporary: PathBuf,
    path: PathBuf,
}

impl Draft {
    /// Room for the longest pid and the longest time; the rest is blanks, which readers skip.
    const LENGTH: usize = 48;

    /// Fills in the process, and puts the new version in the place of the old one.
    pub fn commit(self, process: ProcessId) -> io::Result<()> {
        self.fill(&process.to_string())
            .and_then(|()| fs::rename(&self.temporary, &self.path))
            .map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("cannot write {}: {error}", self.path.display()),
                )
            })
    }

    fn fill(&self, text: &str) -> io::Result<()> {
        use std::os::unix::fs::FileExt as _;
        let line = format!("{text:<width$}\n", width = Self::LENGTH - 1);
        self.file.write_all_at(line.as_bytes(), 0)?;
        self.file.sync_all()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Gone already when it was put in place.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Reads `<pid> <start ticks>`, whatever the blanks.
pub fn parse(text: &str) -> Option<ProcessId> {
    let mut words = text.split_ascii_whitespace();
    let process = ProcessId {
        pid: words.next()?.parse().ok()?,
        start_ticks: words.next()?.parse().ok()?,
    };
    words.next().is_none().then_some(process)
}

/// Writes a file with mode 0600 under another name, syncs it and renames it into place.
pub fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let temporary = temporary(path);
    let written = create_private(&temporary).and_then(|mut file| {
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&temporary, path))
    });
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    path.with_file_name(name)
}

fn create_private(path: &Path) -> io::Result<fs::File> {
    // A leftover of a process that had our pid.
    let _ = fs::remove_file(path);
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    fn folder(name: &str) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("understudy-pidfile-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("a temporary folder");
        path
    }

    #[test]
    fn a_program_name_with_brackets_does_not_shift_the_fields() {
        let stat = "42 (a) b) R 1 77 77 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 123456 9 9";
        let stat = parse_stat(stat).expect("well formed");
        assert_eq!(
            (stat.state, stat.group, stat.start_ticks),
            ('R', 77, 123_456)
        );
        assert!(parse_stat("42 (a").is_none());
        assert!(parse_stat("42 (a) R 1 2").is_none());
    }

    #[test]
    fn a_file_names_a_running_process_and_no_other() {
        let folder = folder("names");
        let file = PidFile(folder.join("a.pid"));
        assert_eq!(file.running(), None, "missing");
        let me = ProcessId::of(std::process::id()).expect("this process runs");
        file.write(me).expect("written");
        assert_eq!(file.running(), Some(me));
        let mode = fs::metadata(&file.0).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        // The pid was given to another process since: the start time differs.
        file.write(ProcessId {
            start_ticks: me.start_ticks + 1,
            ..me
        })
        .expect("written");
        assert_eq!(file.running(), None);
        for damaged in ["", "x y", "12", "1 2 3", "99999999999 1"] {
            fs::write(&file.0, damaged).expect("written");
            assert_eq!(file.running(), None, "{damaged:?}");
        }
        file.remove();
        file.remove();
        fs::remove_dir_all(&folder).expect("removed");
    }

    #[test]
    fn a_draft_keeps_the_old_version_until_it_is_done() {
        let folder = folder("drafts");
        let file = PidFile(folder.join("a.pid"));
        let me = ProcessId::of(std::process::id()).expect("this process runs");
        file.write(me).expect("written");
        drop(file.draft().expect("room"));
        assert_eq!(file.running(), Some(me));
        let length = || fs::metadata(&file.0).expect("there").len();
        let before = length();
        file.draft()
            .and_then(|draft| draft.commit(me))
            .expect("written");
        assert_eq!((file.running(), length()), (Some(me), before));
        assert_eq!(fs::read_dir(&folder).expect("listed").count(), 1);

        let nowhere = PidFile(folder.join("none/b.pid"));
        let error = nowhere.draft().expect_err("no folder").to_string();
        assert!(
            error.contains(&format!("cannot write {}", nowhere.0.display())),
            "{error}"
        );
        fs::remove_dir_all(&folder).expect("removed");
    }

    #[tokio::test]
    async fn stop_ends_a_process_that_ignores_sigterm_and_its_group() {
        let mut child = Command::new("sh")
            .args([
                "-c",
                "trap '' TERM; sleep 600 & while :; do sleep 0.05; done",
            ])
            .process_group(0)
            .spawn()
            .expect("sh");
        let process = ProcessId::of(child.id()).expect("runs");
        let reaper = std::thread::spawn(move || child.wait());
        // Whether or not the shell has set its trap already: the group must be gone afterwards.
        process
            .stop(Duration::from_millis(300))
            .await
            .expect("signals are allowed");
        assert!(!process.is_alive());
        reaper.join().expect("joined").expect("reaped");
        // SIGKILL is obeyed when the kernel next runs the process.
        let group = i32::try_from(process.pid).expect("fits");
        let deadline = Instant::now() + Duration::from_secs(10);
        while group_has_members(group) {
            assert!(Instant::now() < deadline, "a member of the group is left");
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    #[test]
    fn signals_do_not_reach_a_process_that_took_over_the_pid() {
        let mut child = Command::new("sleep").arg("600").spawn().expect("sleep");
        let now = ProcessId::of(child.id()).expect("runs");
        let before = ProcessId {
            start_ticks: now.start_ticks - 1,
            ..now
        };
        before.signal(Signal::SIGKILL).expect("nothing to do");
        assert!(now.is_alive());
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }
}
