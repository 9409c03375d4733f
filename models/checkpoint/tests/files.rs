//! Broken files: each gives an error that names the file and says what is wrong; none a panic.

mod common;
#[path = "common/files.rs"]
mod files;

use std::path::Path;

use common::Scratch;
use files::{counting, write};
use serde_json::{Value, json};
use understudy_checkpoint::Checkpoint;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn refused(directory: &Path, parts: &[&str]) {
    let error = match Checkpoint::open(directory) {
        Ok(_) => panic!("{parts:?}: opened"),
        Err(error) => error.to_string(),
    };
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
}

fn file(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

#[test]
fn what_is_missing_is_named() {
    let scratch = Scratch::new();
    refused(&scratch.0.join("none"), &["does not exist"]);
    refused(&scratch.0, &["holds no weights"]);
    std::fs::write(scratch.0.join("pytorch_model.bin"), "x").unwrap();
    refused(&scratch.0, &["pickle", "convert"]);
}

#[test]
fn truncated_files_are_named_with_both_sizes() {
    let scratch = Scratch::new();
    write(&scratch.0, &[counting("a", &[2, 3])]);
    let path = scratch.0.join(WEIGHTS);
    let whole = std::fs::read(&path).unwrap();
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        refused(
            &scratch.0,
            &[WEIGHTS, "truncated", &format!("holds {length} bytes")],
        );
    }
}

#[test]
fn hostile_headers_are_errors() {
    let entry = |dtype: &str, shape: Value, from: u64, to: u64| json!({"x": {"dtype": dtype, "shape": shape, "data_offsets": [from, to]}});
    let cases = [
        entry("F32", json!([u64::MAX, u64::MAX]), 0, 8),
        entry("I64", json!([3]), 0, 8),
        entry("NEW", json!([1_u64 << 40, 1_u64 << 40]), 0, 8),
        entry("F32", json!([1_u64 << 62, 2]), 0, 0),
        entry("F32", json!([2]), 8, 0),
        entry("F32", json!([2]), u64::MAX, u64::MAX),
        entry("F32", json!([-2]), 0, 8),
        json!({"x": 5}),
    ];
    let scratch = Scratch::new();
    for header in cases {
        std::fs::write(scratch.0.join(WEIGHTS), file(&header, &[0; 8])).unwrap();
        refused(&scratch.0, &[WEIGHTS, "\"x\""]);
    }
    for bytes in [u64::MAX.to_le_bytes().to_vec(), file(&json!([1]), &[])] {
        std::fs::write(scratch.0.join(WEIGHTS), bytes).unwrap();
        refused(&scratch.0, &[WEIGHTS]);
    }
}

#[test]
fn broken_shards_are_named() {
    let scratch = Scratch::new();
    let index = |map: Value| {
        std::fs::write(
            scratch.0.join(INDEX),
            json!({"weight_map": map}).to_string(),
        )
        .unwrap();
    };
    let one = file(
        &json!({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        &[0; 4],
    );
    std::fs::write(scratch.0.join("one"), &one).unwrap();
    std::fs::write(scratch.0.join("two"), &one).unwrap();
    index(json!({"a": "gone"}));
    refused(&scratch.0, &["gone", "missing"]);
    index(json!({"a": "../one"}));
    refused(&scratch.0, &["no plain file name"]);
    index(json!({"a": "one", "b": "one"}));
    refused(&scratch.0, &["\"b\"", "one"]);
    index(json!({"a": "one", "b": "two"}));
    refused(&scratch.0, &["another shard"]);
    index(json!({"a": "one"}));
    assert!(Checkpoint::open(&scratch.0).unwrap().contains("a"));
}

#[test]
fn the_hash_is_of_the_values_however_they_are_cut() {
    let (whole, cut) = (Scratch::new(), Scratch::new());
    write(&whole.0, &[counting("a", &[2]), counting("b", &[3])]);
    for name in ["a", "b"] {
        write(
            &cut.0,
            &[counting(name, &[if name == "a" { 2 } else { 3 }])],
        );
        std::fs::rename(cut.0.join(WEIGHTS), cut.0.join(name)).unwrap();
    }
    let map = json!({"weight_map": {"a": "a", "b": "b"}});
    std::fs::write(cut.0.join(INDEX), map.to_string()).unwrap();
    let hash = |scratch: &Scratch| Checkpoint::open(&scratch.0).unwrap().value_hash();
    assert_eq!(hash(&whole), hash(&cut));
    write(&whole.0, &[counting("a", &[2]), counting("b", &[3, 1])]);
    assert_ne!(hash(&whole), hash(&cut));
}
