//! Where layers get their weights.

use tch::Tensor;
use understudy_checkpoint::TensorError;

/// Where a layer asks for its weights: `(full Hugging Face name, expected shape) -> tensor of that shape`.
pub type GetWeight<'a> = dyn FnMut(&str, &[i64]) -> Result<Tensor, TensorError> + 'a;

/// What a model is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Stacked and strided weights are joined once, so that a step multiplies once.
    Serving,
    /// Every stored tensor stays a parameter of its own: gradients and saved names are the checkpoint's.
    Training,
}

/// Hands out weights, each checked against the shape that was asked for.
pub struct Weights<'a> {
    get: &'a mut GetWeight<'a>,
    purpose: Purpose,
    /// Parts of one stored tensor are asked for one after the other.
    last: Option<(String, Tensor)>,
}

impl<'a> Weights<'a> {
    pub fn new(get: &'a mut GetWeight<'a>, purpose: Purpose) -> Self {
        Self {
            get,
            purpose,
            last: None,
        }
    }

    /// Whether gradients are wanted.
    pub fn is_training(&self) -> bool {
        self.purpose == Purpose::Training
    }

    /// The stored tensor `name`.
    ///
    /// # Errors
    /// [`TensorError`] if there is none, or it has another shape.
    pub fn get(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, TensorError> {
        if let Some((last, tensor)) = &self.last
            && last == name
        {
            return Ok(tensor.shallow_clone());
        }
        let expected: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
        let tensor = (self.get)(name, &expected)?;
        let found = tensor.size();
        if found != expected {
            return Err(TensorError::Shape {
                name: name.to_owned(),
                expected,
                found,
            });
        }
        self.last = Some((name.to_owned(), tensor.shallow_clone()));
        Ok(tensor)
    }
}
