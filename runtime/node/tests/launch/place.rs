//! A cluster of stand-in nodes in a folder of its own, and a launcher to watch.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// No step of these tests takes this long unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(30);

fn program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_understudy"))
}

/// The stand-in node. `cargo test` builds it with all examples; `cargo test --test launch` does not.
pub fn standin() -> PathBuf {
    static BUILT: LazyLock<PathBuf> = LazyLock::new(|| {
        let folder = program().parent().expect("a folder").to_owned();
        let path = folder.join("examples/standin_node");
        if !path.exists() {
            let mut build = Command::new(env!("CARGO"));
            build.args([
                "build",
                "--release",
                "--example",
                "standin_node",
                "--target-dir",
            ]);
            build
                .arg(folder.parent().expect("the target folder"))
                .current_dir(env!("CARGO_MANIFEST_DIR"));
            assert!(
                build.status().expect("cargo").success(),
                "the stand-in node does not build"
            );
        }
        path
    });
    BUILT.clone()
}

/// A cluster of two nodes in a folder of its own; what is left of it is killed and removed at the end.
pub struct Place {
    pub root: PathBuf,
    pub ports: Vec<u16>,
}

impl Place {
    pub fn new(name: &str) -> Self {
        Self::with(name, "", "shutdown_grace_ms = 2000")
    }

    /// With more lines for node `b` (a host, unless they say otherwise; PORT is one for its clients), and for `[gateway]`.
    pub fn with(name: &str, b: &str, gateway: &str) -> Self {
        let root =
            std::env::temp_dir().join(format!("understudy-launch-{}-{name}", std::process::id()));
        fs::create_dir_all(root.join("model")).expect("a temporary folder");
        fs::write(root.join("model/config.json"), "{}").expect("written");
        // Found free by the kernel; held until all are known, so that they differ.
        let held: Vec<TcpListener> = (0..4)
            .map(|_| TcpListener::bind("127.0.0.1:0").expect("a port"))
            .collect();
        let ports: Vec<u16> = held
            .iter()
            .map(|held| held.local_addr().expect("bound").port())
            .collect();
        let [a, client, b_port, b_client] = ports[..] else {
            unreachable!("four were asked for")
        };
        let roles = if b.contains("roles") {
            ""
        } else {
            "roles = [\"host\"]"
        };
        let b = b.replace("PORT", &b_client.to_string());
        let text = format!(
            "[cluster]\nname = \"{name}\"\n\
             [[node]]\nname = \"a\"\ncluster_port = {a}\nclient_port = {client}\n\
             [[node]]\nname = \"b\"\ncluster_port = {b_port}\n{roles}\n{b}\n\
             [[model]]\nname = \"m\"\npath = \"model\"\nreplicas = 2\n\
             [gateway]\n{gateway}\n"
        );
        fs::write(root.join("c.toml"), text).expect("written");
        Self { root, ports }
    }

    pub fn config(&self) -> PathBuf {
        self.root.join("c.toml")
    }

    pub fn run_dir(&self) -> PathBuf {
        let name = self
            .root
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.splitn(4, '-').nth(3));
        self.root.join("run").join(name.expect("made by `with`"))
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(program());
        command
            .args(words)
            .stdin(Stdio::null())
            .current_dir(&self.root);
        command
    }

    pub fn up(&self) -> Command {
        let mut command = self.command(&["up", "c.toml", "--node-binary"]);
        command.arg(standin());
        command
    }

    pub fn down(&self) -> Output {
        self.command(&["down", "c.toml"]).output().expect("runs")
    }

    /// The pid in a node's pid file.
    pub fn pid(&self, node: &str) -> Option<u32> {
        let text = fs::read_to_string(self.run_dir().join(format!("{node}.pid"))).ok()?;
        text.split(' ').next()?.parse().ok()
    }

    /// Processes whose arguments name our configuration.
    pub fn processes(&self) -> Vec<u32> {
        let needle = self.root.to_string_lossy().into_owned();
        let pids = fs::read_dir("/proc").expect("Linux").flatten();
        pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| {
                let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let arguments = String::from_utf8_lossy(&arguments);
                arguments.contains(&needle) && arguments.contains("node")
            })
            .collect()
    }

    pub fn assert_nothing_is_left(&self) {
        until("no process is left", || self.processes().is_empty());
        for node in ["a", "b"] {
            assert_eq!(self.pid(node), None, "the pid file of {node} is left");
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.command(&["down", "c.toml"]).output();
            // What the test has put beyond the reach of `down`.
            for pid in self.processes() {
                let _ = Command::new("kill")
                    .args(["-KILL", &pid.to_string()])
                    .status();
            }
            for log in ["a.log", "b.log", "launcher.log"] {
                let text = fs::read_to_string(self.run_dir().join(log)).unwrap_or_default();
                eprintln!("--- {log}\n{text}");
            }
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

pub fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A launcher in the foreground, with its lines as they come.
pub struct Launcher {
    pub child: Child,
    lines: Receiver<String>,
    pub seen: String,
}

impl Launcher {
    pub fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("runs");
        let (sender, lines) = channel();
        let stdout = child.stdout.take().expect("piped");
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            lines,
            seen: String::new(),
        }
    }

    /// Reads until a line holds `text`.
    pub fn until(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self
            .seen
            .lines()
            .last()
            .is_some_and(|line| line.contains(text))
        {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.seen.push_str(&format!("{line}\n")),
                Err(_) => {
                    let errors = self.errors();
                    panic!("no {text:?} in:\n{}\n{errors}", self.seen);
                }
            }
        }
    }

    pub fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// The exit status, and all that it said on standard error.
    pub fn end(&mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                self.seen.extend(self.lines.iter().map(|line| line + "\n"));
                return (status.code(), self.errors());
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                panic!("the launcher does not end; it said:\n{}", self.seen);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn errors(&mut self) -> String {
        let mut text = String::new();
        if matches!(self.child.try_wait(), Ok(Some(_)))
            && let Some(mut stderr) = self.child.stderr.take()
        {
            let _ = stderr.read_to_string(&mut text);
        }
        text
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .status()
        .expect("kill");
    assert!(status.success(), "kill -{name} {pid}");
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
