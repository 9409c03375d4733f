//! The README's first command, with the real programs and the real model; and what set-up refuses.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use understudy_tests::ports;
use understudy_tests::programs::{self, Engine};

/// The first launch may have to build everything.
const BUILD_PATIENCE: Duration = Duration::from_secs(45 * 60);
/// For what does not build.
const PATIENCE: Duration = Duration::from_secs(60);
/// With everything built, set-up, a look at the build, the start of the engines and the sample fit into this.
const RELAUNCH_LIMIT: Duration = Duration::from_secs(15);

/// A cluster's configuration in a folder of its own, with ports of its own.
struct Site {
    root: PathBuf,
}

impl Site {
    /// `None` where there is no real engine, which is said on standard error.
    fn new(name: &str) -> Option<Self> {
        programs::engine(Engine::Real)?;
        let root =
            std::env::temp_dir().join(format!("understudy-script-{}-{name}", std::process::id()));
        fs::create_dir_all(&root).expect("a temporary folder");
        let [a, client, b] = ports::free();
        let model = programs::repository().join("models/demo");
        let text = format!(
            "[cluster]\nname = \"script-{name}\"\nrun_dir = \"run\"\n\
             [[node]]\nname = \"a\"\ncluster_port = {}\nclient_port = {}\ndevices = [\"cpu\"]\n\
             [[node]]\nname = \"b\"\ncluster_port = {}\nroles = [\"host\"]\ndevices = [\"cpu\"]\n\
             [[model]]\nname = \"demo\"\npath = \"{}\"\nreplicas = 2\n",
            a,
            client,
            b,
            model.display()
        );
        fs::write(root.join("c.toml"), text).expect("written");
        Some(Self { root })
    }

    fn config(&self) -> String {
        self.root.join("c.toml").display().to_string()
    }

    /// `scripts/launch.sh`, from another folder than the repository's; CFG stands for the configuration.
    fn launch(&self, words: &[&str]) -> Command {
        let mut command = Command::new(programs::repository().join("scripts/launch.sh"));
        let config = self.config();
        command
            .args(words.iter().map(|word| match *word {
                "CFG" => config.as_str(),
                word => word,
            }))
            .current_dir(&self.root)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A person's own setting must not lead the script astray.
            .env("CARGO_TARGET_DIR", self.root.join("elsewhere"))
            .process_group(0);
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.launch(words).output().expect("bash runs")
    }

    /// It succeeds; what it says.
    #[track_caller]
    fn good(&self, words: &[&str]) -> String {
        let done = self.run(words);
        let said = text(&done.stdout);
        assert!(
            done.status.success(),
            "{words:?}: {said}\n{}",
            text(&done.stderr)
        );
        said
    }

    /// Command lines that name the configuration.
    fn processes(&self) -> Vec<String> {
        let config = self.config();
        let entries = fs::read_dir("/proc").expect("Linux").flatten();
        entries
            .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
            .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
            .filter(|line| line.contains(&config))
            .collect()
    }

