//! Broken checkpoints: each gives an error that names the file or the tensor and says what is wrong; none a panic.

mod common;

use common::Scratch;
use serde_json::{Value, json};
use understudy_torch::device::DeviceChoice;
use understudy_torch::load::{LoadOptions, load};
use understudy_torch::options::KvMemory;

const SINGLE: &str = "f32_gqa_tied";
const SHARDED: &str = "f32_untied_sharded";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The error of loading `scratch`, which must contain all `parts`.
fn refused(scratch: &Scratch, options: &LoadOptions, parts: &[&str]) {
    let error = match load(&scratch.0, options, &mut |_| {}) {
        Ok(_) => panic!("{parts:?}: loaded"),
        Err(error) => error.to_string(),
    };
    println!("{error}");
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
}

fn options() -> LoadOptions {
    LoadOptions {
        max_sequences: 2,
        threads: 1,
        ..LoadOptions::default()
    }
}

/// A safetensors file from a header and data.
fn file(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Header (without padding) and data of a file.
fn parts(bytes: &[u8]) -> (Value, Vec<u8>) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (
        serde_json::from_slice(&bytes[8..8 + length]).unwrap(),
        bytes[8 + length..].to_vec(),
    )
}

/// Changes the header of a checkpoint's single file.
fn edit_header(scratch: &Scratch, change: impl FnOnce(&mut Value)) {
    let path = scratch.path(WEIGHTS);
    let (mut header, data) = parts(&std::fs::read(&path).unwrap());
    change(&mut header);
    std::fs::write(path, file(&header, &data)).unwrap();
}

#[test]
fn what_is_missing_is_named() {
    let scratch = Scratch::new("none");
    let missing = Scratch(scratch.path("nowhere"));
    refused(&missing, &options(), &["nowhere", "does not exist"]);
    refused(
        &scratch,
        &options(),
        &["holds no weights", "model.safetensors"],
    );
    std::fs::write(scratch.path("pytorch_model.bin"), b"x").unwrap();
    refused(&scratch, &options(), &["pickle", "convert"]);
    let scratch = Scratch::of_golden(SINGLE);
    std::fs::remove_file(scratch.path("config.json")).unwrap();
    refused(&scratch, &options(), &["config.json"]);
}

#[test]
fn truncated_files_are_named_with_both_sizes() {
    let scratch = Scratch::of_golden(SINGLE);
    let bytes = std::fs::read(scratch.path(WEIGHTS)).unwrap();
    for length in [0, 5, 8, 200, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(scratch.path(WEIGHTS), &bytes[..length]).unwrap();
        refused(
            &scratch,
            &options(),
            &[
                "model.safetensors is truncated",
                &format!("holds {length} bytes"),
            ],
        );
    }
}

