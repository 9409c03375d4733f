//! Real node processes, and what they say.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use understudy_cluster::Cookie;

use crate::probe::PROBE;

/// Longest wait for anything; a machine that is busy with other work needs the slack.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// An address where nobody listens, for peers that are never dialed.
pub const NOWHERE: &str = "127.0.0.1:1";

/// A cookie file of its own for every test.
pub struct CookieFile(pub PathBuf);

impl CookieFile {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "understudy-probe-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        let _ = std::fs::remove_file(&path);
        Cookie::generate().write_new(&path).unwrap();
        Self(path)
    }
}

impl Drop for CookieFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// How to start a node.
#[derive(Clone)]
pub struct Start {
    pub node: &'static str,
    pub incarnation: u64,
    pub listen: String,
    pub cluster: &'static str,
    pub cookie: PathBuf,
    pub checksum: u64,
    /// Between two heartbeats; suspicion and death come after three and five of them.
    pub heartbeat_ms: u64,
    /// Nobody reads what it logs.
    pub is_deaf: bool,
    pub peers: Vec<(&'static str, String)>,
}

impl Start {
    pub fn new(node: &'static str, incarnation: u64, cookie: &CookieFile) -> Self {
        Self {
            node,
            incarnation,
            listen: "127.0.0.1:0".to_owned(),
            cluster: "test",
            cookie: cookie.0.clone(),
            checksum: 0,
            heartbeat_ms: 200,
            is_deaf: false,
            peers: Vec::new(),
        }
    }

    pub fn peer(mut self, node: &'static str, address: impl ToString) -> Self {
        self.peers.push((node, address.to_string()));
        self
    }

    pub fn listen(mut self, address: impl ToString) -> Self {
        self.listen = address.to_string();
        self
    }

    pub fn spawn(&self) -> Node {
        let Self {
            node,
            incarnation,
            listen,
            cluster,
            cookie,
            checksum,
            heartbeat_ms,
            is_deaf,
            peers,
        } = self;
        let mut arguments = format!(
            "{node} {incarnation} {listen} {cluster} {} {checksum} {heartbeat_ms}",
            cookie.display()
        );
        for (peer, address) in peers {
            arguments += &format!(" {peer}={address}");
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["probe_process", "--exact", "--nocapture"])
            .env(PROBE, arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (lines, said) = channel();
        let begin = Instant::now();
        let stdout = child.stdout.take().unwrap();
        let mut streams = vec![("", Box::new(stdout) as Box<dyn Read + Send>)];
        if !is_deaf {
            streams.push(("log ", Box::new(child.stderr.take().unwrap())));
        }
        for (prefix, stream) in streams {
            let lines = lines.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    let line = match prefix {
                        "" => line.rsplit_once('@').map(|(_, line)| line.to_owned()),
                        _ => Some(format!("{prefix}{line}")),
                    };
                    let _ = line.map(|line| lines.send((Instant::now(), line)));
                }
            });
        }
        let stdin = child.stdin.take().unwrap();
        let id = format!("{node}-{incarnation:x}");
        Node {
            id,
            child,
            stdin,
            said,
            heard: Vec::new(),
            begin,
        }
    }

    /// Starts it and waits until it listens.
    pub fn up(&self) -> Node {
        let mut node = self.spawn();
        node.expect("listening ");
        node
    }
}

/// A running node.
pub struct Node {
    pub id: String,
    child: Child,
    stdin: ChildStdin,
    said: Receiver<(Instant, String)>,
    /// All that was said, for the message of a failure.
    heard: Vec<String>,
    begin: Instant,
}

impl Node {
    pub fn tell(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").unwrap();
    }

    /// The next line that starts so, what follows it, and when it came. Others before it are skipped.
    pub fn expect(&mut self, start: &str) -> (Instant, String) {
        self.try_expect(start, PATIENCE).unwrap_or_else(|| {
            panic!(
                "{} did not say {start:?}, but:\n{}",
                self.id,
                self.heard.join("\n")
            )
        })
    }

    /// As `expect`, but with its own patience and without a panic.
    pub fn try_expect(&mut self, start: &str, patience: Duration) -> Option<(Instant, String)> {
        let said = |line: &str| {
            line.strip_prefix(start)
                .filter(|_| !line.starts_with("log "))
                .map(str::to_owned)
        };
        self.next(said, patience)
    }

    /// Waits for a log line that contains this. It may have come before: the log and what is said are two streams.
    pub fn expect_log(&mut self, part: &str) {
        let found = self.heard.iter().any(|line| line.contains(part))
            || self
                .next(|line| line.contains(part).then(String::new), PATIENCE)
                .is_some();
        assert!(
            found,
            "{} did not log {part:?}, but:\n{}",
            self.id,
            self.heard.join("\n")
        );
    }

    /// Gives a command again and again until the answer is right.
    pub fn until(&mut self, command: &str, start: &str, mut right: impl FnMut(&str) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            self.tell(command);
            // The answer may be missing: a metric that is not there yet.
            if self
                .try_expect(start, Duration::from_millis(200))
                .is_some_and(|(_, answer)| right(&answer))
            {
                return;
            }
        }
        panic!("{} never gave the right answer to {command:?}", self.id)
    }

    /// As `expect`, but the whole rest must be this, within its own time.
    pub fn next_of(&mut self, start: &str, rest: &str, patience: Duration) -> (Instant, String) {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(found) = self.try_expect(start, deadline - Instant::now()) {
                assert_eq!(found.1, rest);
                return found;
            }
        }
        panic!("{} did not say {start}{rest}", self.id)
    }

    /// How many log lines so far contain this.
    pub fn logged(&self, part: &str) -> usize {
        let lines = self.heard.iter();
        lines
            .filter(|line| line.contains("log ") && line.contains(part))
            .count()
    }

    /// Everything said (but not logged) from now on for a while.
    pub fn listen(&mut self, time: Duration) -> Vec<String> {
        let mut lines = Vec::new();
        self.next(
            |line| {
                if !line.starts_with("log ") {
                    lines.push(line.to_owned());
                }
                None
            },
            time,
        );
        lines
    }

    fn next(
        &mut self,
        mut wanted: impl FnMut(&str) -> Option<String>,
        patience: Duration,
    ) -> Option<(Instant, String)> {
        let deadline = Instant::now() + patience;
        loop {
            match self
                .said
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok((at, line)) => {
                    let found = wanted(&line);
                    self.heard.push(format!(
                        "{:>8} ms  {line}",
                        at.duration_since(self.begin).as_millis()
                    ));
                    if let Some(rest) = found {
                        return Some((at, rest));
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    pub fn signal(&self, signal: Signal) -> Instant {
        let now = Instant::now();
        kill(Pid::from_raw(self.pid() as i32), signal).unwrap();
        now
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it and waits for its end.
    pub fn kill(mut self) -> Instant {
        let now = self.signal(Signal::SIGKILL);
        self.child.wait().unwrap();
        now
    }

    /// Open file descriptors.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .count()
    }

    /// Resident memory, in bytes.
    pub fn rss(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<usize>()
            .unwrap()
            * 1024
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two nodes in session, and where `b` listens. `a` is the dialer.
pub fn pair(cookie: &CookieFile) -> (Node, Node, SocketAddr) {
    let mut b = Start::new("b", 1, cookie).peer("a", NOWHERE).spawn();
    let address: SocketAddr = b.expect("listening ").1.parse().unwrap();
    let mut a = Start::new("a", 1, cookie).peer("b", address).up();
    a.expect("up b-1");
    b.expect("up a-1");
    (a, b, address)
}
