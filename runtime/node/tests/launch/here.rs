//! Nodes of this machine: every road into a running cluster, and that no road out of it leaves a process.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use crate::place::{Launcher, Place, signal, text, until};

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

/// Whoever builds before starting asks first.
#[test]
fn a_running_cluster_can_be_asked_about_without_a_start() {
    let place = Place::new("asked");
    let ask = || {
        let asked = place.command(&["up", "c.toml", "--if-free"]).output();
        let asked = asked.expect("runs");
        (asked.status.code(), text(&asked.stderr))
    };
    assert_eq!(ask(), (Some(0), String::new()));
    let mut launcher = Launcher::start(&mut place.up());
    launcher.until("stop      Ctrl-C");
    let (code, said) = ask();
    assert_eq!(code, Some(1));
    assert!(said.contains("is running here already"), "{said}");
    launcher.signal("INT");
    launcher.end();
    assert_eq!(ask().0, Some(0));
    place.assert_nothing_is_left();
}

/// What the lock file names is compared with what runs, before anything is sent to it.
#[test]
fn a_lock_file_that_names_a_bystander_harms_nobody() {
    let place = Place::new("bystander");
    fs::create_dir_all(place.run_dir()).expect("made");
    let mut bystander = Command::new("sleep").arg("600").spawn().expect("sleep");
    let path = place.run_dir().join("launcher.lock");
    // Held by us, with a pid that was a launcher's in an earlier life.
    fs::write(&path, format!("{} 1 up\n", bystander.id())).expect("written");
    let lock = fs::File::open(&path).expect("there");
    lock.try_lock().expect("free");
    let down = place.down();
    let said = text(&down.stderr);
    assert_eq!(down.status.code(), Some(1), "{said}");
    assert!(said.contains("another process holds"), "{said}");
    assert!(
        bystander.try_wait().expect("our child").is_none(),
        "the bystander was hit"
    );
    // A `down` at work keeps launches off.
    let stat = fs::read_to_string(format!("/proc/{}/stat", bystander.id())).expect("it runs");
    let ticks = stat.split(' ').nth(21).expect("a start time");
    fs::write(&path, format!("{} {ticks} down\n", bystander.id())).expect("written");
    let up = place.up().output().expect("runs");
    let said = text(&up.stderr);
    assert_eq!(up.status.code(), Some(1), "{said}");
    let expected = format!("is being stopped here by `down` (pid {})", bystander.id());
    assert!(said.contains(&expected), "{said}");
    bystander.kill().expect("killed");
    bystander.wait().expect("reaped");
    drop(lock);
    place.assert_nothing_is_left();
}

#[test]
fn a_replica_that_cannot_start_shows_its_nodes_last_words() {
    let place = Place::new("no-libraries");
    let done = place.up().env("STANDIN_DOWN", "b").output().expect("runs");
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    for part in [
        "replica m/1 on b cannot start: the engine's libraries could not be loaded",
        "run scripts/setup.sh",
        "the last lines of the log of node b:",
        "| libtorch_cpu.so: cannot open shared object file",
    ] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    place.assert_nothing_is_left();
}

/// Where a detached launcher cannot write, nothing has been started yet.
#[test]
fn a_detached_launcher_without_a_log_starts_nothing() {
    let place = Place::new("logless");
    fs::create_dir_all(place.run_dir().join("launcher.log")).expect("made");
    let done = place.up().arg("--detach").output().expect("runs");
    let said = text(&done.stdout);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(
        said.contains("launcher.log: Is a directory") && !said.contains("started"),
        "{said}"
    );
    place.assert_nothing_is_left();
}

#[test]
fn ctrl_c_for_a_detached_launch_that_starts_leaves_nothing() {
    let place = Place::new("detached-interrupted");
    let mut parent = Launcher::start(place.up().arg("--detach").env("STANDIN_STARTING", "b"));
    parent.until("replica m/1 on b is starting");
    parent.signal("INT");
    assert_eq!(parent.end().0, Some(130));
    place.assert_nothing_is_left();
}

#[test]
fn a_closed_terminal_stops_a_foreground_launcher() {
    let place = Place::new("hangup");
    let mut launcher = Launcher::start(&mut place.up());
    launcher.until("stop      Ctrl-C");
    launcher.signal("HUP");
    assert_eq!(launcher.end().0, Some(0));
    place.assert_nothing_is_left();
}

#[test]
fn down_stops_a_launch_that_is_starting() {
    let place = Place::new("down-early");
    let mut launcher = Launcher::start(place.up().env("STANDIN_STARTING", "b"));
    launcher.until("replica m/1 on b is starting");
    let down = place.down();
    assert!(
        text(&down.stdout).contains("is stopped"),
        "{}",
        text(&down.stdout)
    );
    assert_eq!(launcher.end().0, Some(143));
    place.assert_nothing_is_left();
}

#[test]
fn a_log_that_grows_is_put_aside_while_its_node_runs() {
    let place = Place::new("grows");
    let mut launcher = Launcher::start(&mut place.up());
    launcher.until("stop      Ctrl-C");
    let log = place.run_dir().join("b.log");
    fs::OpenOptions::new()
        .write(true)
        .open(&log)
        .and_then(|file| file.set_len(65 << 20))
        .expect("a sparse file");
    let old = place.run_dir().join("b.log.1");
    until("the log is put aside", || {
        old.exists() && fs::metadata(&log).is_ok_and(|found| found.len() == 0)
    });
    launcher.signal("INT");
    launcher.end();
    // The node still writes to the file that it has opened.
    let rest = fs::read_to_string(&log).expect("there");
    assert_eq!(rest, "stand-in b stops\n");
    place.assert_nothing_is_left();
}
