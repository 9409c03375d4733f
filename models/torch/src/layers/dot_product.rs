//! Scaled dot-product attention of a batch of equally long pieces, by whichever of LibTorch's kernels takes the case.

use tch::{Device, Kind, Tensor};

use super::AttentionRule;

/// Which keys a row sees.
#[derive(Debug)]
pub enum Visible {
    All,
    /// Row `i` sees keys `0 ..= i`.
    Causal,
    /// Added to the scores, 0 or minus infinity: `[batch or 1, 1, rows, keys]`, in the element type of the queries.
    Mask(Tensor),
}

impl Visible {
    /// What whole sequences of `length` positions, computed from position 0, see.
    #[must_use]
    pub fn within(rule: &AttentionRule, length: usize, options: (Kind, Device)) -> Self {
        match rule.window {
            _ if !rule.causal => Self::All,
            Some(window) if window < length => {
                let positions = Tensor::arange(length as i64, (Kind::Int64, options.1));
                let rows = positions.view([1, -1, 1]);
                Self::Mask(mask(
                    &rows,
                    &positions.view([1, 1, -1]),
                    Some(window),
                    options.0,
                ))
            }
            _ => Self::Causal,
        }
    }
}

/// The mask of rows at the positions `rows`, `[batch, rows, 1]`, over keys at `keys`, `[batch, 1, keys]`.
pub fn mask(rows: &Tensor, keys: &Tensor, window: Option<usize>, kind: Kind) -> Tensor {
    let mut hidden = keys.gt_tensor(rows);
    if let Some(window) = window {
        let too_old = keys.le_tensor(&(rows - window as i64));
        hidden = hidden.logical_or(&too_old);
    }
    hidden
        .zeros_like()
        .to_kind(kind)
        .masked_fill(&hidden, f64::NEG_INFINITY)
        .unsqueeze(1)
}

/// `q` is `[batch, rows, heads, head_dim]`, `k` and `v` are `[batch, keys, kv_heads, head_dim]`; returns
/// `[batch * rows, heads * head_dim]`.
pub fn dot_product(
    rule: &AttentionRule,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    visible: &Visible,
) -> Tensor {
    let (rows, keys) = (q.size()[1], k.size()[1]);
    let (k, v) = (k.transpose(1, 2), v.transpose(1, 2));
    let options = (q.kind(), q.device());
    match (visible, rule.soft_cap) {
        (Visible::Mask(mask), None) => by_group(q, &k, Some(mask), |q, mask| {
            sdpa(rule, q, &k, &v, mask, false, false)
        }),
        (Visible::All, None) if rows == 1 => by_group(q, &k, None, |q, _| {
            sdpa(rule, q, &k, &v, None, false, false)
        }),
        (visible, None) => {
            let causal = matches!(visible, Visible::Causal);
            by_head(rule, q, &k, &v, causal)
        }
        (Visible::All, Some(cap)) => {
            by_group(q, &k, None, |q, _| capped(rule, cap, q, &k, &v, None))
        }
        (Visible::Mask(mask), Some(cap)) => by_group(q, &k, Some(mask), |q, mask| {
            capped(rule, cap, q, &k, &v, mask)
        }),
        (Visible::Causal, Some(cap)) => {
            let positions = Tensor::arange(keys, (Kind::Int64, options.1));
            let (rows, keys) = (positions.view([1, -1, 1]), positions.view([1, 1, -1]));
            let mask = mask(&rows, &keys, None, options.0);
            by_group(q, &k, Some(&mask), |q, mask| {
                capped(rule, cap, q, &k, &v, mask)
            })
        }
    }
}

