//! The launcher against stand-in nodes: every road into a running cluster, and that no road out of it leaves a process.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// No step of these tests takes this long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(30);

fn program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_understudy"))
}

/// The stand-in node. `cargo test` builds it with all examples; `cargo test --test launch` does not.
fn standin() -> PathBuf {
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
struct Place {
    root: PathBuf,
    ports: Vec<u16>,
}

impl Place {
    fn new(name: &str) -> Self {
        Self::with(name, "", "shutdown_grace_ms = 2000")
    }

    /// With more lines for node `b`, and for `[gateway]`.
    fn with(name: &str, b: &str, gateway: &str) -> Self {
        let root =
            std::env::temp_dir().join(format!("understudy-launch-{}-{name}", std::process::id()));
        fs::create_dir_all(root.join("model")).expect("a temporary folder");
        fs::write(root.join("model/config.json"), "{}").expect("written");
        // Found free by the kernel; held until all are known, so that they differ.
        let held: Vec<TcpListener> = (0..3)
            .map(|_| TcpListener::bind("127.0.0.1:0").expect("a port"))
            .collect();
        let ports: Vec<u16> = held
            .iter()
            .map(|held| held.local_addr().expect("bound").port())
            .collect();
        let [a, client, b_port] = ports[..] else {
            unreachable!("three were asked for")
        };
        let text = format!(
            "[cluster]\nname = \"{name}\"\n\
             [[node]]\nname = \"a\"\ncluster_port = {a}\nclient_port = {client}\n\
             [[node]]\nname = \"b\"\ncluster_port = {b_port}\nroles = [\"host\"]\n{b}\n\
             [[model]]\nname = \"m\"\npath = \"model\"\nreplicas = 2\n\
             [gateway]\n{gateway}\n"
        );
        fs::write(root.join("c.toml"), text).expect("written");
        Self { root, ports }
    }

    fn config(&self) -> PathBuf {
        self.root.join("c.toml")
    }

    fn run_dir(&self) -> PathBuf {
        let name = self
            .root
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.splitn(4, '-').nth(3));
        self.root.join("run").join(name.expect("made by `with`"))
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(program());
        command
            .args(words)
            .stdin(Stdio::null())
            .current_dir(&self.root);
        command
    }

    fn up(&self) -> Command {
        let mut command = self.command(&["up", "c.toml", "--node-binary"]);
        command.arg(standin());
        command
    }

    fn down(&self) -> Output {
        self.command(&["down", "c.toml"]).output().expect("runs")
    }

    /// The pid in a node's pid file.
    fn pid(&self, node: &str) -> Option<u32> {
        let text = fs::read_to_string(self.run_dir().join(format!("{node}.pid"))).ok()?;
        text.split(' ').next()?.parse().ok()
    }

    /// Processes whose arguments name our configuration.
    fn processes(&self) -> Vec<u32> {
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

    fn assert_nothing_is_left(&self) {
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
            for log in ["a.log", "b.log", "launcher.log"] {
                let text = fs::read_to_string(self.run_dir().join(log)).unwrap_or_default();
                eprintln!("--- {log}\n{text}");
            }
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A launcher in the foreground, with its lines as they come.
struct Launcher {
    child: Child,
    lines: Receiver<String>,
    seen: String,
}

impl Launcher {
    fn start(command: &mut Command) -> Self {
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
    fn until(&mut self, text: &str) {
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

    fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// The exit status, and all that it said on standard error.
    fn end(&mut self) -> (Option<i32>, String) {
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

fn signal(pid: u32, name: &str) {
    let status = Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .status()
        .expect("kill");
    assert!(status.success(), "kill -{name} {pid}");
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_cluster_comes_up_heals_and_goes_down() {
    let place = Place::new("foreground");
    let mut launcher = Launcher::start(&mut place.up());
    launcher.until("stop      Ctrl-C");
    for part in [
        "Made a new cluster secret",
        "Ready after",
        "asked: Count from 1 to 20.",
        "answers: 1 2 3 4",
        "20 tokens",
    ] {
        assert!(
            launcher.seen.contains(part),
            "no {part:?} in {}",
            launcher.seen
        );
    }
    assert!(
        launcher
            .seen
            .contains(&format!("127.0.0.1:{}", place.ports[1]))
    );
    let mode = fs::metadata(place.run_dir().join("cookie"))
        .expect("made")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);

    // A second launcher keeps off.
    let second = place.up().output().expect("runs");
    assert_eq!(second.status.code(), Some(1));
    let said = text(&second.stderr);
    assert!(
        said.contains(&format!(
            "is running here already (launcher pid {})",
            launcher.child.id()
        )),
        "{said}"
    );

    // A node that dies is started again.
    let before = place.pid("b").expect("it runs");
    signal(before, "KILL");
    launcher.until("node b: ended (killed by SIGKILL); starting it again in 0.1 s");
    launcher.until("node b: started (pid");
    assert_ne!(place.pid("b"), Some(before));

    let all = place.command(&["ps", "c.toml"]).output().expect("runs");
    assert!(all.status.success(), "{}", text(&all.stdout));
    assert_eq!(text(&all.stdout).matches("pid ").count(), 3);

    launcher.signal("INT");
    let (code, _) = launcher.end();
    assert_eq!(code, Some(0));
    // Gateways stop first.
    let at = |part: &str| {
        launcher
            .seen
            .find(part)
            .unwrap_or_else(|| panic!("no {part:?} in {}", launcher.seen))
    };
    assert!(at("node a: stopped") < at("node b: stopped"));
    place.assert_nothing_is_left();
    let all = place.command(&["ps", "c.toml"]).output().expect("runs");
    assert_eq!(
        (
            all.status.code(),
            text(&all.stdout).matches("not running").count()
        ),
        (Some(1), 3)
    );
}

#[test]
fn a_node_that_cannot_start_fails_the_launch_with_its_last_words() {
    let place = Place::new("early");
    // Words of an earlier run do not count.
    fs::create_dir_all(place.run_dir()).expect("made");
    fs::write(place.run_dir().join("b.log"), "words of yesterday\n").expect("written");
    let done = place.up().env("STANDIN_DIE", "b").output().expect("runs");
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(
        said.contains("node b did not come up: exit status 3"),
        "{said}"
    );
    assert!(
        said.contains("| stand-in b cannot go on") && !said.contains("yesterday"),
        "{said}"
    );
    place.assert_nothing_is_left();
}

#[test]
fn ctrl_c_while_starting_leaves_nothing() {
    let place = Place::new("interrupted");
    let mut launcher = Launcher::start(place.up().env("STANDIN_STARTING", "b"));
    launcher.until("replica m/1 on b is starting");
    launcher.signal("INT");
    assert_eq!(launcher.end().0, Some(130));
    place.assert_nothing_is_left();
    // The next one goes on.
    let mut launcher = Launcher::start(&mut place.up());
    launcher.until("stop      Ctrl-C");
    launcher.signal("TERM");
    assert_eq!(launcher.end().0, Some(0));
    place.assert_nothing_is_left();
}

#[test]
fn detached_it_stays_until_down() {
    let place = Place::new("detached");
    let done = place.up().arg("--detach").output().expect("runs");
    let said = text(&done.stdout);
    assert!(done.status.success(), "{said}{}", text(&done.stderr));
    assert!(
        said.contains("20 tokens") && said.contains("stop      understudy down"),
        "{said}"
    );
    assert!(!said.contains('\u{1}'), "the mark is not for people");

    let before = place.pid("a").expect("it runs");
    signal(before, "KILL");
    until("node a is back", || {
        place.pid("a").is_some_and(|pid| pid != before)
    });
    let log = place
        .command(&["logs", "launcher", "--config", "c.toml"])
        .output()
        .expect("runs");
    assert!(
        text(&log.stdout).contains("node a: ended (killed by SIGKILL)"),
        "{}",
        text(&log.stdout)
    );
    let log = place
        .command(&["logs", "b", "--config", "c.toml"])
        .output()
        .expect("runs");
    assert!(
        text(&log.stdout).contains("stand-in b starts"),
        "{}",
        text(&log.stdout)
    );
    let log = place
        .command(&["logs", "x", "--config", "c.toml"])
        .output()
        .expect("runs");
    assert!(
        text(&log.stderr).contains("no node \"x\"")
            && text(&log.stderr).contains("there are: a, b")
    );

    let down = place.down();
    assert!(
        text(&down.stdout).contains("is stopped"),
        "{}",
        text(&down.stdout)
    );
    place.assert_nothing_is_left();
    assert!(text(&place.down().stdout).contains("was not running"));
}

#[test]
fn a_failed_detached_launch_reports_to_its_caller() {
    let place = Place::new("detached-early");
    let done = place
        .up()
        .arg("--detach")
        .env("STANDIN_DIE", "a")
        .output()
        .expect("runs");
    assert_eq!(done.status.code(), Some(1));
    let said = text(&done.stdout);
    assert!(
        said.contains("node a did not come up: exit status 3"),
        "{said}"
    );
    place.assert_nothing_is_left();
}

#[test]
fn nodes_of_a_killed_launcher_are_found_and_stopped() {
    let place = Place::new("orphans");
    let mut launcher = Launcher::start(place.up().arg("--no-sample"));
    launcher.until("stop      Ctrl-C");
    assert!(!launcher.seen.contains("asked:"), "no sample was wanted");
    launcher.signal("KILL");
    launcher.end();
    assert_eq!(place.processes().len(), 2, "that is what SIGKILL does");
    let mut launcher = Launcher::start(&mut place.up());
    launcher.until("Node a still runs from an earlier launch");
    launcher.until("stop      Ctrl-C");
    assert_eq!(place.processes().len(), 2);
    launcher.signal("KILL");
    launcher.end();
    assert!(text(&place.down().stdout).contains("node b: stopped"));
    place.assert_nothing_is_left();
}

#[test]
fn a_taken_port_is_named_with_its_holder() {
    let place = Place::new("ports");
    let _taken = TcpListener::bind(("127.0.0.1", place.ports[1])).expect("free until now");
    let done = place.up().output().expect("runs");
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1));
    let expected = format!(
        "port {} (client_port of node \"a\") is in use by launch",
        place.ports[1]
    );
    assert!(
        said.contains(&expected) && said.contains(&format!("(pid {})", std::process::id())),
        "{said}"
    );
    place.assert_nothing_is_left();
}

#[test]
fn a_second_signal_makes_short_work() {
    let place = Place::with("stubborn", "", "shutdown_grace_ms = 60000");
    let mut launcher = Launcher::start(place.up().env("STANDIN_STUBBORN", "b"));
    launcher.until("stop      Ctrl-C");
    launcher.signal("INT");
    launcher.until("node a: stopped");
    assert_eq!(place.processes().len(), 1, "b ignores the signal");
    launcher.signal("INT");
    launcher.until("node b: did not stop in time and was killed");
    assert_eq!(launcher.end().0, Some(0));
    place.assert_nothing_is_left();
}

/// An `ssh` that runs the command here, with another home folder, and notes what it was called with.
fn fake_ssh(place: &Place) -> (PathBuf, PathBuf) {
    let (bin, home) = (place.root.join("fake"), place.root.join("home"));
    fs::create_dir_all(&bin).expect("made");
    fs::create_dir_all(home.join("inst/bin")).expect("made");
    let script = format!(
        "#!/bin/sh\necho \"$@\" >> {calls}\nwhile [ \"$1\" != -- ]; do shift; done\n\
         [ \"$2\" = me@far ] || {{ echo 'no such host' >&2; exit 255; }}\nshift 2\n\
         cd {home} && HOME={home} exec \"$@\"\n",
        calls = place.root.join("calls").display(),
        home = home.display()
    );
    executable(&bin.join("ssh"), &script);
    fs::copy(standin(), home.join("inst/bin/understudy")).expect("copied");
    (bin, home)
}

fn executable(path: &Path, script: &str) {
    fs::write(path, script).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("set");
}

fn on_path(command: &mut Command, bin: &Path) {
    let path = std::env::var("PATH").unwrap_or_default();
    command
        .env("PATH", format!("{}:{path}", bin.display()))
        .env_remove("UNDERSTUDY_SSH");
}

#[test]
fn nodes_are_started_watched_and_stopped_over_ssh() {
    let place = Place::with(
        "far",
        "ssh = \"me@far\"\ndir = \"~/inst\"",
        "shutdown_grace_ms = 2000",
    );
    let (bin, home) = fake_ssh(&place);
    let run_dir = home.join("inst/run/far");
    let mut up = place.up();
    on_path(&mut up, &bin);
    let mut launcher = Launcher::start(&mut up);
    launcher.until("stop      Ctrl-C");
    assert!(
        launcher.seen.contains("node b: started on me@far (pid"),
        "{}",
        launcher.seen
    );

    // The cookie went through standard input, into a private file; so did the configuration.
    let cookie = fs::read_to_string(place.run_dir().join("cookie")).expect("made");
    assert_eq!(
        fs::read_to_string(run_dir.join("cookie")).expect("copied"),
        cookie
    );
    assert_eq!(
        fs::metadata(run_dir.join("cookie"))
            .expect("there")
            .permissions()
            .mode()
            & 0o777,
        0o600
    );
    let copied = fs::read_to_string(home.join("inst/.launched-far.toml")).expect("copied");
    assert_eq!(copied, fs::read_to_string(place.config()).expect("there"));
    let calls = fs::read_to_string(place.root.join("calls")).expect("noted");
    assert!(calls.contains("BatchMode=yes") && !calls.contains(cookie.trim()));

    let far_pid = || {
        let text = fs::read_to_string(run_dir.join("b.pid")).unwrap_or_default();
        text.split(' ')
            .next()
            .and_then(|pid| pid.parse::<u32>().ok())
    };
    let before = far_pid().expect("it runs");
    signal(before, "KILL");
    launcher.until("node b: ended (its process is gone)");
    launcher.until("node b: started on me@far (pid");
    assert_ne!(far_pid(), Some(before));

    let mut logs = place.command(&["logs", "b", "--config", "c.toml"]);
    on_path(&mut logs, &bin);
    let logs = logs.output().expect("runs");
    assert_eq!(
        text(&logs.stdout).matches("stand-in b starts").count(),
        2,
        "{}",
        text(&logs.stderr)
    );
    let mut ps = place.command(&["ps", "c.toml"]);
    on_path(&mut ps, &bin);
    let ps = text(&ps.output().expect("runs").stdout);
    assert!(ps.contains("me@far") && !ps.contains("not running"), "{ps}");

    // A launcher that is killed leaves the far node; `down` finds it.
    launcher.signal("KILL");
    launcher.end();
    let mut down = place.command(&["down", "c.toml"]);
    on_path(&mut down, &bin);
    let down = text(&down.output().expect("runs").stdout);
    assert!(down.contains("node b: stopped"), "{down}");
    until("no process is left", || place.processes().is_empty());
    assert_eq!(far_pid(), None);

    // And so does Ctrl-C.
    let mut up = place.up();
    on_path(&mut up, &bin);
    let mut launcher = Launcher::start(&mut up);
    launcher.until("stop      Ctrl-C");
    launcher.signal("INT");
    assert_eq!(launcher.end().0, Some(0));
    until("no process is left", || place.processes().is_empty());
}

#[test]
fn a_host_that_ssh_cannot_reach_is_named() {
    let place = Place::with("unreachable", "ssh = \"me@nowhere\"", "");
    let (bin, _) = fake_ssh(&place);
    let mut up = place.up();
    on_path(&mut up, &bin);
    let done = up.output().expect("runs");
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(
        said.contains(
            "ssh cannot reach me@nowhere (no such host); `ssh me@nowhere true` must work"
        ),
        "{said}"
    );
    place.assert_nothing_is_left();
}
