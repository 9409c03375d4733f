//! What a model computes, as data: a family's `config.json` is turned into this description, and executors compute it.
//!
//! ```text
//! x = embedding(id) (* scale) (+ position) (+ type) (-> norm)
//! each layer:  x = residual(x, attention)    x = residual(x, mlp)
//!     residual(x, f) = sum_norm( x + output_norm( f( input_norm(x) ) ) )        every norm may be absent
//!     parallel: x + attention(input_norm(x)) + mlp(mlp's input_norm(x))
//! hidden = final_norm(x);  logits = soft_cap( head(hidden) * scale )
//! ```
//!
//! Invariant: a description says everything that changes the mathematics. An executor computes all of it or refuses; it never looks at
//! `config.json`, and no family has code of its own in an executor.

use crate::rope::RopeSpec;

/// A whole model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Name in `architectures`, such as `LlamaForCausalLM`.
    pub architecture: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    /// Positions of a sequence at most.
    pub context_length: usize,
    pub embedding: EmbeddingSpec,
    pub layers: Vec<LayerSpec>,
    /// Rotary embeddings that layers refer to by index; empty for learned positions.
    pub ropes: Vec<RopeSpec>,
    pub final_norm: Option<NormSpec>,
    pub output: OutputSpec,
    pub bos_token_id: Option<u32>,
    /// Every id that ends a text; empty when the file names none.
    pub eos_token_ids: Vec<u32>,
    /// In which width the file says its weights are stored; the tensors themselves always say.
    pub weight_type: Option<WeightType>,
}

/// Element type that `config.json` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    F32,
    Bf16,
    F16,
}

/// How ids become rows.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingSpec {
    /// `[vocab, hidden]`.
    pub tokens: String,
    /// Every element is multiplied by it (Gemma).
    pub scale: Option<f32>,
    /// Learned positions.
    pub positions: Option<PositionSpec>,
    /// `[types, hidden]`: row 0 is added to every row (BERT; all tokens are of type 0).
    pub token_types: Option<(String, usize)>,
    pub norm: Option<NormSpec>,
}

/// A table of learned positions, `[rows, hidden]`; position `p` has row `p + offset`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PositionSpec {
    pub tensor: String,
    pub rows: usize,
    pub offset: usize,
}

/// One layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    pub attention: AttentionSpec,
    pub attention_norms: ResidualNorms,
    pub mlp: MlpSpec,
    pub mlp_norms: ResidualNorms,
    /// Both branches read the layer's input, and both are added to it (GPT-NeoX).
    pub parallel: bool,
}

/// The norms around one branch; see the module's diagram.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ResidualNorms {
    pub input: Option<NormSpec>,
    pub output: Option<NormSpec>,
    pub sum: Option<NormSpec>,
}

impl ResidualNorms {
    /// The usual one: before the branch only.
    #[must_use]
    pub fn before(norm: NormSpec) -> Self {
        Self {
            input: Some(norm),
            ..Self::default()
        }
    }
}

/// A normalisation over the last dimension.
#[derive(Debug, Clone, PartialEq)]
pub struct NormSpec {
    pub kind: NormKind,
    /// `[size]`.
    pub weight: String,
    /// `[size]`; for [`NormKind::Layer`].
    pub bias: Option<String>,
    pub size: usize,
    pub eps: f32,
}

/// Which normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps) * weight`.
    Rms,
    /// The same by `1 + weight` (Gemma).
    RmsPlusOne,
    /// `(x - mean) / sqrt(variance + eps) * weight + bias`.
    Layer,
}

/// A linear map `[rows, inputs] -> [rows, outputs]`, put together from tensors of the checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearSpec {
    pub inputs: usize,
    pub outputs: usize,
    /// Stacked in order, they are the `[outputs, inputs]` weight.
    pub weight: Vec<WeightPart>,
    /// Stacked in order, they are the `[outputs]` bias; empty for none.
    pub bias: Vec<BiasPart>,
}

