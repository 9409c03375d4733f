//! Gateways that speak the protocol and make up their tokens: position and seed decide everything, so that a stream
//! can be checked whatever happened to it. Faults are scripted, each for one position and once.
//!
//! As strict as the protocol allows: a terminal event waits for credit for the tokens before it, a cancel included, and a
//! request without a reader is cancelled after a grace.

#![allow(dead_code, reason = "each test binary uses a part")]

mod connection;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use understudy_client::protocol::message::{TokenEvent, TopLogprob};
use understudy_client::protocol::{ErrorCode, PROTOCOL_VERSION, RequestId};
use understudy_client::{Error, Event, Stream};

use self::connection::Connection;

/// What happens to the stream that is about to send a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The connection closes.
    Cut,
    /// The connection stays open and brings nothing more.
    Hang,
    /// The stream brings nothing more until it is cancelled; its connection lives.
    Pause,
    /// The stream ends with this code.
    Fail(ErrorCode),
    /// The connection ends with this code.
    Refuse(ErrorCode),
    /// The stream goes on this many positions further.
    Skip(u32),
    /// The position is sent without regard to credit, this often.
    Flood(u32),
}

/// Tokens that a request is ahead of its reader when it is cancelled.
const AHEAD: u32 = 1;

/// What the gateways of one cluster share.
#[derive(Default)]
pub struct Cluster {
    requests: Mutex<HashMap<RequestId, Record>>,
    /// Tokens of every request.
    pub total: u32,
    pub max_credit: u32,
    pub token: Option<String>,
    /// How long a request goes on without a reader; for ever where there is none.
    pub resume_grace: Option<Duration>,
}

#[derive(Clone)]
struct Record {
    seed: u64,
    /// Where it ends.
    end: u32,
    cancelled: bool,
    /// The first position that no reader has been sent.
    sent: u32,
    readers: u32,
    /// When the last reader went.
    left: Option<Instant>,
}

impl Record {
    fn cancel(&mut self) {
        if !self.cancelled && self.sent < self.end {
            self.cancelled = true;
            self.end = self.end.min(self.sent + AHEAD);
        }
    }
}

/// Faults and counters of one gateway.
#[derive(Default)]
pub struct Script {
    pub faults: Vec<(u32, Fault)>,
    /// The connection is cut after this many bytes have been written to it, once.
    pub cut_after_bytes: Option<usize>,
    /// A resume is answered from this many positions before the one asked for.
    pub repeat: u32,
    /// Requests are not known here, though another gateway has them.
    pub forgets: bool,
    /// Resumed requests bear another seed.
    pub changes_seed: bool,
    /// Requests are accepted twice.
    pub accepts_twice: bool,
    /// This many submits end the connection before they are accepted.
    pub submits_to_lose: u32,
    /// No token is sent for now.
    pub holds: bool,
    /// A submit is answered with what is no message.
    pub garbles: bool,
    /// This many resumes are refused as `overloaded`.
    pub resumes_to_refuse: u32,
    pub submits: u32,
    pub resumes: u32,
    pub cancels: u32,
    pub pings: u32,
    pub connections: u32,
    /// Largest number of token events sent and not granted again, of any stream.
    pub most_outstanding: u32,
}

pub struct Gateway {
    pub address: SocketAddr,
    pub script: Arc<Mutex<Script>>,
    task: JoinHandle<()>,
    connections: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

impl Cluster {
    pub fn new(total: u32) -> Arc<Self> {
        Arc::new(Self {
            total,
            max_credit: 1024,
            ..Self::default()
        })
    }

    pub async fn gateway(self: &Arc<Self>) -> Gateway {
        self.gateway_at("127.0.0.1:0".parse().unwrap()).await
    }

    pub async fn gateway_at(self: &Arc<Self>, address: SocketAddr) -> Gateway {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let script = Arc::new(Mutex::new(Script::default()));
        let connections = Arc::new(Mutex::new(Vec::new()));
        let task = tokio::spawn(accept(
            listener,
            self.clone(),
            script.clone(),
            connections.clone(),
        ));
        Gateway {
            address,
            script,
            task,
            connections,
        }
    }

    pub fn is_cancelled(&self, request: RequestId) -> bool {
        self.record(request).unwrap().cancelled
    }

    /// Whether a connection reads the request now.
    pub fn is_read(&self, request: RequestId) -> bool {
        self.record(request).unwrap().readers > 0
    }

    /// Whether a connection reads any request now.
    pub fn is_read_at_all(&self) -> bool {
        let requests = self.requests.lock().unwrap();
        requests.values().any(|record| record.readers > 0)
    }

    /// The request as it is now: cancelled, if the grace for its readers is over.
    fn record(&self, request: RequestId) -> Option<Record> {
        self.change(request, |record| {
            let left = record.left.filter(|_| record.readers == 0);
            if let (Some(left), Some(grace)) = (left, self.resume_grace)
                && left.elapsed() >= grace
            {
                record.cancel();
            }
            record.clone()
        })
    }

    fn change<T>(&self, request: RequestId, change: impl FnOnce(&mut Record) -> T) -> Option<T> {
        self.requests.lock().unwrap().get_mut(&request).map(change)
    }
}

impl Gateway {
    pub fn fault(&self, position: u32, fault: Fault) {
        self.script.lock().unwrap().faults.push((position, fault));
    }

    /// The gateway's process is gone: nothing listens, every connection is closed.
    pub fn kill(&self) {
        self.task.abort();
        self.cut_connections();
    }

    /// Every connection there is now is closed.
    pub fn cut_connections(&self) {
        for connection in self.connections.lock().unwrap().drain(..) {
            connection.abort();
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The token that a seed has at a position.
pub fn token(stream: u32, seed: u64, position: u32) -> TokenEvent {
    let mixed = (seed ^ u64::from(position)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let bits = (mixed >> 40) as u32;
    TokenEvent {
        stream,
        position,
        id: (mixed >> 32) as u32,
        text: format!("t{position} "),
        logprob: Some(-f32::from_bits(0x3f00_0000 | bits)),
        top_logprobs: vec![TopLogprob {
            id: bits,
            logprob: -0.0,
        }],
    }
}

async fn accept(
    listener: TcpListener,
    cluster: Arc<Cluster>,
    script: Arc<Mutex<Script>>,
    connections: Arc<Mutex<Vec<JoinHandle<()>>>>,
) {
    while let Ok((socket, _)) = listener.accept().await {
        script.lock().unwrap().connections += 1;
        let connection = Connection::new(socket, cluster.clone(), script.clone());
        connections
            .lock()
            .unwrap()
            .push(tokio::spawn(connection.run()));
    }
}

/// The error that a stream ends with.
pub async fn error_of(stream: &mut Stream) -> Error {
    loop {
        match stream.next().await {
            Ok(Some(Event::Finished(finished))) => panic!("finished: {finished:?}"),
            Ok(event) => assert!(event.is_some(), "ended without an error"),
            Err(error) => return error,
        }
    }
}

/// Waits until a condition holds; a test that waits longer than this has failed.
pub async fn until(mut condition: impl FnMut() -> bool) {
    tokio::time::timeout(Duration::from_secs(10), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("condition within 10 s");
}

/// The version the gateways speak.
pub const VERSION: u32 = PROTOCOL_VERSION;
