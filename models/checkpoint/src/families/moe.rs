//! Sparse mixtures of experts: Qwen 3 MoE and Mixtral. Both route by the softmax over all experts.

use super::{Decoder, Defaults, gated_mlp, qwen};
use crate::error::ConfigError;
use crate::keys::Keys;
use crate::spec::{Activation, DenseMlp, ExpertsSpec, LinearSpec, MlpSpec, ModelSpec};

/// Experts of all layers at most: far beyond every model, and few enough that a hostile number allocates little.
const MAX_EXPERTS: usize = 1 << 17;

/// How many experts there are, and how many a row goes through.
struct Mixture {
    experts: usize,
    top_k: usize,
    normalised: bool,
}

impl Mixture {
    fn new(
        keys: &Keys<'_>,
        layers: usize,
        experts: usize,
        top_k: usize,
        normalised: bool,
    ) -> Result<Self, ConfigError> {
        let top_k = keys.size_or("num_experts_per_tok", top_k)?;
        if top_k > experts {
            return Err(ConfigError::Inconsistent(format!(
                "num_experts_per_tok = {top_k} is more than the {experts} experts there are"
            )));
        }
        if experts.saturating_mul(layers) > MAX_EXPERTS {
            return Err(ConfigError::Inconsistent(format!(
                "{layers} layers of num_experts = {experts}; no model has more than {MAX_EXPERTS} experts"
            )));
        }
        Ok(Self {
            experts,
            top_k,
            normalised,
        })
    }

    /// The router is `{name}.gate`; `expert` makes the one of an index.
    fn spec(&self, name: &str, hidden: usize, expert: impl Fn(usize) -> DenseMlp) -> MlpSpec {
        MlpSpec::Experts(ExpertsSpec {
            router: LinearSpec::stored(&format!("{name}.gate"), hidden, self.experts, false),
            experts: (0..self.experts).map(expert).collect(),
            top_k: self.top_k,
            normalised: self.normalised,
        })
    }
}

/// Qwen 3 MoE: some layers may be dense; the weights of the chosen experts are normalised if the file says so.
pub(super) fn qwen3(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read_with(
        keys,
        &Defaults {
            kv_heads: Some(4),
            ..qwen::defaults()
        },
    )?;
    let bias = keys.flag_or("attention_bias", false)?;
    let window = qwen::window(keys)?;
    let activation = super::activation(keys, "hidden_act", Activation::Silu)?;
    // transformers 5 writes the second name.
    let experts = match keys.size_if("num_experts")? {
        Some(experts) => {
            keys.ignore(&["num_local_experts"]);
            experts
        }
        None => keys.size_or("num_local_experts", 128)?,
    };
    let normalised = keys.flag_or("norm_topk_prob", false)?;
    let mixture = Mixture::new(keys, decoder.layers, experts, 8, normalised)?;
    let sparse = sparse_layers(keys, decoder.layers)?;
    let expert_inner = keys.size_or("moe_intermediate_size", 768)?;
    let dense_inner = keys.size_or("intermediate_size", 6144)?;
    let hidden = decoder.hidden_size;
    let gated = |name: &str, inner| gated_mlp(name, hidden, inner, false, activation);
    decoder.build(|index| {
        let name = format!("model.layers.{index}");
        let mut attention = qwen::normed_attention(&decoder, &format!("{name}.self_attn"), bias);
        attention.window = decoder.window(window);
        let mlp = format!("{name}.mlp");
        let mlp = match sparse[index] {
            true => mixture.spec(&mlp, hidden, |expert| {
                gated(&format!("{mlp}.experts.{expert}"), expert_inner)
            }),
            false => gated(&mlp, dense_inner).into(),
        };
        decoder.layer(&name, attention, mlp)
    })
}

/// Which layers are mixtures: every `decoder_sparse_step`th, but for those that are listed as dense.
fn sparse_layers(keys: &Keys<'_>, layers: usize) -> Result<Vec<bool>, ConfigError> {
    let step = keys.size_or("decoder_sparse_step", 1)?;
    let dense: Option<Vec<u64>> = match keys.list_if("mlp_only_layers")? {
        None => Some(Vec::new()),
        Some(list) => list.iter().map(serde_json::Value::as_u64).collect(),
    };
    let dense = dense.ok_or_else(|| keys.unsupported("mlp_only_layers", "a list of layers"))?;
    Ok((0..layers)
        .map(|layer| !dense.contains(&(layer as u64)) && (layer + 1).is_multiple_of(step))
        .collect())
}

/// Mixtral: the weights of the chosen experts always sum to 1.
pub(super) fn mixtral(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read_with(
        keys,
        &Defaults {
            eps: 1e-5,
            theta: 1e6,
            kv_heads: Some(8),
            positions: 4096 * 32,
            ..Defaults::default()
        },
    )?;
    let window = keys.size_if("sliding_window")?;
    let activation = super::activation(keys, "hidden_act", Activation::Silu)?;
    let experts = keys.size_or("num_local_experts", 8)?;
    let mixture = Mixture::new(keys, decoder.layers, experts, 2, true)?;
    let inner = keys.size("intermediate_size")?;
    let hidden = decoder.hidden_size;
    decoder.build(|index| {
        let name = format!("model.layers.{index}");
        let mut attention = decoder.attention(&format!("{name}.self_attn"), false);
        attention.window = decoder.window(window);
        let moe = format!("{name}.block_sparse_moe");
        let mlp = mixture.spec(&moe, hidden, |expert| {
            let part = |w: &str| format!("{moe}.experts.{expert}.{w}");
            DenseMlp {
                activation,
                gated: true,
                up: LinearSpec::stacked(
                    &[(&part("w1"), inner), (&part("w3"), inner)],
                    hidden,
                    false,
                ),
                down: LinearSpec::stored(&part("w2"), inner, hidden, false),
            }
        });
        decoder.layer(&name, attention, mlp)
    })
}
