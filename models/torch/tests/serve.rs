//! The engine process as a node sees it: a child that inherits one end of a socket pair.

mod common;

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::{expected, golden};
use understudy_engine_core::codec::{FrameReader, write_frame};
use understudy_engine_core::frame::{
    AttemptError, AttemptId, EngineCommand, EngineEvent, EngineHealth, EngineInfo, FinishReason,
    OutputToken, SamplingParams, StartAttempt, StepToken,
};

/// Longer than any step here takes, on a machine that does much else besides.
const DEADLINE: Duration = Duration::from_secs(60);

struct Engine {
    child: Child,
    socket: UnixStream,
    events: FrameReader<UnixStream>,
}

impl Engine {
    fn start(model: &Path, extra: &[&str]) -> Self {
        Self::start_with_threads(model, extra, "1")
    }

    fn start_with_threads(model: &Path, extra: &[&str], threads: &str) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(DEADLINE)).unwrap();
        let fd = theirs.as_raw_fd();
        let mut command = Command::new(env!("CARGO_BIN_EXE_understudy-engine"));
        command
            .arg("serve")
            .arg("--model")
            .arg(model)
            .args(["--fd", &fd.to_string(), "--device", "cpu"])
            .args(["--threads", threads])
            .args(extra);
        // The binary must find LibTorch by itself.
        command.env_remove("LD_LIBRARY_PATH").stdin(Stdio::null());
        // SAFETY: fcntl is async-signal-safe; it lets the child keep its end.
        unsafe {
            command.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let child = command.spawn().unwrap();
        let events = FrameReader::new(ours.try_clone().unwrap());
        Self {
            child,
            socket: ours,
            events,
        }
    }

    fn send(&mut self, command: &EngineCommand) {
        write_frame(&mut self.socket, command, &mut Vec::new()).unwrap();
    }

    /// The next event that is neither progress, nor a heartbeat, nor a step without tokens; `None` at the end of the stream.
    fn next(&mut self) -> Option<EngineEvent> {
        loop {
            match self.events.read::<EngineEvent>().unwrap() {
                Some(EngineEvent::Loading { .. } | EngineEvent::Heartbeat(_)) => {}
                Some(EngineEvent::Step { tokens, .. }) if tokens.is_empty() => {}
                event => return event,
            }
        }
    }

    fn ready(&mut self) -> EngineInfo {
        match self.next() {
            Some(EngineEvent::Ready(info)) => info,
            other => panic!("{other:?}"),
        }
    }

    /// The next heartbeat of an engine without work: it counts all that was computed before.
    fn health(&mut self) -> EngineHealth {
        loop {
            match self.events.read::<EngineEvent>().unwrap() {
                Some(EngineEvent::Heartbeat(health)) if !health.busy => return health,
                Some(EngineEvent::Heartbeat(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// The tokens of one attempt, to its end.
    fn tokens(&mut self, attempt: AttemptId) -> Vec<StepToken> {
        let mut tokens: Vec<StepToken> = Vec::new();
        while tokens.last().is_none_or(|token| token.finish.is_none()) {
            match self.next() {
                Some(EngineEvent::Step { tokens: step, .. }) => {
                    tokens.extend(step.into_iter().filter(|token| token.attempt == attempt))
                }
                other => panic!("{other:?}"),
            }
        }
        tokens
    }

    fn exit(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < DEADLINE, "the engine does not end");
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

fn start(
    request: u128,
    prompt: &[u32],
    committed: &[OutputToken],
    max_tokens: u32,
) -> StartAttempt {
    StartAttempt {
        attempt: AttemptId { request, epoch: 1 },
        prompt: prompt.to_vec(),
        committed: committed.iter().map(|token| token.id).collect(),
        expect_logprobs: committed.iter().map(|token| token.logprob).collect(),
        sampling: SamplingParams {
            max_tokens,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        ..StartAttempt::default()
    }
}

#[test]
fn serves_the_golden_tokens_and_replays_them_bit_for_bit() {
    let (expected, _) = expected("bf16_mha_tied");
    let length = expected.greedy.len() as u32;
    let mut engine = Engine::start(&golden("bf16_mha_tied"), &["--max-sequences", "4"]);
    let info = engine.ready();
    assert_eq!(
        (
            info.architecture.as_str(),
            info.device.as_str(),
            info.dtype.as_str()
        ),
        ("LlamaForCausalLM", "cpu", "bf16")
    );
    assert_eq!(
        (
            info.vocab_size,
            info.context_length,
            info.max_sequences,
            info.eos_token_ids
        ),
        (259, 256, 4, vec![2])
    );

    let whole = start(1, &expected.prompt, &[], length);
    engine.send(&EngineCommand::Start(whole.clone()));
    let tokens = engine.tokens(whole.attempt);
    let ids: Vec<u32> = tokens.iter().map(|token| token.token.id).collect();
    assert_eq!(ids, expected.greedy);
    assert_eq!(tokens.last().unwrap().finish, Some(FinishReason::Length));

    // Another process, other neighbours, the first 30 tokens committed: the rest must come out with the same logprob bits.
    let mut second = Engine::start(
        &golden("bf16_mha_tied"),
        &["--max-sequences", "3", "--step-tokens", "16"],
    );
    assert_eq!(second.ready().fingerprint, info.fingerprint);
    second.send(&EngineCommand::Start(start(
        7,
        &expected.prompt[5..],
        &[],
        40,
    )));
    let committed: Vec<OutputToken> = tokens[..30]
        .iter()
        .map(|token| token.token.clone())
        .collect();
    let resumed = start(1, &expected.prompt, &committed, length);
    second.send(&EngineCommand::Start(resumed.clone()));
    let rest = second.tokens(resumed.attempt);
    assert_eq!(rest.len(), tokens.len() - 30);
    for (again, before) in rest.iter().zip(&tokens[30..]) {
        assert_eq!(
            (again.position, again.token.id),
            (before.position, before.token.id)
        );
        assert_eq!(
            again.token.logprob.to_bits(),
            before.token.logprob.to_bits(),
            "position {}",
            again.position
        );
    }

    engine.send(&EngineCommand::Shutdown);
    assert_eq!(engine.exit().code(), Some(0));
    // A node that is gone: the engine goes too.
    drop(std::mem::replace(
        &mut second.events,
        FrameReader::new(UnixStream::pair().unwrap().0),
    ));
    second.socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(second.exit().code(), Some(0));
}

#[test]
fn a_model_that_cannot_be_loaded_is_fatal_with_a_reason_and_exit_code_10() {
    let scratch = common::Scratch::of_golden("f32_gqa_tied");
    let path = scratch.path("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let mut engine = Engine::start(&scratch.0, &[]);
    match engine.next() {
        Some(EngineEvent::Fatal { message }) => assert!(message.contains("truncated"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(engine.exit().code(), Some(10));
}

/// With stock operators a replay computes other bits than the first run; close ones must do, or nothing survives an engine's death.
#[test]
fn stock_operators_resume_from_a_log_within_their_tolerance() {
    let cases = [
        ("f32_gqa_tied", "f32"),
        ("bf16_mha_tied", "bf16"),
        ("f16_biases_sharded", "f16"),
    ];
    let mut close = 0;
    for (model, dtype) in cases {
        let fast = [
            "--numerics",
            "fast",
            "--dtype",
            dtype,
            "--max-sequences",
            "2",
        ];
        let (expected, _) = expected(model);
        let length = expected.greedy.len() as u32;
        let mut engine = Engine::start(&golden(model), &fast);
        let fingerprint = engine.ready().fingerprint;
        let whole = start(1, &expected.prompt, &[], length);
        engine.send(&EngineCommand::Start(whole.clone()));
        let tokens = engine.tokens(whole.attempt);
        drop(engine);

        // Another number of threads is the same class of engine.
        let mut second = Engine::start_with_threads(&golden(model), &fast, "2");
        assert_eq!(second.ready().fingerprint, fingerprint, "{dtype}");
        for cut in [1, 17, 40] {
            let committed: Vec<OutputToken> = tokens[..cut]
                .iter()
                .map(|token| token.token.clone())
                .collect();
            let mut resumed = start(cut as u128, &expected.prompt, &committed, length);
            second.send(&EngineCommand::Start(resumed.clone()));
            let rest = second.tokens(resumed.attempt);
            assert_eq!(rest.len(), tokens.len() - cut, "{dtype} from {cut}");
            let moved = rest.iter().zip(&tokens[cut..]);
            let moved = moved
                .take_while(|(again, before)| again.token.id == before.token.id)
                .map(|(again, before)| (again.token.logprob - before.token.logprob).abs());
            println!(
                "{dtype} from {cut}: a logprob moves by {} at most",
                moved.fold(0.0, f32::max)
            );
            // A log of another model is still refused.
            resumed.attempt.request += 1000;
            resumed.expect_logprobs[cut - 1] -= 3.0;
            second.send(&EngineCommand::Start(resumed.clone()));
            match second.next() {
                Some(EngineEvent::AttemptFailed {
                    attempt,
                    error: AttemptError::ReplayMismatch { position, .. },
                }) => assert_eq!((attempt, position), (resumed.attempt, cut as u32 - 1)),
                other => panic!("{dtype} from {cut}: {other:?}"),
            }
        }
        close += second.health().close_logprobs;
    }
    assert!(close > 0, "no logprob moved: does this test anything?");
}

/// A step that is long shows that it gets on before it is over.
#[test]
fn a_step_moves_the_watermark_by_more_than_one() {
    let (expected, _) = expected("f32_gqa_tied");
    let mut engine = Engine::start(&golden("f32_gqa_tied"), &[]);
    engine.ready();
    let one = start(1, &expected.prompt, &[], 1);
    engine.send(&EngineCommand::Start(one.clone()));
    engine.tokens(one.attempt);
    let layers = 2;
    let health = engine.health();
    assert!(health.steps > layers, "{health:?}");
}

/// A node that hears of a fault closes the socket at once; the exit code is the fault's all the same.
#[test]
fn the_exit_code_of_a_fault_survives_a_quick_node() {
    let scratch = common::Scratch::of_golden("f32_gqa_tied");
    std::fs::write(scratch.path("model.safetensors"), b"short").unwrap();
    for round in 0..12 {
        let mut engine = Engine::start(&scratch.0, &[]);
        match engine.next() {
            Some(EngineEvent::Fatal { .. }) => {}
            other => panic!("{other:?}"),
        }
        engine.socket.shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(engine.exit().code(), Some(10), "round {round}");
    }
}

#[test]
fn a_wrong_command_line_says_what_is_allowed_and_exits_with_2() {
    for (arguments, part) in [
        (
            vec!["serve", "--model", "x", "--fd", "9", "--device", "gpu"],
            "allowed: auto, cpu",
        ),
        (
            vec!["serve", "--model", "x", "--fd", "9", "--dtype", "int4"],
            "allowed: auto, f32, bf16, f16",
        ),
        (
            vec!["serve", "--model", "x", "--fd", "9", "--numerics", "quick"],
            "allowed: exact, fast",
        ),
        (vec!["serve", "--model", "x"], "--fd"),
        (
            vec!["serve", "--model", "x", "--fd", "999"],
            "999 is not open",
        ),
        (vec!["run", "x"], "--prompt"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_understudy-engine"))
            .args(&arguments)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(2) && text.contains(part),
            "{arguments:?}: {text}"
        );
    }
}

#[test]
fn run_prints_the_golden_tokens_as_json_lines() {
    let (expected, logits) = expected("f32_gqa_tied");
    let ids: Vec<String> = expected.prompt.iter().map(u32::to_string).collect();
    let output = Command::new(env!("CARGO_BIN_EXE_understudy-engine"))
        .arg("run")
        .arg(golden("f32_gqa_tied"))
        .args([
            "--token-ids",
            &ids.join(","),
            "--max-tokens",
            "64",
            "--ignore-eos",
            "--json",
            "--logits",
            "--top-logprobs",
            "2",
        ])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let lines: Vec<serde_json::Value> = output
        .stdout
        .split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_slice(l).unwrap())
        .collect();
    let got: Vec<u32> = lines
        .iter()
        .map(|line| line["id"].as_u64().unwrap() as u32)
        .collect();
    assert_eq!(got, expected.greedy);
    let first: Vec<f64> = lines[0]["logits"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap())
        .collect();
    let last_row = &logits[logits.len() - first.len()..];
    assert!(
        first
            .iter()
            .zip(last_row)
            .all(|(a, b)| (a - f64::from(*b)).abs() < 1e-4)
    );
    assert_eq!(lines[0]["top"][0][0], lines[0]["id"]);
    assert_eq!(lines[63]["finish_reason"], "length");
}
