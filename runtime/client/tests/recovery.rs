//! Streams whose connections and gateways die: the caller sees every token once, in order, or a typed error.

mod fake;

use std::sync::Arc;
use std::time::Duration;

use fake::{Cluster, Fault, Gateway, error_of, until};
use understudy_client::protocol::ErrorCode;
use understudy_client::{Client, Error, Event, LostReason, Options, Request, Stream};

const TOTAL: u32 = 40;

fn options() -> Options {
    Options {
        window: 8,
        recovery_timeout: Duration::from_secs(10),
        backoff_initial: Duration::from_millis(1),
        backoff_max: Duration::from_millis(10),
        connect_timeout: Duration::from_secs(2),
        keepalive_interval: Duration::from_millis(50),
        keepalive_timeout: Duration::from_millis(200),
        ..Options::default()
    }
}

async fn client(gateways: &[&Gateway], options: Options) -> Client {
    let addresses = gateways.iter().map(|gateway| gateway.address.to_string());
    Client::connect(addresses, options).await.unwrap()
}

/// The whole stream, every token checked; an error is the stream's.
async fn check(stream: &mut Stream) -> Result<(), Error> {
    check_of(stream, TOTAL).await
}

async fn check_of(stream: &mut Stream, total: u32) -> Result<(), Error> {
    let mut seed = None;
    let mut position = 0;
    loop {
        match stream.next().await?.expect("an event") {
            Event::Accepted(accepted) => {
                assert!(seed.replace(accepted.seed).is_none(), "accepted twice")
            }
            Event::Token(token) => {
                let expected = fake::token(0, seed.expect("accepted first"), position);
                assert_eq!((token.position, token.id), (position, expected.id));
                assert_eq!(
                    token.logprob.map(f32::to_bits),
                    expected.logprob.map(f32::to_bits)
                );
                position += 1;
            }
            Event::Finished(finished) => {
                assert_eq!((position, finished.usage.completion_tokens), (total, total));
                assert_eq!(stream.next().await, Ok(None));
                return Ok(());
            }
        }
    }
}

#[tokio::test]
async fn a_connection_cut_at_every_position_is_not_seen() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    let client = client(&[&gateway], options()).await;
    for position in 0..=TOTAL {
        gateway.fault(position, Fault::Cut);
        let mut stream = client.submit(Request::prompt("x")).await.unwrap();
        check(&mut stream).await.unwrap();
        assert_eq!(stream.recoveries(), 1, "cut at {position}");
    }
}

#[tokio::test]
async fn a_connection_cut_at_every_byte_is_not_seen() {
    let cluster = Cluster::new(10);
    let gateway = cluster.gateway().await;
    let mut cut_at = 120;
    let mut unaccepted = 0;
    loop {
        // A new client each time: the bytes are counted from the start of its connection.
        let client = client(&[&gateway], options()).await;
        gateway.script.lock().unwrap().cut_after_bytes = Some(cut_at);
        let mut stream = client.submit(Request::prompt("x")).await.unwrap();
        check_of(&mut stream, 10).await.unwrap();
        if gateway
            .script
            .lock()
            .unwrap()
            .cut_after_bytes
            .take()
            .is_some()
        {
            break;
        }
        unaccepted += u32::from(stream.recoveries() == 0);
        cut_at += 1;
    }
    assert!(cut_at > 1000, "{cut_at} bytes only");
    assert!(unaccepted > 0, "no cut came before accepted");
}

#[tokio::test]
async fn cuts_at_all_positions_of_one_stream_add_up() {
    let cluster = Cluster::new(TOTAL);
    let (one, two) = (cluster.gateway().await, cluster.gateway().await);
    for position in 0..TOTAL {
        let gateway = if position % 3 == 0 { &one } else { &two };
        gateway.fault(position, Fault::Cut);
        gateway.script.lock().unwrap().repeat = 2;
    }
    let mut stream = client(&[&one, &two], options())
        .await
        .submit(Request::prompt("x"))
        .await
        .unwrap();
    check(&mut stream).await.unwrap();
    assert!(stream.recoveries() > 0);
}

