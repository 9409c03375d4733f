//! Gateways that speak the protocol and make up their tokens: position and seed decide everything, so that a stream
//! can be checked whatever happened to it. Faults are scripted, each for one position and once.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use understudy_client::protocol::message::{
    ClientMessage, ClusterStatus, FinishReason, Limits, ServerMessage, TokenEvent, TopLogprob,
    Usage,
};
use understudy_client::protocol::{
    AccessTokens, ConnectionRules, CreditBalance, ErrorBody, ErrorCode, FrameDecoder,
    PROTOCOL_VERSION, RequestId, Step, decode_client, encode, stream_of,
};

/// What happens to the stream that is about to send a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The connection closes.
    Cut,
    /// The connection stays open and brings nothing more.
    Hang,
    /// The stream ends with this code.
    Fail(ErrorCode),
    /// The connection ends with this code.
    Refuse(ErrorCode),
    /// The stream goes on this many positions further.
    Skip(u32),
    /// The position is sent without regard to credit, this often.
    Flood(u32),
}

/// What the gateways of one cluster share.
#[derive(Default)]
pub struct Cluster {
    requests: Mutex<HashMap<RequestId, Record>>,
    /// Tokens of every request.
    pub total: u32,
    pub max_credit: u32,
    pub token: Option<String>,
}

#[derive(Clone)]
struct Record {
    seed: u64,
    cancelled: bool,
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
        self.requests.lock().unwrap()[&request].cancelled
    }
}

impl Gateway {
    pub fn fault(&self, position: u32, fault: Fault) {
        self.script.lock().unwrap().faults.push((position, fault));
    }

