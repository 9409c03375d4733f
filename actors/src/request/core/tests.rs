use std::sync::OnceLock;

use understudy_cluster::{NodeName, PeerId};
use understudy_engine_core::frame::OutputToken;
use understudy_engine_core::text::TextModel;
use understudy_protocol::RequestId;

use understudy_engine_core::frame::{AttemptId, StartAttempt};
use understudy_protocol::message::Sampling;

use super::*;
use crate::peer::ReplicaId;

mod patience;
mod storm;
mod viewing;

const SETTINGS: Settings = Settings {
    max_attempts: 3,
    max_engine_deaths: 10,
    no_replica_timeout: Duration::from_secs(10),
};

/// Ids 0..=8 are the words w0 … w8, each with a space before it; 9 ends the sequence.
fn model() -> &'static TextModel {
    static MODEL: OnceLock<TextModel> = OnceLock::new();
    MODEL.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("understudy-request-core-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let vocab: Vec<String> = (0..9).map(|i| format!("\"\u{2581}w{i}\": {i}")).chain(["\"<end>\": 9".into()]).collect();
        let tokenizer = format!(
            r#"{{"version": "1.0", "truncation": null, "padding": null,
                "added_tokens": [{{"id": 9, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}}],
                "normalizer": null,
                "pre_tokenizer": {{"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": true}},
                "post_processor": null,
                "decoder": {{"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": true}},
                "model": {{"type": "WordLevel", "vocab": {{{}}}, "unk_token": "<end>"}}}}"#,
            vocab.join(", ")
        );
        std::fs::write(dir.join("tokenizer.json"), tokenizer).unwrap();
        let config = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64, "vocab_size": 10, "eos_token_id": 9}"#;
        std::fs::write(dir.join("config.json"), config).unwrap();
        let model = TextModel::load(&dir).unwrap();
        std::fs::remove_dir_all(&dir).ok();
        model
    })
}

fn admission(stop: &[&str]) -> Admission {
    Admission {
        request: RequestId(7),
        model: "m".into(),
        prompt: vec![0, 1],
        sampling: Sampling {
            max_tokens: Some(8),
            seed: Some(3),
            ..Sampling::default()
        },
        stop: stop.iter().map(|&s| s.to_owned()).collect(),
        include_stop: false,
        deadline_ms: 1000,
        resumable: true,
        priority: 0,
    }
}

fn core(stop: &[&str]) -> RequestCore {
    core_with(stop, SETTINGS)
}

fn core_with(stop: &[&str], settings: Settings) -> RequestCore {
    let admission = admission(stop);
    let text = TextFold::new(model(), &admission).unwrap();
    let mut core = RequestCore::new(admission, text, settings, Instant::now());
    core.start();
    core
}

fn token(epoch: u32, position: u32, id: u32) -> StepToken {
    let finish = (id == 9).then_some(frame::FinishReason::Stop);
    let token = OutputToken {
        id,
        logprob: -0.5,
        top: Vec::new(),
    };
    StepToken {
        attempt: AttemptId { request: 7, epoch },
        position,
        token,
        finish,
        waited_ms: None,
    }
}

fn at(name: &str) -> ReplicaRef {
    ReplicaRef {
        peer: PeerId::new(NodeName::new(name).unwrap(), 1),
        replica: ReplicaId {
            model: "m".into(),
            index: 0,
        },
    }
}

fn shown(effects: &[Effect]) -> Vec<(u32, u32, String)> {
    let events = effects.iter().filter_map(|effect| match effect {
        Effect::Emit(ServerMessage::Token(event)) => {
            Some((event.position, event.id, event.text.clone()))
        }
        _ => None,
    });
    events.collect()
}

fn terminals(effects: &[Effect]) -> Vec<&ServerMessage> {
    let is_end = |message: &&ServerMessage| {
        matches!(
            message,
            ServerMessage::Finished { .. } | ServerMessage::Error { .. }
        )
    };
    effects
        .iter()
        .filter_map(|e| {
            if let Effect::Emit(message) = e {
                Some(message)
            } else {
                None
            }
        })
        .filter(is_end)
        .collect()
}