#[tokio::test]
async fn repeated_positions_after_a_resume_are_dropped() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    let client = client(&[&gateway], options()).await;
    for repeat in 1..=9 {
        gateway.script.lock().unwrap().repeat = repeat;
        gateway.fault(20, Fault::Cut);
        let mut stream = client.submit(Request::prompt("x")).await.unwrap();
        check(&mut stream).await.unwrap();
        assert_eq!(stream.recoveries(), 1);
    }
}

#[tokio::test]
async fn a_killed_gateway_hands_its_streams_to_the_other() {
    let cluster = Cluster::new(TOTAL);
    let (one, two) = (cluster.gateway().await, cluster.gateway().await);
    let client = client(&[&one, &two], options()).await;
    let mut streams = Vec::new();
    for _ in 0..32 {
        let mut stream = client.submit(Request::prompt("x")).await.unwrap();
        assert!(matches!(
            stream.next().await.unwrap(),
            Some(Event::Accepted(_))
        ));
        streams.push(stream);
    }
    one.kill();
    let mut tasks = tokio::task::JoinSet::new();
    for mut stream in streams {
        tasks.spawn(async move {
            rest(&mut stream).await;
            stream.recoveries()
        });
    }
    while let Some(recoveries) = tasks.join_next().await {
        assert_eq!(recoveries.unwrap(), 1);
    }
    assert_eq!(
        two.script.lock().unwrap().connections,
        1,
        "each stream dialed for itself"
    );
}

/// Takes what follows `Accepted`, and checks the positions.
async fn rest(stream: &mut Stream) {
    let mut position = 0;
    while let Some(event) = stream.next().await.unwrap() {
        if let Event::Token(token) = event {
            assert_eq!(token.position, position);
            position += 1;
        }
    }
    assert_eq!(position, TOTAL);
}

#[tokio::test]
async fn a_gateway_that_falls_silent_is_left() {
    let cluster = Cluster::new(TOTAL);
    let (one, two) = (cluster.gateway().await, cluster.gateway().await);
    one.fault(7, Fault::Hang);
    let mut stream = client(&[&one, &two], options())
        .await
        .submit(Request::prompt("x"))
        .await
        .unwrap();
    check(&mut stream).await.unwrap();
    assert_eq!(two.script.lock().unwrap().resumes, 1);
}

#[tokio::test]
async fn a_gateway_that_shuts_down_is_left() {
    let cluster = Cluster::new(TOTAL);
    let (one, two) = (cluster.gateway().await, cluster.gateway().await);
    for fault in [
        Fault::Fail(ErrorCode::ShuttingDown),
        Fault::Refuse(ErrorCode::ShuttingDown),
    ] {
        one.fault(7, fault);
        let mut stream = client(&[&one, &two], options())
            .await
            .submit(Request::prompt("x"))
            .await
            .unwrap();
        check(&mut stream).await.unwrap();
        assert_eq!(stream.recoveries(), 1, "{fault:?}");
    }
}

#[tokio::test]
async fn a_gateway_without_the_request_is_passed_over() {
    let cluster = Cluster::new(TOTAL);
    let (one, two) = (cluster.gateway().await, cluster.gateway().await);
    two.script.lock().unwrap().forgets = true;
    let client = client(&[&one, &two], options()).await;
    one.fault(7, Fault::Fail(ErrorCode::ShuttingDown));
    let mut stream = client.submit(Request::prompt("x")).await.unwrap();
    check(&mut stream).await.unwrap();
    assert_eq!(two.script.lock().unwrap().resumes, 1);
    assert_eq!(one.script.lock().unwrap().resumes, 1);
}

#[tokio::test]
async fn a_request_that_no_gateway_knows_ends_at_once() {
    let cluster = Cluster::new(TOTAL);
    let (one, two) = (cluster.gateway().await, cluster.gateway().await);
    one.script.lock().unwrap().forgets = true;
    two.script.lock().unwrap().forgets = true;
    one.fault(7, Fault::Cut);
    let mut stream = client(&[&one, &two], options())
        .await
        .submit(Request::prompt("x"))
        .await
        .unwrap();
    let start = std::time::Instant::now();
    let error = check(&mut stream).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::UnknownRequest));
    assert!(start.elapsed() < options().recovery_timeout);
}

