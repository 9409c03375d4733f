//! The scripts, run by the shell of this machine.

use super::rotate::MAX_LOG_BYTES;
use super::scripts::*;
use super::shell::quote_path;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Runs a script as the other side would; exit status, standard output, standard error.
fn sh(script: &str) -> (i32, String, String) {
    // A script that hangs fails its test with `timeout`'s own status.
    let mut child = Command::new("timeout")
        .args(["20", "sh", "-s"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("sh");
    child
        .stdin
        .take()
        .expect("piped")
        .write_all(script.as_bytes())
        .expect("taken");
    let done = child.wait_with_output().expect("ended");
    let text = |bytes| String::from_utf8(bytes).expect("utf-8");
    (
        done.status.code().unwrap_or(-1),
        text(done.stdout),
        text(done.stderr),
    )
}

fn folder(name: &str) -> std::path::PathBuf {
    let path = std::env::temp_dir().join(format!(
        "understudy-scripts-{}-{name} it's",
        std::process::id()
    ));
    fs::create_dir_all(path.join("bin")).expect("a temporary folder");
    path
}

fn program(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::write(path, text).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("set");
}

#[test]
fn the_installation_is_found_or_its_lack_is_explained() {
    let root = folder("find");
    let (code, _, error) = sh(&find_installation(&root.to_string_lossy()));
    assert_eq!(code, 42);
    assert!(
        error.contains("no target/release/understudy or bin/understudy"),
        "{error}"
    );
    program(&root.join("bin/understudy"), "#!/bin/sh\n");
    let (code, out, _) = sh(&find_installation(&root.to_string_lossy()));
    assert_eq!(
        (code, out),
        (
            0,
            format!(
                "{}\nbin/understudy\n",
                root.canonicalize().expect("there").display()
            )
        )
    );
    let (code, _, error) = sh(&find_installation("/nowhere/it's"));
    assert_eq!(code, 41);
    assert!(
        error.contains("there is no folder /nowhere/it's"),
        "{error}"
    );
    fs::remove_dir_all(&root).expect("removed");
}

#[test]
fn a_node_is_started_seen_and_stopped() {
    let root = folder("start");
    let binary = root.join("bin/understudy");
    // Ignores the first signal, and says then what it was called with.
    program(
        &binary,
        "#!/bin/sh\ntrap '' TERM\necho \"$@\"\nwhile :; do sleep 0.05; done\n",
    );
    let start = Start {
        binary: &binary,
        config: &root.join("config/.launched-x.toml"),
        config_text: "# it's\nkey = \"$HOME `x`\"\n",
        secrets: &[
            (&root.join("run/cookie"), "secret\n"),
            (&root.join("tokens/clients"), "# it's\ntoken\n"),
        ],
        run_dir: &root.join("run"),
        pid_file: &root.join("run/a.pid"),
        owner: "it's me /run",
        output: &root.join("run/a.log"),
        name: "a",
        grace: Duration::from_millis(200),
    };
    let (code, out, error) = sh(&start.script());
    assert_eq!((code, error.as_str()), (0, ""));
    let (pid, ticks) = parse_process(&out).expect("pid and ticks");
    assert_eq!(
        super::pidfile::PidFile(start.pid_file.to_owned()).running(),
        Some(super::pidfile::ProcessId {
            pid,
            start_ticks: ticks
        }),
        "both sides read the same file"
    );
    assert_eq!(
        fs::read_to_string(start.config).expect("copied"),
        start.config_text
    );
    for (path, text) in start.secrets {
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(fs::read_to_string(path).expect("copied"), *text);
        let mode = fs::metadata(path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    assert_eq!(sh(&running(start.pid_file)).1, format!("{pid} {ticks}\n"));
    // Another launch's node is neither replaced nor stopped by an undoing.
    let other = Start {
        owner: "somebody else",
        ..start
    };
    let (code, _, error) = sh(&other.script());
    assert_eq!(code, 43, "a second start is refused");
    assert!(error.contains(&format!("already (pid {pid})")), "{error}");
    let undo = stop(start.pid_file, Duration::ZERO, Some(other.owner));
    assert_eq!(sh(&undo).1.trim(), NOT_RUNNING);
    assert_eq!(sh(&running(start.pid_file)).1, format!("{pid} {ticks}\n"));

    // Our own of an earlier launch is.
    let said = |times| {
        let text = || fs::read_to_string(start.output).unwrap_or_default();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while text().lines().count() < times {
            assert!(std::time::Instant::now() < deadline, "{}", text());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    said(1);
    let (code, out, error) = sh(&start.script());
    assert_eq!((code, error.as_str()), (0, ""));
    assert_eq!(sh(&watch(pid, ticks)).0, GONE);
    let (pid, ticks) = parse_process(&out).expect("pid and ticks");

    said(2);
    let (_, out, _) = sh(&stop(
        start.pid_file,
        Duration::from_millis(200),
        Some(start.owner),
    ));
    assert_eq!(out.trim(), KILLED);
    assert_eq!(sh(&watch(pid, ticks)).0, GONE);
    assert_eq!(sh(&running(start.pid_file)).1, "");
    assert_eq!(
        sh(&stop(start.pid_file, Duration::ZERO, None)).1.trim(),
        NOT_RUNNING
    );
    let (_, out, _) = sh(&tail(start.output, 1, false));
    assert_eq!(
        out.trim(),
        format!("node --config {} --name a", start.config.display())
    );
    fs::remove_dir_all(&root).expect("removed");
}

/// A node that nobody could find again must not run.
#[test]
fn a_pid_file_that_cannot_be_written_means_no_node() {
    let root = folder("unwritable");
    let binary = root.join("bin/understudy");
    program(
        &binary,
        "#!/bin/sh\ntrap '' TERM\nwhile :; do sleep 0.05; done\n",
    );
    let start = Start {
        binary: &binary,
        config: &root.join("c.toml"),
        config_text: "",
        secrets: &[(&root.join("cookie"), "secret")],
        run_dir: &root.join("run"),
        pid_file: &root.join("run/a.pid"),
        owner: "me",
        output: &root.join("run/a.log"),
        name: "a",
        grace: Duration::ZERO,
    };
    // A full disk: it notes which process could not be written down, which is the last that is known of it.
    let full = |file: &str| {
        format!(
            "mv() {{ case $3 in *{file}) cat \"$2\"; return 1 ;; esac; command mv \"$@\"; }}\n{}",
            start.script()
        )
    };
    let (code, out, error) = sh(&full("a.pid"));
    assert_eq!(code, WRITE_FAILED, "{error}");
    assert!(
        error.contains("cannot write ") && error.contains("a.pid"),
        "{error}"
    );
    let (pid, ticks) = parse_process(&out).expect("pid and ticks");
    assert_eq!(sh(&watch(pid, ticks)).0, GONE);
    // The same for a file that is needed before the start: nothing was started at all.
    let (code, out, error) = sh(&full("cookie"));
    assert_eq!((code, out.as_str()), (WRITE_FAILED, "secret"), "{error}");
    assert!(!start.pid_file.exists());
    fs::remove_dir_all(&root).expect("removed");
}

#[test]
fn an_overgrown_log_is_put_aside_at_the_start() {
    let root = folder("grown");
    program(&root.join("bin/understudy"), "#!/bin/sh\n");
    let output = root.join("a.log");
    fs::File::create(&output)
        .and_then(|file| file.set_len(MAX_LOG_BYTES + 1))
        .expect("a sparse file");
    let start = Start {
        binary: &root.join("bin/understudy"),
        config: &root.join("c.toml"),
        config_text: "",
        secrets: &[],
        run_dir: &root,
        pid_file: &root.join("a.pid"),
        owner: "me",
        output: &output,
        name: "a",
        grace: Duration::ZERO,
    };
    assert_eq!(sh(&start.script()).0, 0);
    let length = |name| fs::metadata(root.join(name)).expect("there").len();
    assert_eq!((length("a.log"), length("a.log.1")), (0, MAX_LOG_BYTES + 1));
    fs::remove_dir_all(&root).expect("removed");
}

#[test]
fn half_a_script_does_nothing() {
    let root = folder("half");
    let marker = root.join("marker");
    let whole = group(&format!("touch {}\n", quote_path(&marker)));
    sh(&whole[..whole.len() - 3]);
    assert!(!marker.exists());
    sh(&whole);
    assert!(marker.exists());
    fs::remove_dir_all(&root).expect("removed");
}
