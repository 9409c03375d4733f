//! A stand-in for `understudy node` in the tests of the launcher: it listens, answers `status` and streams a count, and
//! misbehaves as its environment says. It has no engine and no cluster.
//!
//! - `STANDIN_DIE=NAME`: that node says why and exits with status 3 at once;
//! - `STANDIN_STUBBORN=NAME`: that node ignores SIGTERM;
//! - `STANDIN_STARTING=NAME`: that node's replicas never become ready;
//! - `STANDIN_DOWN=NAME`: that node's engines cannot load their libraries.

use std::net::TcpStream as StdStream;
use std::process::ExitCode;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use understudy_config::{ClusterConfig, LoadOptions, PathCheck, read_tokens};
use understudy_protocol::message::{
    ClientMessage, ClusterStatus, FinishReason, Limits, NodeStatus, ReplicaStatus, ServerMessage,
    TokenEvent, Usage, WorkerStatus,
};
use understudy_protocol::{FrameDecoder, RequestId, decode_client, encode};

fn is(variable: &str, name: &str) -> bool {
    std::env::var(variable).is_ok_and(|value| value == name)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let [_, node, config, file, name_option, name] = words.as_slice() else {
        eprintln!("unexpected arguments: {words:?}");
        return ExitCode::from(2);
    };
    assert_eq!([node, config, name_option], ["node", "--config", "--name"]);
    eprintln!("stand-in {name} starts");
    if is("STANDIN_DIE", name) {
        eprintln!("stand-in {name} cannot go on");
        return ExitCode::from(3);
    }
    let options = LoadOptions {
        paths: PathCheck::None,
    };
    let (config, _) =
        ClusterConfig::load_with(file, &options).expect("the launcher has checked it");
    let cookie =
        std::fs::read_to_string(&config.cluster.cookie_file).expect("the launcher has made it");
    assert_eq!(cookie.trim().len(), 64);
    let settings = config
        .node(name)
        .expect("the launcher has taken it from there")
        .clone();
    if let Some(file) = &config.gateway.token_file
        && settings.client_port.is_some()
    {
        read_tokens(file).expect("the launcher has copied it");
    }
    if is("STANDIN_DOWN", name) {
        eprintln!("libtorch_cpu.so: cannot open shared object file");
    }
    let mut listeners = vec![
        TcpListener::bind(settings.listen_address(settings.cluster_port))
            .await
            .expect("bound"),
    ];
    if let Some(port) = settings.client_port {
        listeners.push(
            TcpListener::bind(settings.listen_address(port))
                .await
                .expect("bound"),
        );
    }
    let mut terminate = signal(SignalKind::terminate()).expect("a signal handler");
    for listener in listeners {
        let (config, name) = (config.clone(), name.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, config.clone(), name.clone()));
            }
        });
    }
    loop {
        terminate.recv().await;
        if !is("STANDIN_STUBBORN", name) {
            eprintln!("stand-in {name} stops");
            return ExitCode::SUCCESS;
        }
    }
}

async fn serve(mut stream: TcpStream, config: ClusterConfig, name: String) {
    let mut decoder = FrameDecoder::new(1 << 20);
    loop {
        match stream.read_buf(decoder.buffer_mut()).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        while let Ok(Some(frame)) = decoder.next_frame() {
            let message = decode_client(&frame).expect("a client of ours");
            let mut out = BytesMut::new();
            for answer in answers(message, &config, &name) {
                encode(&answer, &mut out).expect("small");
            }
            if stream.write_all(&out).await.is_err() {
                return;
            }
        }
    }
}

fn answers(message: ClientMessage, config: &ClusterConfig, name: &str) -> Vec<ServerMessage> {
    match message {
        ClientMessage::Hello { .. } => vec![ServerMessage::Welcome {
            version: 1,
            node: name.to_owned(),
            server: "stand-in".to_owned(),
            limits: Limits {
                max_frame_bytes: 1 << 20,
                max_streams: 8,
                max_credit: 1024,
            },
        }],
        ClientMessage::Ping { nonce } => vec![ServerMessage::Pong { nonce }],
        ClientMessage::Status {} => vec![ServerMessage::Status(status(config, name))],
        ClientMessage::Submit(submit) => count(submit.stream),
        _ => vec![],
    }
}

fn count(stream: u32) -> Vec<ServerMessage> {
    let request = RequestId(7);
    let token = |position: u32| {
        let text = format!("{} ", position + 1);
        ServerMessage::Token(TokenEvent {
            stream,
            position,
            id: position,
            text,
            logprob: None,
            top_logprobs: vec![],
        })
    };
    let usage = Usage {
        prompt_tokens: 5,
        completion_tokens: 20,
    };
    let mut all = vec![ServerMessage::Accepted {
        stream,
        request,
        prompt_tokens: 5,
        seed: 1,
    }];
    all.extend((0..20).map(token));
    all.push(ServerMessage::Finished {
        stream,
        finish_reason: FinishReason::Stop,
        usage,
        text: String::new(),
    });
    all
}

fn status(config: &ClusterConfig, name: &str) -> ClusterStatus {
    let listens = |node: &str| {
        let address = config
            .node(node)
            .expect("known")
            .cluster_address()
            .parse()
            .expect("an address");
        StdStream::connect_timeout(&address, Duration::from_millis(200)).is_ok()
    };
    let nodes = config.nodes.iter().map(|node| NodeStatus {
        name: node.name.clone(),
        incarnation: "1".to_owned(),
        state: if node.name == name {
            "self"
        } else if listens(&node.name) {
            "alive"
        } else {
            "never_seen"
        }
        .to_owned(),
        roles: vec![],
        address: node.cluster_address(),
        last_heard_ms: None,
    });
    let replicas = config.placement().into_iter().map(|place| ReplicaStatus {
        state: if is("STANDIN_STARTING", &place.node) {
            "starting"
        } else if is("STANDIN_DOWN", &place.node) {
            "down"
        } else {
            "ready"
        }
        .to_owned(),
        workers: vec![worker(
            is("STANDIN_DOWN", &place.node).then_some("the engine ended: exit status: 127"),
        )],
        model: place.model,
        node: place.node,
        replica: place.replica,
        in_flight: 0,
    });
    ClusterStatus {
        nodes: nodes.collect(),
        replicas: replicas.collect(),
        ..ClusterStatus::default()
    }
}

fn worker(last_error: Option<&str>) -> WorkerStatus {
    WorkerStatus {
        shard: 0,
        state: String::new(),
        engine_pid: None,
        device: "cpu".to_owned(),
        restarts: 0,
        last_error: last_error.map(str::to_owned),
        running: 0,
        waiting: 0,
        kv_used_tokens: 0,
        kv_capacity_tokens: 0,
        rss_bytes: 0,
        fingerprint: String::new(),
    }
}
