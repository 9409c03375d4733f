//! What the cache holds of a model.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::ModelId;

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
pub(super) const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";

/// A directory with a model's files of one commit.
#[derive(Debug)]
pub(super) struct Snapshot(pub PathBuf);

/// The cache's directory of a model.
pub(super) fn directory(cache: &Path, id: &ModelId) -> PathBuf {
    cache.join(format!("models--{}", id.name.replace('/', "--")))
}

impl Snapshot {
    /// The one of the commit that the revision stood at when it was last fetched, or of the commit that it is.
    pub fn cached(cache: &Path, id: &ModelId) -> Option<Self> {
        let directory = directory(cache, id);
        let commit = std::fs::read_to_string(directory.join("refs").join(&id.revision));
        let commit = commit.as_deref().map_or(id.revision.as_str(), str::trim);
        let snapshot = directory.join("snapshots").join(commit);
        snapshot.is_dir().then_some(Self(snapshot))
    }

    /// The first file that is missing without which nothing can be computed.
    pub fn missing(&self) -> Option<String> {
        let lacks = |file: &str| !self.0.join(file).exists();
        if lacks(CONFIG) {
            return Some(CONFIG.to_owned());
        }
        if !lacks(SINGLE) {
            return None;
        }
        match std::fs::read(self.0.join(INDEX)) {
            Err(_) => Some(SINGLE.to_owned()),
            Ok(text) => match shards(&text) {
                Err(_) => Some(INDEX.to_owned()),
                Ok(shards) => shards.into_iter().find(|shard| lacks(shard)),
            },
        }
    }

    /// A snapshot without one may be one that another program fetched in part.
    pub fn has_tokenizer(&self) -> bool {
        self.0.join(TOKENIZER).exists()
    }
}

/// The names of the files that an index lists; plain names only.
pub(super) fn shards(index: &[u8]) -> Result<BTreeSet<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|error| error.to_string())?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    let odd =
        |shard: &&String| shard.is_empty() || shard.starts_with('.') || shard.contains(['/', '\\']);
    match shards.iter().find(odd) {
        Some(shard) => Err(format!("the shard name {shard:?} is no plain file name")),
        None => Ok(shards),
    }
}
