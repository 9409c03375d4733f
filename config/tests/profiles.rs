//! Every profile that ships loads, and the reference page says what the types say.

use std::fs;
use std::path::{Path, PathBuf};

use understudy_config::{ClusterConfig, LoadOptions, PathCheck};

fn profiles() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("profiles");
    let entries = fs::read_dir(directory).expect("config/profiles");
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    files
}

fn load(name: &str) -> (ClusterConfig, Vec<String>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("profiles")
        .join(name);
    let options = LoadOptions {
        paths: PathCheck::None,
    };
    let (config, warnings) =
        ClusterConfig::load_with(path, &options).unwrap_or_else(|problems| panic!("{problems}"));
    (config, warnings.iter().map(ToString::to_string).collect())
}

#[test]
fn every_shipped_profile_loads() {
    let files = profiles();
    assert!(files.len() >= 2, "{files:?}");
    for file in files {
        assert_eq!(
            file.extension().and_then(|end| end.to_str()),
            Some("toml"),
            "{}",
            file.display()
        );
        load(
            file.file_name()
                .and_then(|name| name.to_str())
                .expect("a name"),
        );
    }
}

#[test]
fn the_local_profile_is_two_nodes_with_two_replicas_of_the_demo_model() {
    let (config, warnings) = load("local.toml");
    let places: Vec<String> = config
        .placement()
        .iter()
        .map(|place| format!("{}/{} on {}", place.model, place.replica, place.node))
        .collect();
    assert_eq!(places, ["demo/0 on a", "demo/1 on b"]);
    assert_eq!(
        config
            .node("a")
            .and_then(|node| node.client_address())
            .as_deref(),
        Some("127.0.0.1:7601")
    );
    assert_eq!(warnings.len(), 1, "{warnings:#?}");
    assert!(warnings[0].contains("only gateway"), "{}", warnings[0]);
}

#[test]
fn the_local_profile_writes_into_the_ignored_run_directory_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the repository")
        .to_owned();
    let (config, _) = load("local.toml");
    assert_eq!(config.cluster.run_dir, root.join("run/local"));
    assert_eq!(config.cluster.cookie_file, root.join("run/local/cookie"));
    assert_eq!(config.models[0].path, root.join("models/demo"));
    let ignored = fs::read_to_string(root.join(".gitignore")).expect(".gitignore");
    assert!(ignored.lines().any(|line| line == "/run/"), "{ignored}");
}

#[test]
fn the_annotated_profile_draws_no_warning_but_that_of_the_missing_encryption() {
    let (config, warnings) = load("cluster.toml");
    assert_eq!(config.placement().len(), 6);
    assert_eq!(warnings.len(), 1, "{warnings:#?}");
    assert!(warnings[0].contains("not encrypted"), "{}", warnings[0]);
}

/// What is commented out in the annotated profile is the default: with the comment signs removed it must load to the
/// same settings.
#[test]
fn defaults_shown_in_comments_are_the_defaults() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("profiles/cluster.toml");
    let text = fs::read_to_string(&path).expect("the profile");
    let is_key = |line: &str| {
        line.strip_prefix("# ")
            .is_some_and(|rest| rest.split_once(" = ").is_some_and(|(key, _)| is_word(key)))
    };
    let uncommented: Vec<&str> = text
        .lines()
        .map(|line| {
            if is_key(line) && !line.contains("context_length") {
                &line[2..]
            } else {
                line
            }
        })
        .collect();
    let options = LoadOptions {
        paths: PathCheck::None,
    };
    let parse = |text: &str| {
        ClusterConfig::parse(&path, text, &options)
            .unwrap_or_else(|problems| panic!("{problems}"))
            .0
    };
    assert!(
        uncommented
            .iter()
            .filter(|line| line.contains(" = "))
            .count()
            > 60
    );
    assert_eq!(parse(&uncommented.join("\n")), parse(&text));
}

fn is_word(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}

/// Broken files are reported, never panicked on: the annotated profile cut off at every character, and with every line
/// taken out or doubled.
#[test]
fn no_damage_to_a_file_makes_the_reader_panic() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("profiles/cluster.toml");
    let text = fs::read_to_string(&path).expect("the profile");
    let options = LoadOptions {
        paths: PathCheck::None,
    };
    let shown = |text: &str| match ClusterConfig::parse(&path, text, &options) {
        Ok((config, _)) => config.checksum().to_string(),
        Err(problems) => problems.to_string() + &problems.to_json().to_string(),
    };
    for (at, _) in text.char_indices() {
        assert!(!shown(&text[..at]).is_empty());
    }
    let lines: Vec<&str> = text.lines().collect();
    for at in 0..lines.len() {
        let without = [&lines[..at], &lines[at + 1..]].concat().join("\n");
        let doubled = [&lines[..=at], &lines[at..]].concat().join("\n");
        assert!(!shown(&without).is_empty() && !shown(&doubled).is_empty());
    }
}

#[test]
fn the_reference_page_is_made_from_the_types() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == understudy_config::page(),
        "docs/configuration.md is out of date: cargo run --release -p understudy-config --example docs > docs/configuration.md"
    );
}

#[test]
fn the_example_on_the_reference_page_is_a_whole_configuration_of_at_most_ten_lines() {
    let page = understudy_config::page();
    let example = page
        .split("```toml\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .expect("an example");
    assert!(example.lines().count() <= 10, "{example}");
    let options = LoadOptions {
        paths: PathCheck::None,
    };
    let (config, _) = ClusterConfig::parse("example.toml", example, &options)
        .unwrap_or_else(|problems| panic!("{problems}"));
    assert_eq!(config.placement().len(), 1);
}