    /// The gateway's process is gone: nothing listens, every connection is closed.
    pub fn kill(&self) {
        self.task.abort();
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

struct Stream {
    request: RequestId,
    seed: u64,
    position: u32,
    credit: CreditBalance,
    outstanding: u32,
}

struct Connection {
    socket: TcpStream,
    cluster: Arc<Cluster>,
    script: Arc<Mutex<Script>>,
    rules: ConnectionRules,
    streams: HashMap<u32, Stream>,
    out: BytesMut,
    written: usize,
    hung: bool,
}

/// The connection is over.
struct Over;

impl Connection {
    fn new(socket: TcpStream, cluster: Arc<Cluster>, script: Arc<Mutex<Script>>) -> Self {
        let tokens = AccessTokens::new(cluster.token.clone());
        Self {
            socket,
            rules: ConnectionRules::new(tokens, &limits(&cluster)),
            cluster,
            script,
            streams: HashMap::new(),
            out: BytesMut::new(),
            written: 0,
            hung: false,
        }
    }

    async fn run(mut self) {
        self.socket.set_nodelay(true).unwrap();
        let mut decoder = FrameDecoder::new(limits(&self.cluster).max_frame_bytes as usize);
        loop {
            match decoder.next_frame() {
                Ok(Some(payload)) => {
                    let going_on = self.receive(&payload).and_then(|()| self.pump());
                    if self.flush().await.is_err() || going_on.is_err() {
                        return;
                    }
                    continue;
                }
                Ok(None) => {}
                Err(error) => {
                    self.send(&refusal(error.into()));
                    let _ = self.flush().await;
                    return;
                }
            }
            match self.socket.read_buf(decoder.buffer_mut()).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    fn receive(&mut self, payload: &[u8]) -> Result<(), Over> {
        let message = match decode_client(payload) {
            Ok(message) => message,
            Err(error) if error.code == ErrorCode::InvalidRequest => {
                let stream = stream_of(payload);
                self.send(&ServerMessage::Error {
                    stream,
                    request: None,
                    error,
                });
                return Ok(());
            }
            Err(error) => {
                self.send(&refusal(error));
                return Err(Over);
            }
        };
        match self.rules.receive(&message) {
            Step::Welcome { version } => self.send(&ServerMessage::Welcome {
                version,
                node: "fake".to_owned(),
                server: "fake/0".to_owned(),
                limits: limits(&self.cluster),
            }),
            Step::Deliver => self.act(message),
            Step::Ignore => {}
            Step::Refuse { stream, error } => self.send(&ServerMessage::Error {
                stream: Some(stream),
                request: None,
                error,
            }),
            Step::Close(error) => {
                self.send(&refusal(error));
                return Err(Over);
            }
        }
        Ok(())
    }

    fn act(&mut self, message: ClientMessage) {
        match message {
            ClientMessage::Submit(submit) => {
                let request = RequestId(fastrand::u128(..));
                let seed = submit.sampling.seed.unwrap_or_else(|| fastrand::u64(..));
                let record = Record {
                    seed,
                    cancelled: false,
                };
                self.cluster
                    .requests
                    .lock()
                    .unwrap()
                    .insert(request, record);
                self.script.lock().unwrap().submits += 1;
                self.begin(submit.stream, request, seed, 0, submit.credit);
            }
            ClientMessage::Resume {
                stream,
                request,
                next_position,
                credit,
            } => {
                let (repeat, forgets, changes_seed) = {
                    let mut script = self.script.lock().unwrap();
                    script.resumes += 1;
                    (script.repeat, script.forgets, script.changes_seed)
                };
                let record = self.cluster.requests.lock().unwrap().get(&request).cloned();
                match record.filter(|_| !forgets) {
                    Some(Record { seed, .. }) => {
                        let seed = seed ^ u64::from(changes_seed);
                        let from = next_position.saturating_sub(repeat);
                        self.begin(stream, request, seed, from, credit);
                    }
                    None => self.fail(stream, ErrorCode::UnknownRequest),
                }
            }
            ClientMessage::Cancel { stream } => {
                self.script.lock().unwrap().cancels += 1;
                let request = self.streams[&stream].request;
                self.cluster
                    .requests
                    .lock()
                    .unwrap()
                    .get_mut(&request)
                    .unwrap()
                    .cancelled = true;
                self.finish(stream, FinishReason::Cancelled);
            }
            ClientMessage::Credit { stream, tokens } => {
                let stream = self.streams.get_mut(&stream).unwrap();
                stream.credit.grant(tokens);
                stream.outstanding -= tokens;
            }
            ClientMessage::Ping { nonce } => {
                self.script.lock().unwrap().pings += 1;
                if !self.hung {
                    self.send(&ServerMessage::Pong { nonce });
                }
            }
            ClientMessage::Status {} => self.send(&ServerMessage::Status(ClusterStatus {
                cluster: "fake".to_owned(),
                ..ClusterStatus::default()
            })),
            ClientMessage::Hello { .. } => unreachable!("the rules take hello"),
        }
    }

    fn begin(&mut self, number: u32, request: RequestId, seed: u64, position: u32, credit: u32) {
        let credit = CreditBalance::new(credit, self.cluster.max_credit);
        let stream = Stream {
            request,
            seed,
            position,
            credit,
            outstanding: 0,
        };
        self.streams.insert(number, stream);
        self.send(&ServerMessage::Accepted {
            stream: number,
            request,
            prompt_tokens: 3,
            seed,
        });
    }

    /// Sends whatever credit allows.
    fn pump(&mut self) -> Result<(), Over> {
        let mut numbers: Vec<u32> = self.streams.keys().copied().collect();
        numbers.sort_unstable();
        for number in numbers {
            while self.step(number)? {}
        }
        Ok(())
    }

    fn step(&mut self, number: u32) -> Result<bool, Over> {
        if self.hung {
            return Ok(false);
        }
        let Some(stream) = self.streams.get_mut(&number) else {
            return Ok(false);
        };
        let position = stream.position;
        if let Some(fault) = take_fault(&self.script, position) {
            return self.strike(number, position, fault);
        }
        if position == self.cluster.total {
            self.finish(number, FinishReason::Length);
            return Ok(false);
        }
        if !stream.credit.spend() {
            return Ok(false);
        }
        stream.position += 1;
        stream.outstanding += 1;
        let outstanding = stream.outstanding;
        let event = token(number, stream.seed, position);
        let mut script = self.script.lock().unwrap();
        script.most_outstanding = script.most_outstanding.max(outstanding);
        drop(script);
        self.send(&ServerMessage::Token(event));
        Ok(true)
    }

    fn strike(&mut self, number: u32, position: u32, fault: Fault) -> Result<bool, Over> {
        match fault {
            Fault::Cut => Err(Over),
            Fault::Hang => {
                self.hung = true;
                Ok(false)
            }
            Fault::Fail(code) => {
                self.fail(number, code);
                Ok(false)
            }
            Fault::Refuse(code) => {
                self.send(&refusal(ErrorBody::new(code, "scripted")));
                Err(Over)
            }
            Fault::Skip(positions) => {
                self.streams.get_mut(&number).unwrap().position += positions;
                Ok(true)
            }
            Fault::Flood(times) => {
                let seed = self.streams[&number].seed;
                for _ in 0..times {
                    self.send(&ServerMessage::Token(token(number, seed, position)));
                }
                Ok(true)
            }
        }
    }

    fn finish(&mut self, stream: u32, finish_reason: FinishReason) {
        let position = self.streams.remove(&stream).unwrap().position;
        self.rules.ended(stream);
        self.send(&ServerMessage::Finished {
            stream,
            finish_reason,
            usage: Usage {
                prompt_tokens: 3,
                completion_tokens: position,
            },
            text: "end".to_owned(),
        });
    }

    fn fail(&mut self, stream: u32, code: ErrorCode) {
        let request = self.streams.remove(&stream).map(|stream| stream.request);
        self.rules.ended(stream);
        self.send(&ServerMessage::Error {
            stream: Some(stream),
            request,
            error: ErrorBody::new(code, "scripted"),
        });
    }

    fn send(&mut self, message: &ServerMessage) {
        encode(message, &mut self.out).unwrap();
    }

    async fn flush(&mut self) -> Result<(), Over> {
        let room = {
            let mut script = self.script.lock().unwrap();
            let room = script
                .cut_after_bytes
                .map(|limit| limit.saturating_sub(self.written));
            if room.is_some_and(|room| room <= self.out.len()) {
                script.cut_after_bytes = None;
                room
            } else {
                None
            }
        };
        let cut = room.is_some();
        let bytes = self.out.split_to(room.unwrap_or(self.out.len()));
        self.written += bytes.len();
        self.socket.write_all(&bytes).await.map_err(|_| Over)?;
        if cut { Err(Over) } else { Ok(()) }
    }
}

fn take_fault(script: &Mutex<Script>, position: u32) -> Option<Fault> {
    let mut script = script.lock().unwrap();
    let index = script.faults.iter().position(|&(at, _)| at == position)?;
    Some(script.faults.remove(index).1)
}

fn limits(cluster: &Cluster) -> Limits {
    Limits {
        max_frame_bytes: 4096,
        max_streams: 64,
        max_credit: cluster.max_credit,
    }
}

fn refusal(error: ErrorBody) -> ServerMessage {
    ServerMessage::Error {
        stream: None,
        request: None,
        error,
    }
}

/// The version the gateways speak.
pub const VERSION: u32 = PROTOCOL_VERSION;
