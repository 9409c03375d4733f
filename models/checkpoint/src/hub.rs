//! Models by the name that they have on the Hugging Face hub, `org/name` or `org/name@revision`: found in the cache, or fetched into it.
//!
//! ```text
//! $HF_HOME/hub/models--org--name/refs/main             the commit that a branch stood at
//!                                snapshots/<commit>/…  its files (links to blobs/)
//! ```
//!
//! The cache is the one of Python's `huggingface_hub`. Invariant: `refs` points to a snapshot only after every file of it is there, and all
//! files are of one commit, so that an interrupted fetch is never taken for a model.

mod cache;
mod fetch;

use std::path::{Path, PathBuf};

use cache::Snapshot;

/// The environment variables that are read here, and nowhere else.
mod environment {
    pub const CACHE: &str = "HF_HUB_CACHE";
    pub const HOME: &str = "HF_HOME";
    pub const CACHE_HOME: &str = "XDG_CACHE_HOME";
    pub const ENDPOINT: &str = "HF_ENDPOINT";
    pub const TOKEN: &str = "HF_TOKEN";
    pub const OFFLINE: &str = "HF_HUB_OFFLINE";
}

const ENDPOINT: &str = "https://huggingface.co";

/// Why a model cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error(
        "{0:?} is no directory, and no name of a model on the hub either; a name is org/name or org/name@revision"
    )]
    Name(String),
    #[error("there is no home directory for the cache of models; set HF_HOME")]
    NoCache,
    #[error(
        "{model} is not in the cache {cache}: {missing} is missing, and nothing is fetched offline. Fetch it where there is a network, with `hf download {model}` or by starting once without the offline option"
    )]
    Offline {
        model: String,
        cache: PathBuf,
        missing: String,
    },
    #[error(
        "{endpoint} has no model {model}, or not this revision of it; a private model needs a token (HF_TOKEN, or `hf auth login`)"
    )]
    NotFound { model: String, endpoint: String },
    #[error(
        "{model} is gated: accept its conditions at {endpoint}/{model} and give a token that may read it (HF_TOKEN, or `hf auth login`)"
    )]
    Gated { model: String, endpoint: String },
    #[error("{model} has no safetensors weights on the hub; other formats are not read here")]
    NoSafetensors { model: String },
    #[error("{file} of {model} is not usable: {reason}")]
    File {
        model: String,
        file: String,
        reason: String,
    },
    #[error("cannot fetch {file} of {model} from {endpoint}: {reason}")]
    Transfer {
        model: String,
        file: String,
        endpoint: String,
        reason: String,
    },
    #[error("cannot write {path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
}

impl HubError {
    /// Whether the same request may succeed later.
    #[must_use]
    pub fn is_retriable(&self) -> bool {
        matches!(self, Self::Transfer { .. })
    }
}

/// How far a fetch has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    pub file: &'a str,
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// A model's name on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelId {
    /// `org/name`, or `name` of the few old ones.
    pub name: String,
    /// Branch, tag or commit.
    pub revision: String,
}

impl ModelId {
    /// `org/name[@revision]`; `None` if it is no such name. What passes can stand in a path.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let plain = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(allowed)
        };
        let good = name.split('/').count() <= 2
            && name.split('/').all(plain)
            && !name.contains("--")
            && revision.split('/').all(plain);
        good.then(|| Self {
            name: name.to_owned(),
            revision: revision.to_owned(),
        })
    }
}

impl std::fmt::Display for ModelId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.name),
            revision => write!(f, "{}@{revision}", self.name),
        }
    }
}

/// Where models are kept and fetched from.
#[derive(Debug, Clone)]
pub struct Hub {
    /// The directory of `models--…` directories.
    pub cache: PathBuf,
    pub endpoint: String,
    pub token: Option<String>,
    /// Fetch nothing.
    pub offline: bool,
}

impl Hub {
    /// As Python's `huggingface_hub` has it from the environment; `HF_HUB_OFFLINE` counts as `offline` too.
    ///
    /// # Errors
    /// [`HubError::NoCache`].
    pub fn from_env(offline: bool) -> Result<Self, HubError> {
        let path = |key| {
            std::env::var_os(key)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let text = |key| std::env::var(key).ok().filter(|value| !value.is_empty());
        let home = path(environment::HOME)
            .or_else(|| Some(path(environment::CACHE_HOME)?.join("huggingface")))
            .or_else(|| Some(std::env::home_dir()?.join(".cache/huggingface")));
        let cache = path(environment::CACHE).or_else(|| Some(home.as_ref()?.join("hub")));
        let stored = || {
            let token = std::fs::read_to_string(home.as_ref()?.join("token")).ok()?;
            Some(token.trim().to_owned()).filter(|token| !token.is_empty())
        };
        let set = |key| {
            text(key).is_some_and(|value| {
                !matches!(&*value.to_lowercase(), "0" | "false" | "no" | "off")
            })
        };
        Ok(Self {
            cache: cache.ok_or(HubError::NoCache)?,
            endpoint: text(environment::ENDPOINT).unwrap_or_else(|| ENDPOINT.to_owned()),
            token: text(environment::TOKEN).or_else(stored),
            offline: offline || set(environment::OFFLINE),
        })
    }

    /// The directory with the model's files: `model` itself if it is one, else the cached snapshot, fetched if it is not complete.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn resolve(
        &self,
        model: &str,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<PathBuf, HubError> {
        if Path::new(model).is_dir() {
            return Ok(model.into());
        }
        let id = ModelId::parse(model).ok_or_else(|| HubError::Name(model.to_owned()))?;
        let cached = Snapshot::cached(&self.cache, &id);
        let missing = match &cached {
            None => Some("every file".to_owned()),
            Some(snapshot) => snapshot.missing(),
        };
        match (cached, missing) {
            (Some(snapshot), None) if self.offline || snapshot.has_tokenizer() => Ok(snapshot.0),
            (_, Some(missing)) if self.offline => Err(HubError::Offline {
                model: id.to_string(),
                cache: self.cache.clone(),
                missing,
            }),
            _ => fetch::fetch(self, &id, progress),
        }
    }
}

/// [`Hub::resolve`] with the environment's settings.
///
/// # Errors
/// [`HubError`].
pub fn resolve(
    model: &str,
    offline: bool,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, HubError> {
    // A local directory needs no home for a cache.
    if Path::new(model).is_dir() {
        return Ok(model.into());
    }
    Hub::from_env(offline)?.resolve(model, progress)
}
