//! Streams that are cancelled, dropped or left, here and by others: what becomes of the request.

mod fake;

use std::sync::Arc;
use std::time::Duration;

use fake::{Cluster, Gateway, error_of, until};
use understudy_client::{Client, Error, Event, FinishReason, Options, Request, RequestId, Stream};

fn options() -> Options {
    Options {
        window: 8,
        recovery_timeout: Duration::from_secs(10),
        backoff_initial: Duration::from_millis(1),
        backoff_max: Duration::from_millis(10),
        connect_timeout: Duration::from_secs(2),
        ..Options::default()
    }
}

async fn client(gateway: &Gateway) -> Client {
    Client::connect([gateway.address.to_string()], options())
        .await
        .unwrap()
}

/// Takes what follows `Accepted`, and checks the positions.
async fn rest(stream: &mut Stream, from: u32) {
    let mut position = from;
    while let Some(event) = stream.next().await.unwrap() {
        if let Event::Token(token) = event {
            assert_eq!(token.position, position);
            position += 1;
        }
    }
    assert_eq!(position, TOTAL);
}

const TOTAL: u32 = 40;

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
        until(|| cluster.is_cancelled(accepted.request)).await;
    }
    assert_eq!(gateway.script.lock().unwrap().connections, 1);
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
async fn a_stream_dropped_in_recovery_is_cancelled_elsewhere() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    let address = gateway.address;
    let client = client(&gateway).await;
    let mut stream = client.submit(Request::prompt("x")).await.unwrap();
    stream.next().await.unwrap();
    let id = stream.request_id().unwrap();
    gateway.kill();
    until(|| !cluster.is_read(id)).await;
    drop(stream);
    let back = cluster.gateway_at(address).await;
    until(|| cluster.is_cancelled(id)).await;
    // Its number comes free: whoever cancels has given credit for the tokens before the end.
    until(|| !cluster.is_read(id)).await;
    assert_eq!(back.script.lock().unwrap().cancels, 1);
}

#[tokio::test]
async fn a_request_that_others_cancelled_does_not_look_finished() {
    let mut cluster = Cluster::new(TOTAL);
    Arc::get_mut(&mut cluster).unwrap().resume_grace = Some(Duration::from_millis(20));
    let gateway = cluster.gateway().await;
    let address = gateway.address;
    let client = client(&gateway).await;
    let mut stream = client.submit(Request::prompt("x")).await.unwrap();
    stream.next().await.unwrap();
    let id = stream.request_id().unwrap();
    gateway.kill();
    until(|| cluster.is_cancelled(id)).await;
    let _back = cluster.gateway_at(address).await;
    let error = error_of(&mut stream).await;
    let expected = Error::Cancelled {
        request: id,
        next_position: stream.next_position(),
    };
    assert_eq!(error, expected);
    assert!(!error.is_retriable());
    assert!(error.to_string().contains("resume_grace_ms"), "{error}");
}

/// A request that is in flight, and a client whose first gateway never answers and whose second one has the request.
struct Elsewhere {
    cluster: Arc<Cluster>,
    gateway: Gateway,
    _silent: tokio::net::TcpListener,
    stream: Stream,
    id: RequestId,
    client: Client,
}

async fn elsewhere(recovery_timeout: Duration) -> Elsewhere {
    let cluster = Cluster::new(1_000_000);
    let gateway = cluster.gateway().await;
    let own = client(&gateway).await;
    let mut stream = own.submit(Request::prompt("x")).await.unwrap();
    stream.next().await.unwrap();
    let id = stream.request_id().unwrap();
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = [silent.local_addr().unwrap(), gateway.address];
    let options = Options {
        connect_timeout: Duration::from_millis(300),
        recovery_timeout,
        ..options()
    };
    let client = Client::new(addresses.map(|address| address.to_string()), options).unwrap();
    Elsewhere {
        cluster,
        gateway,
        _silent: silent,
        stream,
        id,
        client,
    }
}

impl Elsewhere {
    /// The request goes on: the client has been at its second gateway since, and done nothing to it.
    async fn assert_left_alone(mut self) {
        self.client.status().await.unwrap();
        // A cancel would take the same way, and a few turns.
        for _ in 0..100 {
            self.client.ping().await.unwrap();
        }
        assert_eq!(self.gateway.script.lock().unwrap().cancels, 0);
        assert!(!self.cluster.is_cancelled(self.id));
        assert!(self.stream.next().await.unwrap().is_some());
    }
}

#[tokio::test]
async fn a_resume_that_is_dropped_leaves_the_request_alone() {
    let elsewhere = elsewhere(Duration::from_secs(10)).await;
    let resume = elsewhere.client.resume(elsewhere.id, 0);
    let given_up = tokio::time::timeout(Duration::from_millis(50), resume).await;
    assert!(given_up.is_err(), "the first gateway answered");
    elsewhere.assert_left_alone().await;
}

#[tokio::test]
async fn a_resume_that_fails_leaves_the_request_alone() {
    let elsewhere = elsewhere(Duration::from_millis(50)).await;
    let failed = elsewhere.client.resume(elsewhere.id, 0).await;
    let error = failed.err().unwrap();
    assert!(matches!(error, Error::NotRecovered { .. }), "{error}");
    elsewhere.assert_left_alone().await;
}

#[tokio::test]
async fn a_resumed_stream_dropped_before_it_is_accepted_leaves_the_request_alone() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    let client = client(&gateway).await;
    let mut stream = client.submit(Request::prompt("x")).await.unwrap();
    stream.next().await.unwrap();
    let id = stream.request_id().unwrap();
    // Dropped at once, so before anything has come.
    drop(client.resume(id, 0).await.unwrap());
    until(|| gateway.script.lock().unwrap().resumes == 1).await;
    client.ping().await.unwrap();
    assert!(!cluster.is_cancelled(id));
    rest(&mut stream, 0).await;
    // It got the credit to come to its end.
    until(|| !cluster.is_read(id)).await;
}

#[tokio::test]
async fn a_detached_request_goes_on_and_can_be_resumed() {
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    let client = client(&gateway).await;
    let mut stream = client.submit(Request::prompt("x")).await.unwrap();
    for _ in 0..4 {
        stream.next().await.unwrap();
    }
    let (id, next_position) = stream.detach().unwrap();
    assert_eq!(next_position, 3);
    until(|| !cluster.is_read(id)).await;
    assert!(!cluster.is_cancelled(id));
    let mut again = client.resume(id, next_position).await.unwrap();
    rest(&mut again, next_position).await;
    assert_eq!(gateway.script.lock().unwrap().cancels, 0);

    let unaccepted = client.submit(Request::prompt("x")).await.unwrap();
    assert_eq!(unaccepted.detach(), None);
    until(|| gateway.script.lock().unwrap().cancels == 1).await;
}
