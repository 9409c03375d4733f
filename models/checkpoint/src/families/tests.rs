use serde_json::{Value, json};

use super::*;
use crate::rope::RopeScaling;
use crate::spec::{NormKind, OutputSpec};

/// A small file of a Llama-like family.
pub(crate) fn decoder(architecture: &str, model_type: &str) -> Value {
    json!({
        "architectures": [architecture], "model_type": model_type, "vocab_size": 100, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        "bos_token_id": 1, "eos_token_id": [2, 3],
    })
}

fn llama() -> Value {
    let mut config = decoder("LlamaForCausalLM", "llama");
    config["rope_theta"] = json!(5000.0);
    config["rope_scaling"] = Value::Null;
    config["torch_dtype"] = json!("bfloat16");
    config
}

fn with(mut config: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn without(mut config: Value, key: &str) -> Value {
    config.as_object_mut().unwrap().remove(key);
    config
}

fn spec(config: &Value) -> ModelSpec {
    from_json(&config.to_string()).unwrap_or_else(|error| panic!("{error}"))
}

/// The message of a refusal, which names the key.
fn refused(config: &Value, part: &str) {
    match from_json(&config.to_string()) {
        Ok(_) => panic!("{part}: read"),
        Err(error) => assert!(error.to_string().contains(part), "{part}: {error}"),
    }
}

fn windows(spec: &ModelSpec) -> Vec<Option<usize>> {
    spec.layers
        .iter()
        .map(|layer| layer.attention.window)
        .collect()
}

fn names(spec: &ModelSpec) -> Vec<String> {
    spec.tensors().into_iter().map(|(name, _)| name).collect()
}

#[test]
fn llama_in_the_spelling_of_transformers_4() {
    let spec = spec(&llama());
    let attention = &spec.layers[0].attention;
    assert_eq!(
        (attention.heads, attention.kv_heads, attention.head_dim),
        (4, 2, 16)
    );
    assert_eq!(
        (attention.scale, attention.rope, attention.window),
        (0.25, Some(0), None)
    );
    assert_eq!(attention.qkv.outputs, 128);
    assert!(attention.qkv.bias.is_empty() && attention.causal);
    assert_eq!(spec.ropes[0].theta, 5000.0);
    assert_eq!(
        (spec.bos_token_id, &*spec.eos_token_ids),
        (Some(1), &[2, 3][..])
    );
    assert_eq!(spec.weight_type, Some(WeightType::Bf16));
    assert!(matches!(
        spec.output,
        OutputSpec::Logits {
            head: None,
            soft_cap: None
        }
    ));
    assert_eq!((spec.layers.len(), spec.context_length), (4, 128));
}

#[test]
fn llama_in_the_spelling_of_transformers_5() {
    let config = without(without(llama(), "rope_theta"), "torch_dtype");
    let spec = spec(&with(
        config,
        json!({
            "rope_parameters": {"rope_theta": 7000.0, "rope_type": "default"},
            "dtype": "float32", "head_dim": 32, "eos_token_id": 9, "attention_bias": true, "mlp_bias": true,
        }),
    ));
    assert_eq!(spec.ropes[0].theta, 7000.0);
    assert_eq!(spec.weight_type, Some(WeightType::F32));
    assert_eq!(spec.eos_token_ids, [9]);
    let names = names(&spec);
    for bias in [
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
    ] {
        assert!(
            names.contains(&format!("model.layers.3.{bias}.bias")),
            "{bias}"
        );
    }
}

#[test]
fn absent_keys_take_the_defaults_of_transformers() {
    let spec = spec(&without(
        without(llama(), "num_key_value_heads"),
        "tie_word_embeddings",
    ));
    assert_eq!(spec.layers[0].attention.kv_heads, 4);
    assert!(matches!(
        spec.output,
        OutputSpec::Logits { head: Some(_), .. }
    ));
    assert!(
        super::from_json_within(&llama().to_string(), Some(40))
            .unwrap()
            .context_length
            == 40
    );
}

#[test]
fn refusals_name_the_key() {
    let cases = [
        (
            with(llama(), json!({"model_type": "mistral"})),
            "model_type",
        ),
        (without(llama(), "model_type"), "model_type"),
        (
            with(
                llama(),
                json!({"architectures": ["LlamaForSequenceClassification"]}),
            ),
            "LlamaForCausalLM, MistralForCausalLM",
        ),
        (
            with(
                llama(),
                json!({"architectures": ["Gemma3ForConditionalGeneration"]}),
            ),
            "images",
        ),
        (without(llama(), "hidden_size"), "hidden_size"),
        (with(llama(), json!({"hidden_act": "mish"})), "hidden_act"),
        (
            with(llama(), json!({"num_key_value_heads": 3})),
            "num_key_value_heads",
        ),
        (
            with(llama(), json!({"num_key_value_heads": 0})),
            "num_key_value_heads",
        ),
        (
            with(llama(), json!({"num_attention_heads": 0})),
            "num_attention_heads",
        ),
        (with(llama(), json!({"vocab_size": -5})), "vocab_size"),
        (
            with(llama(), json!({"num_hidden_layers": i32::MAX})),
            "num_hidden_layers",
        ),
        (with(llama(), json!({"head_dim": 7})), "head_dim"),
        (with(llama(), json!({"rms_norm_eps": 0.0})), "rms_norm_eps"),
        (
            with(llama(), json!({"torch_dtype": "float8"})),
            "torch_dtype",
        ),
        (
            with(llama(), json!({"quantization_config": {"bits": 4}})),
            "quantization_config",
        ),
        (with(llama(), json!({"logit_scale": 0.5})), "logit_scale"),
        (
            with(llama(), json!({"partial_rotary_factor": 0.5})),
            "partial_rotary_factor",
        ),
        (
            with(
                llama(),
                json!({"rope_scaling": {"rope_type": "proportional"}}),
            ),
            "rope_type",
        ),
        (
            with(llama(), json!({"rope_scaling": {"type": "linear"}})),
            "factor",
        ),
        (
            with(
                llama(),
                json!({"rope_scaling": {"type": "linear", "factor": 2.0, "odd": 1}}),
            ),
            "odd",
        ),
    ];
    for (config, part) in cases {
        refused(&config, part);
    }
    assert!(from_json("{").is_err() && from_json("[1]").is_err());
}

#[test]
fn a_rope_rule_is_understood_or_refused() {
    let rule = json!({"rope_type": "linear", "factor": 2.0});
    let old = |rule: Value| with(llama(), json!({"rope_scaling": rule}));
    let both = |new: &Value, old: Value| {
        with(
            llama(),
            json!({"rope_parameters": new, "rope_scaling": old}),
        )
    };
    for (config, part) in [
        (old(json!({"factor": 2.0})), "rope_type"),
        (old(json!({"type": 3, "factor": 2.0})), "rope_type = 3"),
        (
            old(json!({"rope_type": null, "factor": 2.0})),
            "rope_type = null",
        ),
        (old(json!("linear")), "rope_type"),
        (
            old(json!({"rope_type": "linear", "type": "llama3", "factor": 2.0})),
            "type = \"llama3\"",
        ),
        (
            both(&rule, json!({"rope_type": "linear", "factor": 4.0})),
            "rope_parameters and rope_scaling",
        ),
        (
            both(&json!({"rope_theta": 1e4, "factor": 2.0}), Value::Null),
            "rope_type",
        ),
    ] {
        refused(&config, part);
    }
    for config in [
        both(&rule, json!({"type": "linear", "factor": 2.0})),
        both(&rule, Value::Null),
        old(json!({"type": "linear", "rope_type": "linear", "factor": 2.0})),
    ] {
        assert_eq!(
            spec(&config).ropes[0].scaling,
            RopeScaling::Linear { factor: 2.0 }
        );
    }
    for none in [
        json!({}),
        json!({"rope_theta": 9.0}),
        json!({"rope_type": "default"}),
    ] {
        let spec = spec(&both(&none, Value::Null));
        assert_eq!(spec.ropes[0].scaling, RopeScaling::None);
    }
}

#[test]
fn mistral_has_a_window_unless_the_file_says_null() {
    let config = with(
        decoder("MistralForCausalLM", "mistral"),
        json!({"max_position_embeddings": 9000}),
    );
    assert_eq!(windows(&spec(&config)), [Some(4096); 4]);
    let set = |window: Value| with(config.clone(), json!({"sliding_window": window}));
    assert_eq!(windows(&spec(&set(Value::Null))), [None; 4]);
    assert_eq!(windows(&spec(&set(json!(7)))), [Some(7); 4]);
    // As wide as the context: no window.
    assert_eq!(windows(&spec(&set(json!(9000)))), [None; 4]);
}

#[test]
fn qwen2_has_biases_and_windows_of_its_own() {
    let config = with(
        decoder("Qwen2ForCausalLM", "qwen2"),
        json!({"sliding_window": 32, "max_window_layers": 2, "use_sliding_window": false}),
    );
    let plain = spec(&config);
    assert_eq!(windows(&plain), [None; 4]);
    assert_eq!(plain.layers[0].attention.qkv.bias.len(), 3);
    assert!(plain.layers[0].attention.output.bias.is_empty());
    let used = with(config, json!({"use_sliding_window": true}));
    assert_eq!(windows(&spec(&used)), [None, None, Some(32), Some(32)]);
    let (full, sliding) = ("full_attention", "sliding_attention");
    let listed = with(
        used.clone(),
        json!({"layer_types": [sliding, full, full, sliding]}),
    );
    assert_eq!(windows(&spec(&listed)), [Some(32), None, None, Some(32)]);
    assert_eq!(
        windows(&spec(&with(used.clone(), json!({"max_window_layers": 0})))),
        [Some(32); 4]
    );
    refused(&with(used, json!({"layer_types": [full]})), "layer_types");
}

#[test]
fn qwen3_norms_heads() {
    let spec = spec(&decoder("Qwen3ForCausalLM", "qwen3"));
    let attention = &spec.layers[1].attention;
    assert_eq!(attention.head_dim, 128);
    let norm = attention.q_norm.as_ref().unwrap();
    assert_eq!((norm.size, norm.kind), (128, NormKind::Rms));
    assert_eq!(norm.weight, "model.layers.1.self_attn.q_norm.weight");
    assert!(attention.qkv.bias.is_empty());
}

#[test]
fn mixtures_have_their_experts() {
    let config = with(
        decoder("Qwen3MoeForCausalLM", "qwen3_moe"),
        json!({"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": true,
               "mlp_only_layers": [1], "decoder_sparse_step": 2}),
    );
    let qwen = spec(&config);
    let sparse: Vec<bool> = qwen
        .layers
        .iter()
        .map(|layer| matches!(layer.mlp, MlpSpec::Experts(_)))
        .collect();
    assert_eq!(sparse, [false, false, false, true]);
    let MlpSpec::Experts(mixture) = &qwen.layers[3].mlp else {
        unreachable!()
    };
    assert_eq!(
        (mixture.experts.len(), mixture.top_k, mixture.normalised),
        (6, 2, true)
    );
    assert_eq!(mixture.experts[5].up.outputs, 48);
    assert!(names(&qwen).contains(&"model.layers.3.mlp.experts.5.up_proj.weight".to_owned()));
    refused(
        &with(config, json!({"num_experts_per_tok": 7})),
        "num_experts_per_tok",
    );

    let mixtral = spec(&with(
        decoder("MixtralForCausalLM", "mixtral"),
        json!({"num_local_experts": 3}),
    ));
    let MlpSpec::Experts(mixture) = &mixtral.layers[0].mlp else {
        unreachable!()
    };
    assert!(mixture.normalised && mixture.top_k == 2);
    assert_eq!(
        mixture.experts[1].up.weight[1].tensor,
        "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    );
    assert_eq!(mixtral.ropes[0].theta, 1e6);
}

#[test]
fn gemma2_is_capped_and_scaled() {
    let config = with(
        decoder("Gemma2ForCausalLM", "gemma2"),
        json!({"sliding_window": 8, "query_pre_attn_scalar": 100, "hidden_act": "gelu", "head_dim": 16}),
    );
    let config = without(config, "tie_word_embeddings");
    let gemma = spec(&config);
    assert_eq!(windows(&gemma), [Some(8), None, Some(8), None]);
    assert_eq!(
        (gemma.embedding.scale, gemma.layers[0].attention.scale),
        (Some(8.0), 0.1)
    );
    assert_eq!(gemma.layers[0].attention.soft_cap, Some(50.0));
    assert!(matches!(
        gemma.output,
        OutputSpec::Logits {
            head: None,
            soft_cap: Some(30.0)
        }
    ));
    let norms = &gemma.layers[0].mlp_norms;
    assert_eq!(
        norms.output.as_ref().unwrap().weight,
        "model.layers.0.post_feedforward_layernorm.weight"
    );
    assert_eq!(norms.input.as_ref().unwrap().kind, NormKind::RmsPlusOne);
    let MlpSpec::Dense(mlp) = &gemma.layers[0].mlp else {
        unreachable!()
    };
    assert_eq!(mlp.activation, Activation::GeluTanh);
    let off = spec(&with(config, json!({"attn_logit_softcapping": null})));
    assert_eq!(off.layers[0].attention.soft_cap, None);
}

#[test]
fn gemma3_turns_by_two_thetas_in_both_spellings() {
    let config = with(
        decoder("Gemma3ForCausalLM", "gemma3_text"),
        json!({"sliding_window": 8, "sliding_window_pattern": 3, "head_dim": 16}),
    );
    let old = spec(&with(
        config.clone(),
        json!({"rope_theta": 2e6, "rope_local_base_freq": 3e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ));
    let new = spec(&with(
        config.clone(),
        json!({"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        }}),
    ));
    assert_eq!(old, new);
    assert_eq!((new.ropes[0].theta, new.ropes[1].theta), (2e6, 3e4));
    assert_eq!(new.ropes[1].scaling, RopeScaling::None);
    let ropes: Vec<Option<usize>> = new
        .layers
        .iter()
        .map(|layer| layer.attention.rope)
        .collect();
    assert_eq!(ropes, [Some(1), Some(1), Some(0), Some(1)]);
    assert_eq!(windows(&new), [Some(8), Some(8), None, Some(8)]);
    assert_eq!(
        new.layers[0].attention.k_norm.as_ref().unwrap().kind,
        NormKind::RmsPlusOne
    );
    for (change, key) in [
        (
            json!({"use_bidirectional_attention": true}),
            "use_bidirectional_attention",
        ),
        (
            json!({"attn_logit_softcapping": 30.0}),
            "attn_logit_softcapping",
        ),
        (
            json!({"rope_parameters": {"rope_type": "default"}}),
            "rope_parameters",
        ),
    ] {
        refused(&with(config.clone(), change), key);
    }
}

#[test]
fn phi3_is_fused_and_takes_factors_by_the_context() {
    let config = with(
        decoder("Phi3ForCausalLM", "phi3"),
        json!({"rope_scaling": {"type": "su", "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [5.0, 6.0, 7.0, 8.0]},
               "original_max_position_embeddings": 32, "partial_rotary_factor": 0.5, "sliding_window": 16}),
    );
    let long = spec(&config);
    let short = from_json_within(&config.to_string(), Some(32)).unwrap();
    let factors = |spec: &ModelSpec| match &spec.ropes[0].scaling {
        RopeScaling::PerFrequency { factors, .. } => factors[0],
        other => panic!("{other:?}"),
    };
    assert_eq!((factors(&long), factors(&short)), (5.0, 1.0));
    assert_eq!(
        long.ropes[0].attention_factor(),
        short.ropes[0].attention_factor()
    );
    assert_eq!(long.ropes[0].rotary_dim, 8);
    let attention = &long.layers[0].attention;
    assert_eq!(
        (
            attention.qkv.weight.len(),
            attention.qkv.outputs,
            attention.window
        ),
        (1, 128, Some(16))
    );
    let rule = json!({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]});
    refused(&with(config, json!({"rope_scaling": rule})), "long_factor");
}

#[test]
fn smollm3_has_layers_that_do_not_turn() {
    let config = with(
        decoder("SmolLM3ForCausalLM", "smollm3"),
        json!({"no_rope_layer_interval": 2}),
    );
    let ropes = |spec: &ModelSpec| -> Vec<bool> {
        spec.layers
            .iter()
            .map(|layer| layer.attention.rope.is_some())
            .collect()
    };
    assert_eq!(ropes(&spec(&config)), [true, false, true, false]);
    let listed = with(
        config,
        json!({"no_rope_layers": [0, 1, 1, 0], "use_sliding_window": true, "sliding_window": 9}),
    );
    let spec = spec(&listed);
    assert_eq!(ropes(&spec), [false, true, true, false]);
    assert_eq!(windows(&spec), [Some(9), None, None, Some(9)]);
}

#[test]
fn gpt2_is_stored_the_other_way_round() {
    let config = json!({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50, "n_embd": 12, "n_layer": 2, "n_head": 3,
        "n_positions": 20, "n_ctx": 20, "scale_attn_by_inverse_layer_idx": true,
    });
    let gpt2 = spec(&config);
    let shape = gpt2
        .tensors()
        .into_iter()
        .find(|(name, _)| name == "transformer.h.1.attn.c_attn.weight");
    assert_eq!(shape.unwrap().1, [12, 36]);
    assert_eq!(
        (
            gpt2.layers[0].attention.scale,
            gpt2.layers[1].attention.scale
        ),
        (0.5, 0.25)
    );
    assert_eq!(gpt2.embedding.positions.as_ref().unwrap().rows, 20);
    refused(
        &with(config, json!({"add_cross_attention": true})),
        "add_cross_attention",
    );
}

#[test]
fn gpt_neox_has_each_heads_rows_together() {
    let config = with(
        without(
            without(decoder("GPTNeoXForCausalLM", "gpt_neox"), "rms_norm_eps"),
            "num_key_value_heads",
        ),
        json!({"rotary_pct": 0.5, "rotary_emb_base": 900, "layer_norm_eps": 1e-5, "tie_word_embeddings": false}),
    );
    let old = spec(&config);
    let new = without(without(config, "rotary_pct"), "rotary_emb_base");
    let rule = json!({"rope_type": "default", "rope_theta": 900, "partial_rotary_factor": 0.5});
    assert_eq!(old, spec(&with(new, json!({"rope_parameters": rule}))));
    assert!(old.layers[0].parallel);
    assert_eq!((old.ropes[0].rotary_dim, old.ropes[0].theta), (8, 900.0));
    let keys = &old.layers[0].attention.qkv.weight[1].rows;
    // The second head's first key is behind a whole head and the head's own queries.
    assert_eq!((keys.stored(0), keys.stored(16)), (16, 48 + 16));
    assert_eq!((keys.rows(), keys.end()), (64, 176));
}

#[test]
fn encoders_alone_and_with_a_classifier() {
    let config = |architecture: &str, model_type: &str| {
        json!({
            "architectures": [architecture], "model_type": model_type, "vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 3, "intermediate_size": 20, "max_position_embeddings": 34, "id2label": {"0": "LABEL_0"},
        })
    };
    let bert = spec(&config("BertModel", "bert"));
    assert!(!bert.generates() && !bert.layers[0].attention.causal && bert.final_norm.is_none());
    assert_eq!(
        (
            bert.context_length,
            bert.embedding.positions.as_ref().unwrap().offset
        ),
        (34, 0)
    );
    assert!(bert.layers[0].mlp_norms.sum.is_some() && bert.layers[0].mlp_norms.input.is_none());
    let roberta = spec(&config(
        "XLMRobertaForSequenceClassification",
        "xlm-roberta",
    ));
    assert_eq!(
        (
            roberta.context_length,
            roberta.embedding.positions.as_ref().unwrap().offset
        ),
        (32, 2)
    );
    let OutputSpec::Hidden {
        pooler: Some((pooler, Activation::Tanh)),
        classifier: Some(classifier),
    } = &roberta.output
    else {
        panic!("{:?}", roberta.output)
    };
    assert_eq!(pooler.weight[0].tensor, "classifier.dense.weight");
    assert_eq!(
        (classifier.outputs, &*classifier.weight[0].tensor),
        (1, "classifier.out_proj.weight")
    );
    let relative = with(
        config("BertModel", "bert"),
        json!({"position_embedding_type": "relative_key"}),
    );
    refused(&relative, "position_embedding_type");
}
