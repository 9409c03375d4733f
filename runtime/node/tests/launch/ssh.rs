//! Nodes of other machines, over an `ssh` of the test's own.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::place::{Launcher, Place, signal, standin, text, until};

/// Node `b` is on another machine.
const FAR: &str = "ssh = \"me@far\"\ndir = \"~/inst\"";

/// What a fake `ssh` does besides its work, while a file of that name lies in the cluster's folder:
///
/// - `cut`: cannot connect;
/// - `hang`: says nothing, for ever;
/// - `break`: loses the connection when a start has done its work, before its answer comes;
/// - `hang-start`: the same, but says nothing.
const FAULTS: &str = r#"
[ -e "$root/cut" ] && { echo 'no route' >&2; exit 255; }
[ -e "$root/hang" ] && exec sleep 600
script=$root/script.$$
cat > "$script"
if grep -q setsid "$script"; then
    if [ -e "$root/break" ]; then run >/dev/null; echo 'broken pipe' >&2; exit 255; fi
    if [ -e "$root/hang-start" ]; then run >/dev/null; exec sleep 600; fi
fi
"#;

/// An `ssh` that runs the command here, with another home folder, and notes what it was called with. The login shell of
/// its host greets.
fn fake_ssh(place: &Place) -> (PathBuf, PathBuf) {
    let (bin, home) = (place.root.join("fake"), place.root.join("home"));
    fs::create_dir_all(&bin).expect("made");
    fs::create_dir_all(home.join("inst/bin")).expect("made");
    let script = format!(
        "#!/bin/sh\nroot={root}\necho \"$@\" >> \"$root/calls\"\nwhile [ \"$1\" != -- ]; do shift; done\n\
         [ \"$2\" = me@far ] || {{ echo 'no such host' >&2; exit 255; }}\nshift 2\n\
         run() {{ (cd {home} && HOME={home} exec \"$command\" -s < \"$script\"); }}\ncommand=$1\n\
         {FAULTS}\necho 'Welcome to far'\ncd {home} && HOME={home} exec \"$@\" < \"$script\"\n",
        root = place.root.display(),
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

/// A launcher of a cluster with node `b` far away.
fn far(place: &Place, bin: &Path) -> Launcher {
    let mut up = place.up();
    on_path(&mut up, bin);
    Launcher::start(&mut up)
}

fn down(place: &Place, bin: &Path) -> String {
    let mut down = place.command(&["down", "c.toml"]);
    on_path(&mut down, bin);
    text(&down.output().expect("runs").stdout)
}

fn fault(place: &Place, name: &str) {
    fs::write(place.root.join(name), "").expect("written");
}

fn mend(place: &Place, name: &str) {
    fs::remove_file(place.root.join(name)).expect("removed");
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

    // A launcher that is killed leaves the far node; the next start replaces it.
    launcher.signal("KILL");
    launcher.end();
    let before = far_pid().expect("it runs");
    let mut up = place.up();
    on_path(&mut up, &bin);
    let mut launcher = Launcher::start(&mut up);
    launcher.until("stop      Ctrl-C");
    assert_ne!(far_pid(), Some(before));
    assert!(!place.processes().contains(&before));

    // And so does `down`.
    launcher.signal("KILL");
    launcher.end();
    let mut down = place.command(&["down", "c.toml"]);
    on_path(&mut down, &bin);
    let down = text(&down.output().expect("runs").stdout);
    assert!(down.contains("node b: stopped"), "{down}");
    until("no process is left", || place.processes().is_empty());
    assert_eq!(far_pid(), None);
    assert!(!run_dir.join("b.owner").exists());

    // And Ctrl-C leaves nothing.
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

/// "Stopped" is said only of what has been seen to stop.
#[test]
fn a_stop_that_nobody_confirms_is_a_failure() {
    let place = Place::with("unconfirmed", FAR, "shutdown_grace_ms = 2000");
    let (bin, _) = fake_ssh(&place);
    let mut launcher = far(&place, &bin);
    launcher.until("stop      Ctrl-C");
    fault(&place, "cut");
    launcher.signal("INT");
    let (code, said) = launcher.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("not stopped, and perhaps still running: b"),
        "{said}"
    );
    assert!(
        launcher
            .seen
            .contains("node b: could not be stopped: ssh cannot reach me@far (no route)")
            && launcher.seen.contains("run `down` when me@far answers"),
        "{}",
        launcher.seen
    );
    assert!(
        !launcher.seen.contains("Stopped") && !launcher.seen.contains("was killed"),
        "{}",
        launcher.seen
    );
    mend(&place, "cut");
    assert!(down(&place, &bin).contains("node b: stopped"));
    until("no process is left", || place.processes().is_empty());
}

#[test]
fn a_start_whose_answer_is_lost_is_undone() {
    let place = Place::with("undone", FAR, "shutdown_grace_ms = 2000");
    let (bin, _) = fake_ssh(&place);
    fault(&place, "break");
    let mut launcher = far(&place, &bin);
    let (code, said) = launcher.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("node b did not come up: ssh cannot reach me@far (broken pipe)")
            && !said.contains("may run"),
        "{said}"
    );
    until("no process is left", || place.processes().is_empty());
}

/// Haste does not mean that a node is forgotten, and an ssh that hangs does not mean that haste is in vain.
#[test]
fn a_second_signal_does_not_wait_for_ssh() {
    let place = Place::with("hanging", FAR, "shutdown_grace_ms = 60000");
    let (bin, _) = fake_ssh(&place);
    // Before anything was asked of the other machine, the first signal is enough.
    fault(&place, "hang");
    let mut launcher = far(&place, &bin);
    launcher.until("node a: started");
    launcher.signal("INT");
    assert_eq!(launcher.end().0, Some(130));
    mend(&place, "hang");

    // Its node is started, but the answer does not come: the second signal undoes that.
    fault(&place, "hang-start");
    let mut launcher = far(&place, &bin);
    until("b runs", || place.processes().len() == 2);
    launcher.signal("INT");
    launcher.until("node a: stopped");
    launcher.signal("INT");
    assert_eq!(launcher.end().0, Some(130));
    until("no process is left", || place.processes().is_empty());

    // And where it cannot be undone, that is said.
    let mut launcher = far(&place, &bin);
    until("b runs", || place.processes().len() == 2);
    launcher.signal("INT");
    launcher.until("node a: stopped");
    fault(&place, "hang");
    let begun = Instant::now();
    launcher.signal("INT");
    let (code, said) = launcher.end();
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(code, Some(1), "{said}");
    assert!(
        launcher
            .seen
            .contains("node b: could not be stopped: me@far did not answer over ssh"),
        "{}",
        launcher.seen
    );
    mend(&place, "hang");
    mend(&place, "hang-start");
    assert!(down(&place, &bin).contains("node b: stopped"));
    until("no process is left", || place.processes().is_empty());
}

#[test]
fn a_node_of_somebody_elses_launch_is_left_alone() {
    let place = Place::with("others", FAR, "shutdown_grace_ms = 2000");
    let (bin, home) = fake_ssh(&place);
    let mut launcher = far(&place, &bin);
    launcher.until("stop      Ctrl-C");
    launcher.signal("KILL");
    launcher.end();
    let owner = home.join("inst/run/others/b.owner");
    let ours = fs::read_to_string(&owner).expect("written");
    assert!(
        ours.ends_with(&place.run_dir().display().to_string()),
        "{ours}"
    );
    fs::write(&owner, "elsewhere /run").expect("written");
    let mut launcher = far(&place, &bin);
    let (code, said) = launcher.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("already (pid") && said.contains("from another launch"),
        "{said}"
    );
    assert_eq!(place.processes().len(), 1, "b still runs");
    assert!(down(&place, &bin).contains("node b: stopped"));
    until("no process is left", || place.processes().is_empty());
}

