//! Descriptions against checkpoints: names of either form, rows through patterns, and tensors that nobody asked for.

mod common;
#[path = "common/files.rs"]
mod files;

use common::Scratch;
use files::{Tensor, counting, write};
use serde_json::{Value, json};
use understudy_checkpoint::reader::StoredType;
use understudy_checkpoint::spec::{BiasPart, LinearSpec, RowPattern, WeightPart};
use understudy_checkpoint::{Checkpoint, ModelSpec, check_all_used, families};

fn gpt2() -> Value {
    json!({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 5, "n_embd": 4, "n_layer": 1, "n_head": 2,
        "n_positions": 3,
    })
}

fn bert() -> Value {
    json!({
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 6, "max_position_embeddings": 3,
    })
}

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 6, "tie_word_embeddings": true,
    })
}

fn spec(config: &Value) -> ModelSpec {
    families::from_json(&config.to_string()).unwrap()
}

/// A checkpoint of all tensors of `spec`, renamed.
fn checkpoint(spec: &ModelSpec, rename: impl Fn(&str) -> String) -> (Scratch, Checkpoint) {
    let tensors: Vec<Tensor> = spec
        .tensors()
        .iter()
        .map(|(name, shape)| counting(&rename(name), shape))
        .collect();
    let scratch = Scratch::new();
    write(&scratch.0, &tensors);
    let checkpoint = Checkpoint::open(&scratch.0).unwrap();
    (scratch, checkpoint)
}

/// One way to write the names of a checkpoint.
type Rename<'a> = &'a dyn Fn(&str) -> String;

