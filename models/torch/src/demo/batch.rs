//! A training step's samples as one flat batch: groups of similar length, padded within the group only.

use tch::Tensor;

use super::dialogue::Sample;
use super::tokenizer::END;
use crate::layers::{Attend, AttentionRule, Visible, dot_product};

/// Samples of one padded length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    pub samples: usize,
    pub length: usize,
}

/// A step's rows, group after group, sample after sample.
#[derive(Debug)]
pub struct Batch {
    /// `[rows]` i64.
    pub ids: Tensor,
    /// `[rows]` i64; every sample starts at 0.
    pub positions: Tensor,
    /// `[learned]` i64: rows whose next token is learned.
    pub learned_rows: Tensor,
    /// `[learned]` i64: that next token.
    pub targets: Tensor,
    /// `[learned]` f32.
    pub weights: Tensor,
    /// For each learned row the index of its sample, in the order of the rows.
    pub owners: Vec<usize>,
    pub groups: Vec<Group>,
}

impl Batch {
    /// Orders `samples` by length and lays them out.
    pub fn new(mut samples: Vec<Sample>) -> Self {
        samples.sort_by_key(|sample| sample.ids.len());
        let groups = grouped(&samples.iter().map(|s| s.ids.len() - 1).collect::<Vec<_>>());
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        let (mut rows, mut targets, mut weights, mut owners) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut lengths = groups
            .iter()
            .flat_map(|group| std::iter::repeat_n(group.length, group.samples));
        for (index, sample) in samples.iter().enumerate() {
            let length = lengths.next().unwrap_or(sample.ids.len() - 1);
            let start = ids.len();
            for at in 0..length {
                // The last token is a target only; behind it stands padding that nothing attends to.
                ids.push(
                    sample
                        .ids
                        .get(at)
                        .map_or(i64::from(END), |id| i64::from(*id)),
                );
                positions.push(at as i64);
                if let (Some(target), Some(&weight)) =
                    (sample.ids.get(at + 1), sample.weights.get(at + 1))
                    && weight > 0.0
                {
                    rows.push((start + at) as i64);
                    targets.push(i64::from(*target));
                    weights.push(weight);
                    owners.push(index);
                }
            }
        }
        Self {
            ids: Tensor::from_slice(&ids),
            positions: Tensor::from_slice(&positions),
            learned_rows: Tensor::from_slice(&rows),
            targets: Tensor::from_slice(&targets),
            weights: Tensor::from_slice(&weights),
            owners,
            groups,
        }
    }

    /// Rows, padding included.
    pub fn rows(&self) -> usize {
        self.groups.iter().map(|g| g.samples * g.length).sum()
    }
}

/// Cuts ascending lengths into groups whose padding stays below an eighth (or four tokens) per sample.
fn grouped(lengths: &[usize]) -> Vec<Group> {
    let mut groups = Vec::new();
    let mut start = 0;
    while start < lengths.len() {
        let limit = (lengths[start] + 4).max(lengths[start] + lengths[start] / 8);
        let end = start + lengths[start..].partition_point(|length| *length <= limit);
        groups.push(Group {
            samples: end - start,
            length: lengths[end - 1],
        });
        start = end;
    }
    groups
}

/// Causal attention within each sample of a [`Batch`].
#[derive(Debug)]
pub struct GroupedAttention<'a> {
    pub groups: &'a [Group],
}

impl Attend for GroupedAttention<'_> {
    fn attend(
        &mut self,
        _layer: usize,
        rule: &AttentionRule,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Tensor {
        let mut row = 0;
        let mut outputs = Vec::with_capacity(self.groups.len());
        for group in self.groups {
            let (samples, length) = (group.samples as i64, group.length as i64);
            let own = |x: &Tensor| {
                let size = x.size();
                x.narrow(0, row, samples * length)
                    .view([samples, length, size[1], size[2]])
            };
            let visible = Visible::within(rule, group.length, (q.kind(), q.device()));
            outputs.push(dot_product(rule, &own(q), &own(k), &own(v), &visible));
            row += samples * length;
        }
        Tensor::cat(&outputs, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(length: usize, learned: usize) -> Sample {
        Sample {
            ids: (0..length as u32).collect(),
            weights: (0..length)
                .map(|i| if i >= length - learned { 1.0 } else { 0.0 })
                .collect(),
        }
    }

    #[test]
    fn every_learned_token_is_predicted_from_the_row_before_it() {
        let batch = Batch::new(vec![sample(30, 5), sample(8, 2), sample(10, 3)]);
        let rows: Vec<i64> = Vec::try_from(&batch.learned_rows).unwrap();
        let targets: Vec<i64> = Vec::try_from(&batch.targets).unwrap();
        let ids: Vec<i64> = Vec::try_from(&batch.ids).unwrap();
        assert_eq!(targets.len(), 10);
        for (row, target) in rows.iter().zip(&targets) {
            assert_eq!(ids[*row as usize] + 1, *target);
        }
        assert_eq!(batch.owners, [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]);
        assert_eq!(batch.rows(), ids.len());
    }

    #[test]
    fn groups_waste_little() {
        let lengths: Vec<usize> = (8..400).collect();
        let groups = grouped(&lengths);
        let padded: usize = groups.iter().map(|g| g.samples * g.length).sum();
        let used: usize = lengths.iter().sum();
        assert!(padded as f64 <= used as f64 * 1.1);
        assert_eq!(
            groups.iter().map(|g| g.samples).sum::<usize>(),
            lengths.len()
        );
    }
}
