//! `chat` and `status`, into pipes and on a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::Stdio;

use crate::fake::{Cluster, Fault, Gateway};
use crate::program::{finish, run_piped, run_with, understudy};

const ANSWER: &str = "t0 t1 t2 end";

async fn chat(gateway: &Gateway, input: &str) -> crate::program::Ran {
    let address = gateway.address.to_string();
    run_piped(understudy().args(["chat", "--addr", &address]), input).await
}

#[tokio::test]
async fn piped_lines_are_answered_in_turn() {
    let gateway = Cluster::new(3).gateway().await;
    let ran = chat(&gateway, "one\n\ntwo\n/reset\nthree").await;
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(0), ""));
    assert_eq!(ran.stdout, format!("{ANSWER}\n{ANSWER}\n{ANSWER}\n"));
    let ran = chat(&gateway, "one\n/quit\ntwo\n").await;
    assert_eq!((ran.status, ran.stdout), (Some(0), format!("{ANSWER}\n")));
    let ran = chat(&gateway, "").await;
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(0), ""));
}

#[tokio::test]
async fn a_failure_in_a_pipe_ends_the_conversation() {
    let gateway = Cluster::new(3).gateway().await;
    gateway.fault(1, Fault::Fail(understudy_protocol::ErrorCode::Overloaded));
    let ran = chat(&gateway, "one\ntwo\n").await;
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(4), "t0 \n"));
    assert!(ran.stderr.contains("overloaded"), "{}", ran.stderr);
}

#[tokio::test]
async fn status_is_text_or_json() {
    let gateway = Cluster::new(3).gateway().await;
    let address = gateway.address.to_string();
    let ran = run_with(&["status", "--addr", &address]).await;
    assert_eq!(ran.status, Some(0), "{ran:?}");
    assert!(
        ran.stdout.starts_with("cluster fake, as "),
        "{}",
        ran.stdout
    );
    assert!(!ran.stdout.contains('\x1b'), "colours into a pipe");
    let ran = run_with(&["status", "--addr", &address, "--json"]).await;
    assert_eq!(ran.json()[0]["cluster"], "fake");
}

/// A terminal: what the program's side is, and what the person's is.
struct Terminal {
    person: File,
    program: OwnedFd,
}

impl Terminal {
    fn open() -> Self {
        let (mut person, mut program) = (0, 0);
        let null = std::ptr::null_mut();
        // SAFETY: both pointers are to live integers, and null asks for defaults.
        let result =
            unsafe { libc::openpty(&mut person, &mut program, null, null.cast(), null.cast()) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        // SAFETY: openpty succeeded, so both are open and nobody else's.
        unsafe {
            Self {
                person: File::from_raw_fd(person),
                program: OwnedFd::from_raw_fd(program),
            }
        }
    }

    fn stdio(&self) -> Stdio {
        Stdio::from(self.program.try_clone().expect("a descriptor"))
    }
}

/// Who sits at a terminal.
struct Person {
    terminal: File,
    /// Shown and not looked at yet.
    unread: String,
}

impl Person {
    fn at(terminal: &Terminal) -> Self {
        Self {
            terminal: terminal.person.try_clone().expect("a descriptor"),
            unread: String::new(),
        }
    }

    /// Reads up to and including `part`.
    fn read_until(&mut self, part: &str) -> String {
        let mut chunk = [0; 1024];
        loop {
            if let Some(start) = self.unread.find(part) {
                let rest = self.unread.split_off(start + part.len());
                return std::mem::replace(&mut self.unread, rest);
            }
            let count = self
                .terminal
                .read(&mut chunk)
                .expect("the terminal is read");
            self.unread
                .push_str(&String::from_utf8_lossy(&chunk[..count]));
        }
    }

    fn types(&mut self, keys: &[u8]) {
        self.terminal.write_all(keys).expect("typed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_can_stop_an_answer_and_go_on() {
    let gateway = Cluster::new(3).gateway().await;
    gateway.fault(2, Fault::Pause);
    let address = gateway.address.to_string();
    let terminal = Terminal::open();
    let mut command = understudy();
    command.args(["chat", "--addr", &address]);
    command
        .stdin(terminal.stdio())
        .stdout(terminal.stdio())
        .stderr(terminal.stdio());
    // SAFETY: setsid and ioctl are async-signal-safe; they make the terminal the child's own, so that ^C reaches it.
    unsafe {
        command.pre_exec(|| {
            let failed = libc::setsid() == -1 || libc::ioctl(0, libc::TIOCSCTTY, 0) == -1;
            if failed {
                Err(std::io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
    let child = command.spawn().expect("the program starts");
    let mut person = Person::at(&terminal);
    let talk = tokio::task::spawn_blocking(move || {
        person.read_until("> ");
        person.types(b"one\n");
        person.read_until("t0 t1 ");
        person.types(b"\x03");
        person.read_until("> ");
        person.types(b"/nonsense\n");
        person.read_until("no command /nonsense");
        person.read_until("> ");
        person.types(b"\x04");
    });
    drop(terminal.program);
    let ran = finish(child).await;
    talk.await.expect("the talk went as expected");
    assert_eq!(ran.status, Some(0), "{ran:?}");
    assert_eq!(gateway.script.lock().expect("not poisoned").cancels, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_gets_colours_unless_it_does_not_want_them() {
    let gateway = Cluster::new(3).gateway().await;
    let address = gateway.address.to_string();
    for (no_color, coloured) in [("", true), ("1", false)] {
        let terminal = Terminal::open();
        let mut command = understudy();
        command
            .args(["status", "--addr", &address])
            .env("NO_COLOR", no_color);
        command.stdout(terminal.stdio());
        let child = command.spawn().expect("the program starts");
        let mut person = Person::at(&terminal);
        let shown = tokio::task::spawn_blocking(move || person.read_until("no replica is known"));
        let ran = finish(child).await;
        assert_eq!(ran.status, Some(0), "{ran:?}");
        assert_eq!(shown.await.expect("read").contains("\x1b[1m"), coloured);
    }
}
