//! What a client and a gateway's other actors see of a session.

mod harness;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use understudy_protocol::message::{FinishReason, ServerMessage};

use self::harness::{Gateway, PATIENCE, credit, frames, hello, shape, submit, tap, within};
use super::*;
use crate::hub::HubMsg;
use crate::request::RequestMsg;

#[tokio::test]
async fn tokens_do_not_wait_for_acknowledgements() {
    let gateway = Gateway::start().await;
    let (_client, _session, socket) = gateway.accept().await;
    let socket = TcpStream::from_std(socket).expect("a socket");
    assert!(socket.nodelay().expect("an option"));
}

/// A large prompt waits for its turn to be tokenized; whatever else the client wants does not wait for it.
#[tokio::test]
async fn a_slow_admission_holds_nothing_else_up() {
    let mut gateway = Gateway::start().await;
    let mut client = gateway.connect().await;
    client.send(&[submit(1, "count", 1)]).await;
    assert_eq!(shape(client.next().await), ("accepted", 1));
    let running = gateway.attempt().await;
    gateway.token(running, 0);
    gateway.token(running, 1);
    assert_eq!(shape(client.next().await), ("token", 1));

    let shared = gateway.shared.clone();
    let turns = shared.admission.hold_all_turns().await;
    let slow = submit(2, &"x".repeat(10_000), 1);
    client.send(&[slow, credit(2, 3)]).await;
    client.pong(7).await;
    client.send(&[credit(1, 1)]).await;
    assert_eq!(shape(client.next().await), ("token", 1));
    client.send(&[ClientMessage::Cancel { stream: 1 }]).await;
    assert_eq!(shape(client.next().await), ("finished", 1));
    drop(turns);
    assert_eq!(shape(client.next().await), ("invalid_request", 2));
}

/// What a client says of a stream right behind its submit is said to the request, when there is one.
#[tokio::test]
async fn credit_and_cancel_overtake_no_admission() {
    let gateway = Gateway::start().await;
    let (_client, session, _socket) = gateway.accept().await;
    let (request, mut said) = tap::<RequestMsg>().await;
    let (answers, _queue) = Answers::new();
    let outbox = answers.stream();
    let (stopped, _) = oneshot::channel();
    let mut state = SessionState {
        me: session.clone(),
        shared: gateway.shared.clone(),
        answers: Some(answers),
        streams: HashMap::new(),
        questions: Questions::default(),
        is_stopping: false,
        connection: tokio::spawn(async {}),
        stopped: Some(stopped),
    };
    let entry = Stream {
        outbox: outbox.clone(),
        reading: None,
        early_credit: 0,
        is_cancelled: false,
    };
    state.streams.insert(1, entry);
    state.inbound(&credit(1, 2));
    state.inbound(&credit(1, 3));
    state.inbound(&ClientMessage::Cancel { stream: 1 });
    let reading = Reading::new(request, session, 1, outbox.clone());
    state.opened(1, &outbox, Some(reading));
    let first = within(said.recv()).await;
    assert!(
        matches!(
            first,
            Some(RequestMsg::Credit {
                stream: 1,
                tokens: 5,
                ..
            })
        ),
        "{first:?}"
    );
    let second = within(said.recv()).await;
    assert!(
        matches!(second, Some(RequestMsg::Cancel { .. })),
        "{second:?}"
    );
    // Late words about an earlier use of the number neither end this one nor take its place.
    let earlier = state.answers.as_ref().expect("answers").stream();
    let (ended, _) = tap::<RequestMsg>().await;
    let late = Reading::new(ended, state.me.clone(), 1, earlier.clone());
    state.opened(1, &earlier, Some(late));
    state.ended(1);
    state.inbound(&credit(1, 1));
    let third = within(said.recv()).await;
    assert!(
        matches!(third, Some(RequestMsg::Credit { .. })),
        "{third:?}"
    );
    // However the session ends, the request hears of it.
    drop(state);
    let last = within(said.recv()).await;
    assert!(matches!(last, Some(RequestMsg::Detach { .. })), "{last:?}");
}

