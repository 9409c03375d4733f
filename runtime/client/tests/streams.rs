//! Streams against fake gateways: events, credit, cancel, many at once, calls, and what refuses.

mod fake;

use std::time::Duration;

use fake::{Cluster, Fault, Gateway};
use understudy_client::protocol::ErrorCode;
use understudy_client::{
    Client, Error, Event, FinishReason, Finished, LostReason, Options, Request, RequestId, Stream,
};

async fn client(gateway: &Gateway) -> Client {
    Client::connect([gateway.address.to_string()], Options::default())
        .await
        .unwrap()
}

/// Takes the rest of a stream and checks every token; the positions begin at `from`.
async fn check(stream: &mut Stream, from: u32, total: u32) -> Finished {
    let mut seed = None;
    let mut position = from;
    loop {
        match stream.next().await.unwrap().expect("an event") {
            Event::Accepted(accepted) => assert!(seed.replace(accepted.seed).is_none()),
            Event::Token(token) => {
                let expected = fake::token(0, seed.expect("accepted first"), position);
                assert_eq!((token.position, token.id), (position, expected.id));
                assert_eq!(
                    token.logprob.map(f32::to_bits),
                    expected.logprob.map(f32::to_bits)
                );
                assert_eq!(token.text, expected.text);
                position += 1;
            }
            Event::Finished(finished) => {
                assert_eq!(position, total);
                assert_eq!(stream.next().await, Ok(None));
                return finished;
            }
        }
    }
}

#[tokio::test]
async fn a_stream_gives_accepted_then_tokens_then_finished() {
    let cluster = Cluster::new(10);
    let gateway = cluster.gateway().await;
    let mut stream = client(&gateway)
        .await
        .submit(Request::prompt("x"))
        .await
        .unwrap();
    let finished = check(&mut stream, 0, 10).await;
    assert_eq!(finished.finish_reason, FinishReason::Length);
    assert_eq!(finished.usage.completion_tokens, 10);
    assert_eq!(finished.text, "end");
    assert_eq!(stream.recoveries(), 0);
}

#[tokio::test]
async fn credit_is_given_back_and_bounds_what_is_under_way() {
    let cluster = Cluster::new(1000);
    let gateway = cluster.gateway().await;
    for window in [1, 2, 7, 64] {
        let options = Options {
            window,
            ..Options::default()
        };
        let client = Client::connect([gateway.address.to_string()], options)
            .await
            .unwrap();
        let mut stream = client.submit(Request::prompt("x")).await.unwrap();
        check(&mut stream, 0, 1000).await;
        let most = std::mem::take(&mut gateway.script.lock().unwrap().most_outstanding);
        assert!(
            (1..=window).contains(&most),
            "{most} outstanding with a window of {window}"
        );
    }
}

#[tokio::test]
async fn a_window_over_the_servers_limit_is_cut_to_it() {
    let mut cluster = Cluster::new(100);
    std::sync::Arc::get_mut(&mut cluster).unwrap().max_credit = 3;
    let gateway = cluster.gateway().await;
    let mut stream = client(&gateway)
        .await
        .submit(Request::prompt("x"))
        .await
        .unwrap();
    check(&mut stream, 0, 100).await;
    assert_eq!(gateway.script.lock().unwrap().most_outstanding, 3);
}

