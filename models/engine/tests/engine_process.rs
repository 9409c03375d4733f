//! The fake engine as a process of its own: frames, faults, exit codes, the end of the socket.

use std::{
    io::{ErrorKind, Write},
    os::{
        fd::AsRawFd,
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, ExitStatus as ProcessStatus, Stdio},
    time::{Duration, Instant},
};

use understudy_engine_core::{
    codec::{self, CodecError, FrameReader},
    frame::{
        AttemptError, AttemptId, EngineCommand, EngineEvent, EngineHealth, EngineInfo,
        FinishReason, SamplingParams, StartAttempt, StepToken,
    },
    server::ExitStatus,
};

/// No condition in these tests takes longer, even on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// A fake engine, and our end of its socket.
struct Engine {
    child: Child,
    socket: UnixStream,
    events: FrameReader<UnixStream>,
}

impl Engine {
    fn spawn(options: &[&str]) -> Self {
        Self::spawn_with(options, &[])
    }

    fn spawn_with(options: &[&str], environment: &[(&str, &str)]) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let fd = theirs.as_raw_fd();
        let mut command = Command::new(env!("CARGO_BIN_EXE_understudy-engine-fake"));
        command
            .args(["serve", "--model", "no-such-model", "--fd", &fd.to_string()])
            .args(options);
        command
            .envs(environment.iter().copied())
            .stderr(Stdio::null());
        // SAFETY: fcntl is async-signal-safe; it lets the child inherit the descriptor.
        unsafe {
            command.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let child = command.spawn().unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let events = FrameReader::new(socket.try_clone().unwrap());
        Self {
            child,
            socket,
            events,
        }
    }

    fn ready(options: &[&str]) -> (Self, EngineInfo) {
        let mut engine = Self::spawn(options);
        let info = engine.wait_for(|event| match event {
            EngineEvent::Ready(info) => Some(info),
            _ => None,
        });
        (engine, info)
    }

    fn send(&mut self, command: &EngineCommand) {
        self.socket
            .write_all(&codec::encode(command).unwrap())
            .unwrap();
    }

    fn start(&mut self, request: u128, max_tokens: u32) {
        self.send(&EngineCommand::Start(attempt(request, max_tokens)));
    }

    /// The next event; `None` when the engine has closed its end.
    fn next(&mut self) -> Option<EngineEvent> {
        match self.events.read() {
            Ok(event) => event,
            Err(CodecError::Io(error)) if error.kind() == ErrorKind::ConnectionReset => None,
            Err(error) => panic!("no event: {error}"),
        }
    }

    fn wait_for<T>(&mut self, mut pick: impl FnMut(EngineEvent) -> Option<T>) -> T {
        let limit = Instant::now() + DEADLINE;
        while Instant::now() < limit {
            let event = self.next().expect("the engine closed its socket");
            if let Some(found) = pick(event) {
                return found;
            }
        }
        panic!("the event did not come in {DEADLINE:?}");
    }

    /// All tokens until one of them is final.
    fn tokens_to_the_end(&mut self) -> Vec<StepToken> {
        let mut all = Vec::new();
        self.wait_for(|event| {
            if let EngineEvent::Step { tokens, .. } = event {
                all.extend(tokens);
            }
            all.last()
                .is_some_and(|token: &StepToken| token.finish.is_some())
                .then_some(())
        });
        all
    }

    fn health(&mut self) -> EngineHealth {
        self.wait_for(|event| match event {
            EngineEvent::Heartbeat(health) => Some(health),
            _ => None,
        })
    }

    fn fatal(&mut self) -> String {
        self.wait_for(|event| match event {
            EngineEvent::Fatal { message } => Some(message),
            _ => None,
        })
    }

