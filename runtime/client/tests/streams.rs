//! Streams against fake gateways: events, credit, and what refuses.

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
async fn the_text_of_a_stream_is_its_tokens_and_its_end() {
    let cluster = Cluster::new(3);
    let gateway = cluster.gateway().await;
    let stream = client(&gateway)
        .await
        .submit(Request::chat("x"))
        .await
        .unwrap();
    assert_eq!(stream.text().await.unwrap(), "t0 t1 t2 end");
}

#[tokio::test]
async fn a_request_that_is_accepted_twice_is_an_error() {
    let cluster = Cluster::new(10);
    let gateway = cluster.gateway().await;
    gateway.script.lock().unwrap().accepts_twice = true;
    let client = client(&gateway).await;
    let stream = client.submit(Request::prompt("x")).await.unwrap();
    let error = stream.text().await.unwrap_err();
    assert!(matches!(error, Error::Protocol(_)), "{error}");
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