#[test]
fn hostile_headers_are_errors() {
    let scratch = Scratch::of_golden(SINGLE);
    let write = |bytes: &[u8]| std::fs::write(scratch.path(WEIGHTS), bytes).unwrap();
    write(&u64::MAX.to_le_bytes());
    refused(&scratch, &options(), &["claims 18446744073709551615 bytes"]);
    write(&[8, 0, 0, 0, 0, 0, 0, 0, b'{', b'"', 0xff, 0, 1, 2, 3, 4]);
    refused(&scratch, &options(), &["no safetensors file", "header"]);
    write(&file(&json!([1, 2]), b""));
    refused(&scratch, &options(), &["no safetensors file"]);
    let name = "model.embed_tokens.weight";
    let cases = [
        (
            json!({"dtype": "F32", "shape": [131, 42], "data_offsets": [10, 5]}),
            "impossible offsets",
        ),
        (
            json!({"dtype": "F32", "shape": [131, 42], "data_offsets": [0, u64::MAX]}),
            "impossible offsets",
        ),
        (
            json!({"dtype": "F32", "shape": [131, 42], "data_offsets": [0, 1_u64 << 60]}),
            "truncated",
        ),
        (
            json!({"dtype": "F32", "shape": [131, 42], "data_offsets": [0, 8]}),
            "takes 8 bytes",
        ),
        (
            json!({"dtype": "F32", "shape": [u64::MAX, u64::MAX], "data_offsets": [0, 8]}),
            "takes 8 bytes",
        ),
        (
            json!({"dtype": "F32", "shape": [-1, 42], "data_offsets": [0, 8]}),
            "header of tensor",
        ),
        (json!({"dtype": "F32", "data_offsets": [0, 8]}), "shape"),
        (json!(7), "header of tensor"),
    ];
    for (entry, part) in cases {
        write(&file(&json!({name: entry}), &[0; 8]));
        refused(&scratch, &options(), &["model.safetensors", part]);
    }
    // Deep nesting must not overflow the stack.
    let deep = "[".repeat(200_000);
    let mut bytes = (deep.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(deep.as_bytes());
    write(&bytes);
    refused(&scratch, &options(), &["no safetensors file"]);
}

/// Flipping any byte of the header gives an error or a model, never a panic.
#[test]
fn damaged_headers_never_panic() {
    let scratch = Scratch::of_golden(SINGLE);
    let bytes = std::fs::read(scratch.path(WEIGHTS)).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut rng = fastrand::Rng::with_seed(5);
    let mut errors = 0;
    for _ in 0..300 {
        let mut damaged = bytes.clone();
        for _ in 0..1 + rng.usize(0..3) {
            damaged[rng.usize(0..header)] = rng.u8(..);
        }
        std::fs::write(scratch.path(WEIGHTS), damaged).unwrap();
        errors += u32::from(load(&scratch.0, &options(), &mut |_| {}).is_err());
    }
    assert!(errors > 200, "{errors}");
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let scratch = Scratch::of_golden(SINGLE);
    scratch.edit_config(|config| config["intermediate_size"] = json!(76));
    refused(
        &scratch,
        &options(),
        &[
            "model.layers.0.mlp.down_proj.weight",
            "[42, 75]",
            "[42, 76]",
        ],
    );

    let scratch = Scratch::of_golden(SINGLE);
    scratch.edit_config(|config| config["num_hidden_layers"] = json!(3));
    refused(
        &scratch,
        &options(),
        &["model.layers.2.", "lacks the tensor"],
    );

    let scratch = Scratch::of_golden(SINGLE);
    edit_header(&scratch, |header| {
        let entry = header.as_object_mut().unwrap().remove(name).unwrap();
        header["model.layers.1.mlp.up_proj.qweight"] = entry;
    });
    refused(&scratch, &options(), &[name, "quantized", "GPTQ"]);

    let scratch = Scratch::of_golden(SINGLE);
    edit_header(&scratch, |header| {
        header[name]["dtype"] = json!("F8_E4M3");
        header[name]["shape"] = json!([300, 42]);
    });
    refused(
        &scratch,
        &options(),
        &[name, "F8_E4M3", "supported: F32, BF16, F16"],
    );

    // Wide enough for the shape, but of another type.
    let scratch = Scratch::of_golden(SINGLE);
    edit_header(&scratch, |header| header[name]["dtype"] = json!("I32"));
    refused(&scratch, &options(), &[name, "I32"]);
}

/// Adds an f32 tensor of this shape to a checkpoint's single file.
fn add_tensor(scratch: &Scratch, name: &str, shape: &[u64]) {
    let path = scratch.path(WEIGHTS);
    let (mut header, mut data) = parts(&std::fs::read(&path).unwrap());
    let start = data.len() as u64;
    let end = start + 4 * shape.iter().product::<u64>();
    data.resize(end as usize, 0);
    header[name] = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]});
    std::fs::write(path, file(&header, &data)).unwrap();
}

