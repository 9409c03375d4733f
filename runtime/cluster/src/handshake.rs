//! The handshake on a fresh connection, before `ractor_cluster` sees a byte of it.
//!
//! ```text
//! dialer                                   acceptor
//!   magic, Hello{names, nonce}      ------>           (8 bytes, then frames: length u16 | kind u8 | body)
//!                                   <------  magic, Hello{names, nonce}  or  Refuse{reason}
//!   Proof{HMAC("dialer")}           ------>
//!                                   <------  Accept{HMAC("acceptor")}    or  Refuse{reason}
//! ```
//! Each proof is HMAC-SHA256, under a key derived from the cookie, over its label and the SHA-256 of both hellos.
//! Both nonces are fresh and both names are inside, so a proof is worth nothing on another connection, for another
//! node or in the other direction. The first bytes of a third HMAC over the same name the session; it is
//! never sent here. Proofs are compared in constant time.
//!
//! Invariant: nothing a stranger sends allocates more than [`MAX_FRAME_BYTES`], and the caller puts a deadline on
//! the whole of it.

use std::fmt;
use std::io;

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use understudy_config::ConfigMismatch;

use crate::identity::{NodeName, PeerId};
use crate::settings::ClusterSettings;

const MAGIC: [u8; 8] = *b"UNDRSTDY";
/// Version of everything that nodes say to each other.
pub(crate) const PROTOCOL_VERSION: u16 = 2;
/// Longest handshake frame.
const MAX_FRAME_BYTES: usize = 512;
/// Longest cluster name, in bytes.
pub(crate) const MAX_CLUSTER_BYTES: usize = 128;

const HELLO: u8 = 1;
const PROOF: u8 = 2;
const ACCEPT: u8 = 3;
const REFUSE: u8 = 4;

/// Why a node does not want another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Refusal {
    Version = 1,
    Cluster = 2,
    UnknownNode = 3,
    Direction = 4,
    Cookie = 5,
    Config = 6,
    StaleIncarnation = 7,
    Leaving = 8,
}

impl Refusal {
    /// Every reason.
    pub(crate) const ALL: [Self; 8] = [
        Self::Version,
        Self::Cluster,
        Self::UnknownNode,
        Self::Direction,
        Self::Cookie,
        Self::Config,
        Self::StaleIncarnation,
        Self::Leaving,
    ];

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|refusal| *refusal as u8 == code)
    }

    /// A word for metrics and logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Version => "version",
            Self::Cluster => "cluster",
            Self::UnknownNode => "unknown_node",
            Self::Direction => "direction",
            Self::Cookie => "cookie",
            Self::Config => "config",
            Self::StaleIncarnation => "stale_incarnation",
            Self::Leaving => "leaving",
        }
    }

    /// What a person should look at.
    pub(crate) fn advice(self) -> &'static str {
        match self {
            Self::Version => "the nodes run incompatible versions: upgrade the older one",
            Self::Cluster => {
                "the nodes belong to different clusters: compare `name` in their configurations"
            }
            Self::UnknownNode => {
                "the node is not in the other's configuration: give every node the same file"
            }
            Self::Direction => {
                "the nodes do not agree who dials: do both run with the right node name?"
            }
            Self::Cookie => "the cookies differ: copy the same cookie file to every node",
            Self::Config => "the configurations differ: give every node the same file",
            Self::StaleIncarnation => {
                "a later run of the same node is in the cluster: stop the older process"
            }
            Self::Leaving => "the other node is shutting down",
        }
    }
}

/// How a handshake ended without a session.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the other side does not speak this protocol")]
    Garbage,
    #[error("the other side refused: {}", .0.advice())]
    Refused(Refusal),
    #[error("refused: {}", .0.advice())]
    Refuse(Refusal),
    #[error(
        "{expected} was expected at this address, {got} answered: check the addresses in the configuration"
    )]
    WrongNode { expected: NodeName, got: NodeName },
}

/// What both sides know after a handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Agreed {
    pub(crate) peer: PeerId,
    /// Names the session; the same on both sides, different for every connection.
    pub(crate) session: u64,
    /// The configurations differ, and the settings allow that.
    pub(crate) config_differs: bool,
}

/// What this node says of itself, and whom it lets in. Holds a key, so it does not show itself.
pub(crate) struct Local {
    cluster: String,
    me: PeerId,
    checksum: u64,
    mismatch: ConfigMismatch,
    peers: Vec<NodeName>,
    key: [u8; 32],
}

/// Whether `me` is the one that dials `peer`: of a pair, the one with the smaller name.
pub(crate) fn dials(me: &NodeName, peer: &NodeName) -> bool {
    me < peer
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local")
            .field("me", &self.me)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Proven {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proven")
            .field("peer", &self.agreed.peer)
            .finish_non_exhaustive()
    }
}