    fn exit(mut self) -> ProcessStatus {
        let limit = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                Instant::now() < limit,
                "the engine did not exit in {DEADLINE:?}"
            );
            std::thread::yield_now();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn attempt(request: u128, max_tokens: u32) -> StartAttempt {
    StartAttempt {
        attempt: AttemptId { request, epoch: 1 },
        prompt: vec![1, 2, 3],
        committed: vec![],
        expect_logprobs: vec![],
        suspect: false,
        priority: 0,
        fork_of: None,
        cache_salt: 0,
        sampling: SamplingParams {
            max_tokens,
            ..SamplingParams::default()
        },
    }
}

fn code(status: ExitStatus) -> Option<i32> {
    Some(i32::from(status.code()))
}

#[test]
fn serves_a_request_and_shuts_down() {
    let (mut engine, info) = Engine::ready(&[
        "--max-sequences",
        "2",
        "--context-length",
        "100",
        "--vocab-size",
        "50",
    ]);
    assert_eq!(
        (info.max_sequences, info.context_length, info.vocab_size),
        (2, 100, 50)
    );
    assert_eq!(info.pid, engine.child.id());
    engine.start(7, 10);
    let tokens = engine.tokens_to_the_end();
    let positions: Vec<u32> = tokens.iter().map(|token| token.position).collect();
    assert_eq!(positions, (0..10).collect::<Vec<_>>());
    assert_eq!(tokens[9].finish, Some(FinishReason::Length));
    let totals = engine.wait_for(|event| match event {
        EngineEvent::Heartbeat(health) if !health.busy => Some(health),
        _ => None,
    });
    assert_eq!(
        (totals.generated_tokens, totals.prompt_tokens, totals.steps),
        (10, 3, 10)
    );
    assert!(totals.rss_bytes > 0);
    engine.send(&EngineCommand::Shutdown);
    assert_eq!(engine.exit().code(), code(ExitStatus::Done));
}

/// The same tokens without the times that they took.
fn timeless(tokens: &[StepToken]) -> Vec<StepToken> {
    let without = |token: &StepToken| StepToken {
        waited_ms: None,
        ..token.clone()
    };
    tokens.iter().map(without).collect()
}

#[test]
fn every_step_is_reported_with_the_prompt_tokens_it_ran() {
    let (mut engine, _) = Engine::ready(&["--max-sequences", "1", "--step-tokens", "4"]);
    let mut start = attempt(1, 3);
    start.prompt = vec![5; 10];
    engine.send(&EngineCommand::Start(start));
    let mut steps = Vec::new();
    engine.wait_for(|event| match event {
        EngineEvent::Step {
            step,
            prompt_tokens,
            tokens,
        } => {
            steps.push((step, prompt_tokens, tokens.len()));
            (steps.len() == 5).then_some(())
        }
        _ => None,
    });
    assert_eq!(
        steps,
        [(1, 4, 0), (2, 4, 0), (3, 2, 1), (4, 0, 1), (5, 0, 1)]
    );
}

#[test]
fn the_first_token_says_how_long_its_attempt_waited_for_a_slot() {
    let (mut engine, _) = Engine::ready(&["--max-sequences", "1", "--step-delay-us", "2000"]);
    let both = [attempt(1, 50), attempt(2, 2)].map(|start| {
        let command = EngineCommand::Start(start);
        codec::encode(&command).unwrap()
    });
    engine.socket.write_all(&both.concat()).unwrap();
    assert_eq!(engine.tokens_to_the_end().len(), 50);
    let tokens = engine.tokens_to_the_end();
    let waited: Vec<Option<u32>> = tokens.iter().map(|token| token.waited_ms).collect();
    assert!(
        matches!(waited[..], [Some(waited_ms), None] if waited_ms >= 50),
        "50 steps of 2 ms come first: {waited:?}"
    );
}

#[test]
fn an_engine_started_in_place_of_a_killed_one_goes_on_with_the_same_bits() {
    let (mut first, _) = Engine::ready(&[]);
    first.start(1, 40);
    let whole = first.tokens_to_the_end();
    drop(first);
    let (mut second, _) = Engine::ready(&[]);
    let mut resumed = attempt(1, 40);
    resumed.committed = whole[..25].iter().map(|token| token.token.id).collect();
    resumed.expect_logprobs = whole[21..25]
        .iter()
        .map(|token| token.token.logprob)
        .collect();
    second.send(&EngineCommand::Start(resumed.clone()));
    assert_eq!(
        timeless(&second.tokens_to_the_end()),
        timeless(&whole[25..])
    );
    assert_eq!(second.health().replayed_tokens, 25);
    let (mut other_model, _) = Engine::ready(&["--salt", "1"]);
    other_model.send(&EngineCommand::Start(resumed));
    let error = other_model.wait_for(|event| match event {
        EngineEvent::AttemptFailed { error, .. } => Some(error),
        _ => None,
    });
    assert!(
        matches!(error, AttemptError::ReplayMismatch { position: 21, .. }),
        "{error}"
    );
}

#[test]
fn the_process_ends_with_its_socket_even_in_the_middle_of_a_step() {
    let (mut engine, _) = Engine::ready(&["--hang-at-step", "2"]);
    engine.start(1, 10);
    engine.wait_for(|event| matches!(event, EngineEvent::Step { step: 1, .. }).then_some(()));
    engine.socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(engine.exit().code(), code(ExitStatus::Done));
}

#[test]
fn the_process_dies_with_the_thread_that_started_it_even_if_the_socket_stays_open() {
    use std::{os::unix::process::ExitStatusExt, sync::mpsc::channel, thread};
    let (give, take) = channel();
    let (finish, finished) = channel::<()>();
    let parent = thread::spawn(move || {
        give.send(Engine::ready(&["--hang-at-step", "1"]).0)
            .unwrap();
        let _ = finished.recv();
    });
    let mut engine: Engine = take.recv().unwrap();
    engine.start(1, 1);
    drop(finish);
    parent.join().unwrap();
    assert_eq!(engine.exit().signal(), Some(libc::SIGKILL));
}

#[test]
fn a_hung_step_shows_in_the_heartbeat() {
    let (mut engine, _) = Engine::ready(&["--hang-at-step", "3"]);
    engine.start(1, 10);
    for _ in 0..2 {
        engine.wait_for(|event| matches!(event, EngineEvent::Step { .. }).then_some(()));
    }
    for _ in 0..3 {
        let health = engine.health();
        assert!(health.busy && health.steps == 2, "{health:?}");
    }
    engine.start(2, 1);
    engine.send(&EngineCommand::Shutdown);
    assert_eq!(engine.exit().code(), code(ExitStatus::Done));
}

/// One step that takes a second: whether its watermark moves before it is over.
fn moves_within_a_step(options: &[&str]) -> bool {
    let long = ["--step-delay-us", "1000000"];
    let (mut engine, _) = Engine::ready(&[&long, options].concat());
    engine.start(1, 1);
    let mut seen = Vec::new();
    engine.wait_for(|event| match event {
        EngineEvent::Heartbeat(health) if health.busy => {
            seen.push(health.steps);
            None
        }
        EngineEvent::Step { .. } => Some(()),
        _ => None,
    });
    assert!(seen.len() >= 3 && seen.is_sorted(), "{seen:?}");
    seen.first() < seen.last()
}

#[test]
fn a_long_step_moves_the_watermark_if_the_runner_reports() {
    assert!(moves_within_a_step(&["--step-ticks", "10"]));
    assert!(!moves_within_a_step(&[]));
}

/// A node that hears of a fault closes the socket at once. That must not turn the exit code into that of a good end.
#[test]
fn the_exit_code_of_a_fault_survives_a_quick_node() {
    for round in 0..40 {
        let mut engine = Engine::spawn(&["--fail-at-start"]);
        engine.fatal();
        engine.socket.shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(
            engine.exit().code(),
            code(ExitStatus::LoadFailed),
            "round {round}"
        );
    }
}

#[test]
fn faults_give_their_exit_codes() {
    let cases: [(&[&str], ExitStatus); 3] = [
        (&["--fail-at-start"], ExitStatus::LoadFailed),
        (&["--fail-at-step", "2"], ExitStatus::StepFailed),
        (&["--panic-at-step", "2"], ExitStatus::Panicked),
    ];
    for (options, status) in cases {
        let mut engine = Engine::spawn(options);
        engine.start(1, 10);
        let message = engine.fatal();
        assert!(message.contains("told to"), "{message}");
        assert_eq!(engine.exit().code(), code(status), "{options:?}");
    }
}

#[test]
fn poison_aborts_the_process_and_can_be_limited_to_once() {
    use std::os::unix::process::ExitStatusExt;
    let marker = std::env::temp_dir().join(format!("understudy-fake-once-{}", std::process::id()));
    let environment = [
        ("UNDERSTUDY_FAKE_ABORT_AT_POSITION", "5"),
        ("UNDERSTUDY_FAKE_ONCE", marker.to_str().unwrap()),
    ];
    let mut engine = Engine::spawn_with(&[], &environment);
    engine.start(1, 10);
    while engine.next().is_some() {}
    assert_eq!(engine.exit().signal(), Some(libc::SIGABRT));
    let mut engine = Engine::spawn_with(&[], &environment);
    engine.start(1, 10);
    assert_eq!(engine.tokens_to_the_end().len(), 10);
    std::fs::remove_file(marker).unwrap();
}

#[test]
fn a_slow_load_proves_life_and_then_serves() {
    let mut engine = Engine::spawn(&["--slow-load-ms", "900"]);
    engine.start(1, 3);
    let mut reports = Vec::new();
    engine.wait_for(|event| match event {
        EngineEvent::Loading { progress } => {
            reports.push(progress);
            None
        }
        EngineEvent::Ready(_) => Some(()),
        other => panic!("before Ready: {other:?}"),
    });
    assert!(
        reports.len() >= 2
            && reports.is_sorted()
            && reports.iter().all(|p| (0.0..=1.0).contains(p)),
        "{reports:?}"
    );
    assert_eq!(engine.tokens_to_the_end().len(), 3);
}

#[test]
fn garbage_is_answered_and_ends_the_process() {
    for garbage in [&[0xff_u8; 8][..], &[0, 0, 0, 1, 0xc1], &[0, 0, 0, 0]] {
        let (mut engine, _) = Engine::ready(&[]);
        engine.socket.write_all(garbage).unwrap();
        assert!(engine.fatal().contains("frame"));
        assert_eq!(engine.exit().code(), code(ExitStatus::BadFrame));
    }
}

#[test]
fn more_than_fits_is_refused_and_a_cancel_makes_room() {
    let (mut engine, _) = Engine::ready(&[
        "--max-sequences",
        "1",
        "--max-waiting",
        "1",
        "--step-delay-us",
        "1000",
        "--context-length",
        "100000",
    ]);
    engine.start(1, 90_000);
    engine.start(2, 2);
    engine.start(3, 2);
    let (refused, error) = engine.wait_for(|event| match event {
        EngineEvent::AttemptFailed { attempt, error } => Some((attempt, error)),
        _ => None,
    });
    assert_eq!(refused.request, 3);
    assert_eq!(
        error,
        AttemptError::Full {
            running: 1,
            waiting: 1,
            limit: 1
        }
    );
    engine.send(&EngineCommand::Cancel {
        attempt: AttemptId {
            request: 1,
            epoch: 1,
        },
    });
    engine.wait_for(|event| match event {
        EngineEvent::Step { tokens, .. } => tokens
            .iter()
            .any(|t| t.attempt.request == 2 && t.finish.is_some())
            .then_some(()),
        _ => None,
    });
    assert_eq!(engine.health().waiting, 0);
}

#[test]
fn not_finite_logits_end_the_attempt_and_not_the_engine() {
    let (mut engine, _) = Engine::ready(&["--nan-at-step", "3"]);
    engine.start(1, 10);
    let error = engine.wait_for(|event| match event {
        EngineEvent::AttemptFailed { error, .. } => Some(error),
        _ => None,
    });
    assert_eq!(error, AttemptError::NotFinite { position: 2 });
    assert_eq!(engine.health().running, 0);
}

#[test]
fn a_wrong_command_line_says_what_is_wrong() {
    let run = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_understudy-engine-fake"))
            .args(arguments)
            .output()
            .unwrap()
    };
    for (arguments, part) in [
        (&["serve", "--model", "m"][..], "--fd is missing"),
        (&["serve", "--model", "m", "--fd", "977"], "977 is not open"),
        (&["serve", "--model", "m", "--fd", "0"], "not a Unix socket"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), code(ExitStatus::Usage));
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(message.contains(part), "{message}");
    }
}
