//! A sparse mixture of experts (Shazeer et al. 2017; as in Mixtral): every row goes through its best few.

use tch::{Kind, Tensor};
use understudy_checkpoint::TensorError;
use understudy_checkpoint::spec::ExpertsSpec;

use super::{Linear, Mlp, Weights};

/// The router and its experts.
#[derive(Debug)]
pub struct Experts {
    router: Linear,
    experts: Vec<Mlp>,
    top_k: i64,
    normalised: bool,
}

/// The (row, choice) pairs of a step, expert by expert.
struct Order {
    /// Pair `row * top_k + choice` of each place.
    pairs: Vec<i64>,
    /// How many places each expert has.
    counts: Vec<i64>,
}

impl Experts {
    /// Gets the router and all experts.
    ///
    /// # Errors
    /// [`TensorError`].
    pub fn load(spec: &ExpertsSpec, weights: &mut Weights<'_>) -> Result<Self, TensorError> {
        let experts = spec.experts.iter().map(|expert| Mlp::load(expert, weights));
        Ok(Self {
            experts: experts.collect::<Result<_, _>>()?,
            router: Linear::load(&spec.router, weights)?,
            top_k: spec.top_k as i64,
            normalised: spec.normalised,
        })
    }

    /// `[rows, hidden] -> [rows, hidden]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let scores = self.router.forward(x).softmax(-1, Kind::Float);
        let (shares, chosen) = scores.topk(self.top_k, -1, true, true);
        let shares = match self.normalised {
            true => &shares / shares.sum_dim_intlist(-1, true, Kind::Float),
            false => shares,
        };
        let outputs = self.chosen_outputs(x, &chosen);
        (outputs * shares.to_kind(x.kind()).unsqueeze(-1)).sum_dim_intlist(1, false, x.kind())
    }

    /// `[rows, top_k, hidden]`: what each row's experts make of it.
    ///
    /// How many rows an expert gets is known on the device only, and a product needs it on the host: one small copy per layer, the one
    /// wait within a step.
    fn chosen_outputs(&self, x: &Tensor, chosen: &Tensor) -> Tensor {
        let ids: Vec<i64> = Vec::try_from(chosen.reshape(-1)).unwrap_or_default();
        let order = Order::of(&ids, self.experts.len());
        let mut places = vec![0; order.pairs.len()];
        for (place, pair) in order.pairs.iter().enumerate() {
            places[*pair as usize] = place as i64;
        }
        let rows: Vec<i64> = order.pairs.iter().map(|pair| pair / self.top_k).collect();
        let index = |values: &[i64]| Tensor::from_slice(values).to_device(x.device());
        let sorted = x.index_select(0, &index(&rows));
        let mut first = 0;
        let mut outputs = Vec::new();
        for (expert, count) in self.experts.iter().zip(&order.counts) {
            if *count > 0 {
                outputs.push(expert.forward(&sorted.narrow(0, first, *count)));
                first += count;
            }
        }
        Tensor::cat(&outputs, 0)
            .index_select(0, &index(&places))
            .view([x.size()[0], self.top_k, -1])
    }
}

impl Order {
    /// A counting sort by expert; within one, in the order of the rows.
    fn of(ids: &[i64], experts: usize) -> Self {
        let mut counts = vec![0; experts];
        for id in ids {
            counts[*id as usize] += 1;
        }
        let mut next = Vec::with_capacity(experts);
        let mut first = 0;
        for count in &counts {
            next.push(first);
            first += count;
        }
        let mut pairs = vec![0; ids.len()];
        for (pair, id) in ids.iter().enumerate() {
            let place = &mut next[*id as usize];
            pairs[*place as usize] = pair as i64;
            *place += 1;
        }
        Self { pairs, counts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_sorted_by_expert() {
        let order = Order::of(&[2, 0, 1, 2, 0, 3], 5);
        assert_eq!(order.counts, [2, 1, 2, 1, 0]);
        assert_eq!(order.pairs, [1, 4, 2, 0, 3, 5]);
    }
}
