//! One connection of a fake gateway: does what the protocol says, and what the script says.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use understudy_client::protocol::message::{
    ClientMessage, ClusterStatus, FinishReason, Limits, ServerMessage, Submit, Usage,
};
use understudy_client::protocol::{
    AccessTokens, ConnectionRules, CreditBalance, ErrorBody, ErrorCode, FrameDecoder, RequestId,
    Step, decode_client, encode, stream_of,
};

use super::{Cluster, Fault, Record, Script, token};

struct Stream {
    request: RequestId,
    seed: u64,
    position: u32,
    end: u32,
    cancelled: bool,
    paused: bool,
    credit: CreditBalance,
    /// Token events sent and not granted again; below 0 where more was granted.
    outstanding: i64,
}

pub(super) struct Connection {
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

/// Its requests go on without a reader.
impl Drop for Connection {
    fn drop(&mut self) {
        for stream in std::mem::take(&mut self.streams).into_values() {
            self.no_longer_read(&stream);
        }
    }
}

impl Connection {
    pub(super) fn new(
        socket: TcpStream,
        cluster: Arc<Cluster>,
        script: Arc<Mutex<Script>>,
    ) -> Self {
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

    pub(super) async fn run(mut self) {
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
            Step::Deliver => return self.act(message),
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

    fn act(&mut self, message: ClientMessage) -> Result<(), Over> {
        match message {
            ClientMessage::Submit(submit) => return self.submit(&submit),
            ClientMessage::Resume {
                stream,
                request,
                next_position,
                credit,
            } => {
                let (repeat, forgets, refuses) = {
                    let mut script = self.script.lock().unwrap();
                    script.resumes += 1;
                    let refuses = script.resumes_to_refuse > 0;
                    script.resumes_to_refuse = script.resumes_to_refuse.saturating_sub(1);
                    (script.repeat, script.forgets, refuses)
                };
                match self.cluster.record(request).filter(|_| !forgets) {
                    Some(_) if refuses => self.fail(stream, ErrorCode::Overloaded),
                    Some(record) => {
                        let from = next_position.saturating_sub(repeat);
                        self.begin(stream, request, &record, from, credit);
                    }
                    None => self.fail(stream, ErrorCode::UnknownRequest),
                }
            }
            ClientMessage::Cancel { stream } => {
                self.script.lock().unwrap().cancels += 1;
                let request = self.streams[&stream].request;
                let record = self.cluster.change(request, |record| {
                    record.cancel();
                    record.clone()
                });
                let stream = self.streams.get_mut(&stream).unwrap();
                let record = record.unwrap();
                (stream.end, stream.cancelled) = (record.end, record.cancelled);
            }
            ClientMessage::Credit { stream, tokens } => {
                let stream = self.streams.get_mut(&stream).unwrap();
                stream.credit.grant(tokens);
                stream.outstanding -= i64::from(tokens);
            }
            ClientMessage::Ping { nonce } => {
                self.script.lock().unwrap().pings += 1;
                if !self.hung {
                    self.send(&ServerMessage::Pong { nonce });
                }
            }
            ClientMessage::Status {} if self.hung => {}
            ClientMessage::Status {} => self.send(&ServerMessage::Status(ClusterStatus {
                cluster: "fake".to_owned(),
                ..ClusterStatus::default()
            })),
            ClientMessage::Hello { .. } => unreachable!("the rules take hello"),
        }
        Ok(())
    }

    fn submit(&mut self, submit: &Submit) -> Result<(), Over> {
        let mut script = self.script.lock().unwrap();
        script.submits += 1;
        if script.garbles {
            // A frame of one byte that is no map.
            self.out.extend_from_slice(&[0, 0, 0, 1, 0xc0]);
            return Ok(());
        }
        if script.submits_to_lose > 0 {
            script.submits_to_lose -= 1;
            return Err(Over);
        }
        drop(script);
        let request = RequestId(fastrand::u128(..));
        let record = Record {
            seed: submit.sampling.seed.unwrap_or_else(|| fastrand::u64(..)),
            end: self.cluster.total,
            cancelled: false,
            sent: 0,
            readers: 0,
            left: None,
        };
        let mut requests = self.cluster.requests.lock().unwrap();
        requests.insert(request, record.clone());
        drop(requests);
        self.begin(submit.stream, request, &record, 0, submit.credit);
        Ok(())
    }

    fn begin(
        &mut self,
        number: u32,
        request: RequestId,
        record: &Record,
        position: u32,
        credit: u32,
    ) {
        self.cluster.change(request, |record| record.readers += 1);
        let (changes_seed, accepts_twice) = {
            let script = self.script.lock().unwrap();
            (script.changes_seed, script.accepts_twice)
        };
        let seed = record.seed ^ u64::from(changes_seed && record.left.is_some());
        let stream = Stream {
            request,
            seed,
            position,
            end: record.end,
            cancelled: record.cancelled,
            paused: false,
            credit: CreditBalance::new(credit, self.cluster.max_credit),
            outstanding: 0,
        };
        self.streams.insert(number, stream);
        for _ in 0..=u32::from(accepts_twice) {
            self.send(&ServerMessage::Accepted {
                stream: number,
                request,
                prompt_tokens: 3,
                seed,
            });
        }
    }

    fn no_longer_read(&self, stream: &Stream) {
        self.cluster.change(stream.request, |record| {
            record.sent = record.sent.max(stream.position);
            record.readers -= 1;
            record.left = Some(Instant::now());
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
        if self.hung || self.script.lock().unwrap().holds {
            return Ok(false);
        }
        let Some(stream) = self.streams.get_mut(&number) else {
            return Ok(false);
        };
        if stream.paused && !stream.cancelled {
            return Ok(false);
        }
        let position = stream.position;
        if let Some(fault) = take_fault(&self.script, position) {
            return self.strike(number, position, fault);
        }
        if position == stream.end {
            let reason = match stream.cancelled {
                true => FinishReason::Cancelled,
                false => FinishReason::Length,
            };
            self.finish(number, reason);
            return Ok(false);
        }
        if !stream.credit.spend() {
            return Ok(false);
        }
        stream.position += 1;
        stream.outstanding += 1;
        let outstanding = stream.outstanding;
        let event = token(number, stream.seed, position);
        let request = stream.request;
        self.cluster.change(request, |record| {
            record.sent = record.sent.max(position + 1);
        });
        let mut script = self.script.lock().unwrap();
        let outstanding = u32::try_from(outstanding).unwrap_or(0);
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
            Fault::Pause => {
                self.streams.get_mut(&number).unwrap().paused = true;
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
        let ended = self.streams.remove(&stream).unwrap();
        self.no_longer_read(&ended);
        let position = ended.position;
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
        let ended = self.streams.remove(&stream);
        if let Some(ended) = &ended {
            self.no_longer_read(ended);
        }
        let request = ended.map(|ended| ended.request);
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