/// Every head with its own keys: no mask, so that the fastest kernels take it.
fn by_head(rule: &AttentionRule, q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Tensor {
    let (batch, rows, heads) = (q.size()[0], q.size()[1], q.size()[2]);
    let kv_heads = k.size()[1];
    let q = q.transpose(1, 2);
    // Only CUDA's flash kernel, which is for narrow types, shares keys among heads; elsewhere that would end in the slow path.
    let sharing = matches!(q.device(), Device::Cuda(_)) && q.kind() != Kind::Float;
    let out = if heads == kv_heads || sharing {
        sdpa(rule, &q, k, v, None, causal, heads != kv_heads)
    } else {
        let (k, v) = (repeated(k, heads / kv_heads), repeated(v, heads / kv_heads));
        sdpa(rule, &q, &k, &v, None, causal, false)
    };
    out.transpose(1, 2).reshape([batch * rows, -1])
}

/// `[batch, kv_heads, keys, head_dim]` with every head `times` times.
fn repeated(x: &Tensor, times: i64) -> Tensor {
    let size = x.size();
    x.unsqueeze(2)
        .expand([-1, -1, times, -1, -1], false)
        .reshape([size[0], size[1] * times, size[2], size[3]])
}

/// The heads of a group as rows of one: keys and values are read once, and no kernel has to know of groups. `attend` takes queries of
/// `[batch, kv_heads, group * rows, head_dim]`.
fn by_group(
    q: &Tensor,
    k: &Tensor,
    mask: Option<&Tensor>,
    attend: impl FnOnce(&Tensor, Option<&Tensor>) -> Tensor,
) -> Tensor {
    let (batch, rows, heads, dim) = (q.size()[0], q.size()[1], q.size()[2], q.size()[3]);
    let kv_heads = k.size()[1];
    let group = heads / kv_heads;
    let q = q
        .reshape([batch, rows, kv_heads, group, dim])
        .permute([0, 2, 3, 1, 4])
        .reshape([batch, kv_heads, group * rows, dim]);
    let repeated = mask
        .filter(|mask| mask.size()[2] > 1 && group > 1)
        .map(|mask| mask.repeat([1, 1, group, 1]));
    attend(&q, repeated.as_ref().or(mask))
        .view([batch, kv_heads, group, rows, dim])
        .permute([0, 3, 1, 2, 4])
        .reshape([batch * rows, heads * dim])
}

fn sdpa(
    rule: &AttentionRule,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
    sharing: bool,
) -> Tensor {
    Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, causal, rule.scale, sharing)
        .contiguous()
}

/// Soft-capped scores (Gemma 2): no fused kernel has them.
fn capped(
    rule: &AttentionRule,
    cap: f64,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
) -> Tensor {
    let mut scores = (q.matmul(&k.transpose(2, 3)) * (rule.scale / cap)).tanh() * cap;
    if let Some(mask) = mask {
        scores += mask;
    }
    scores.softmax(-1, Kind::Float).to_kind(q.kind()).matmul(v)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn rule(soft_cap: Option<f64>, window: Option<usize>, causal: bool) -> AttentionRule {
        AttentionRule {
            scale: 0.4,
            soft_cap,
            window,
            causal,
        }
    }

    fn random(shape: [i64; 4]) -> Tensor {
        Tensor::randn(shape, OPTIONS)
    }

    /// The formula, score by score.
    fn plain(rule: &AttentionRule, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let (rows, heads, kv_heads) = (q.size()[1], q.size()[2], k.size()[2]);
        let mut out = Vec::new();
        for row in 0..rows {
            for head in 0..heads {
                let shared = head / (heads / kv_heads);
                let first = match rule.window {
                    Some(window) => (row + 1 - window as i64).max(0),
                    None => 0,
                };
                let end = if rule.causal { row + 1 } else { k.size()[1] };
                let seen = |x: &Tensor| x.get(0).narrow(0, first, end - first).select(1, shared);
                let mut scores = seen(k).mv(&q.get(0).get(row).get(head)) * rule.scale;
                if let Some(cap) = rule.soft_cap {
                    scores = (scores / cap).tanh() * cap;
                }
                out.push(seen(v).tr().mv(&scores.softmax(0, Kind::Float)));
            }
        }
        Tensor::stack(&out, 0).view([rows, -1])
    }

    #[test]
    fn every_case_is_the_formula() {
        let _turn = crate::demo::random_numbers();
        tch::manual_seed(3);
        for (heads, kv_heads) in [(6, 2), (4, 4), (3, 1)] {
            let (q, k, v) = (
                random([1, 9, heads, 8]),
                random([1, 9, kv_heads, 8]),
                random([1, 9, kv_heads, 8]),
            );
            for rule in [
                rule(None, None, true),
                rule(None, Some(4), true),
                rule(Some(0.7), None, true),
                rule(Some(0.7), Some(3), true),
                rule(None, None, false),
                rule(Some(0.7), None, false),
            ] {
                let visible = Visible::within(&rule, 9, OPTIONS);
                let got = dot_product(&rule, &q, &k, &v, &visible);
                let worst = (got - plain(&rule, &q, &k, &v)).abs().max();
                assert!(
                    worst.double_value(&[]) < 1e-5,
                    "{heads} {kv_heads} {rule:?}"
                );
            }
        }
    }
}