/// The router answers nobody. What the gateway knows itself is answered, and the connection goes on, before and after.
#[tokio::test]
async fn a_status_that_cannot_be_had_costs_no_connection() {
    let mut gateway = Gateway::start().await;
    let mut client = gateway.connect().await;
    client.send(&[ClientMessage::Status {}]).await;
    let question = within(gateway.routed.recv()).await;
    client.pong(1).await;
    // It is being asked already: one look later answers these two.
    client
        .send(&[ClientMessage::Status {}, ClientMessage::Status {}])
        .await;
    client.pong(2).await;
    drop(question);
    for look in [1, 2] {
        for _ in 0..look {
            let Some(ServerMessage::Status(status)) = client.next().await else {
                panic!("no status");
            };
            assert_eq!(
                (status.node.as_str(), status.version.as_str()),
                ("a", "1.2.3")
            );
            assert!(status.nodes.is_empty());
        }
        if look == 1 {
            drop(within(gateway.routed.recv()).await);
        }
    }
    client.pong(3).await;
}

#[tokio::test]
async fn a_handshake_has_one_deadline() {
    let limit = Duration::from_millis(300);
    let gateway = Gateway::start_with(|shared| shared.handshake_timeout = limit).await;
    let (mut client, ..) = gateway.accept().await;
    let started = Instant::now();
    let (mut read, mut write) = client.socket.split();
    let trickling = async {
        for byte in frames(&[hello()]) {
            write.write_all(&[byte]).await?;
            // Slower than anybody, and never silent for as long as the limit.
            tokio::time::sleep(limit / 5).await;
        }
        std::io::Result::Ok(())
    };
    let mut answer = Vec::new();
    let reading = within(read.read_to_end(&mut answer));
    let (_, read) = tokio::join!(trickling, reading);
    read.expect("no reset");
    let took = started.elapsed();
    assert!(String::from_utf8_lossy(&answer).contains("timeout"));
    let all = frames(&[hello()]).len() as u32 * (limit / 5);
    assert!(took >= limit && took < all + PATIENCE, "{took:?}");
}

#[tokio::test]
async fn who_is_not_greeted_sends_small_frames() {
    let gateway = Gateway::start().await;
    let (mut client, ..) = gateway.accept().await;
    client.socket.write_u32(100 * 1024).await.expect("sent");
    assert_eq!(client.last_word().await.code, ErrorCode::FrameTooLarge);
    // In the same write as the hello, a large frame is as good as later.
    let (mut client, ..) = gateway.accept().await;
    client
        .send(&[hello(), submit(1, &"x".repeat(100 * 1024), 1)])
        .await;
    assert!(matches!(
        client.next().await,
        Some(ServerMessage::Welcome { .. })
    ));
    assert_eq!(shape(client.next().await), ("invalid_request", 1));
}

#[tokio::test]
async fn silence_closes_a_connection_without_requests() {
    let limit = Duration::from_millis(200);
    let mut gateway = Gateway::start_with(|shared| shared.idle_timeout = limit).await;
    let mut client = gateway.connect().await;
    client.send(&[submit(1, "count", 1)]).await;
    assert_eq!(shape(client.next().await), ("accepted", 1));
    let attempt = gateway.attempt().await;
    // Much longer than the limit.
    tokio::time::sleep(4 * limit).await;
    gateway.token(attempt, 0);
    assert_eq!(shape(client.next().await), ("token", 1));
    client.send(&[ClientMessage::Cancel { stream: 1 }]).await;
    assert_eq!(shape(client.next().await), ("finished", 1));
    assert_eq!(client.last_word().await.code, ErrorCode::Timeout);
}

#[tokio::test]
async fn a_frame_cut_by_the_end_is_told() {
    let gateway = Gateway::start().await;
    let mut client = gateway.connect().await;
    client
        .socket
        .write_all(&[0, 0, 0, 9, 1])
        .await
        .expect("sent");
    client.socket.shutdown().await.expect("half-closed");
    assert_eq!(client.last_word().await.code, ErrorCode::Malformed);
}

