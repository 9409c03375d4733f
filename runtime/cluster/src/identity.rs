//! Who a node is: its configured name, and the incarnation of the process that bears the name now.
//!
//! Invariant: a [`PeerId`] names one run of one process. A restarted node has a new incarnation, so
//! nothing that was addressed to the old process can reach the new one by mistake.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Longest node name, in bytes. Names travel in the handshake, in log lines and in metric labels.
pub const MAX_NAME_BYTES: usize = 64;

/// The configured name of a node: 1 to [`MAX_NAME_BYTES`] ASCII letters, digits, `.`, `_` or `-`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(Arc<str>);

/// Why a string is not a node name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not a node name: use 1 to {MAX_NAME_BYTES} letters, digits, '.', '_' or '-'")]
pub struct NameError {
    name: String,
}

impl NodeName {
    /// Checks and takes over a name.
    pub fn new(name: impl AsRef<str>) -> Result<Self, NameError> {
        let name = name.as_ref();
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.chars().all(allowed) {
            let name = name.chars().take(MAX_NAME_BYTES + 1).collect();
            return Err(NameError { name });
        }
        Ok(Self(name.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl AsRef<str> for NodeName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = NameError;
    fn from_str(name: &str) -> Result<Self, NameError> {
        Self::new(name)
    }
}

impl TryFrom<String> for NodeName {
    type Error = NameError;
    fn try_from(name: String) -> Result<Self, NameError> {
        Self::new(name)
    }
}

impl TryFrom<&str> for NodeName {
    type Error = NameError;
    fn try_from(name: &str) -> Result<Self, NameError> {
        Self::new(name)
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> Self {
        name.0.as_ref().to_owned()
    }
}

/// One run of one node: `name-<incarnation in hexadecimal>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PeerId {
    /// The configured name.
    pub node: NodeName,
    /// Which run of it. A later run has a larger number; see [`new_incarnation`].
    pub incarnation: u64,
}

impl PeerId {
    /// The run `incarnation` of `node`.
    pub fn new(node: NodeName, incarnation: u64) -> Self {
        Self { node, incarnation }
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:x}", self.node, self.incarnation)
    }
}

/// Why a string is not a [`PeerId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a peer id: expected NAME-INCARNATION, the incarnation in hexadecimal")]
pub struct PeerIdError(String);

impl FromStr for PeerId {
    type Err = PeerIdError;
    fn from_str(text: &str) -> Result<Self, PeerIdError> {
        let wrong = || PeerIdError(text.chars().take(MAX_NAME_BYTES + 17).collect());
        let (node, incarnation) = text.rsplit_once('-').ok_or_else(wrong)?;
        let node = NodeName::new(node).map_err(|_| wrong())?;
        let incarnation = u64::from_str_radix(incarnation, 16).map_err(|_| wrong())?;
        Ok(Self { node, incarnation })
    }
}

/// An incarnation for a process that starts now: microseconds since the Unix epoch.
///
/// Only the order matters, and only between runs of one node. A clock that was set back costs a
/// restarted node at most the hold time of a stale incarnation (see `docs/cluster.md`).
pub fn new_incarnation() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Where a configured node listens for its peers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PeerAddress {
    /// The configured name.
    pub node: NodeName,
    /// Host name or IP address, resolved at every dial.
    pub host: String,
    /// TCP port of the cluster listener.
    pub port: u16,
}

impl PeerAddress {
    /// The address of `node` at a socket address.
    pub fn at(node: NodeName, address: SocketAddr) -> Self {
        Self {
            node,
            host: address.ip().to_string(),
            port: address.port(),
        }
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}:{}", self.node, self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in [
            "a",
            "gateway-1",
            "host_2.rack.example",
            &"x".repeat(MAX_NAME_BYTES),
        ] {
            assert_eq!(NodeName::new(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "a b",
            "a/b",
            "é",
            "a\n",
            &"x".repeat(MAX_NAME_BYTES + 1),
        ] {
            assert!(NodeName::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn peer_id_reads_back_what_it_prints() {
        let id = PeerId::new(NodeName::new("host-2").unwrap(), 0x5_f00d);
        assert_eq!(id.to_string(), "host-2-5f00d");
        assert_eq!("host-2-5f00d".parse::<PeerId>().unwrap(), id);
        for bad in ["host", "-1", "host-xyz", "host-", "a b-1"] {
            assert!(bad.parse::<PeerId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn peer_id_survives_serde() {
        let id = PeerId::new(NodeName::new("a").unwrap(), u64::MAX);
        let bytes = rmp_serde::to_vec(&id).unwrap();
        assert_eq!(rmp_serde::from_slice::<PeerId>(&bytes).unwrap(), id);
        let bad = rmp_serde::to_vec(&("a b", 1u64)).unwrap();
        assert!(rmp_serde::from_slice::<PeerId>(&bad).is_err());
    }
}
