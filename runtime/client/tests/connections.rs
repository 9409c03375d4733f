//! Connections to fake gateways: shared, further ones where they are full, kept alive, refused; and calls.

mod fake;

use std::time::Duration;

use fake::{Cluster, Fault, Gateway, until};
use understudy_client::protocol::ErrorCode;
use understudy_client::{Client, Error, Event, Options, Request, Stream};

async fn client(gateway: &Gateway) -> Client {
    Client::connect([gateway.address.to_string()], Options::default())
        .await
        .unwrap()
}

/// Reads a stream to its end, and checks the positions.
async fn check(stream: &mut Stream, total: u32) {
    let mut position = 0;
    while let Some(event) = stream.next().await.unwrap() {
        if let Event::Token(token) = event {
            assert_eq!(token.position, position);
            position += 1;
        }
    }
    assert_eq!(position, total);
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
            check(&mut stream, 200).await;
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(gateway.script.lock().unwrap().connections, 1);
}

#[tokio::test]
async fn more_streams_than_a_connection_takes_get_further_connections() {
    let cluster = Cluster::new(200);
    let gateway = cluster.gateway().await;
    let client = client(&gateway).await;
    let mut streams = Vec::new();
    for _ in 0..200 {
        streams.push(client.submit(Request::prompt("x")).await.unwrap());
    }
    // All are in flight at once: none can end before it is read.
    let mut tasks = tokio::task::JoinSet::new();
    for mut stream in streams {
        tasks.spawn(async move { check(&mut stream, 200).await });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    // 64 streams on each.
    assert_eq!(gateway.script.lock().unwrap().connections, 4);
}

#[tokio::test]
async fn a_stream_beyond_all_connections_waits_for_another_to_end() {
    let cluster = Cluster::new(1_000_000);
    let gateway = cluster.gateway().await;
    let options = Options {
        connections_per_gateway: 1,
        // So long that only the end of a stream can be what the waiting one goes by.
        backoff_initial: Duration::from_secs(60),
        backoff_max: Duration::from_secs(60),
        recovery_timeout: Duration::from_secs(120),
        ..Options::default()
    };
    let client = Client::connect([gateway.address.to_string()], options.clone())
        .await
        .unwrap();
    let mut streams = Vec::new();
    for _ in 0..64 {
        streams.push(client.submit(Request::prompt("x")).await.unwrap());
    }
    let mut waiting = tokio::spawn({
        let client = client.clone();
        async move { client.submit(Request::prompt("x")).await }
    });
    client.ping().await.unwrap();
    assert!(!waiting.is_finished());
    drop(streams.pop());
    let waited = tokio::time::timeout(Duration::from_secs(10), &mut waiting)
        .await
        .expect("a place within 10 s");
    let mut stream = waited.unwrap().unwrap();
    assert!(matches!(stream.next().await, Ok(Some(Event::Accepted(_)))));
    assert_eq!(gateway.script.lock().unwrap().connections, 1);
}

#[tokio::test]
async fn a_stream_beyond_all_connections_is_overloaded_where_it_may_not_wait() {
    let cluster = Cluster::new(1_000_000);
    let gateway = cluster.gateway().await;
    let options = Options {
        connections_per_gateway: 2,
        recovery_timeout: Duration::ZERO,
        ..Options::default()
    };
    let client = Client::connect([gateway.address.to_string()], options)
        .await
        .unwrap();
    let mut streams = Vec::new();
    for _ in 0..128 {
        streams.push(client.submit(Request::prompt("x")).await.unwrap());
    }
    let error = client.submit(Request::prompt("x")).await.err().unwrap();
    assert_eq!(error.code(), Some(ErrorCode::Overloaded));
    assert!(error.is_retriable());
    assert!(error.to_string().contains("2 connections"), "{error}");
}

#[tokio::test]
async fn calls_leave_a_gateway_that_has_fallen_silent() {
    let cluster = Cluster::new(10);
    let (one, two) = (cluster.gateway().await, cluster.gateway().await);
    let options = Options {
        keepalive_timeout: Duration::from_secs(60),
        call_timeout: Duration::from_secs(2),
        ..Options::default()
    };
    let addresses = [one.address.to_string(), two.address.to_string()];
    let client = Client::connect(addresses, options).await.unwrap();
    one.fault(5, Fault::Hang);
    let _stream = client.submit(Request::prompt("x")).await.unwrap();
    until(|| one.script.lock().unwrap().faults.is_empty()).await;
    assert_eq!(client.status().await.unwrap().cluster, "fake");
    client.ping().await.unwrap();
    assert_eq!(two.script.lock().unwrap().connections, 1);
}

#[tokio::test]
async fn a_client_is_not_made_with_options_that_cannot_work() {
    let options = Options {
        keepalive_interval: Duration::from_secs(6),
        ..Options::default()
    };
    let error = Client::new(["127.0.0.1:1"], options).err().unwrap();
    assert!(error.to_string().contains("keepalive_interval"), "{error}");
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

async fn until_refused(address: &str) {
    tokio::time::timeout(Duration::from_secs(10), async {
        while tokio::net::TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("refused within 10 s");
}