/// A client may say all that it has to say, and only read from then on.
#[tokio::test]
async fn a_half_closed_connection_is_served_to_the_end() {
    let mut gateway = Gateway::start().await;
    let mut client = gateway.connect().await;
    client.send(&[submit(1, "count", 10)]).await;
    client.socket.shutdown().await.expect("half-closed");
    assert_eq!(shape(client.next().await), ("accepted", 1));
    let attempt = gateway.attempt().await;
    for position in 0..3 {
        gateway.token(attempt, position);
        assert_eq!(shape(client.next().await), ("token", 1));
    }
    let hub = &gateway.shared.surroundings.hub;
    hub.cast(HubMsg::Shutdown).expect("a hub");
    assert_eq!(shape(client.next().await), ("shutting_down", 1));
    assert_eq!(client.next().await, None);
}

/// First the streams' terminal events, then the connection's last word, then the end, without waiting for the client.
#[tokio::test]
async fn a_stopping_session_closes_by_itself() {
    let gateway = Gateway::start().await;
    let (mut client, session, _) = gateway.accept().await;
    client.greet().await;
    client.send(&[submit(1, "count", 10)]).await;
    assert_eq!(shape(client.next().await), ("accepted", 1));
    session.cast(SessionMsg::Shutdown).expect("a session");
    client.send(&[ClientMessage::Cancel { stream: 1 }]).await;
    let Some(ServerMessage::Finished { finish_reason, .. }) = client.next().await else {
        panic!("not finished");
    };
    assert_eq!(finish_reason, FinishReason::Cancelled);
    assert_eq!(client.last_word().await.code, ErrorCode::ShuttingDown);

    // A stream that does not end is not waited for.
    let (mut client, session, _) = gateway.accept().await;
    client.greet().await;
    client.send(&[submit(1, "count", 10)]).await;
    assert_eq!(shape(client.next().await), ("accepted", 1));
    session.cast(SessionMsg::Shutdown).expect("a session");
    assert_eq!(client.last_word().await.code, ErrorCode::ShuttingDown);
}

/// The client writes all of a frame that is too large before it reads.
#[tokio::test]
async fn the_last_word_is_read_by_who_is_still_writing() {
    let gateway = Gateway::start().await;
    let mut client = gateway.connect().await;
    let frame = vec![0; 5 << 20];
    client
        .socket
        .write_u32(frame.len() as u32)
        .await
        .expect("sent");
    client
        .socket
        .write_all(&frame)
        .await
        .expect("taken to its end");
    assert_eq!(client.last_word().await.code, ErrorCode::FrameTooLarge);
}

/// Two messages in one write. Were the second one taken, the error of the first would end it in the books.
#[tokio::test]
async fn a_number_is_not_used_again_before_its_refusal_is_out() {
    let gateway = Gateway::start().await;
    let mut client = gateway.connect().await;
    // A submit with text for its credit.
    let bad = b"\x00\x00\x00\x21\x83\xa4type\xa6submit\xa6stream\x05\xa6credit\xa1x";
    let mut bytes = BytesMut::from(&bad[..]);
    bytes[3] = bad.len() as u8 - 4;
    client.socket.write_all(&bytes).await.expect("sent");
    assert_eq!(shape(client.next().await), ("invalid_request", 5));
    client.send(&[submit(5, "count", 1)]).await;
    assert_eq!(shape(client.next().await), ("accepted", 5));
    let cancel = ClientMessage::Cancel { stream: 5 };
    client.send(&[cancel]).await;
    assert_eq!(shape(client.next().await), ("finished", 5));
}

/// Places are free again, and counted so, when sockets are closed.
#[tokio::test]
async fn a_connection_gives_its_place_back() {
    let gateway = Gateway::start().await;
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(gateway.connect().await);
    }
    assert!(ConnectionPlace::take(&gateway.shared).is_none());
    clients.clear();
    let all = gateway.shared.connections.acquire_many(8);
    drop(within(all).await.expect("every place"));
}