/// A tensor that is left out would make another model than the one that was trained, and nothing but its nonsense would tell.
#[test]
fn tensors_that_nobody_asks_for_are_refused_with_the_key_that_would() {
    let cases: [(&str, &[u64], &str); 7] = [
        (
            "model.layers.0.self_attn.q_proj.bias",
            &[60],
            "attention_bias",
        ),
        ("model.layers.1.mlp.up_proj.bias", &[75], "mlp_bias"),
        (
            "model.layers.0.self_attn.q_norm.weight",
            &[10],
            "architectures",
        ),
        (
            "model.layers.1.self_attn.k_norm.weight",
            &[10],
            "architectures",
        ),
        (
            "model.layers.0.mlp.gate_proj.weight_scale",
            &[1],
            "quantization_config",
        ),
        (
            "model.layers.2.mlp.up_proj.weight",
            &[75, 42],
            "num_hidden_layers is 2",
        ),
        ("score.weight", &[2, 42], "architectures"),
    ];
    for (name, shape, part) in cases {
        let scratch = Scratch::of_golden(SINGLE);
        add_tensor(&scratch, name, shape);
        refused(&scratch, &options(), &[name, part]);
    }
    let scratch = Scratch::of_golden(SINGLE);
    scratch.edit_config(|config| config["num_hidden_layers"] = json!(1));
    refused(
        &scratch,
        &options(),
        &["model.layers.1.", "num_hidden_layers is 1"],
    );
    let scratch = Scratch::of_golden("f16_biases_sharded");
    scratch.edit_config(|config| config["mlp_bias"] = json!(false));
    refused(&scratch, &options(), &["_proj.bias", "mlp_bias"]);
}

#[test]
fn tensors_that_follow_from_the_others_are_left_out() {
    let scratch = Scratch::of_golden(SINGLE);
    add_tensor(
        &scratch,
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        &[5],
    );
    add_tensor(&scratch, "model.rotary_emb.inv_freq", &[5]);
    add_tensor(&scratch, "lm_head.weight", &[131, 42]);
    load(&scratch.0, &options(), &mut |_| {}).unwrap();
}

/// A tensor that no model computes with is still described to people.
#[test]
fn hostile_shapes_are_errors_whatever_the_type() {
    for (dtype, shape, bytes) in [
        ("I32", vec![u64::MAX, u64::MAX], 8),
        ("I64", vec![3], 8),
        ("F4", vec![3], 8),
        ("NEW", vec![1 << 40, 1 << 40], 8),
        ("F32", vec![1 << 62, 2], 0),
    ] {
        let scratch = Scratch::of_golden(SINGLE);
        let header = json!({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, bytes]}});
        std::fs::write(scratch.path(WEIGHTS), file(&header, &[0; 8])).unwrap();
        refused(&scratch, &options(), &["\"x\"", "takes"]);
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_understudy-engine"))
            .arg("inspect")
            .arg(&scratch.0)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(10), "{dtype} {shape:?}");
    }
    // Each count is a number, their sum is not.
    let scratch = Scratch::of_golden(SINGLE);
    let entry = json!({"dtype": "NEW", "shape": [u64::MAX], "data_offsets": [0, 8]});
    let header = json!({"x": entry, "y": entry});
    std::fs::write(scratch.path(WEIGHTS), file(&header, &[0; 8])).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_understudy-engine"))
        .arg("inspect")
        .arg(&scratch.0)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && text.contains("36893488147419103230"),
        "{text}"
    );
}