/// Rows of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightPart {
    pub tensor: String,
    /// Outputs of the stored tensor.
    pub stored_outputs: usize,
    /// Stored as `[inputs, outputs]` (GPT-2's Conv1D).
    pub transposed: bool,
    pub rows: RowPattern,
}

/// Elements of one bias vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BiasPart {
    pub tensor: String,
    pub stored_len: usize,
    pub rows: RowPattern,
}

/// `count` runs of `len` rows, the first at `first`, each `stride` after the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowPattern {
    pub first: usize,
    pub len: usize,
    pub stride: usize,
    pub count: usize,
}

impl RowPattern {
    /// Rows `first .. first + len`.
    #[must_use]
    pub fn range(first: usize, len: usize) -> Self {
        Self {
            first,
            len,
            stride: len,
            count: 1,
        }
    }

    /// How many rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.len * self.count
    }

    /// The stored row that is row `index` of the pattern.
    #[must_use]
    pub fn stored(&self, index: usize) -> usize {
        self.first + index / self.len * self.stride + index % self.len
    }

    /// One more than the last stored row.
    #[must_use]
    pub fn end(&self) -> usize {
        match self.rows() {
            0 => self.first,
            rows => self.stored(rows - 1) + 1,
        }
    }
}

impl LinearSpec {
    /// `{name}.weight` and, when `bias`, `{name}.bias`, as stored.
    #[must_use]
    pub fn stored(name: &str, inputs: usize, outputs: usize, bias: bool) -> Self {
        Self::stacked(&[(name, outputs)], inputs, bias)
    }

    /// Several maps of one input, one after the other in the output.
    #[must_use]
    pub fn stacked(parts: &[(&str, usize)], inputs: usize, bias: bool) -> Self {
        let weight = parts.iter().map(|(name, outputs)| WeightPart {
            tensor: format!("{name}.weight"),
            stored_outputs: *outputs,
            transposed: false,
            rows: RowPattern::range(0, *outputs),
        });
        let biases = parts
            .iter()
            .filter(|_| bias)
            .map(|(name, outputs)| BiasPart {
                tensor: format!("{name}.bias"),
                stored_len: *outputs,
                rows: RowPattern::range(0, *outputs),
            });
        Self {
            inputs,
            outputs: parts.iter().map(|(_, outputs)| outputs).sum(),
            weight: weight.collect(),
            bias: biases.collect(),
        }
    }
}

/// Grouped-query attention: query head `h` belongs to key head `h / (heads / kv_heads)`.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Outputs: all query heads, then all key heads, then all value heads.
    pub qkv: LinearSpec,
    pub output: LinearSpec,
    /// Over each head's elements, before rotary embedding.
    pub q_norm: Option<NormSpec>,
    pub k_norm: Option<NormSpec>,
    /// Scores are multiplied by it.
    pub scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// Position `p` sees the last `window` positions up to itself; `None` sees all.
    pub window: Option<usize>,
    /// Which of [`ModelSpec::ropes`]; `None` for none.
    pub rope: Option<usize>,
    /// Whether a position sees only those up to itself. Encoders see the whole sequence.
    pub causal: bool,
}

/// The feed-forward part of a layer.
#[derive(Debug, Clone, PartialEq)]
pub enum MlpSpec {
    Dense(DenseMlp),
    Experts(ExpertsSpec),
}

/// `down(act(gate(x)) * up(x))`, or `down(act(up(x)))`.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseMlp {
    pub activation: Activation,
    /// Whether there is a gate.
    pub gated: bool,
    /// Outputs: the gate's, if there is one, then those of `up`; each as many as `down` has inputs.
    pub up: LinearSpec,
    pub down: LinearSpec,
}

/// A sparse mixture: every row goes through its `top_k` best experts.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsSpec {
    /// Scores of the experts; their softmax over all experts gives the weights.
    pub router: LinearSpec,
    pub experts: Vec<DenseMlp>,
    pub top_k: usize,
    /// The chosen experts' weights are divided by their sum.
    pub normalised: bool,
}