#[test]
fn names_of_either_form_are_found() {
    let old_norms = |name: &str| {
        let name = name.replace("LayerNorm.weight", "LayerNorm.gamma");
        name.replace("LayerNorm.bias", "LayerNorm.beta")
    };
    let cases: [(Value, Rename<'_>); 5] = [
        (gpt2(), &|name| name.to_owned()),
        (gpt2(), &|name| name.replace("transformer.", "")),
        (bert(), &|name| name.replace("bert.", "")),
        (bert(), &old_norms),
        (llama(), &|name| name.replace("model.", "")),
    ];
    for (config, rename) in cases {
        let (_scratch, checkpoint) = checkpoint(&spec(&config), rename);
        let spec = spec(&config).with_names_of(&checkpoint);
        check_all_used(checkpoint.names(), &spec).unwrap();
        for (name, shape) in spec.tensors() {
            let shape: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
            checkpoint.tensor(&name, &shape).unwrap();
        }
    }
}

#[test]
fn tensors_that_nobody_asks_for_are_refused_with_the_key_that_would() {
    let cases = [
        (
            llama(),
            "model.layers.0.self_attn.q_proj.bias",
            "attention_bias",
        ),
        (llama(), "model.layers.1.mlp.up_proj.bias", "mlp_bias"),
        (
            llama(),
            "model.layers.0.self_attn.q_norm.weight",
            "architectures",
        ),
        (
            llama(),
            "model.layers.0.mlp.gate_proj.weight_scale",
            "quantization_config",
        ),
        (llama(), "model.layers.0.mlp.gate_proj.qweight", "GPTQ"),
        (
            llama(),
            "model.layers.2.mlp.up_proj.weight",
            "num_hidden_layers is 2",
        ),
        (llama(), "model.layers.0.attn.bias", "architectures"),
        (
            gpt2(),
            "transformer.h.1.ln_1.weight",
            "num_hidden_layers is 1",
        ),
        (bert(), "classifier.weight", "architectures"),
    ];
    for (config, name, part) in cases {
        let spec = spec(&config);
        let names: Vec<String> = spec.tensors().into_iter().map(|(name, _)| name).collect();
        let all = names.iter().map(String::as_str).chain([name]);
        let error = check_all_used(all, &spec).unwrap_err().to_string();
        assert!(
            error.contains(name) && error.contains(part),
            "{part}: {error}"
        );
    }
}

#[test]
fn tensors_that_mean_nothing_are_left_out() {
    for (config, name) in [
        (llama(), "model.layers.0.self_attn.rotary_emb.inv_freq"),
        (llama(), "lm_head.weight"),
        (gpt2(), "transformer.h.0.attn.bias"),
        (gpt2(), "h.0.attn.masked_bias"),
        (bert(), "bert.embeddings.position_ids"),
        (bert(), "bert.pooler.dense.bias"),
        (bert(), "cls.predictions.bias"),
    ] {
        check_all_used([name], &spec(&config)).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn rows_come_through_patterns_whichever_way_they_are_stored() {
    let (inputs, stored) = (3, 6);
    let rows = RowPattern {
        first: 1,
        len: 1,
        stride: 2,
        count: 3,
    };
    let part = |tensor: &str, transposed, rows| WeightPart {
        tensor: tensor.to_owned(),
        stored_outputs: stored,
        transposed,
        rows,
    };
    let map = LinearSpec {
        inputs,
        outputs: 3 + stored,
        weight: vec![
            part("a", false, rows),
            part("b", true, RowPattern::range(0, stored)),
        ],
        bias: vec![
            BiasPart {
                tensor: "c".to_owned(),
                stored_len: stored,
                rows: RowPattern::range(0, stored),
            },
            BiasPart {
                tensor: "c".to_owned(),
                stored_len: stored,
                rows,
            },
        ],
    };
    let scratch = Scratch::new();
    let tensors = [
        counting("a", &[stored, inputs]),
        counting("b", &[inputs, stored]),
        counting("c", &[stored]),
    ];
    write(&scratch.0, &tensors);
    let checkpoint = Checkpoint::open(&scratch.0).unwrap();
    let reader = checkpoint.linear(&map).unwrap();
    assert_eq!(
        (reader.inputs(), reader.outputs(), reader.stored_type()),
        (3, 9, Some(StoredType::F32))
    );

    let mut expected: Vec<Vec<f32>> = [1, 3, 5]
        .map(|row| {
            vec![
                row as f32 * 3.0,
                row as f32 * 3.0 + 1.0,
                row as f32 * 3.0 + 2.0,
            ]
        })
        .to_vec();
    expected.extend((0..6).map(|row| vec![row as f32, row as f32 + 6.0, row as f32 + 12.0]));
    let mut row = vec![0.0; inputs];
    for (index, expected) in expected.iter().enumerate() {
        reader.row(index, &mut row);
        assert_eq!(row, *expected, "{index}");
    }
    for first in 0..9 {
        let mut rows = vec![0.0; (9 - first) * inputs];
        reader.rows(first, &mut rows);
        assert_eq!(rows, expected[first..].concat(), "{first}");
    }
    assert_eq!(reader.row_bytes(1).unwrap(), &tensors[0].3[36..48]);
    assert!(reader.row_bytes(3).is_none());
    assert_eq!(
        reader.bias().unwrap(),
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 3.0, 5.0]
    );
    let error = checkpoint
        .linear(&LinearSpec::stored("a", 3, 6, false))
        .unwrap_err();
    assert!(error.to_string().contains("a.weight"), "{error}");
}

/// Every half and every bf16 number, against what their bits mean.
#[test]
fn widening_is_exact() {
    let halves: Vec<u16> = (0..=u16::MAX).collect();
    let bytes: Vec<u8> = halves.iter().flat_map(|half| half.to_le_bytes()).collect();
    let scratch = Scratch::new();
    let shape = vec![halves.len()];
    write(
        &scratch.0,
        &[
            ("f16".to_owned(), "F16", shape.clone(), bytes.clone()),
            ("bf16".to_owned(), "BF16", shape, bytes),
        ],
    );
    let checkpoint = Checkpoint::open(&scratch.0).unwrap();
    let (f16, bf16) = (
        checkpoint.vector("f16", 65_536).unwrap(),
        checkpoint.vector("bf16", 65_536).unwrap(),
    );
    for half in halves {
        let (exponent, mantissa) = (i32::from(half >> 10 & 31), f64::from(half & 1023));
        let sign = if half >> 15 == 1 { -1.0 } else { 1.0 };
        let value = match exponent {
            0 => sign * mantissa * 2.0_f64.powi(-24),
            31 if mantissa == 0.0 => sign * f64::INFINITY,
            31 => f64::NAN,
            _ => sign * (1.0 + mantissa / 1024.0) * 2.0_f64.powi(exponent - 15),
        };
        let found = f16[usize::from(half)];
        assert!(
            f64::from(found) == value || found.is_nan() && value.is_nan(),
            "{half:#x}: {found}"
        );
        assert_eq!(found.is_sign_negative(), half >> 15 == 1);
        assert_eq!(bf16[usize::from(half)].to_bits() >> 16, u32::from(half));
    }
}
