use super::*;

const CONTEXT: u32 = 64;

fn admissions() -> Admissions {
    let settings = ModelSettings {
        name: "demo".into(),
        path: concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo").into(),
        context_length: Some(CONTEXT),
        ..ModelSettings::default()
    };
    let defaults = Defaults {
        deadline_ms: 1000,
        max_deadline_ms: 1000,
        max_priority: 0,
        max_tokens: 16,
    };
    Admissions::load(&[settings], defaults).expect("the demo model")
}

fn submit(input: Input, sampling: Sampling) -> Submit {
    Submit {
        stream: 1,
        model: None,
        input,
        sampling,
        stop: Vec::new(),
        include_stop: false,
        deadline_ms: None,
        resumable: false,
        priority: 0,
        credit: 1,
    }
}

async fn refusal(admissions: &Admissions, submit: Submit) -> String {
    let error = admissions.admit(submit).await.expect_err("a refusal");
    assert_eq!(error.code, ErrorCode::InvalidRequest, "{error}");
    error.message
}

/// What an engine would refuse after `accepted`.
#[tokio::test]
async fn what_no_engine_would_take_is_refused_before_it_is_accepted() {
    let admissions = admissions();
    let ids = || Input::TokenIds(vec![5; 60]);
    let foreign = Sampling {
        stop_token_ids: vec![3, 1_000_000],
        ..Sampling::default()
    };
    let said = refusal(&admissions, submit(ids(), foreign)).await;
    assert!(
        said.contains("stop_token_ids") && said.contains("1000000"),
        "{said}"
    );
    // The context has room for 4 more.
    let min_tokens = |min| Sampling {
        max_tokens: Some(20),
        min_tokens: Some(min),
        ..Sampling::default()
    };
    let said = refusal(&admissions, submit(ids(), min_tokens(5))).await;
    assert!(
        said.contains("min_tokens 5") && said.contains("4 tokens"),
        "{said}"
    );
    let (admission, _) = admissions
        .admit(submit(ids(), min_tokens(4)))
        .await
        .expect("it fits exactly");
    assert_eq!(admission.sampling.max_tokens, Some(4));
}

/// No turn is free, so whatever is answered was not tokenized.
#[tokio::test]
async fn a_text_that_cannot_fit_is_refused_unseen() {
    let admissions = admissions();
    let _all = admissions.hold_all_turns().await;
    let text = "count ".repeat(100_000);
    let message = understudy_protocol::message::ChatMessage {
        role: "user".into(),
        content: text.clone(),
    };
    for input in [Input::Prompt(text), Input::Messages(vec![message])] {
        let refused = refusal(&admissions, submit(input, Sampling::default()));
        let said = timeout(Duration::from_secs(10), refused)
            .await
            .expect("at once");
        assert!(
            said.contains("600000 bytes") && said.contains("shorten"),
            "{said}"
        );
    }
}
