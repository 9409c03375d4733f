//! Models by name: the cache's layout, and fetching from a server on this machine.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::Scratch;
use serde_json::json;
use understudy_checkpoint::hub::{Hub, HubError, ModelId};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files of the one model `org/name`, and every request that came.
struct Server {
    endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(files: &[(&str, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let files: BTreeMap<String, String> = files
            .iter()
            .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
            .collect();
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let log = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &files, &log);
            }
        });
        Self { endpoint, asked }
    }

    fn hub(&self, cache: &Path) -> Hub {
        Hub {
            cache: cache.to_owned(),
            endpoint: self.endpoint.clone(),
            token: None,
            offline: false,
        }
    }

    /// The requests since the last call.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

fn answer(mut stream: TcpStream, files: &BTreeMap<String, String>, log: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap())
        .lines()
        .map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let path = request.split(' ').nth(1).unwrap().to_owned();
    let headers: Vec<String> = lines
        .take_while(|line| !line.is_empty())
        .map(|line| line.to_lowercase())
        .collect();
    log.lock().unwrap().push(path.clone());
    let range = headers
        .iter()
        .find_map(|header| header.strip_prefix("range: bytes="));
    let reply = if path.starts_with("/api/models/org/name/revision/main") {
        let siblings: Vec<_> = files
            .keys()
            .map(|name| json!({"rfilename": name}))
            .collect();
        let body = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
    } else if path.contains("/gated/") {
        "HTTP/1.1 403 Forbidden\r\nx-error-code: GatedRepo\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned()
    } else if let Some(text) = path
        .strip_prefix(&format!("/org/name/resolve/{COMMIT}/"))
        .and_then(|file| files.get(file))
    {
        let (first, last) = range.unwrap().split_once('-').unwrap();
        let first: usize = first.parse().unwrap();
        let last = last.parse().unwrap_or(text.len() - 1);
        let part = &text[first..=last];
        let name = path.rsplit('/').next().unwrap();
        format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{}\r\nETag: \"{name}\"\r\nx-repo-commit: {COMMIT}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{part}",
            text.len(),
            part.len()
        )
    } else {
        "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned()
    };
    // The client may have gone: its own affair.
    let _ = stream.write_all(reply.as_bytes());
}

fn resolve(hub: &Hub, model: &str) -> Result<std::path::PathBuf, HubError> {
    hub.resolve(model, &mut |_| {})
}

/// A cache as Python's library leaves it.
fn cached(cache: &Path, files: &[(&str, &str)]) {
    let model = cache.join("models--org--name");
    let snapshot = model.join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::write(model.join("refs/main"), COMMIT).unwrap();
    for (name, text) in files {
        std::fs::write(snapshot.join(name), text).unwrap();
    }
}

fn offline(cache: &Path) -> Hub {
    Hub {
        cache: cache.to_owned(),
        endpoint: "http://127.0.0.1:1".to_owned(),
        token: None,
        offline: true,
    }
}

const SHARDS: &str = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;

#[test]
fn names_are_names_and_nothing_else() {
    let id = ModelId::parse("org/na.me-1_x@v1.0").unwrap();
    assert_eq!((&*id.name, &*id.revision), ("org/na.me-1_x", "v1.0"));
    assert_eq!(ModelId::parse("gpt2").unwrap().revision, "main");
    assert_eq!(
        ModelId::parse("a/b@refs/pr/1").unwrap().to_string(),
        "a/b@refs/pr/1"
    );
    for bad in [
        "", "/abs/dir", "./dir", "a/b/c", "a/../b", "a/..", "a b", "a/b@", "a/b@../x", "a/b@/x",
        "a//b", "~/x", "a--b/c",
    ] {
        assert!(ModelId::parse(bad).is_none(), "{bad}");
    }
    let scratch = Scratch::new();
    let error = resolve(&offline(&scratch.0), "./none/here").unwrap_err();
    assert!(matches!(error, HubError::Name(_)), "{error}");
}

#[test]
fn a_local_directory_wins() {
    let scratch = Scratch::new();
    let path = scratch.0.to_str().unwrap();
    assert_eq!(
        resolve(&offline(Path::new("/nowhere")), path).unwrap(),
        scratch.0
    );
}

