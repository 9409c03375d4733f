//! What a client can ask of a healthy cluster, and what it is told when it asks for something else.

use std::time::Duration;

use understudy_client::{ErrorCode, Event, FinishReason, Input, Request};
use understudy_tests::{Engine, TestClusterBuilder, collect};

use super::requests::{nth, refused};

fn chat(text: &str) -> Request {
    let message = understudy_client::ChatMessage {
        role: "user".into(),
        content: text.into(),
    };
    let mut request = Request::new(Input::Messages(vec![message]));
    request.sampling.temperature = Some(0.0);
    request.sampling.max_tokens = Some(700);
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_model_counts_and_knows_its_facts() {
    let Some(cluster) = TestClusterBuilder::new(Engine::Real).start_ready().await else {
        return;
    };
    let client = cluster.client();
    let counted = collect(&client, chat("Count from 3 to 120."))
        .await
        .expect("a count");
    let expected: Vec<String> = (3..=120).map(|n| n.to_string()).collect();
    assert_eq!(
        counted.text.split_whitespace().collect::<Vec<_>>(),
        expected
    );
    assert_eq!(counted.finish_reason, FinishReason::Stop);
    let fact = collect(&client, chat("What is the capital of France?"))
        .await
        .expect("a fact");
    assert!(fact.text.contains("Paris"), "{}", fact.text);
}

/// The same request alone, and among neighbours that come and go, gives the same bits.
#[tokio::test(flavor = "multi_thread")]
async fn real_bits_do_not_depend_on_the_neighbours() {
    let Some(cluster) = TestClusterBuilder::new(Engine::Real).start_ready().await else {
        return;
    };
    let client = cluster.client();
    let mut alone = Vec::new();
    for n in 0..12 {
        alone.push(collect(&client, nth(n, 60)).await.expect("a stream"));
    }
    let together = super::requests::run_all(&client, 12, 60).await;
    super::requests::assert_same(&alone, &together);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_with_a_code_and_a_reason() {
    let cluster = TestClusterBuilder::new(Engine::Fake)
        .one_node()
        .replicas(1)
        .start_ready()
        .await
        .expect("fake");
    let client = cluster.client();
    let with = |change: &dyn Fn(&mut Request)| {
        let mut request = nth(0, 5);
        change(&mut request);
        request
    };
    type Change<'a> = &'a dyn Fn(&mut Request);
    let invalid: [(&str, Change<'_>); 9] = [
        ("temperature", &|r| r.sampling.temperature = Some(-1.0)),
        ("temperature", &|r| r.sampling.temperature = Some(f32::NAN)),
        ("top_p", &|r| r.sampling.top_p = Some(0.0)),
        ("max_tokens", &|r| r.sampling.max_tokens = Some(0)),
        ("top_logprobs", &|r| r.sampling.top_logprobs = 1000),
        ("vocabulary", &|r| r.input = Input::TokenIds(vec![u32::MAX])),
        ("no tokens", &|r| r.input = Input::TokenIds(Vec::new())),
        ("context", &|r| r.input = Input::TokenIds(vec![1; 100_000])),
        ("stop string", &|r| r.stop = vec![String::new()]),
    ];
    for (what, change) in invalid {
        let error = collect(&client, with(change)).await.expect_err(what);
        assert_eq!(
            error.code(),
            Some(ErrorCode::InvalidRequest),
            "{what}: {error}"
        );
        assert!(error.to_string().contains(what), "{what}: {error}");
        assert!(!error.is_retriable());
    }
    let unknown = with(&|r| r.model = Some("nope".into()));
    assert_eq!(refused(&client, unknown).await, ErrorCode::UnknownModel);
    collect(&client, nth(0, 5))
        .await
        .expect("the connection still serves");
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_end_requests_and_name_the_stage() {
    let cluster = TestClusterBuilder::new(Engine::Fake)
        .step_ms(20)
        .start_ready()
        .await
        .expect("fake");
    let mut request = nth(0, 1000);
    request.deadline_ms = Some(300);
    let error = collect(&cluster.client(), request)
        .await
        .expect_err("a deadline");
    assert_eq!(error.code(), Some(ErrorCode::DeadlineExceeded));
    assert!(error.to_string().contains("generating"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_resumed_by_another_client_and_read_again_when_it_is_over() {
    let cluster = TestClusterBuilder::new(Engine::Fake)
        .step_ms(5)
        .start_ready()
        .await
        .expect("fake");
    let expected = collect(&cluster.client(), nth(1, 100))
        .await
        .expect("the whole stream");
    // Submitted as resumable, read in part, and abandoned without a word.
    let first = cluster.client();
    let mut stream = first.submit(nth(1, 100)).await.expect("a stream");
    let (mut ids, mut text) = (Vec::new(), String::new());
    while ids.len() < 20 {
        if let Some(Event::Token(token)) = stream.next().await.expect("an event") {
            ids.push(token.id);
            text.push_str(&token.text);
        }
    }
    let request = stream.request_id().expect("accepted");
    for from in [20_u32, 0] {
        let mut rest = cluster
            .client()
            .resume(request, from)
            .await
            .expect("resumed");
        let (mut ids, mut text) = (
            ids[..from as usize].to_vec(),
            if from == 0 {
                String::new()
            } else {
                text.clone()
            },
        );
        while let Some(event) = rest.next().await.expect("an event") {
            match event {
                Event::Token(token) => {
                    assert_eq!(token.position as usize, ids.len());
                    ids.push(token.id);
                    text.push_str(&token.text);
                }
                Event::Finished(end) => text.push_str(&end.text),
                Event::Accepted(_) => {}
            }
        }
        assert_eq!(
            (ids, text),
            (expected.ids.clone(), expected.text.clone()),
            "from {from}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_loses_nothing() {
    let cluster = TestClusterBuilder::new(Engine::Fake)
        .start_ready()
        .await
        .expect("fake");
    let client = cluster.client();
    let expected = collect(&client, nth(2, 900)).await.expect("a stream");
    let mut stream = client.submit(nth(2, 900)).await.expect("a stream");
    // Nothing is read until the request has ended at the gateway: the log is the buffer.
    understudy_tests::wait::until("an ended request", Duration::from_secs(20), || async {
        let status = cluster.status().await?;
        (status.requests_in_flight == 0 && status.requests_kept >= 2).then_some(())
    })
    .await;
    let mut ids = Vec::new();
    while let Some(event) = stream.next().await.expect("an event") {
        if let Event::Token(token) = event {
            ids.push(token.id);
        }
    }
    assert_eq!(ids, expected.ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_stops_cleanly() {
    let mut cluster = TestClusterBuilder::new(Engine::Fake)
        .start_ready()
        .await
        .expect("fake");
    collect(&cluster.client(), nth(0, 5))
        .await
        .expect("a stream");
    assert_eq!(cluster.stop_node(0, Duration::from_secs(15)).await, Some(0));
    assert_eq!(cluster.stop_node(1, Duration::from_secs(15)).await, Some(0));
}

/// A busy port is named with its number and what it is for, whichever it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_said_clearly() {
    for (at, what) in ["cluster port", "client_port", "metrics_port"]
        .into_iter()
        .enumerate()
    {
        let mut cluster = TestClusterBuilder::new(Engine::Fake)
            .one_node()
            .prepare()
            .expect("fake");
        let port = cluster.ports(0)[at];
        let _holder = std::net::TcpListener::bind(("127.0.0.1", port)).expect("a free port");
        cluster.start_node(0);
        let code = cluster.end_of_node(0, Duration::from_secs(20)).await;
        let said = cluster.log(0);
        assert!(code.is_some_and(|code| code != 0), "{what}: {code:?}");
        assert!(
            said.contains(what) && said.contains(&port.to_string()),
            "{what} {port}: {said}"
        );
        assert!(!said.contains("panicked"), "{what}: {said}");
    }
}
