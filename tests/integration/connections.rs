//! What a gateway does with connections: raw sockets, against a real one.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use understudy_protocol::message::{ClientMessage, FinishReason, Input, Sampling, ServerMessage};
use understudy_protocol::{ErrorCode, encode};
use understudy_tests::wait::until;
use understudy_tests::{Engine, TestCluster, TestClusterBuilder, collect, programs, scrape};

use self::raw::{Raw, count, hello, submit};
use super::requests::nth;

mod raw;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

async fn cluster(gateway: &str, step_ms: u64) -> TestCluster {
    TestClusterBuilder::new(Engine::Fake)
        .one_node()
        .replicas(1)
        .step_ms(step_ms)
        .settings(&format!("[gateway]\n{gateway}"))
        .start_ready()
        .await
        .expect("fake")
}

/// Waits until the gateway counts as many connections.
async fn connections(cluster: &TestCluster, wanted: u32) {
    until("the gauge of connections", PATIENCE, || async {
        let text = scrape::text(&cluster.metrics_address(0)).await;
        let now = scrape::sum(&text, "understudy_connections", "");
        (now == f64::from(wanted)).then_some(())
    })
    .await;
}

/// A client that sends a byte now and then does not keep its place; nor do as many of them as there are places keep
/// anybody else out for longer than a handshake may take.
#[tokio::test(flavor = "multi_thread")]
async fn trickled_handshakes_end_in_time_and_give_their_places_back() {
    let limit = Duration::from_millis(500);
    let places = 20;
    let settings = format!(
        "handshake_timeout_ms = {}\nmax_connections = {places}",
        limit.as_millis()
    );
    let cluster = cluster(&settings, 0).await;
    connections(&cluster, 0).await;
    let started = Instant::now();
    let mut tricklers = Vec::new();
    for _ in 0..places {
        // One by one, so that they are in the queue before the client.
        let socket = TcpStream::connect(cluster.address()).await;
        let trickling = trickle(socket.expect("a connection"), limit / 5);
        tricklers.push(tokio::spawn(trickling));
    }
    // Turned away while they hold the places, and then not: the library tries again by itself.
    let client = cluster.client();
    let served = collect(&client, nth(0, 5));
    timeout(PATIENCE, served)
        .await
        .expect("in time")
        .expect("a stream");
    for trickler in tricklers {
        let answer = trickler.await.expect("a trickler");
        assert!(answer.contains("timeout"), "{answer:?}");
    }
    let took = started.elapsed();
    assert!(took >= limit, "{took:?}");
}