/// An activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`: `gelu_new`, `gelu_pytorch_tanh`, `gelu_fast`.
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt(2)))`: `gelu`.
    GeluErf,
    Relu,
    /// Of a pooler only.
    Tanh,
}

/// What comes out.
#[derive(Debug, Clone, PartialEq)]
pub enum OutputSpec {
    /// Scores of the next token.
    Logits {
        /// `None`: the embedding's matrix (`tie_word_embeddings`).
        head: Option<LinearSpec>,
        /// `cap * tanh(logit / cap)`.
        soft_cap: Option<f32>,
    },
    /// An encoder's hidden states; what is made of them is the caller's.
    Hidden {
        /// `act(linear(row of the first token))`.
        pooler: Option<(LinearSpec, Activation)>,
        /// On the pooled row: scores, such as a reranker's.
        classifier: Option<LinearSpec>,
    },
}

impl ModelSpec {
    /// Every linear map with a name for messages and cache files, in a fixed order.
    pub fn linears(&self) -> Vec<(String, &LinearSpec)> {
        let mut all = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            all.push((format!("layers.{index}.qkv"), &layer.attention.qkv));
            all.push((format!("layers.{index}.output"), &layer.attention.output));
            match &layer.mlp {
                MlpSpec::Dense(mlp) => {
                    all.push((format!("layers.{index}.up"), &mlp.up));
                    all.push((format!("layers.{index}.down"), &mlp.down));
                }
                MlpSpec::Experts(mixture) => {
                    all.push((format!("layers.{index}.router"), &mixture.router));
                    for (expert, mlp) in mixture.experts.iter().enumerate() {
                        all.push((format!("layers.{index}.experts.{expert}.up"), &mlp.up));
                        all.push((format!("layers.{index}.experts.{expert}.down"), &mlp.down));
                    }
                }
            }
        }
        match &self.output {
            OutputSpec::Logits { head, .. } => {
                all.extend(head.iter().map(|head| ("head".to_owned(), head)));
            }
            OutputSpec::Hidden { pooler, classifier } => {
                all.extend(pooler.iter().map(|(map, _)| ("pooler".to_owned(), map)));
                all.extend(classifier.iter().map(|map| ("classifier".to_owned(), map)));
            }
        }
        all
    }

    /// Every norm, in a fixed order.
    pub fn norms(&self) -> Vec<&NormSpec> {
        let layers = self.layers.iter().flat_map(|layer| {
            [
                &layer.attention_norms.input,
                &layer.attention_norms.output,
                &layer.attention_norms.sum,
                &layer.attention.q_norm,
                &layer.attention.k_norm,
                &layer.mlp_norms.input,
                &layer.mlp_norms.output,
                &layer.mlp_norms.sum,
            ]
        });
        [&self.embedding.norm]
            .into_iter()
            .chain(layers)
            .chain([&self.final_norm])
            .flatten()
            .collect()
    }

    /// Every tensor that the model is made of, with its stored shape.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut all = vec![(self.embedding.tokens.clone(), vec![self.vocab_size, hidden])];
        if let Some(positions) = &self.embedding.positions {
            all.push((positions.tensor.clone(), vec![positions.rows, hidden]));
        }
        if let Some((tensor, types)) = &self.embedding.token_types {
            all.push((tensor.clone(), vec![*types, hidden]));
        }
        for norm in self.norms() {
            all.push((norm.weight.clone(), vec![norm.size]));
            all.extend(norm.bias.iter().map(|bias| (bias.clone(), vec![norm.size])));
        }
        for (_, map) in self.linears() {
            all.extend(map.weight.iter().map(|part| {
                let (out, inputs) = (part.stored_outputs, map.inputs);
                let shape = if part.transposed {
                    vec![inputs, out]
                } else {
                    vec![out, inputs]
                };
                (part.tensor.clone(), shape)
            }));
            all.extend(
                map.bias
                    .iter()
                    .map(|part| (part.tensor.clone(), vec![part.stored_len])),
            );
        }
        all.sort();
        all.dedup();
        all
    }

    /// Whether the model generates text (else it is an encoder).
    #[must_use]
    pub fn generates(&self) -> bool {
        matches!(self.output, OutputSpec::Logits { .. })
    }
}