#[test]
fn hostile_configurations_are_errors_before_anything_is_allocated() {
    let scratch = Scratch::of_golden(SINGLE);
    scratch.edit_config(|config| {
        config["max_position_embeddings"] = json!(i32::MAX);
    });
    refused(
        &scratch,
        &options(),
        // 2^27 blocks of 9984 bytes: values are padded to whole registers.
        &["KV cache", "1277952 MiB", "context_length"],
    );
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_understudy-engine"))
        .arg("inspect")
        .arg(&scratch.0)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_tokenizer_with_ids_beyond_the_model_is_refused() {
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/tokenizer.json");
    let scratch = Scratch::of_golden(SINGLE);
    std::fs::copy(demo, scratch.path("tokenizer.json")).unwrap();
    refused(
        &scratch,
        &options(),
        &["tokenizer.json has ids up to 1606", "vocab_size", "131"],
    );
}

#[test]
fn broken_shards_are_named() {
    let scratch = Scratch::of_golden(SHARDED);
    let index: Value =
        serde_json::from_slice(&std::fs::read(scratch.path(INDEX)).unwrap()).unwrap();
    let shard = index["weight_map"]["model.norm.weight"]
        .as_str()
        .unwrap()
        .to_owned();
    let write = |index: &Value| std::fs::write(scratch.path(INDEX), index.to_string()).unwrap();

    for hostile in ["../secret.safetensors", "/etc/passwd", "..", ""] {
        let mut changed = index.clone();
        changed["weight_map"]["model.norm.weight"] = json!(hostile);
        write(&changed);
        refused(&scratch, &options(), &["index.json", "no plain file name"]);
    }
    let mut changed = index.clone();
    changed["weight_map"]["model.extra.weight"] = json!(shard);
    write(&changed);
    refused(
        &scratch,
        &options(),
        &["model.extra.weight", "is not in", &shard],
    );
    // The same tensor in two shards: which one counts?
    let other = index["weight_map"]
        .as_object()
        .unwrap()
        .iter()
        .find(|(_, name)| **name != json!(shard))
        .map(|(_, name)| name.as_str().unwrap().to_owned())
        .unwrap();
    let whole = std::fs::read(scratch.path(&other)).unwrap();
    let (mut header, mut data) = parts(&whole);
    let start = data.len();
    data.resize(start + 4 * 52, 0);
    header["model.norm.weight"] =
        json!({"dtype": "F32", "shape": [52], "data_offsets": [start, start + 4 * 52]});
    write(&index);
    std::fs::write(scratch.path(&other), file(&header, &data)).unwrap();
    refused(
        &scratch,
        &options(),
        &["model.norm.weight", "another shard"],
    );
    std::fs::write(scratch.path(&other), whole).unwrap();

    write(&json!({"weight_map": [1]}));
    refused(&scratch, &options(), &["index.json", "not a shard index"]);
    write(&index);
    std::fs::remove_file(scratch.path(&shard)).unwrap();
    refused(&scratch, &options(), &[&shard, "is missing"]);
}

#[test]
fn configurations_that_cannot_be_computed_are_refused() {
    let cases: [(&str, Value, &[&str]); 10] = [
        (
            "architectures",
            json!(["LlamaModel"]),
            &["architectures", "LlamaModel", "LlamaForCausalLM"],
        ),
        (
            "rope_parameters",
            json!({"rope_theta": 1e4, "factor": 2.0}),
            &["config.json", "rope_type"],
        ),
        (
            "model_type",
            json!("mistral"),
            &["config.json", "model_type", "mistral", "llama"],
        ),
        (
            "quantization_config",
            json!({"quant_method": "awq"}),
            &["quantization_config", "f32, bf16 or f16"],
        ),
        (
            "rope_parameters",
            json!({"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}),
            &["proportional"],
        ),
        ("hidden_act", json!("quick_gelu"), &["hidden_act"]),
        ("num_key_value_heads", json!(4), &["num_key_value_heads"]),
        ("head_dim", json!(9), &["head_dim"]),
        ("vocab_size", json!("many"), &["config.json"]),
        // Sizes that nothing could hold must be caught before anything is allocated.
        (
            "vocab_size",
            json!(2_000_000_000),
            &["model.embed_tokens.weight", "2000000000"],
        ),
    ];
    for (key, value, parts) in cases {
        let scratch = Scratch::of_golden(SINGLE);
        scratch.edit_config(|config| config[key] = value);
        refused(&scratch, &options(), parts);
    }
    let scratch = Scratch::of_golden(SINGLE);
    std::fs::write(scratch.path("config.json"), "{").unwrap();
    refused(&scratch, &options(), &["config.json"]);
}

#[test]
fn options_that_do_not_fit_the_model_are_refused() {
    let scratch = Scratch::of_golden(SINGLE);
    refused(
        &scratch,
        &LoadOptions {
            context_length: Some(257),
            ..options()
        },
        &["257", "1 to 256"],
    );
    refused(
        &scratch,
        &LoadOptions {
            context_length: Some(0),
            ..options()
        },
        &["1 to 256"],
    );
    refused(
        &scratch,
        &LoadOptions {
            max_sequences: 0,
            ..options()
        },
        &["at least one sequence"],
    );
    refused(
        &scratch,
        &LoadOptions {
            kv_memory: KvMemory::Bytes(1 << 16),
            ..options()
        },
        &["KV cache", "256 positions", "kv_memory"],
    );
    if !std::path::Path::new("/dev/nvidiactl").exists() {
        refused(
            &scratch,
            &LoadOptions {
                device: DeviceChoice::Cuda(0),
                ..options()
            },
            &["CUDA was asked for"],
        );
    }
}
