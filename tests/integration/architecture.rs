//! The edges between crates that the architecture allows.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use understudy_tests::programs;

/// Direct dependencies of every crate of the workspace, by package name.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .current_dir(programs::repository())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    packages
        .iter()
        .map(|package| {
            let normal = |dependency: &&serde_json::Value| dependency["kind"].is_null();
            let names = package["dependencies"]
                .as_array()
                .expect("dependencies")
                .iter()
                .filter(normal);
            let names = names
                .filter_map(|dependency| dependency["name"].as_str())
                .map(str::to_owned)
                .collect();
            (package["name"].as_str().expect("a name").to_owned(), names)
        })
        .collect()
}

/// The only crate that may use a library.
#[test]
fn libraries_are_confined() {
    let dependencies = dependencies();
    for (library, home) in [
        ("tch", "understudy-torch"),
        ("ractor_cluster", "understudy-cluster"),
    ] {
        let users: Vec<&String> = dependencies
            .iter()
            .filter(|(_, names)| names.contains(library))
            .map(|(user, _)| user)
            .collect();
        assert_eq!(users, [home], "{library} belongs into {home} alone");
    }
}

#[test]
fn layers_know_only_what_is_below_them() {
    let allowed: [(&str, &[&str]); 10] = [
        ("understudy-protocol", &[]),
        ("understudy-config", &[]),
        ("understudy-kernels", &[]),
        ("understudy-telemetry", &[]),
        ("understudy-cluster", &[]),
        ("understudy-journal", &["understudy-protocol"]),
        ("understudy-client", &["understudy-protocol"]),
        ("understudy-engine-core", &["understudy-kernels"]),
        (
            "understudy-torch",
            &["understudy-engine-core", "understudy-kernels"],
        ),
        (
            "understudy-actors",
            &[
                "understudy-cluster",
                "understudy-config",
                "understudy-engine-core",
                "understudy-journal",
                "understudy-protocol",
                "understudy-telemetry",
            ],
        ),
    ];
    let dependencies = dependencies();
    for (package, below) in allowed {
        let own = dependencies[package]
            .iter()
            .filter(|name| name.starts_with("understudy-"));
        let beyond: Vec<&String> = own.filter(|name| !below.contains(&name.as_str())).collect();
        assert!(beyond.is_empty(), "{package} must not know {beyond:?}");
    }
}
