//! What a training run is, apart from how far it is: everything that its bits follow from, as the state file keeps it.
//!
//! Invariant: a run goes on only as what it began as. Going on with another schedule, other data or another number of threads would give
//! a model that no command makes again.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use super::batch::Batch;
use super::optimizer::{self, Rates};
use super::train::{FALL_FROM, FINAL_RATE, TrainArgs, WARM_UP};

/// How many of the first batches stand for the data.
pub const SAMPLED_BATCHES: u32 = 3;

/// A state that this run cannot go on from.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error(
        "{path} lacks {key}: another version of this program wrote it; finish that run with that version, or start anew without --resume"
    )]
    Lacks { path: PathBuf, key: String },
    #[error(
        "{path} is of a run with {key} = {stored}, this one has {key} = {asked}; give the options of that run, or start anew without --resume"
    )]
    Differs {
        path: PathBuf,
        key: String,
        stored: String,
        asked: String,
    },
}

/// Names and values of everything that decides a run's bits; options first, then what follows from them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan([(&'static str, String); 10]);

impl Plan {
    /// The plan of `args`; `batches` are the first [`SAMPLED_BATCHES`] ones.
    pub fn new(args: &TrainArgs, rates: Rates, tokenizer_json: &str, batches: &[Batch]) -> Self {
        let minutes = args.minutes.map_or("none".to_owned(), |m| format!("{m:?}"));
        Self([
            ("seed", args.seed.to_string()),
            ("steps", args.steps.to_string()),
            ("minutes", minutes),
            ("tokens_per_step", args.tokens_per_step.to_string()),
            ("threads", args.threads.to_string()),
            ("muon_rate", format!("{:?}", rates.muon)),
            ("adam_rate", format!("{:?}", rates.adam)),
            (
                "optimizer",
                format!(
                    "{}, decay {:?}, clip {:?}",
                    optimizer::constants(),
                    rates.weight_decay,
                    rates.clip
                ),
            ),
            (
                "schedule",
                format!("warm-up {WARM_UP}, fall from {FALL_FROM:?}, to {FINAL_RATE:?}"),
            ),
            ("data", data_version(tokenizer_json, batches)),
        ])
    }

    /// For the state file.
    pub fn entries(&self) -> impl Iterator<Item = (String, String)> {
        self.0
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone()))
    }

    /// Whether the state at `path` is of this very plan.
    ///
    /// # Errors
    /// [`PlanError`], with the key.
    pub fn check(&self, path: &Path, stored: &HashMap<String, String>) -> Result<(), PlanError> {
        for (key, asked) in &self.0 {
            match stored.get(*key) {
                Some(value) if value == asked => {}
                Some(value) => {
                    return Err(PlanError::Differs {
                        path: path.to_owned(),
                        key: (*key).to_owned(),
                        stored: value.clone(),
                        asked: asked.clone(),
                    });
                }
                None => {
                    return Err(PlanError::Lacks {
                        path: path.to_owned(),
                        key: (*key).to_owned(),
                    });
                }
            }
        }
        Ok(())
    }
}

/// A hash of the tokenizer and of what the first batches teach.
fn data_version(tokenizer_json: &str, batches: &[Batch]) -> String {
    let mut hash = Sha256::new();
    hash.update(Sha256::digest(tokenizer_json));
    for batch in batches {
        for tensor in [&batch.ids, &batch.targets] {
            hash_values(&mut hash, tensor);
        }
        hash_values(&mut hash, &batch.weights.to_kind(Kind::Double));
    }
    hex(&hash.finalize()[..8])
}

fn hash_values(hash: &mut Sha256, tensor: &Tensor) {
    let values: Vec<f64> = Vec::try_from(&tensor.to_kind(Kind::Double)).unwrap_or_default();
    hash.update(values.len().to_le_bytes());
    for value in values {
        hash.update(value.to_le_bytes());
    }
}

/// SHA-256 of a file, in hexadecimal.
pub fn file_hash(path: &Path) -> std::io::Result<String> {
    Ok(hex(&Sha256::digest(std::fs::read(path)?)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(change: impl FnOnce(&mut TrainArgs)) -> Plan {
        let mut args = TrainArgs::for_tests(Path::new("dir"));
        change(&mut args);
        let rates = Rates {
            muon: args.muon_rate,
            adam: args.adam_rate,
            weight_decay: 0.02,
            clip: 1.0,
        };
        Plan::new(&args, rates, "{}", &[])
    }

    #[test]
    fn another_plan_is_refused_by_its_key() {
        let path = Path::new("state");
        let stored: HashMap<String, String> = plan(|_| {}).entries().collect();
        assert_eq!(plan(|_| {}).check(path, &stored), Ok(()));
        let others = [
            ("seed", plan(|args| args.seed += 1)),
            ("steps", plan(|args| args.steps += 1)),
            ("minutes", plan(|args| args.minutes = Some(5.0))),
            ("tokens_per_step", plan(|args| args.tokens_per_step += 1)),
            ("threads", plan(|args| args.threads += 1)),
            ("muon_rate", plan(|args| args.muon_rate += 1e-9)),
            ("adam_rate", plan(|args| args.adam_rate += 1e-9)),
        ];
        for (key, other) in others {
            let error = other.check(path, &stored).unwrap_err().to_string();
            assert!(error.contains(&format!("with {key} = ")), "{key}: {error}");
        }
        for key in ["optimizer", "schedule", "data"] {
            let mut other = stored.clone();
            other.insert(key.to_owned(), "other".to_owned());
            let error = plan(|_| {}).check(path, &other).unwrap_err().to_string();
            assert!(error.contains(&format!("with {key} = other")), "{error}");
        }
        for key in stored.keys() {
            let mut without = stored.clone();
            without.remove(key);
            let error = plan(|_| {}).check(path, &without).unwrap_err();
            assert!(matches!(error, PlanError::Lacks { key: named, .. } if named == *key));
        }
    }

    #[test]
    fn other_data_is_another_version() {
        let version = |ids: &[u32], weight: f32| {
            let sample = crate::demo::dialogue::Sample {
                ids: ids.to_vec(),
                weights: vec![weight; ids.len()],
            };
            data_version("{}", &[Batch::new(vec![sample])])
        };
        let base = version(&[1, 2, 3], 1.0);
        assert_eq!(base, version(&[1, 2, 3], 1.0));
        assert_ne!(base, version(&[1, 2, 4], 1.0));
        assert_ne!(base, version(&[1, 2, 3], 0.5));
        assert_ne!(data_version("{}", &[]), data_version("[]", &[]));
    }
}
