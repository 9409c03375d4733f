//! A linear map, put together from stored tensors.

use tch::Tensor;
use understudy_checkpoint::TensorError;
use understudy_checkpoint::spec::{BiasPart, LinearSpec, RowPattern, WeightPart};

use super::Weights;

/// `y = x Wᵀ + b`, where `W` and `b` are stacked from their parts.
#[derive(Debug)]
pub struct Linear {
    weights: Vec<Part>,
    /// As many as there are weights, of the same lengths; or none.
    biases: Vec<Part>,
}

/// Rows of one stored tensor, `[out, in]` or `[out]` once taken.
#[derive(Debug)]
struct Part {
    stored: Tensor,
    /// Stored as `[in, out]`.
    transposed: bool,
    /// Indices of the rows, i64; `None` for all of them.
    rows: Option<Tensor>,
}

impl Linear {
    /// Gets the parts. For serving, they become one matrix and one vector.
    ///
    /// # Errors
    /// [`TensorError`].
    pub fn load(spec: &LinearSpec, weights: &mut Weights<'_>) -> Result<Self, TensorError> {
        let parts: Vec<Part> = spec
            .weight
            .iter()
            .map(|part| Part::of_weight(part, spec.inputs, weights))
            .collect::<Result<_, _>>()?;
        let biases: Vec<Part> = spec
            .bias
            .iter()
            .map(|part| Part::of_bias(part, weights))
            .collect::<Result<_, _>>()?;
        let aligned = spec.bias.is_empty()
            || (spec.bias.len() == spec.weight.len()
                && spec
                    .bias
                    .iter()
                    .zip(&spec.weight)
                    .all(|(bias, weight)| bias.rows.rows() == weight.rows.rows()));
        Ok(if weights.is_training() && aligned {
            Self {
                weights: parts,
                biases,
            }
        } else if weights.is_training() {
            // No family that is trained here has such parts; they would be joined in every step.
            Self {
                weights: vec![Part::whole(stacked(&parts))],
                biases: vec![Part::whole(stacked(&biases))],
            }
        } else {
            let one = |parts: &[Part]| match parts {
                [] => Vec::new(),
                parts => vec![Part::whole(stacked(parts).contiguous())],
            };
            Self {
                weights: one(&parts),
                biases: one(&biases),
            }
        })
    }

    /// `[rows, in] -> [rows, out]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let mut biases = self.biases.iter();
        let outputs: Vec<Tensor> = self
            .weights
            .iter()
            .map(|weight| x.linear(&weight.taken(), biases.next().map(Part::taken)))
            .collect();
        joined(outputs)
    }
}

impl Part {
    fn whole(stored: Tensor) -> Self {
        Self {
            stored,
            transposed: false,
            rows: None,
        }
    }

    fn of_weight(
        part: &WeightPart,
        inputs: usize,
        weights: &mut Weights<'_>,
    ) -> Result<Self, TensorError> {
        let shape = match part.transposed {
            true => [inputs, part.stored_outputs],
            false => [part.stored_outputs, inputs],
        };
        let stored = weights.get(&part.tensor, &shape)?;
        let rows = indices(&part.rows, part.stored_outputs, &stored);
        Ok(Self {
            stored,
            transposed: part.transposed,
            rows,
        })
    }

    fn of_bias(part: &BiasPart, weights: &mut Weights<'_>) -> Result<Self, TensorError> {
        let stored = weights.get(&part.tensor, &[part.stored_len])?;
        let rows = indices(&part.rows, part.stored_len, &stored);
        Ok(Self {
            stored,
            transposed: false,
            rows,
        })
    }

    /// The rows as they are used. Views and copies are made anew each time, so that gradients reach the stored tensor.
    fn taken(&self) -> Tensor {
        let stored = match self.transposed {
            true => self.stored.tr(),
            false => self.stored.shallow_clone(),
        };
        match &self.rows {
            Some(rows) => stored.index_select(0, rows),
            None => stored,
        }
    }
}