/// Sends a byte of a frame at every `pause` until the connection is closed, and gives what it read.
async fn trickle(mut socket: TcpStream, pause: Duration) -> String {
    let (mut read, mut write) = socket.split();
    let mut answer = Vec::new();
    let trickling = async {
        for byte in [0, 0, 1, 0].into_iter().chain(std::iter::repeat(0)) {
            if write.write_all(&[byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(pause).await;
        }
    };
    let reading = timeout(PATIENCE, read.read_to_end(&mut answer));
    tokio::select! {
        read = reading => read.map(drop).expect("closed in time"),
        () = trickling => {}
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_are_small_before_the_welcome_and_large_behind_it() {
    let cluster = cluster("", 0).await;
    let mut raw = Raw::connect(&cluster).await;
    raw.socket.write_u32(100 * 1024).await.expect("sent");
    assert_eq!(raw.last_word().await.code, ErrorCode::FrameTooLarge);
    // In one write: the limit is the large one from the hello's end on.
    let mut raw = Raw::connect(&cluster).await;
    let large = submit(1, Input::TokenIds(vec![5; 100 * 1024]), 5);
    raw.send(&[hello(), large]).await;
    raw.welcome().await;
    assert_eq!(raw.refusal(1).await.code, ErrorCode::InvalidRequest);
}

/// Two submits of the same number in one write, the first of them bad.
#[tokio::test(flavor = "multi_thread")]
async fn a_number_is_busy_until_its_refusal_is_out() {
    let cluster = cluster("", 0).await;
    let mut raw = Raw::greeted(&cluster).await;
    let mut bytes = Default::default();
    encode(&submit(5, count(), 200), &mut bytes).expect("a frame");
    // `{type: submit, stream: 5, credit: "x"}`
    let bad = b"\x83\xa4type\xa6submit\xa6stream\x05\xa6credit\xa1x";
    let mut write = (bad.len() as u32).to_be_bytes().to_vec();
    write.extend_from_slice(bad);
    write.extend_from_slice(&bytes);
    raw.socket.write_all(&write).await.expect("sent");
    assert_eq!(raw.refusal(5).await.code, ErrorCode::InvalidRequest);
    // Whether the error was out before the second submit was looked at is a race; both ends are whole.
    match raw.next().await {
        Some(ServerMessage::Error {
            stream: None,
            error,
            ..
        }) => assert_eq!(error.code, ErrorCode::OutOfOrder),
        Some(ServerMessage::Accepted { stream: 5, .. }) => {
            // More than any initial credit: the books must find the stream.
            for position in 0..200 {
                let token = raw.next().await;
                assert!(
                    matches!(&token, Some(ServerMessage::Token(t)) if t.position == position),
                    "{token:?}"
                );
            }
        }
        other => panic!("{other:?}"),
    }
}

/// A prompt of megabytes for a context of kilobytes is refused at once, and pings and credit do not wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_huge_prompt_holds_nothing_up() {
    let cluster = cluster("", 1).await;
    let mut raw = Raw::greeted(&cluster).await;
    let ClientMessage::Submit(mut running) = submit(1, count(), 200) else {
        unreachable!()
    };
    running.credit = 1;
    raw.send(&[ClientMessage::Submit(running)]).await;
    assert!(matches!(
        raw.next().await,
        Some(ServerMessage::Accepted { .. })
    ));
    assert!(matches!(raw.next().await, Some(ServerMessage::Token(_))));
    let huge = Input::Prompt("count from 1 to 2 ".repeat(4_000_000 / 18));
    let started = Instant::now();
    let rest = ClientMessage::Credit {
        stream: 1,
        tokens: 199,
    };
    let ping = ClientMessage::Ping { nonce: 7 };
    raw.send(&[submit(2, huge, 5), ping, rest]).await;
    let (mut pong_after, mut refused, mut tokens) = (None, false, 1);
    while tokens < 200 || !refused || pong_after.is_none() {
        match raw.next().await.expect("a message") {
            ServerMessage::Pong { nonce: 7 } => pong_after = Some(started.elapsed()),
            ServerMessage::Token(token) => {
                assert_eq!(token.position, tokens);
                tokens += 1;
            }
            ServerMessage::Error {
                stream: Some(2),
                error,
                ..
            } => {
                assert_eq!(error.code, ErrorCode::InvalidRequest);
                refused = true;
            }
            ServerMessage::Finished { stream: 1, .. } => {}
            other => panic!("{other:?}"),
        }
    }
    // To tokenize it takes many seconds.
    let pong_after = pong_after.expect("a pong");
    assert!(pong_after < Duration::from_secs(2), "{pong_after:?}");
}

/// The client writes the whole frame before it reads anything.
#[tokio::test(flavor = "multi_thread")]
async fn the_error_for_a_large_frame_is_read_behind_it() {
    let cluster = cluster("", 0).await;
    let mut raw = Raw::greeted(&cluster).await;
    let frame = vec![0; 5 << 20];
    raw.socket
        .write_u32(frame.len() as u32)
        .await
        .expect("sent");
    raw.socket.write_all(&frame).await.expect("taken");
    assert_eq!(raw.last_word().await.code, ErrorCode::FrameTooLarge);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_may_close_its_side_and_read_on() {
    let cluster = cluster("", 2).await;
    let mut raw = Raw::greeted(&cluster).await;
    raw.send(&[submit(1, count(), 50), submit(2, count(), 3)])
        .await;
    raw.socket.shutdown().await.expect("half-closed");
    let (mut tokens, mut ended) = ([0; 2], 0);
    while let Some(message) = raw.next().await {
        match message {
            ServerMessage::Token(token) => tokens[token.stream as usize - 1] += 1,
            ServerMessage::Finished { finish_reason, .. } => {
                assert_eq!(finish_reason, FinishReason::Length);
                ended += 1;
            }
            ServerMessage::Accepted { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((tokens, ended), ([50, 3], 2));
}

/// A client that is gone altogether looks like that at first; its request must not go on for it.
#[tokio::test(flavor = "multi_thread")]
async fn the_request_of_a_client_that_is_gone_is_cancelled() {
    let cluster = cluster("", 5).await;
    let mut raw = Raw::greeted(&cluster).await;
    raw.send(&[submit(1, count(), 1000)]).await;
    assert!(matches!(
        raw.next().await,
        Some(ServerMessage::Accepted { .. })
    ));
    assert!(matches!(raw.next().await, Some(ServerMessage::Token(_))));
    drop(raw);
    // To its end it would take five seconds.
    until("a cancelled request", Duration::from_secs(3), || async {
        let status = cluster.status().await?;
        (status.requests_in_flight == 0 && status.requests_kept == 1).then_some(())
    })
    .await;
}

/// The last words: of each stream, then of the connection, then the end, though the client does nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_gateway_closes_its_connections_itself() {
    let mut cluster = cluster("shutdown_grace_ms = 0", 20).await;
    let mut raw = Raw::greeted(&cluster).await;
    let mut idle = Raw::greeted(&cluster).await;
    raw.send(&[submit(1, count(), 1000)]).await;
    assert!(matches!(
        raw.next().await,
        Some(ServerMessage::Accepted { .. })
    ));
    let reading = tokio::spawn(async move {
        loop {
            match raw.next().await {
                Some(ServerMessage::Token(_)) => {}
                Some(ServerMessage::Error {
                    stream: Some(1),
                    error,
                    ..
                }) => {
                    assert_eq!(error.code, ErrorCode::ShuttingDown);
                    return raw.last_word().await;
                }
                other => panic!("{other:?}"),
            }
        }
    });
    let (stopped, last) = tokio::join!(cluster.stop_node(0, PATIENCE), reading);
    assert_eq!(stopped, Some(0));
    assert_eq!(last.expect("a reader").code, ErrorCode::ShuttingDown);
    assert_eq!(idle.last_word().await.code, ErrorCode::ShuttingDown);
}

/// One connection too many is told so, and how long to wait; a place that comes free is free, and counted so.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_gateway_says_so_and_counts_right() {
    let cluster = cluster("max_connections = 2", 0).await;
    connections(&cluster, 0).await;
    let first = Raw::greeted(&cluster).await;
    connections(&cluster, 1).await;
    let _second = Raw::greeted(&cluster).await;
    connections(&cluster, 2).await;
    let mut third = Raw::connect(&cluster).await;
    third.send(&[hello()]).await;
    let error = third.last_word().await;
    assert_eq!(error.code, ErrorCode::Overloaded);
    assert!(error.retriable && error.retry_after_ms.is_some());
    drop(first);
    connections(&cluster, 1).await;
    Raw::greeted(&cluster).await;
}

/// What no engine would take: `error` alone, without `accepted` before it.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_request_is_not_accepted_first() {
    let cluster = cluster("", 0).await;
    let mut raw = Raw::greeted(&cluster).await;
    let with = |stream, change: &dyn Fn(&mut Sampling)| {
        let ClientMessage::Submit(mut submit) = submit(stream, Input::TokenIds(vec![5; 1000]), 100)
        else {
            unreachable!()
        };
        change(&mut submit.sampling);
        ClientMessage::Submit(submit)
    };
    raw.send(&[with(1, &|s| s.stop_token_ids = vec![4_000_000])])
        .await;
    assert_eq!(raw.refusal(1).await.code, ErrorCode::InvalidRequest);
    raw.send(&[with(2, &|s| s.min_tokens = Some(50))]).await;
    assert_eq!(raw.refusal(2).await.code, ErrorCode::InvalidRequest);
    // The context has room for 24 tokens behind the prompt.
    raw.send(&[with(3, &|s| s.min_tokens = Some(24))]).await;
    let (positions, end) = raw.whole_stream(3).await;
    assert_eq!(positions, (0..24).collect::<Vec<_>>());
    assert!(matches!(end, ServerMessage::Finished { .. }), "{end:?}");
}

/// The page's table of limits has the configuration's defaults, and a gateway says them.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_has_the_limits_that_gateways_have() {
    let path = programs::repository().join("docs/protocol.md");
    let page = std::fs::read_to_string(path).expect("the page");
    let row = |start: &str| -> String {
        let line = page.lines().find(|line| line.starts_with(start));
        let line = line.unwrap_or_else(|| panic!("no row {start:?}"));
        let cell = line.split('|').nth(2).expect("a second column").trim();
        cell.replace(',', "")
    };
    let seconds = |ms: u64| format!("{} s", ms / 1000);
    let gateway = understudy_config::GatewaySettings::default();
    let frame_mib = gateway.max_frame_bytes >> 20;
    assert_eq!(row("| payload of a frame (`"), format!("{frame_mib} MiB"));
    let streams = gateway.max_streams_per_connection;
    assert_eq!(row("| streams in flight"), streams.to_string());
    assert_eq!(row("| credit of a stream"), gateway.max_credit.to_string());
    let requests = gateway.max_requests_in_flight;
    assert_eq!(row("| requests in flight"), requests.to_string());
    assert_eq!(
        row("| connections at a gateway"),
        gateway.max_connections.to_string()
    );
    assert_eq!(row("| handshake"), seconds(gateway.handshake_timeout_ms));
    assert_eq!(
        row("| silence of a client"),
        seconds(gateway.idle_timeout_ms)
    );
    assert_eq!(row("| bytes to send"), seconds(gateway.write_timeout_ms));
    let deadlines = [gateway.default_deadline_ms, gateway.max_deadline_ms].map(seconds);
    assert_eq!(row("| `deadline_ms` left out"), deadlines.join(" / "));
    assert_eq!(
        row("| `max_tokens` left out"),
        gateway.default_max_tokens.to_string()
    );
    assert_eq!(
        row("| a resumable request without"),
        seconds(gateway.resume_grace_ms)
    );

    let cluster = cluster("", 0).await;
    let mut raw = Raw::connect(&cluster).await;
    raw.send(&[hello()]).await;
    let said = raw.welcome().await;
    assert_eq!(u64::from(said.max_frame_bytes), gateway.max_frame_bytes);
    assert_eq!(said.max_streams, streams);
    assert_eq!(said.max_credit, gateway.max_credit);
}