fn next_start(effects: &[Effect]) -> &StartAttempt {
    let start = effects.iter().find_map(|e| {
        if let Effect::Route { start, .. } = e {
            Some(start)
        } else {
            None
        }
    });
    start.expect("a new attempt")
}

#[test]
fn tokens_are_shown_in_order_then_one_end() {
    let now = Instant::now();
    let mut core = core(&[]);
    let mut effects = core.attach(1, 0, 100).unwrap();
    effects.extend(core.tokens(vec![token(1, 0, 2)], now));
    effects.extend(core.tokens(vec![token(1, 1, 3)], now));
    effects.extend(core.tokens(vec![token(1, 2, 9)], now));
    let texts: String = shown(&effects).into_iter().map(|(.., text)| text).collect();
    assert_eq!(texts, " w2 w3");
    assert_eq!(
        shown(&effects).iter().map(|s| s.0).collect::<Vec<_>>(),
        [0, 1, 2]
    );
    let ends = terminals(&effects);
    assert!(matches!(
        ends[..],
        [ServerMessage::Finished {
            finish_reason: FinishReason::Stop,
            ..
        }]
    ));
    assert!(core.is_over());
}

#[test]
fn late_epochs_and_wrong_positions_are_dropped() {
    let now = Instant::now();
    let mut core = core(&[]);
    core.attach(1, 0, 100).unwrap();
    core.tokens(vec![token(1, 0, 2)], now);
    let lost = core.lost(1, LossCause::EngineExit, now);
    assert_eq!(next_start(&lost).committed, [2]);
    assert_eq!(next_start(&lost).expect_logprobs, [-0.5]);
    let zombie = core.tokens(vec![token(1, 1, 8)], now);
    assert!(shown(&zombie).is_empty());
    assert!(zombie.contains(&Effect::Observe(Observation::Fenced(1))));
    let repeated = core.tokens(vec![token(2, 0, 2)], now);
    assert!(shown(&repeated).is_empty());
    assert_eq!(shown(&core.tokens(vec![token(2, 1, 3)], now)).len(), 1);
}

#[test]
fn a_gap_starts_over_from_the_log() {
    let now = Instant::now();
    let mut core = core(&[]);
    core.attach(1, 0, 100).unwrap();
    core.tokens(vec![token(1, 0, 2)], now);
    let effects = core.tokens(vec![token(1, 2, 4), token(1, 3, 5)], now);
    assert!(shown(&effects).is_empty());
    assert!(effects.contains(&Effect::Release {
        attempt: AttemptId {
            request: 7,
            epoch: 1
        },
        cancel: true
    }));
    assert_eq!(next_start(&effects).attempt.epoch, 2);
}

#[test]
fn nothing_is_shown_without_credit_and_nothing_is_lost_by_waiting() {
    let now = Instant::now();
    let mut core = core(&[]);
    let mut effects = core.attach(1, 0, 1).unwrap();
    for position in 0..5 {
        effects.extend(core.tokens(vec![token(1, position, position)], now));
    }
    assert_eq!(shown(&effects).len(), 1);
    assert_eq!(
        shown(&core.credit(2, 100))
            .iter()
            .map(|s| s.0)
            .collect::<Vec<_>>(),
        [1, 2]
    );
    let end = core.tokens(vec![token(1, 5, 9)], now);
    assert!(terminals(&end).is_empty(), "the end comes after the tokens");
    let rest = core.credit(100, 100);
    assert_eq!(
        shown(&rest).iter().map(|s| s.0).collect::<Vec<_>>(),
        [3, 4, 5]
    );
    assert_eq!(terminals(&rest).len(), 1);
}

#[test]
fn stop_strings_cut_the_text_and_cancel_the_engine() {
    let now = Instant::now();
    let mut core = core(&["w3 w4"]);
    let mut effects = core.attach(1, 0, 100).unwrap();
    for (position, id) in [2, 3, 4, 5].into_iter().enumerate() {
        effects.extend(core.tokens(vec![token(1, position as u32, id)], now));
    }
    let text: String = shown(&effects).into_iter().map(|(.., text)| text).collect();
    assert_eq!(text, " w2 ");
    assert_eq!(
        core.committed(),
        3,
        "what the engine made beyond the stop string never counts"
    );
    assert!(effects.contains(&Effect::Release {
        attempt: AttemptId {
            request: 7,
            epoch: 1
        },
        cancel: true
    }));
}