impl Local {
    pub(crate) fn new(settings: &ClusterSettings) -> Self {
        Self {
            cluster: settings.cluster.clone(),
            me: PeerId::new(settings.node.clone(), settings.incarnation),
            checksum: settings.config_checksum,
            mismatch: settings.config_mismatch,
            peers: settings.others().map(|peer| peer.node.clone()).collect(),
            key: settings.cookie.derive("understudy cluster handshake 1"),
        }
    }

    /// The dialing side. `expected` is the node that is configured at the address.
    pub(crate) async fn dial<S>(
        &self,
        stream: &mut S,
        expected: &NodeName,
    ) -> Result<Agreed, HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mine = self.hello();
        stream.write_all(&MAGIC).await?;
        write_frame(stream, HELLO, &mine).await?;
        read_magic(stream).await?;
        let theirs = read_expected(stream, HELLO).await?;
        let hello = Hello::decode(&theirs)?;
        if hello.node != *expected {
            return Err(HandshakeError::WrongNode {
                expected: expected.clone(),
                got: hello.node,
            });
        }
        self.judge(&hello).map_err(HandshakeError::Refuse)?;
        let transcript = Transcript::new(&self.key, &mine, &theirs);
        write_frame(stream, PROOF, &transcript.proof("dialer")).await?;
        let proof = read_expected(stream, ACCEPT).await?;
        if !transcript.is_proof("acceptor", &proof) {
            return Err(HandshakeError::Refuse(Refusal::Cookie));
        }
        Ok(self.agreed(hello, &transcript))
    }

    /// The accepting side, up to the dialer's proof. The caller then either [`confirm`]s or [`refuse`]s.
    ///
    /// [`confirm`]: Proven::confirm
    /// [`refuse`]: Proven::refuse
    pub(crate) async fn accept<S>(&self, stream: &mut S) -> Result<Proven, HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        read_magic(stream).await?;
        let theirs = read_expected(stream, HELLO).await?;
        let hello = Hello::decode(&theirs)?;
        stream.write_all(&MAGIC).await?;
        let known = self
            .judge(&hello)
            .and_then(|()| match dials(&hello.node, &self.me.node) {
                true => Ok(()),
                false => Err(Refusal::Direction),
            });
        if let Err(refusal) = known {
            return send_refusal(stream, refusal).await;
        }
        let mine = self.hello();
        write_frame(stream, HELLO, &mine).await?;
        let transcript = Transcript::new(&self.key, &theirs, &mine);
        let proof = read_expected(stream, PROOF).await?;
        if !transcript.is_proof("dialer", &proof) {
            return send_refusal(stream, Refusal::Cookie).await;
        }
        Ok(Proven {
            agreed: self.agreed(hello, &transcript),
            proof: transcript.proof("acceptor"),
        })
    }

    fn judge(&self, hello: &Hello) -> Result<(), Refusal> {
        if hello.version != PROTOCOL_VERSION {
            return Err(Refusal::Version);
        }
        if hello.cluster != self.cluster {
            return Err(Refusal::Cluster);
        }
        if !self.peers.contains(&hello.node) {
            return Err(Refusal::UnknownNode);
        }
        if hello.checksum != self.checksum && self.mismatch == ConfigMismatch::Refuse {
            return Err(Refusal::Config);
        }
        Ok(())
    }

    fn agreed(&self, hello: Hello, transcript: &Transcript) -> Agreed {
        Agreed {
            config_differs: hello.checksum != self.checksum,
            peer: PeerId::new(hello.node, hello.incarnation),
            session: transcript.session(),
        }
    }

    fn hello(&self) -> Vec<u8> {
        let mut nonce = [0u8; 32];
        getrandom::fill(&mut nonce).expect("the system gives random bytes");
        Hello {
            version: PROTOCOL_VERSION,
            cluster: self.cluster.clone(),
            node: self.me.node.clone(),
            incarnation: self.me.incarnation,
            checksum: self.checksum,
            nonce,
        }
        .encode()
    }
}

/// A dialer that has proven to know the cookie, and waits for the answer.
pub(crate) struct Proven {
    pub(crate) agreed: Agreed,
    proof: [u8; 32],
}

impl Proven {
    /// Lets the dialer in.
    pub(crate) async fn confirm<S: AsyncWrite + Unpin>(&self, stream: &mut S) -> io::Result<()> {
        write_frame(stream, ACCEPT, &self.proof).await
    }

    /// Sends it away.
    pub(crate) async fn refuse<S: AsyncWrite + Unpin>(
        &self,
        stream: &mut S,
        refusal: Refusal,
    ) -> HandshakeError {
        match send_refusal::<_, ()>(stream, refusal).await {
            Ok(()) => HandshakeError::Refuse(refusal),
            Err(error) => error,
        }
    }
}

