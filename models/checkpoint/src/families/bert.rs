//! BERT, RoBERTa and XLM-RoBERTa: encoders, alone or with a classifier on top (rerankers are classifiers with one class).

use serde_json::Value;

use super::{check_layers, gpt2::layer_norm, head_dim, weight_type};
use crate::error::ConfigError;
use crate::keys::Keys;
use crate::spec::{
    Activation, AttentionSpec, DenseMlp, EmbeddingSpec, LayerSpec, LinearSpec, ModelSpec,
    OutputSpec, PositionSpec, ResidualNorms,
};

/// Where the two kinds differ.
struct Kind {
    /// Of the tensors' names.
    prefix: &'static str,
    /// `{prefix}.pooler.dense`, or the name of a classifier's own first map.
    pooler: String,
    classifier: &'static str,
    /// Of the row of the first position.
    position_offset: usize,
}

pub(super) fn bert(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    encoder(
        keys,
        &Kind {
            prefix: "bert",
            pooler: "bert.pooler.dense".to_owned(),
            classifier: "classifier",
            position_offset: 0,
        },
    )
}

pub(super) fn roberta(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    // Padding has the row of its own number, and the first token the next one.
    let padding = match keys.token_ids("pad_token_id")?.first() {
        None => 1,
        Some(padding) => *padding as usize,
    };
    encoder(
        keys,
        &Kind {
            prefix: "roberta",
            pooler: "classifier.dense".to_owned(),
            classifier: "classifier.out_proj",
            position_offset: padding + 1,
        },
    )
}

fn encoder(keys: &Keys<'_>, kind: &Kind) -> Result<ModelSpec, ConfigError> {
    keys.only("position_embedding_type", &Value::from("absolute"))?;
    keys.absent("is_decoder", "false: an encoder")?;
    keys.absent("add_cross_attention", "false: an encoder alone")?;
    // Ties a head that is not computed.
    keys.ignore(&["tie_word_embeddings"]);
    let hidden = keys.size("hidden_size")?;
    let vocab_size = keys.size("vocab_size")?;
    let eps = keys.positive_or("layer_norm_eps", 1e-12)? as f32;
    let rows = keys.size_or("max_position_embeddings", 512)?;
    let positions = rows.saturating_sub(kind.position_offset);
    if positions == 0 {
        return Err(ConfigError::Inconsistent(format!(
            "max_position_embeddings = {rows}, of which the first {} are not for tokens",
            kind.position_offset
        )));
    }
    let embedding = |part: &str| format!("{}.embeddings.{part}", kind.prefix);
    let weight = |part: &str| format!("{}.weight", embedding(part));
    let architecture = super::architecture(keys)?;
    let output = output(keys, kind, &architecture, hidden)?;
    Ok(ModelSpec {
        architecture,
        vocab_size,
        hidden_size: hidden,
        context_length: super::context_length(keys, positions),
        embedding: EmbeddingSpec {
            tokens: weight("word_embeddings"),
            scale: None,
            positions: Some(PositionSpec {
                tensor: weight("position_embeddings"),
                rows,
                offset: kind.position_offset,
            }),
            token_types: Some((
                weight("token_type_embeddings"),
                keys.size_or("type_vocab_size", 2)?,
            )),
            norm: Some(layer_norm(&embedding("LayerNorm"), hidden, eps)),
        },
        layers: layers(keys, kind.prefix, hidden, eps)?,
        ropes: Vec::new(),
        final_norm: None,
        output,
        bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
        eos_token_ids: keys.token_ids("eos_token_id")?,
        weight_type: weight_type(keys)?,
    })
}

fn layers(
    keys: &Keys<'_>,
    prefix: &str,
    hidden: usize,
    eps: f32,
) -> Result<Vec<LayerSpec>, ConfigError> {
    let heads = keys.size("num_attention_heads")?;
    let head_dim = head_dim(hidden, heads, "num_attention_heads")?;
    let inner = keys.size("intermediate_size")?;
    let activation = super::activation(keys, "hidden_act", Activation::GeluErf)?;
    let layers = check_layers("num_hidden_layers", keys.size("num_hidden_layers")?)?;
    let layer = |index: usize| {
        let name = format!("{prefix}.encoder.layer.{index}");
        let map = |part: &str, inputs, outputs| {
            LinearSpec::stored(&format!("{name}.{part}"), inputs, outputs, true)
        };
        // Over the sum of a branch and its input.
        let norm = |part: &str| ResidualNorms {
            sum: Some(layer_norm(&format!("{name}.{part}"), hidden, eps)),
            ..ResidualNorms::default()
        };
        let parts = ["query", "key", "value"].map(|part| format!("{name}.attention.self.{part}"));
        let parts = parts.each_ref().map(|part| (part.as_str(), hidden));
        let attention = AttentionSpec {
            heads,
            kv_heads: heads,
            head_dim,
            qkv: LinearSpec::stacked(&parts, hidden, true),
            output: map("attention.output.dense", hidden, hidden),
            q_norm: None,
            k_norm: None,
            scale: (head_dim as f64).sqrt().recip() as f32,
            soft_cap: None,
            window: None,
            rope: None,
            causal: false,
        };
        let mlp = DenseMlp {
            activation,
            gated: false,
            up: map("intermediate.dense", hidden, inner),
            down: map("output.dense", inner, hidden),
        };
        LayerSpec {
            attention,
            attention_norms: norm("attention.output.LayerNorm"),
            mlp: mlp.into(),
            mlp_norms: norm("output.LayerNorm"),
            parallel: false,
        }
    };
    Ok((0..layers).map(layer).collect())
}

/// Hidden states; a classifier's scores, from the pooled first row, where the architecture has one.
fn output(
    keys: &Keys<'_>,
    kind: &Kind,
    architecture: &str,
    hidden: usize,
) -> Result<OutputSpec, ConfigError> {
    if !architecture.ends_with("ForSequenceClassification") {
        keys.ignore(&["num_labels"]);
        return Ok(OutputSpec::Hidden {
            pooler: None,
            classifier: None,
        });
    }
    let names = keys.get("id2label").and_then(Value::as_object);
    // transformers' own default is two classes.
    let classes = keys.size_or("num_labels", names.map_or(2, |names| names.len().max(1)))?;
    Ok(OutputSpec::Hidden {
        pooler: Some((
            LinearSpec::stored(&kind.pooler, hidden, hidden, true),
            Activation::Tanh,
        )),
        classifier: Some(LinearSpec::stored(kind.classifier, hidden, classes, true)),
    })
}