#[tokio::test]
async fn many_streams_share_one_connection() {
    let cluster = Cluster::new(200);
    let gateway = cluster.gateway().await;
    let client = client(&gateway).await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let client = client.clone();
        tasks.spawn(async move {
            let mut stream = client.submit(Request::prompt("x")).await.unwrap();
            check(&mut stream, 0, 200).await;
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(gateway.script.lock().unwrap().connections, 1);
}

#[tokio::test]
async fn a_reader_that_waits_does_not_hold_up_the_others() {
    let cluster = Cluster::new(500);
    let gateway = cluster.gateway().await;
    let client = client(&gateway).await;
    let mut slow = client.submit(Request::prompt("x")).await.unwrap();
    let mut quick = client.submit(Request::prompt("x")).await.unwrap();
    check(&mut quick, 0, 500).await;
    check(&mut slow, 0, 500).await;
}

#[tokio::test]
async fn cancel_ends_with_finished_and_the_rest_is_not_sent() {
    let cluster = Cluster::new(1_000_000);
    let gateway = cluster.gateway().await;
    let mut stream = client(&gateway)
        .await
        .submit(Request::prompt("x"))
        .await
        .unwrap();
    stream.next().await.unwrap();
    stream.cancel();
    let finished = loop {
        if let Some(Event::Finished(finished)) = stream.next().await.unwrap() {
            break finished;
        }
    };
    assert_eq!(finished.finish_reason, FinishReason::Cancelled);
    assert!(stream.next_position() <= 200);
}

#[tokio::test]
async fn a_dropped_stream_is_cancelled_and_its_number_comes_free() {
    let cluster = Cluster::new(1_000_000);
    let gateway = cluster.gateway().await;
    let client = client(&gateway).await;
    // More than the gateway's 64 streams at once, one after the other.
    for _ in 0..200 {
        let mut stream = client.submit(Request::prompt("x")).await.unwrap();
        let Some(Event::Accepted(accepted)) = stream.next().await.unwrap() else {
            panic!("not accepted");
        };
        drop(stream);
        client.ping().await.unwrap();
        assert!(cluster.is_cancelled(accepted.request));
    }
}

#[tokio::test]
async fn the_last_drop_cancels_before_the_connection_closes() {
    let cluster = Cluster::new(1_000_000);
    let gateway = cluster.gateway().await;
    let client = client(&gateway).await;
    let mut stream = client.submit(Request::prompt("x")).await.unwrap();
    stream.next().await.unwrap();
    drop(client);
    drop(stream);
    until(|| gateway.script.lock().unwrap().cancels == 1).await;
}

#[tokio::test]
async fn status_and_ping_are_answered() {
    let cluster = Cluster::new(1);
    let gateway = cluster.gateway().await;
    let client = client(&gateway).await;
    assert_eq!(client.status().await.unwrap().cluster, "fake");
    assert!(client.ping().await.unwrap() < Duration::from_secs(1));
}

#[tokio::test]
async fn an_idle_connection_is_kept_alive_by_pings() {
    let cluster = Cluster::new(1);
    let gateway = cluster.gateway().await;
    let options = Options {
        keepalive_interval: Duration::from_millis(10),
        keepalive_timeout: Duration::from_millis(500),
        ..Options::default()
    };
    let client = Client::connect([gateway.address.to_string()], options)
        .await
        .unwrap();
    until(|| gateway.script.lock().unwrap().pings >= 5).await;
    client.status().await.unwrap();
    assert_eq!(gateway.script.lock().unwrap().connections, 1);
}

#[tokio::test]
async fn the_servers_errors_come_typed() {
    let cluster = Cluster::new(10);
    let gateway = cluster.gateway().await;
    let client = client(&gateway).await;
    for code in [
        ErrorCode::InvalidRequest,
        ErrorCode::Overloaded,
        ErrorCode::DeadlineExceeded,
    ] {
        gateway.fault(4, Fault::Fail(code));
        let mut stream = client.submit(Request::prompt("x")).await.unwrap();
        let error = loop {
            match stream.next().await {
                Ok(event) => assert!(event.is_some()),
                Err(error) => break error,
            }
        };
        assert_eq!(error.code(), Some(code));
        assert_eq!(error.is_retriable(), code.is_retriable());
        assert_eq!(stream.next().await, Ok(None));
        assert_eq!(stream.next_position(), 4);
    }
}

#[tokio::test]
async fn a_token_is_needed_where_the_gateway_wants_one() {
    let mut cluster = Cluster::new(1);
    std::sync::Arc::get_mut(&mut cluster).unwrap().token = Some("secret".to_owned());
    let gateway = cluster.gateway().await;
    let address = [gateway.address.to_string()];
    let error = Client::connect(address.clone(), Options::default())
        .await
        .err()
        .unwrap();
    assert_eq!(error.code(), Some(ErrorCode::Unauthorized));
    assert!(!error.is_retriable());
    let options = Options {
        token: Some("secret".to_owned()),
        ..Options::default()
    };
    assert!(Client::connect(address, options).await.is_ok());
}

#[tokio::test]
async fn a_request_over_the_frame_limit_is_refused_here() {
    let cluster = Cluster::new(1);
    let gateway = cluster.gateway().await;
    let client = client(&gateway).await;
    let error = client
        .submit(Request::prompt("x".repeat(5000)))
        .await
        .err()
        .unwrap();
    assert!(
        matches!(error, Error::TooLarge { max: 4096, .. }),
        "{error}"
    );
    client.status().await.unwrap();
}

#[tokio::test]
async fn gaps_floods_and_changed_requests_are_errors() {
    let cluster = Cluster::new(300);
    let gateway = cluster.gateway().await;
    for fault in [Fault::Skip(1), Fault::Flood(500)] {
        let options = Options {
            recovery_timeout: Duration::ZERO,
            ..Options::default()
        };
        let client = Client::connect([gateway.address.to_string()], options)
            .await
            .unwrap();
        gateway.fault(5, fault);
        let mut stream = client.submit(Request::prompt("x")).await.unwrap();
        let error = loop {
            match stream.next().await {
                Ok(Some(event)) => {
                    assert!(!matches!(event, Event::Finished(_)), "{fault:?} went by")
                }
                Ok(None) => panic!("{fault:?} ended without an error"),
                Err(error) => break error,
            }
        };
        let broken = match fault {
            Fault::Skip(_) => matches!(error, Error::Protocol(_)),
            _ => matches!(
                error,
                Error::Lost {
                    reason: LostReason::Protocol(_),
                    ..
                }
            ),
        };
        assert!(broken, "{fault:?}: {error}");
    }
}

#[tokio::test]
async fn a_request_can_be_resumed_by_its_id_alone() {
    let cluster = Cluster::new(20);
    let gateway = cluster.gateway().await;
    let mut first = client(&gateway)
        .await
        .submit(Request::prompt("x"))
        .await
        .unwrap();
    check(&mut first, 0, 20).await;
    let id = first.request_id().unwrap();
    for from in 0..=20 {
        let mut again = client(&gateway).await.resume(id, from).await.unwrap();
        check(&mut again, from, 20).await;
    }
    let mut unknown = client(&gateway)
        .await
        .resume(RequestId(1), 0)
        .await
        .unwrap();
    let error = unknown.next().await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::UnknownRequest));
}

#[tokio::test]
async fn no_gateway_is_an_error_within_the_time_limit() {
    let error = Client::connect(Vec::<String>::new(), Options::default())
        .await
        .err()
        .unwrap();
    assert_eq!(error, Error::NoAddress);
    let cluster = Cluster::new(1);
    let gateway = cluster.gateway().await;
    let address = gateway.address.to_string();
    gateway.kill();
    until_refused(&address).await;
    let error = Client::connect([address], Options::default())
        .await
        .err()
        .unwrap();
    assert!(error.is_retriable(), "{error}");
}

/// Waits until a condition holds; a test that waits longer than this has failed.
async fn until(mut condition: impl FnMut() -> bool) {
    tokio::time::timeout(Duration::from_secs(10), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("condition within 10 s");
}

async fn until_refused(address: &str) {
    tokio::time::timeout(Duration::from_secs(10), async {
        while tokio::net::TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("refused within 10 s");
}