async fn send_refusal<S: AsyncWrite + Unpin, T>(
    stream: &mut S,
    refusal: Refusal,
) -> Result<T, HandshakeError> {
    // The dialer may be gone already; the refusal is what matters here.
    let _ = write_frame(stream, REFUSE, &[refusal as u8]).await;
    let _ = stream.shutdown().await;
    Err(HandshakeError::Refuse(refusal))
}

#[derive(Debug, PartialEq, Eq)]
struct Hello {
    version: u16,
    cluster: String,
    node: NodeName,
    incarnation: u64,
    checksum: u64,
    nonce: [u8; 32],
}

impl Hello {
    /// `version u16 | incarnation u64 | checksum u64 | nonce 32 | cluster len u8, bytes | node len u8, bytes`;
    /// later versions may append.
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(MAX_FRAME_BYTES);
        bytes.extend(self.version.to_be_bytes());
        bytes.extend(self.incarnation.to_be_bytes());
        bytes.extend(self.checksum.to_be_bytes());
        bytes.extend(self.nonce);
        for text in [self.cluster.as_str(), self.node.as_str()] {
            bytes.push(text.len() as u8);
            bytes.extend(text.as_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, HandshakeError> {
        Self::parse(bytes).ok_or(HandshakeError::Garbage)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.split_first_chunk::<2>()?;
        let (incarnation, rest) = rest.split_first_chunk::<8>()?;
        let (checksum, rest) = rest.split_first_chunk::<8>()?;
        let (nonce, rest) = rest.split_first_chunk::<32>()?;
        let (cluster, rest) = text(rest)?;
        let (node, _) = text(rest)?;
        Some(Self {
            version: u16::from_be_bytes(*version),
            cluster: cluster.to_owned(),
            node: NodeName::new(node).ok()?,
            incarnation: u64::from_be_bytes(*incarnation),
            checksum: u64::from_be_bytes(*checksum),
            nonce: *nonce,
        })
    }
}

fn text(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (&length, rest) = bytes.split_first()?;
    let (text, rest) = rest.split_at_checked(usize::from(length))?;
    Some((std::str::from_utf8(text).ok()?, rest))
}

/// What was said so far, under the shared key.
struct Transcript {
    key: [u8; 32],
    digest: [u8; 32],
}

impl Transcript {
    fn new(key: &[u8; 32], dialer: &[u8], acceptor: &[u8]) -> Self {
        let mut hash = Sha256::new();
        for hello in [dialer, acceptor] {
            hash.update((hello.len() as u64).to_be_bytes());
            hash.update(hello);
        }
        Self {
            key: *key,
            digest: hash.finalize().into(),
        }
    }

    fn mac(&self, label: &str) -> Hmac<Sha256> {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.key).expect("HMAC takes keys of any length");
        mac.update(label.as_bytes());
        mac.update(&self.digest);
        mac
    }

    fn proof(&self, label: &str) -> [u8; 32] {
        self.mac(label).finalize().into_bytes().into()
    }

    fn is_proof(&self, label: &str, proof: &[u8]) -> bool {
        self.mac(label).verify_slice(proof).is_ok()
    }

    fn session(&self) -> u64 {
        let name = self.proof("session");
        u64::from_be_bytes(*name.first_chunk().expect("32 bytes"))
    }
}

async fn write_frame<S: AsyncWrite + Unpin>(
    stream: &mut S,
    kind: u8,
    body: &[u8],
) -> io::Result<()> {
    debug_assert!(body.len() < MAX_FRAME_BYTES);
    let mut frame = Vec::with_capacity(body.len() + 3);
    frame.extend(((body.len() + 1) as u16).to_be_bytes());
    frame.push(kind);
    frame.extend_from_slice(body);
    stream.write_all(&frame).await?;
    stream.flush().await
}

async fn read_magic<S: AsyncRead + Unpin>(stream: &mut S) -> Result<(), HandshakeError> {
    let mut magic = [0u8; 8];
    stream.read_exact(&mut magic).await?;
    if magic == MAGIC {
        Ok(())
    } else {
        Err(HandshakeError::Garbage)
    }
}

/// The body of the next frame, which must be of this kind, or a refusal.
async fn read_expected<S: AsyncRead + Unpin>(
    stream: &mut S,
    expected: u8,
) -> Result<Vec<u8>, HandshakeError> {
    let length = usize::from(stream.read_u16().await?);
    if length == 0 || length > MAX_FRAME_BYTES {
        return Err(HandshakeError::Garbage);
    }
    let kind = stream.read_u8().await?;
    let mut body = vec![0u8; length - 1];
    stream.read_exact(&mut body).await?;
    match (kind, body.first().copied().and_then(Refusal::from_code)) {
        (kind, _) if kind == expected => Ok(body),
        (REFUSE, Some(refusal)) => Err(HandshakeError::Refused(refusal)),
        _ => Err(HandshakeError::Garbage),
    }
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
