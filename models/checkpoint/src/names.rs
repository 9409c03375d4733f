//! Tensor names: one model is saved with and without the name of its inner module in front, and old files name a layer norm's halves otherwise.
//!
//! ```text
//! transformer.h.0.ln_1.weight      GPT2LMHeadModel.save_pretrained
//!             h.0.ln_1.weight      the same tensor in the hub's gpt2, which GPT2Model saved
//! bert.embeddings.LayerNorm.gamma  converted from TensorFlow; today's name ends in weight
//! ```
//!
//! A description has the names that transformers writes today; [`ModelSpec::with_names_of`] turns them into those of one checkpoint.

use crate::reader::Checkpoint;
use crate::spec::{LinearSpec, MlpSpec, ModelSpec, NormSpec, OutputSpec};

/// Inner modules, as they stand in front of names.
const PREFIXES: &[&str] = &["model.", "transformer.", "bert.", "roberta.", "gpt_neox."];

/// Today's ending of a layer norm's tensors, and the old one.
const ENDINGS: &[(&str, &str)] = &[
    ("LayerNorm.weight", "LayerNorm.gamma"),
    ("LayerNorm.bias", "LayerNorm.beta"),
];

impl ModelSpec {
    /// The same model with the names that `checkpoint` has. A tensor that it has under no name keeps its own: reading it says that it is
    /// missing.
    #[must_use]
    pub fn with_names_of(self, checkpoint: &Checkpoint) -> Self {
        self.with_names(|name| checkpoint.contains(name))
    }

    /// The same for any set of names.
    #[must_use]
    pub fn with_names(mut self, has: impl Fn(&str) -> bool) -> Self {
        self.each_name(&mut |name| {
            if !has(name)
                && let Some(other) = other_names(name).into_iter().find(|other| has(other))
            {
                *name = other;
            }
        });
        self
    }

    /// Every place where a tensor is named.
    fn each_name(&mut self, change: &mut dyn FnMut(&mut String)) {
        let embedding = &mut self.embedding;
        change(&mut embedding.tokens);
        if let Some(positions) = &mut embedding.positions {
            change(&mut positions.tensor);
        }
        if let Some((types, _)) = &mut embedding.token_types {
            change(types);
        }
        for norm in [&mut embedding.norm, &mut self.final_norm]
            .into_iter()
            .flatten()
        {
            norm.each_name(change);
        }
        for layer in &mut self.layers {
            let attention = &mut layer.attention;
            attention.qkv.each_name(change);
            attention.output.each_name(change);
            let norms = [
                &mut attention.q_norm,
                &mut attention.k_norm,
                &mut layer.attention_norms.input,
                &mut layer.attention_norms.output,
                &mut layer.attention_norms.sum,
                &mut layer.mlp_norms.input,
                &mut layer.mlp_norms.output,
                &mut layer.mlp_norms.sum,
            ];
            for norm in norms.into_iter().flatten() {
                norm.each_name(change);
            }
            layer.mlp.each_name(change);
        }
        match &mut self.output {
            OutputSpec::Logits { head, .. } => {
                head.iter_mut().for_each(|map| map.each_name(change));
            }
            OutputSpec::Hidden { pooler, classifier } => {
                pooler.iter_mut().for_each(|(map, _)| map.each_name(change));
                classifier.iter_mut().for_each(|map| map.each_name(change));
            }
        }
    }
}

impl MlpSpec {
    fn each_name(&mut self, change: &mut dyn FnMut(&mut String)) {
        let mlps = match self {
            Self::Dense(mlp) => std::slice::from_mut(mlp),
            Self::Experts(mixture) => {
                mixture.router.each_name(change);
                mixture.experts.as_mut_slice()
            }
        };
        for mlp in mlps {
            mlp.up.each_name(change);
            mlp.down.each_name(change);
        }
    }
}

impl NormSpec {
    fn each_name(&mut self, change: &mut dyn FnMut(&mut String)) {
        change(&mut self.weight);
        self.bias.iter_mut().for_each(change);
    }
}

impl LinearSpec {
    fn each_name(&mut self, change: &mut dyn FnMut(&mut String)) {
        self.weight
            .iter_mut()
            .for_each(|part| change(&mut part.tensor));
        self.bias
            .iter_mut()
            .for_each(|part| change(&mut part.tensor));
    }
}

/// Other names of the same tensor.
fn other_names(name: &str) -> Vec<String> {
    let mut names = vec![name.to_owned()];
    for prefix in PREFIXES {
        match name.strip_prefix(prefix) {
            Some(bare) => names.push(bare.to_owned()),
            None => names.push(format!("{prefix}{name}")),
        }
    }
    let old = names.iter().flat_map(|name| {
        ENDINGS
            .iter()
            .filter_map(move |(new, old)| Some(format!("{}{old}", name.strip_suffix(new)?)))
    });
    let old: Vec<String> = old.collect();
    names.extend(old);
    names
}