#[test]
fn held_back_text_comes_with_the_end() {
    let now = Instant::now();
    let mut core = core(&["w3 w4"]);
    let mut effects = core.attach(1, 0, 100).unwrap();
    effects.extend(core.tokens(vec![token(1, 0, 3)], now));
    effects.extend(core.tokens(vec![token(1, 1, 9)], now));
    let text: String = shown(&effects).into_iter().map(|(.., text)| text).collect();
    let [ServerMessage::Finished { text: tail, .. }] = terminals(&effects)[..] else {
        panic!("one end")
    };
    assert_eq!(text + tail, " w3");
}

#[test]
fn attempts_are_bounded() {
    let now = Instant::now();
    let mut core = core(&[]);
    core.attach(1, 0, 100).unwrap();
    assert!(terminals(&core.lost(1, LossCause::EngineExit, now)).is_empty());
    assert!(terminals(&core.lost(2, LossCause::NodeDown, now)).is_empty());
    let end = core.lost(3, LossCause::EngineExit, now);
    let [ServerMessage::Error { error, .. }] = terminals(&end)[..] else {
        panic!("one end")
    };
    assert_eq!(error.code, ErrorCode::AttemptsExhausted);
    assert!(error.retriable);
    assert!(
        core.lost(3, LossCause::EngineExit, now).is_empty(),
        "ended is ended"
    );
    assert!(core.deadline(now).is_empty());
}

#[test]
fn progress_starts_the_count_of_attempts_over() {
    let now = Instant::now();
    let mut core = core(&[]);
    for position in 0..7 {
        let effects = core.lost(core.epoch(), LossCause::EngineExit, now);
        assert_eq!(next_start(&effects).committed.len(), position as usize);
        core.tokens(vec![token(core.epoch(), position, 2)], now);
    }
    assert!(
        core.outcome().is_none(),
        "each of these losses was made good"
    );
}

#[test]
fn a_request_on_which_engines_die_is_computed_alone() {
    let now = Instant::now();
    let settings = Settings {
        max_attempts: 10,
        ..SETTINGS
    };
    let mut core = core_with(&[], settings);
    core.attach(1, 0, 100).unwrap();
    let is_suspect = |effects: &[Effect]| {
        let found = effects.iter().find_map(|e| match e {
            Effect::Route { start, .. } => Some(start.suspect),
            _ => None,
        });
        found.expect("a new attempt")
    };
    assert!(!is_suspect(&core.lost(1, LossCause::EngineExit, now)));
    assert!(is_suspect(&core.lost(2, LossCause::EngineExit, now)));
    assert!(is_suspect(&core.lost(3, LossCause::EngineGone, now)));
    core.tokens(vec![token(4, 0, 2)], now);
    assert!(!is_suspect(&core.lost(4, LossCause::EngineExit, now)));
}

#[test]
fn a_replica_that_computes_other_bits_is_avoided() {
    let now = Instant::now();
    let mut core = core(&[]);
    core.dispatched(1, at("a"), "f".into(), now);
    core.tokens(vec![token(1, 0, 2)], now);
    core.lost(1, LossCause::EngineExit, now);
    core.dispatched(2, at("b"), "f".into(), now);
    let mismatch = AttemptError::ReplayMismatch {
        position: 0,
        expected: 1,
        actual: 2,
    };
    let effects = core.refused(2, Refusal::Engine(mismatch), now);
    let Some(Effect::Route {
        avoid, fingerprint, ..
    }) = effects.iter().find(|e| matches!(e, Effect::Route { .. }))
    else {
        panic!("a new attempt")
    };
    assert_eq!(
        (avoid.as_slice(), fingerprint.as_deref()),
        ([at("b")].as_slice(), Some("f"))
    );
}

#[test]
fn the_deadline_names_the_stage() {
    let now = Instant::now();
    let mut core = core(&[]);
    core.attach(1, 0, 0).unwrap();
    let effects = core.deadline(now);
    let [ServerMessage::Error { error, .. }] = terminals(&effects)[..] else {
        panic!("one end")
    };
    assert_eq!(
        (error.code, error.stage.as_deref()),
        (ErrorCode::DeadlineExceeded, Some("queued"))
    );
}