#[test]
fn the_cache_is_used_offline_and_what_is_missing_is_named() {
    let scratch = Scratch::new();
    let hub = offline(&scratch.0);
    let missing = |part: &str| {
        let error = resolve(&hub, "org/name").unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, HubError::Offline { .. }) && text.contains(part),
            "{part}: {text}"
        );
        assert!(text.contains("hf download org/name"), "{text}");
    };
    missing("every file");
    cached(&scratch.0, &[]);
    missing("config.json");
    cached(&scratch.0, &[("config.json", "{}")]);
    missing("model.safetensors");
    cached(
        &scratch.0,
        &[
            ("model.safetensors.index.json", SHARDS),
            ("model-1.safetensors", ""),
        ],
    );
    missing("model-2.safetensors");
    cached(&scratch.0, &[("model-2.safetensors", "")]);
    let snapshot = scratch.0.join("models--org--name/snapshots").join(COMMIT);
    assert_eq!(resolve(&hub, "org/name").unwrap(), snapshot);
    // A commit needs no branch that points to it.
    assert_eq!(
        resolve(&hub, &format!("org/name@{COMMIT}")).unwrap(),
        snapshot
    );
    assert!(resolve(&hub, "org/name@other").is_err());
}

#[test]
fn a_model_is_fetched_once_with_what_it_needs_and_no_more() {
    let server = Server::start(&[
        ("config.json", "{}"),
        ("tokenizer.json", "{\"model\": 1}"),
        ("README.md", "no"),
        ("pytorch_model.bin", "no"),
        ("model.safetensors.index.json", SHARDS),
        ("model-1.safetensors", "one"),
        ("model-2.safetensors", "second"),
        ("model-3.safetensors", "no"),
    ]);
    let scratch = Scratch::new();
    let hub = server.hub(&scratch.0);
    let mut told = Vec::new();
    let directory = hub
        .resolve("org/name", &mut |progress| {
            told.push((
                progress.file.to_owned(),
                progress.done_bytes,
                progress.total_bytes,
            ));
        })
        .unwrap();
    assert_eq!(
        directory,
        scratch.0.join("models--org--name/snapshots").join(COMMIT)
    );
    assert_eq!(
        std::fs::read_to_string(directory.join("model-2.safetensors")).unwrap(),
        "second"
    );
    assert!(
        told.contains(&("model-2.safetensors".to_owned(), 6, 6)),
        "{told:?}"
    );
    for absent in ["README.md", "pytorch_model.bin", "model-3.safetensors"] {
        assert!(!directory.join(absent).exists(), "{absent}");
    }
    server.asked();
    assert_eq!(resolve(&hub, "org/name").unwrap(), directory);
    assert_eq!(
        server.asked(),
        Vec::<String>::new(),
        "the cache is complete"
    );
    // Python's library, and we offline, find it by the branch.
    assert_eq!(
        resolve(&offline(&scratch.0), "org/name").unwrap(),
        directory
    );
    // What is gone is fetched again, and only that.
    std::fs::remove_file(directory.join("model-1.safetensors")).unwrap();
    resolve(&hub, "org/name").unwrap();
    assert!(
        server
            .asked()
            .iter()
            .all(|path| path.contains("/api/") || path.ends_with("model-1.safetensors"))
    );
}

#[test]
fn an_interrupted_fetch_is_no_model() {
    let server = Server::start(&[
        ("config.json", "{}"),
        ("model.safetensors.index.json", SHARDS),
    ]);
    let scratch = Scratch::new();
    let error = resolve(&server.hub(&scratch.0), "org/name").unwrap_err();
    assert!(error.to_string().contains("org/name"), "{error}");
    assert!(!scratch.0.join("models--org--name/refs/main").exists());
    assert!(matches!(
        resolve(&offline(&scratch.0), "org/name"),
        Err(HubError::Offline { .. })
    ));
}

#[test]
fn errors_say_what_to_do() {
    let server = Server::start(&[("config.json", "{}"), ("pytorch_model.bin", "x")]);
    let scratch = Scratch::new();
    let hub = server.hub(&scratch.0);
    let error = resolve(&hub, "org/name").unwrap_err();
    assert!(matches!(error, HubError::NoSafetensors { .. }), "{error}");
    let error = resolve(&hub, "org/other").unwrap_err();
    assert!(
        matches!(error, HubError::NotFound { .. }) && !error.is_retriable(),
        "{error}"
    );
    let error = resolve(&hub, "gated/name").unwrap_err();
    assert!(
        matches!(error, HubError::Gated { .. }) && error.to_string().contains("HF_TOKEN"),
        "{error}"
    );
    let nobody = Hub {
        offline: false,
        ..offline(&scratch.0)
    };
    let error = resolve(&nobody, "org/name").unwrap_err();
    assert!(error.is_retriable(), "{error}");
    let odd = r#"{"weight_map": {"a": "../../evil.safetensors"}}"#;
    let server = Server::start(&[("config.json", "{}"), ("model.safetensors.index.json", odd)]);
    let scratch = Scratch::new();
    let error = resolve(&server.hub(&scratch.0), "org/name").unwrap_err();
    assert!(error.to_string().contains("evil"), "{error}");
}
