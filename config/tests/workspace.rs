//! The edges between the crates of the workspace, as `docs/architecture.md` draws them.
//!
//! A new edge is a decision: write it here and there, or do without it.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Which crates of the workspace each one may use (dev-dependencies aside), with the prefix `understudy-` left out.
const EDGES: &[(&str, &[&str])] = &[
    ("config", &[]),
    ("protocol", &[]),
    ("kernels", &[]),
    ("telemetry", &[]),
    ("client", &["protocol"]),
    ("journal", &["protocol"]),
    ("cluster", &["config", "protocol", "telemetry"]),
    ("engine-core", &["kernels"]),
    ("checkpoint", &["kernels"]),
    ("cpu", &["checkpoint", "engine-core", "kernels"]),
    ("torch", &["checkpoint", "cpu", "engine-core", "kernels"]),
    (
        "actors",
        &[
            "cluster",
            "config",
            "engine-core",
            "journal",
            "protocol",
            "telemetry",
        ],
    ),
    (
        "node",
        &[
            "actors",
            "client",
            "cluster",
            "config",
            "engine-core",
            "journal",
            "protocol",
            "telemetry",
        ],
    ),
    (
        "tests",
        &[
            "client",
            "config",
            "engine-core",
            "journal",
            "node",
            "protocol",
            "telemetry",
        ],
    ),
];

/// Crates of others that only some of ours may use.
const WRAPPED: &[(&str, &[&str])] = &[
    ("tch", &["torch"]),
    ("torch-sys", &["torch"]),
    ("ractor_cluster", &["cluster"]),
    ("ractor", &["cluster", "actors", "node"]),
];

/// Crates that must be usable without an async runtime, so that any program and any simulator can drive them.
const WITHOUT_RUNTIME: &[&str] = &["config", "protocol", "journal", "kernels"];

/// Direct dependencies of each crate of the workspace, dev-dependencies left out.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--offline",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let packages = metadata["packages"].as_array().expect("packages");
    let of_package = |package: &Value| {
        let all = package["dependencies"]
            .as_array()
            .expect("dependencies")
            .iter();
        let used = all.filter(|one| one["kind"] != "dev");
        (
            short(&text(&package["name"])),
            used.map(|one| short(&text(&one["name"]))).collect(),
        )
    };
    packages.iter().map(of_package).collect()
}

fn short(name: &str) -> String {
    name.strip_prefix("understudy-").unwrap_or(name).to_owned()
}

#[test]
fn crates_use_each_other_only_along_the_drawn_edges() {
    let dependencies = dependencies();
    let drawn: BTreeSet<String> = EDGES.iter().map(|(name, _)| (*name).to_owned()).collect();
    let present: BTreeSet<String> = dependencies.keys().cloned().collect();
    assert_eq!(
        present, drawn,
        "every crate of the workspace has its line in EDGES"
    );
    for (name, allowed) in EDGES {
        let ours = dependencies[*name].intersection(&present);
        let extra: Vec<&String> = ours
            .filter(|one| !allowed.contains(&one.as_str()))
            .collect();
        assert!(
            extra.is_empty(),
            "{name} uses {extra:?}, which no edge allows"
        );
    }
}

#[test]
fn libtorch_and_the_cluster_library_stay_behind_one_crate_each() {
    for (name, used) in dependencies() {
        for (wrapped, wrappers) in WRAPPED {
            assert!(
                !used.contains(*wrapped) || wrappers.contains(&name.as_str()),
                "{name} uses {wrapped}; only {wrappers:?} may"
            );
        }
    }
}

#[test]
fn pure_crates_need_no_runtime() {
    let dependencies = dependencies();
    for name in WITHOUT_RUNTIME {
        assert!(!dependencies[*name].contains("tokio"), "{name} uses tokio");
    }
}
