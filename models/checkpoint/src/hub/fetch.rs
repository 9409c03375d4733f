//! Fetching a model's files into the cache.

use std::path::PathBuf;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::cache::{CONFIG, INDEX, SINGLE, directory, shards};
use super::{Hub, HubError, ModelId, Progress};

/// What is fetched beside the weights, where a model has it.
const FILES: &[&str] = &[
    CONFIG,
    "1_Pooling/config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];

/// Attempts after the first, each from where the last one stopped.
const RETRIES: usize = 3;

/// Fetches what is not there yet, all of the commit at which the revision stands now; the snapshot's directory.
pub(super) fn fetch(
    hub: &Hub,
    id: &ModelId,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, HubError> {
    let failed = |file: &str, error| error_of(hub, id, file, &error);
    let cache = Cache::new(hub.cache.clone());
    let builder = ApiBuilder::from_cache(cache.clone())
        .with_endpoint(hub.endpoint.trim_end_matches('/').to_owned())
        .with_token(hub.token.clone())
        .with_progress(false)
        .with_retries(RETRIES);
    let api = builder
        .build()
        .map_err(|error| failed("the list of files", error))?;
    let of =
        |revision: &str| Repo::with_revision(id.name.clone(), RepoType::Model, revision.to_owned());
    let info = api
        .repo(of(&id.revision))
        .info()
        .map_err(|error| failed("the list of files", error))?;
    let commit = plain_commit(hub, id, info.sha)?;
    let mut fetcher = Fetcher {
        repo: api.repo(of(&commit)),
        snapshot: directory(&hub.cache, id).join("snapshots").join(&commit),
        hub,
        id,
        progress,
    };
    let listed = |name: &str| {
        info.siblings
            .iter()
            .any(|sibling| sibling.rfilename == name)
    };
    // Small files first: a configuration that cannot be read is known before gigabytes are fetched.
    for file in FILES.iter().filter(|file| listed(file)) {
        fetcher.file(file)?;
    }
    if listed(SINGLE) {
        fetcher.file(SINGLE)?;
    } else if listed(INDEX) {
        fetcher.shards()?;
    } else {
        return Err(HubError::NoSafetensors {
            model: id.to_string(),
        });
    }
    let snapshot = fetcher.snapshot;
    cache
        .repo(of(&id.revision))
        .create_ref(&commit)
        .map_err(|source| HubError::Io {
            path: directory(&hub.cache, id).join("refs"),
            source,
        })?;
    Ok(snapshot)
}

/// A commit is used in paths; one that is not plain is not from a hub.
fn plain_commit(hub: &Hub, id: &ModelId, commit: String) -> Result<String, HubError> {
    if !commit.is_empty() && commit.chars().all(|c| c.is_ascii_alphanumeric()) {
        return Ok(commit);
    }
    Err(HubError::Transfer {
        model: id.to_string(),
        file: "the list of files".to_owned(),
        endpoint: hub.endpoint.clone(),
        reason: format!("the commit {commit:?} is none"),
    })
}

/// One model's fetch.
struct Fetcher<'a> {
    repo: ApiRepo,
    snapshot: PathBuf,
    hub: &'a Hub,
    id: &'a ModelId,
    progress: &'a mut dyn FnMut(Progress<'_>),
}

impl Fetcher<'_> {
    fn file(&mut self, file: &str) -> Result<(), HubError> {
        if self.snapshot.join(file).exists() {
            return Ok(());
        }
        let relay = Relay {
            file: file.to_owned(),
            done_bytes: 0,
            total_bytes: 0,
            progress: &mut *self.progress,
        };
        match self.repo.download_with_progress(file, relay) {
            Ok(_) => Ok(()),
            Err(error) => Err(error_of(self.hub, self.id, file, &error)),
        }
    }

    fn shards(&mut self) -> Result<(), HubError> {
        self.file(INDEX)?;
        let path = self.snapshot.join(INDEX);
        let text = std::fs::read(&path).map_err(|source| HubError::Io { path, source })?;
        let shards = shards(&text).map_err(|reason| HubError::File {
            model: self.id.to_string(),
            file: INDEX.to_owned(),
            reason,
        })?;
        shards.iter().try_for_each(|shard| self.file(shard))
    }
}

/// Turns the crate's progress into ours.
struct Relay<'a> {
    file: String,
    done_bytes: u64,
    total_bytes: u64,
    progress: &'a mut dyn FnMut(Progress<'_>),
}

impl Relay<'_> {
    fn tell(&mut self) {
        (self.progress)(Progress {
            file: &self.file,
            done_bytes: self.done_bytes,
            total_bytes: self.total_bytes,
        });
    }
}

impl hf_hub::api::Progress for Relay<'_> {
    fn init(&mut self, size: usize, _filename: &str) {
        // Told anew at each attempt.
        (self.done_bytes, self.total_bytes) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.done_bytes += size as u64;
        self.tell();
    }

    fn finish(&mut self) {
        self.tell();
    }
}

fn error_of(hub: &Hub, id: &ModelId, file: &str, error: &ApiError) -> HubError {
    let (model, endpoint) = (id.to_string(), hub.endpoint.clone());
    let innermost = match error {
        ApiError::TooManyRetries(inner) => inner,
        other => other,
    };
    if let ApiError::RequestError(request) = innermost
        && let ureq::Error::Status(status, response) = &**request
    {
        // The hub says which of several meanings a status has.
        match (*status, response.header("x-error-code")) {
            (_, Some("GatedRepo")) | (403, _) => {
                return HubError::Gated {
                    model: id.name.clone(),
                    endpoint,
                };
            }
            (401 | 404, _) => return HubError::NotFound { model, endpoint },
            _ => {}
        }
    }
    HubError::Transfer {
        model,
        file: file.to_owned(),
        endpoint,
        reason: innermost.to_string(),
    }
}