#[tokio::test]
async fn a_gateway_that_comes_back_in_time_is_found_again() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    let address = gateway.address;
    let client = client(&[&gateway], options()).await;
    let mut stream = client.submit(Request::prompt("x")).await.unwrap();
    stream.next().await.unwrap();
    gateway.kill();
    let back = tokio::spawn(come_back(cluster.clone(), address));
    rest(&mut stream).await;
    back.await.unwrap();
}

/// The address is taken again after the client has found it empty for a while.
async fn come_back(cluster: Arc<Cluster>, address: std::net::SocketAddr) -> Gateway {
    tokio::time::sleep(Duration::from_millis(50)).await;
    cluster.gateway_at(address).await
}

#[tokio::test]
async fn recovery_ends_by_its_timeout_with_the_id_to_resume() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    let options = Options {
        recovery_timeout: Duration::from_millis(100),
        ..options()
    };
    let mut stream = client(&[&gateway], options)
        .await
        .submit(Request::prompt("x"))
        .await
        .unwrap();
    stream.next().await.unwrap();
    let id = stream.request_id();
    gateway.kill();
    let error = loop {
        match stream.next().await {
            Ok(event) => assert!(event.is_some()),
            Err(error) => break error,
        }
    };
    assert!(error.is_retriable());
    match error {
        Error::NotRecovered {
            request,
            next_position,
            ..
        } => {
            assert_eq!((request, next_position), (id, stream.next_position()));
        }
        error => panic!("{error}"),
    }
}

#[tokio::test]
async fn without_recovery_a_loss_is_told() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    let options = Options {
        recovery_timeout: Duration::ZERO,
        ..options()
    };
    gateway.fault(7, Fault::Cut);
    let mut stream = client(&[&gateway], options)
        .await
        .submit(Request::prompt("x"))
        .await
        .unwrap();
    let error = check(&mut stream).await.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error}");
    assert_eq!(stream.next_position(), 7);
}

#[tokio::test]
async fn a_resumed_request_with_another_seed_is_refused() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    gateway.script.lock().unwrap().changes_seed = true;
    gateway.fault(7, Fault::Cut);
    let mut stream = client(&[&gateway], options())
        .await
        .submit(Request::prompt("x"))
        .await
        .unwrap();
    let error = check(&mut stream).await.unwrap_err();
    assert!(matches!(error, Error::Protocol(_)), "{error}");
}

#[tokio::test]
async fn a_gateway_that_accepts_and_dies_for_ever_is_left_after_a_while() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    for _ in 0..1000 {
        gateway.fault(7, Fault::Cut);
    }
    let mut stream = client(&[&gateway], options())
        .await
        .submit(Request::prompt("x"))
        .await
        .unwrap();
    let error = check(&mut stream).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::NotRecovered {
                next_position: 7,
                ..
            }
        ),
        "{error}"
    );
    assert!(gateway.script.lock().unwrap().resumes < 50);
}