    #[track_caller]
    fn assert_nothing_is_left(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.processes().is_empty() {
            assert!(Instant::now() < deadline, "left: {:?}", self.processes());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.run(&["stop", "CFG"]);
            for log in ["a.log", "b.log", "launcher.log"] {
                let text = fs::read_to_string(self.root.join("run").join(log)).unwrap_or_default();
                eprintln!("--- {log}\n{text}");
            }
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A script that runs, with its lines as they come; killed with its group when dropped.
struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: String,
}

impl Running {
    fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().expect("bash runs");
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        // Both, in no order: a failure is easier to understand with all of it.
        for pipe in [
            Box::new(stdout) as Box<dyn std::io::BufRead + Send>,
            Box::new(stderr),
        ] {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut lines = pipe.lines().map_while(Result::ok);
                lines.all(|line| sender.send(line).is_ok())
            });
        }
        Self {
            child,
            lines,
            seen: String::new(),
        }
    }

    /// Reads until a line holds `part`.
    #[track_caller]
    fn until(&mut self, part: &str, patience: Duration) {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push_str(&format!("{line}\n"));
                    if line.contains(part) {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no {part:?} yet in:\n{}", self.seen),
                Err(RecvTimeoutError::Disconnected) => panic!("no {part:?} in:\n{}", self.seen),
            }
        }
    }

    /// As Ctrl-C on a terminal: to the whole foreground job.
    fn interrupt(&self) {
        let group = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        killpg(group, Signal::SIGINT).expect("it runs");
    }

    fn end(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                self.seen.extend(self.lines.iter().map(|line| line + "\n"));
                return status.code();
            }
            assert!(Instant::now() < deadline, "it does not end:\n{}", self.seen);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let group = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
            let _ = killpg(group, Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

#[test]
fn the_launch_script_starts_shows_and_stops_a_cluster() {
    let Some(site) = Site::new("whole") else {
        return;
    };
    let mut first = Running::start(&mut site.launch(&["--detach", "CFG"]));
    first.until("1 2 3", BUILD_PATIENCE);
    assert_eq!(first.end(), Some(0), "{}", first.seen);
    assert!(first.seen.contains("launch.sh stop "), "{}", first.seen);

    let status = site.good(&["status", "CFG"]);
    assert_eq!(status.matches("ready").count(), 4, "{status}");
    assert!(site.good(&["logs", "a", "CFG"]).contains("node started"));
    let processes = site.good(&["ps", "CFG"]);
    assert_eq!(processes.matches("pid ").count(), 3, "{processes}");
    // Options and the configuration may come before the node's name.
    for words in [
        &["logs", "-f", "a", "CFG"][..],
        &["CFG", "logs", "--follow", "a"],
        &["logs", "CFG", "a", "-f"],
    ] {
        let mut follow = Running::start(&mut site.launch(words));
        follow.until("node started", PATIENCE);
        follow.interrupt();
        assert_ne!(follow.end(), Some(0));
    }

    let second = site.run(&["CFG", "--detach"]);
    let said = text(&second.stderr);
    assert_eq!(second.status.code(), Some(1), "{said}");
    assert!(said.contains("is running here already"), "{said}");
    assert!(
        !said.contains("Finished"),
        "it built beside a running cluster: {said}"
    );

    site.good(&["stop", "CFG"]);
    site.assert_nothing_is_left();
    assert_eq!(site.run(&["ps", "CFG"]).status.code(), Some(1));

    let begun = Instant::now();
    let again = site.good(&["CFG", "--detach"]);
    let took = begun.elapsed();
    assert!(again.contains("1 2 3"), "{again}");
    assert!(took < RELAUNCH_LIMIT, "the relaunch took {took:?}");
    site.good(&["stop", "CFG"]);
    site.assert_nothing_is_left();
    assert!(!site.root.join("elsewhere").exists(), "built elsewhere");
}

#[test]
fn ctrl_c_ends_the_launch_script_and_all_that_it_has_started() {
    let Some(site) = Site::new("interrupted") else {
        return;
    };
    for (moment, code) in [("waiting: ", 130), ("stop      Ctrl-C", 0)] {
        let mut launch = Running::start(&mut site.launch(&["CFG"]));
        launch.until(moment, BUILD_PATIENCE);
        launch.interrupt();
        assert_eq!(launch.end(), Some(code), "{}", launch.seen);
        assert!(launch.seen.contains("Stopped"), "{}", launch.seen);
        site.assert_nothing_is_left();
    }
}

/// A copy of the scripts alone, with other tools on the path.
struct Scripts {
    root: PathBuf,
}

impl Scripts {
    fn new(name: &str) -> Self {
        let root =
            std::env::temp_dir().join(format!("understudy-setup-{}-{name}", std::process::id()));
        fs::create_dir_all(root.join("scripts")).expect("a temporary folder");
        fs::create_dir_all(root.join("bin")).expect("a temporary folder");
        let repository = programs::repository();
        for entry in fs::read_dir(repository.join("scripts"))
            .expect("there")
            .flatten()
        {
            if entry.path().is_file() {
                fs::copy(entry.path(), root.join("scripts").join(entry.file_name()))
                    .expect("copied");
            }
        }
        fs::copy(repository.join("Cargo.toml"), root.join("Cargo.toml")).expect("copied");
        Self { root }
    }

    fn tool(&self, name: &str, script: &str) {
        let path = self.root.join("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("set");
    }

    /// It refuses before it has fetched anything; in what words.
    #[track_caller]
    fn refusal(&self) -> String {
        let path = std::env::var("PATH").unwrap_or_default();
        let bin = self.root.join("bin");
        let done = Command::new(self.root.join("scripts/setup.sh"))
            .env("PATH", format!("{}:{path}", bin.display()))
            .env_remove("LIBTORCH")
            .stdin(Stdio::null())
            .output()
            .expect("bash runs");
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{said}");
        assert!(!said.contains("Fetching"), "{said}");
        assert!(!Path::exists(&self.root.join(".deps")), "{said}");
        said
    }
}

impl Drop for Scripts {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

#[test]
fn set_up_wants_a_rust_that_can_build_this() {
    let scripts = Scripts::new("rust");
    let wanted = env!("CARGO_PKG_RUST_VERSION");
    scripts.tool("cargo", "echo 'cargo 1.80.0 (376290515 2024-07-16)'");
    let said = scripts.refusal();
    let expected = format!("Rust {wanted} or newer needed, found 1.80.0: rustup update stable");
    assert!(said.contains(&expected), "{said}");
    scripts.tool("cargo", "echo 'error: no toolchain' >&2; exit 1");
    let said = scripts.refusal();
    assert!(
        said.contains("cargo does not run:") && said.contains("no toolchain"),
        "{said}"
    );
}

/// A `build.target` of the person's own sends programs elsewhere, and the ones of yesterday must not be taken for them.
#[test]
fn a_build_that_went_elsewhere_is_noticed() {
    let scripts = Scripts::new("target");
    let build = || {
        let path = std::env::var("PATH").unwrap_or_default();
        let done = Command::new("bash")
            .args([
                "-euo",
                "pipefail",
                "-c",
                "source scripts/lib.sh; build_binaries",
            ])
            .current_dir(&scripts.root)
            .env(
                "PATH",
                format!("{}:{path}", scripts.root.join("bin").display()),
            )
            .output()
            .expect("bash runs");
        (done.status.code(), text(&done.stderr))
    };
    let into = |folder: &str| {
        format!(
            "mkdir -p {folder} && for p in understudy understudy-engine; do echo > {folder}/$p; chmod +x {folder}/$p; done"
        )
    };
    scripts.tool("cargo", &into("target/some-machine/release"));
    let (code, said) = build();
    assert_eq!(code, Some(1));
    assert!(said.contains("take build.target out"), "{said}");
    // Older than the others, as a build of yesterday is.
    scripts.tool(
        "cargo",
        &format!(
            "{}; touch -d yesterday target/release/*",
            into("target/release")
        ),
    );
    assert_eq!(build().0, Some(1));
    scripts.tool("cargo", &into("target/release"));
    assert_eq!(build(), (Some(0), String::new()));
}

#[test]
fn set_up_wants_a_python_that_can_fetch() {
    let scripts = Scripts::new("python");
    scripts.tool("cargo", "echo 'cargo 1.999.0 (0 2099-01-01)'");
    scripts.tool(
        "python3",
        "case $1 in -c) exit 1 ;; --version) echo Python 3.6.9 ;; esac",
    );
    let said = scripts.refusal();
    assert!(
        said.contains("Python 3.8 or newer needed, found Python 3.6.9"),
        "{said}"
    );
}