/// `None` if the pattern is every stored row in order.
fn indices(pattern: &RowPattern, stored: usize, beside: &Tensor) -> Option<Tensor> {
    let rows = 0..pattern.rows();
    if rows.len() == stored && rows.clone().all(|row| pattern.stored(row) == row) {
        return None;
    }
    let rows: Vec<i64> = rows.map(|row| pattern.stored(row) as i64).collect();
    Some(Tensor::from_slice(&rows).to_device(beside.device()))
}

fn stacked(parts: &[Part]) -> Tensor {
    match parts {
        [part] => part.taken(),
        parts => Tensor::cat(&parts.iter().map(Part::taken).collect::<Vec<_>>(), 0),
    }
}

fn joined(mut outputs: Vec<Tensor>) -> Tensor {
    match outputs.len() {
        1 => outputs.swap_remove(0),
        _ => Tensor::cat(&outputs, -1),
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::layers::Purpose;

    /// Element `(i, j)` of a stored matrix is `10 i + j`, element `i` of a vector `100 i`.
    fn numbered(_name: &str, shape: &[i64]) -> Result<Tensor, TensorError> {
        let float = (Kind::Float, Device::Cpu);
        Ok(match *shape {
            [rows, columns] => {
                (Tensor::arange(rows, float) * 10.0).unsqueeze(1) + Tensor::arange(columns, float)
            }
            _ => Tensor::arange(shape[0], float) * 100.0,
        })
    }

    fn values(spec: &LinearSpec, purpose: Purpose) -> Vec<f32> {
        let mut get = numbered;
        let map = Linear::load(spec, &mut Weights::new(&mut get, purpose)).unwrap();
        let unit = Tensor::from_slice(&[1.0_f32, 0.0]).view([1, 2]);
        Vec::try_from(map.forward(&unit).view(-1)).unwrap()
    }

    #[test]
    fn stacked_strided_and_transposed_parts_are_put_together() {
        let strided = RowPattern {
            first: 1,
            len: 2,
            stride: 3,
            count: 2,
        };
        let part = |tensor: &str, stored_outputs, transposed, rows| WeightPart {
            tensor: tensor.to_owned(),
            stored_outputs,
            transposed,
            rows,
        };
        let bias = |tensor: &str, stored_len, rows| BiasPart {
            tensor: tensor.to_owned(),
            stored_len,
            rows,
        };
        let spec = LinearSpec {
            inputs: 2,
            outputs: 7,
            weight: vec![
                part("a", 6, false, strided),
                part("b", 3, true, RowPattern::range(0, 3)),
            ],
            bias: vec![bias("c", 6, strided), bias("d", 3, RowPattern::range(0, 3))],
        };
        // Column 0 of rows 1, 2, 4 and 5 of a; row 0 of b; with the biases.
        let expected = [110.0, 220.0, 440.0, 550.0, 0.0, 101.0, 202.0];
        assert_eq!(values(&spec, Purpose::Serving), expected);
        assert_eq!(values(&spec, Purpose::Training), expected);
    }

    #[test]
    fn training_keeps_the_stored_tensors_apart() {
        let spec = LinearSpec::stacked(&[("q", 3), ("k", 2)], 2, false);
        let mut parameters = Vec::new();
        let mut get = |name: &str, shape: &[i64]| {
            let parameter = numbered(name, shape)?.set_requires_grad(true);
            parameters.push(parameter.shallow_clone());
            Ok(parameter)
        };
        let map = Linear::load(&spec, &mut Weights::new(&mut get, Purpose::Training)).unwrap();
        let unit = Tensor::from_slice(&[1.0_f32, 2.0]).view([1, 2]);
        for _ in 0..2 {
            map.forward(&unit).sum(Kind::Float).backward();
        }
        let gradients: Vec<Vec<i64>> = parameters.iter().map(|p| p.grad().size()).collect();
        assert_eq!(gradients, [[3, 2], [2, 2]]);
        assert_eq!(parameters[1].grad().double_value(&[1, 1]), 4.0);
    }
}