#[tokio::test]
async fn a_dropped_next_loses_nothing_in_recovery() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    for position in [0, 3, 9, 27] {
        gateway.fault(position, Fault::Cut);
    }
    let mut stream = client(&[&gateway], options())
        .await
        .submit(Request::prompt("x"))
        .await
        .unwrap();
    let mut positions = Vec::new();
    loop {
        // Polled once and dropped, again and again.
        let polled = tokio::select! {
            biased;
            event = stream.next() => Some(event.unwrap()),
            () = tokio::task::yield_now() => None,
        };
        match polled {
            Some(Some(Event::Token(token))) => positions.push(token.position),
            Some(Some(_)) | None => {}
            Some(None) => break,
        }
    }
    assert_eq!(positions, (0..TOTAL).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_stream_that_is_not_polled_recovers_by_itself() {
    let mut cluster = Cluster::new(TOTAL);
    Arc::get_mut(&mut cluster).unwrap().resume_grace = Some(Duration::from_millis(500));
    let gateway = cluster.gateway().await;
    // The connection goes when the caller is a whole window behind.
    gateway.fault(8, Fault::Cut);
    let client = client(&[&gateway], options()).await;
    let mut stream = client.submit(Request::prompt("x")).await.unwrap();
    until(|| gateway.script.lock().unwrap().resumes == 1).await;
    check(&mut stream).await.unwrap();
    assert_eq!(stream.recoveries(), 1);
    assert!(gateway.script.lock().unwrap().most_outstanding <= 8);
}

#[tokio::test]
async fn a_stream_that_the_gateway_gave_up_unread_is_resumed_when_it_is_read() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    let client = client(&[&gateway], options()).await;
    // Given up with all credit spent, and with some left.
    for (position, resumed_unread) in [(8, 0), (3, 1)] {
        let resumes = gateway.script.lock().unwrap().resumes;
        gateway.fault(position, Fault::Fail(ErrorCode::Timeout));
        let mut stream = client.submit(Request::prompt("x")).await.unwrap();
        until(|| gateway.script.lock().unwrap().faults.is_empty()).await;
        client.ping().await.unwrap();
        let unread = gateway.script.lock().unwrap().resumes - resumes;
        assert!(unread <= resumed_unread, "resumed to wait there again");
        check(&mut stream).await.unwrap();
        assert_eq!(stream.recoveries(), 1, "given up at {position}");
    }
}

#[tokio::test]
async fn a_submit_that_ends_its_connections_is_sent_a_few_times_only() {
    let cluster = Cluster::new(TOTAL);
    let (one, two) = (cluster.gateway().await, cluster.gateway().await);
    let client = client(&[&one, &two], options()).await;
    for gateway in [&one, &two] {
        gateway.script.lock().unwrap().submits_to_lose = 1000;
    }
    let mut stream = client.submit(Request::prompt("x")).await.unwrap();
    let error = error_of(&mut stream).await;
    assert!(
        matches!(error, Error::SubmitLost { times: 4, .. }),
        "{error}"
    );
    assert!(!error.is_retriable());
    let submits = |gateway: &Gateway| gateway.script.lock().unwrap().submits;
    assert_eq!(submits(&one) + submits(&two), 4);

    for gateway in [&one, &two] {
        gateway.script.lock().unwrap().submits_to_lose = 1;
    }
    let mut stream = client.submit(Request::prompt("x")).await.unwrap();
    check(&mut stream).await.unwrap();
}

#[tokio::test]
async fn a_submit_that_is_answered_with_nonsense_is_not_sent_again() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    gateway.script.lock().unwrap().garbles = true;
    let client = client(&[&gateway], options()).await;
    let mut stream = client.submit(Request::prompt("x")).await.unwrap();
    let error = error_of(&mut stream).await;
    assert!(
        matches!(
            error,
            Error::Lost {
                reason: LostReason::Protocol(_),
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(gateway.script.lock().unwrap().submits, 1);
}

#[tokio::test]
async fn a_resume_that_is_refused_for_now_is_tried_again() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    gateway.script.lock().unwrap().resumes_to_refuse = 2;
    gateway.fault(7, Fault::Cut);
    let client = client(&[&gateway], options()).await;
    let mut stream = client.submit(Request::prompt("x")).await.unwrap();
    check(&mut stream).await.unwrap();
    assert_eq!(gateway.script.lock().unwrap().resumes, 3);
}

#[tokio::test]
async fn durations_without_end_are_taken() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    let options = Options {
        connect_timeout: Duration::MAX,
        recovery_timeout: Duration::MAX,
        backoff_max: Duration::MAX,
        keepalive_interval: Duration::MAX - Duration::from_secs(1),
        keepalive_timeout: Duration::MAX,
        event_timeout: Duration::MAX,
        call_timeout: Duration::MAX,
        ..options()
    };
    for position in [3, 4, 5] {
        gateway.fault(position, Fault::Cut);
    }
    let client = client(&[&gateway], options).await;
    let request = Request {
        deadline_ms: Some(u64::MAX),
        ..Request::prompt("x")
    };
    let mut stream = client.submit(request).await.unwrap();
    check(&mut stream).await.unwrap();
    client.status().await.unwrap();
    drop(client.submit(Request::prompt("x")).await.unwrap());
    until(|| gateway.script.lock().unwrap().cancels == 1).await;
}
