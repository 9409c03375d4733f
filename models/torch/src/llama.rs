//! A Llama decoder: embedding, blocks of attention and SwiGLU with RMS norms before each, a final norm, a head.
//!
//! Invariant: weight names and layouts are Hugging Face's, so that any Llama checkpoint loads and what training
//! writes loads elsewhere. The model keeps no state between calls; keys and values live behind [`Attention`].

use tch::{Device, Kind, Tensor};

use crate::config::LlamaConfig;
use crate::exact::SharedPool;
pub use crate::layers::Attention;
use crate::layers::{Embedding, GetWeight, Linear, Mlp, RmsNorm, Rope, RopeAngles, SelfAttention};
use crate::tensor_error::TensorError;

/// One transformer block.
#[derive(Debug)]
struct DecoderLayer {
    input_norm: RmsNorm,
    attention: SelfAttention,
    post_attention_norm: RmsNorm,
    mlp: Mlp,
}

/// The whole model.
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    embedding: Embedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    /// `None` when the embedding's matrix serves as the head (`tie_word_embeddings`).
    head: Option<Linear>,
    rope: Rope,
}

impl Llama {
    /// Builds the model from what `get(name, expected shape)` returns. Serving reads safetensors there, training
    /// makes parameters. The weights' device and element type are the model's.
    pub fn load(config: LlamaConfig, get: &mut GetWeight<'_>) -> Result<Self, TensorError> {
        let mut get = checked(get);
        let get: &mut GetWeight<'_> = &mut get;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = Embedding::load("model.embed_tokens", vocab, hidden, get)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| DecoderLayer::load(index, &config, get))
            .collect::<Result<_, _>>()?;
        let norm = RmsNorm::load("model.norm", hidden, config.rms_norm_eps, get)?;
        let head = match config.tie_word_embeddings {
            true => None,
            false => Some(Linear::load("lm_head", hidden, vocab, false, get)?),
        };
        let rope = Rope::new(&config, embedding.options().1);
        Ok(Self {
            config,
            embedding,
            layers,
            norm,
            head,
            rope,
        })
    }

    /// The architecture that the model was built for.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Where the weights lie; inputs must be there.
    pub fn device(&self) -> Device {
        self.embedding.options().1
    }

    /// Element type of the activations.
    pub fn kind(&self) -> Kind {
        self.embedding.options().0
    }

    /// The same model by our own kernels, whose bits depend on nothing but the inputs. CPU only; no gradients.
    pub fn into_exact(self, pool: &SharedPool) -> Self {
        let layers = self.layers.into_iter().map(|layer| DecoderLayer {
            input_norm: layer.input_norm.into_exact(pool),
            attention: layer.attention.into_exact(pool),
            post_attention_norm: layer.post_attention_norm.into_exact(pool),
            mlp: layer.mlp.into_exact(pool),
        });
        Self {
            config: self.config,
            embedding: self.embedding.into_exact(pool),
            layers: layers.collect(),
            norm: self.norm.into_exact(pool),
            head: self.head.map(|head| head.into_exact(pool)),
            rope: self.rope,
        }
    }

    /// `ids` and `positions` are `[rows]` i64 (id below `vocab_size`, position below `max_position_embeddings`);
    /// returns `[rows, hidden]`, after the final norm. Rows may belong to any mixture of sequences.
    pub fn forward(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        attention: &mut dyn Attention,
    ) -> Tensor {
        let mut x = self.embedding.forward(ids);
        let exact = matches!(self.embedding, Embedding::Packed { .. });
        let angles = self.rope.angles(positions, x.kind(), exact);
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(index, &x, &angles, attention);
        }
        self.norm.forward(&x)
    }

    /// `[n, hidden] -> [n, vocab]` in f32. Callers pass only the rows whose next token they want.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let logits = match &self.head {
            Some(head) => head.forward(hidden),
            None => self.embedding.as_head(hidden),
        };
        logits.to_kind(Kind::Float)
    }
}

impl DecoderLayer {
    fn load(
        index: usize,
        config: &LlamaConfig,
        get: &mut GetWeight<'_>,
    ) -> Result<Self, TensorError> {
        let name = format!("model.layers.{index}");
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let post = format!("{name}.post_attention_layernorm");
        Ok(Self {
            input_norm: RmsNorm::load(&format!("{name}.input_layernorm"), hidden, eps, get)?,
            attention: SelfAttention::load(&format!("{name}.self_attn"), config, get)?,
            post_attention_norm: RmsNorm::load(&post, hidden, eps, get)?,
            mlp: Mlp::load(&format!("{name}.mlp"), config, get)?,
        })
    }

    fn forward(
        &self,
        index: usize,
        x: &Tensor,
        angles: &RopeAngles,
        attention: &mut dyn Attention,
    ) -> Tensor {
        let normed = self.input_norm.forward(x);
        let x = x + self.attention.forward(index, &normed, angles, attention);
        let normed = self.post_attention_norm.forward(&x);
        &x + self.mlp.forward(&normed)
    }
}

/// `get`, with every answer's shape compared to the question's.
fn checked<'a>(
    get: &'a mut GetWeight<'_>,
) -> impl FnMut(&str, &[i64]) -> Result<Tensor, TensorError> + 'a {
    move |name, expected| {
        let tensor = get(name, expected)?;
        let found = tensor.size();
        if found != expected {
            return Err(TensorError::Shape {
                name: name.to_owned(),
                expected: expected.to_vec(),
                found,
            });
        }
        Ok(tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zeros(shape: &[i64]) -> Tensor {
        Tensor::zeros(shape, (Kind::Float, Device::Cpu))
    }

    #[test]
    fn a_missing_tensor_is_named() {
        let config = crate::demo::model_config(300);
        let error = Llama::load(config, &mut |name, shape| {
            if name == "model.layers.1.mlp.up_proj.weight" {
                return Err(TensorError::Missing(name.to_owned()));
            }
            Ok(zeros(shape))
        })
        .unwrap_err();
        assert!(
            error
                .to_string()
                .contains("model.layers.1.mlp.up_proj.weight")
        );
    }

    #[test]
    fn a_wrong_shape_is_named_with_both_shapes() {
        let config = crate::demo::model_config(300);
        let error = Llama::load(config, &mut |name, shape| {
            Ok(match name {
                "model.norm.weight" => zeros(&[7]),
                _ => zeros(shape),
            })
        })
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("model.norm.weight") && error.contains("[7]"),
            "{error}"
        );
    }

    #[test]
    fn an_untied_head_is_asked_for() {
        let mut config = crate::demo::model_config(300);
        config.tie_word_embeddings = false;
        let mut names = Vec::new();
        Llama::load(config, &mut |name, shape| {
            names.push(name.to_owned());
            Ok(zeros(shape))
        })
        .unwrap();
        assert!(names.iter().any(|name| name == "lm_head.weight"));
    }
}