/// A gateway needs the tokens of its clients wherever it runs.
#[test]
fn tokens_go_to_the_gateways_on_other_machines() {
    let place = Place::with(
        "tokens",
        &format!("roles = [\"gateway\", \"host\"]\nclient_port = PORT\n{FAR}"),
        "shutdown_grace_ms = 2000\ntoken_file = \"secrets/tokens\"",
    );
    let (bin, home) = fake_ssh(&place);
    let tokens = place.root.join("secrets/tokens");
    fs::create_dir_all(tokens.parent().expect("has one")).expect("made");
    fs::write(&tokens, "# it's alice\nt0ken-of-alice\nt0ken-of-bob\n").expect("written");
    fs::set_permissions(&tokens, fs::Permissions::from_mode(0o600)).expect("set");
    let mut launcher = far(&place, &bin);
    launcher.until("stop      Ctrl-C");
    let copy = home.join("inst/secrets/tokens");
    assert_eq!(
        fs::read_to_string(&copy).expect("copied"),
        fs::read_to_string(&tokens).expect("there")
    );
    let mode = fs::metadata(&copy).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let calls = fs::read_to_string(place.root.join("calls")).expect("noted");
    assert!(!calls.contains("t0ken"));
    launcher.signal("INT");
    assert_eq!(launcher.end().0, Some(0));
    until("no process is left", || place.processes().is_empty());
}
