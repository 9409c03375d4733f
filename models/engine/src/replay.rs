//! Whether a recomputed logprob is the committed one: what a replay is held to.
//!
//! An exact runner gives the same bits however a sequence is cut into chunks, so any other bit means another model. Stock operators do
//! not: a replay computes many rows at once where the first run computed one, and sums run in another order. There a comparison of bits
//! would refuse every resume, so the logprobs need only be close; what is closer than [`tolerance_nats`] is counted, not refused.

use crate::runner::ModelInfo;

/// The committed logprob's stand-in where a log does not fit the context, so that nothing could be recomputed: a NaN, which no
/// recomputation that is compared ever is.
pub const NOT_COMPUTED_BITS: u32 = f32::NAN.to_bits();

/// f32: sums in another order differ by some 1e-7 of their terms, and a few layers make 3e-6 nats of that (measured: two layers, logits
/// up to 7). Deeper models with larger logits have room for a hundred times as much.
const TOLERANCE_F32_NATS: f32 = 1e-3;
/// f16 (11 bits): logits come out of the head in this type, and between 16 and 32, where those of real models lie, one step is 1/64
/// (measured on two layers with logits up to 6: 0.004). Some flipped roundings in the chosen logit and in the normaliser.
const TOLERANCE_F16_NATS: f32 = 0.1;
/// bf16 (8 bits): as above, with a step of 1/8 (measured on two layers with logits up to 8: 0.03). Another model's or another prompt's
/// logprobs are off by whole nats in one of the few that are compared.
const TOLERANCE_BF16_NATS: f32 = 0.5;

/// What a model's replays are held to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ReplayCheck {
    /// Bit for bit.
    Exact,
    /// Within so many nats.
    Within(f32),
}

/// How a recomputed logprob compares with the committed one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Same,
    /// Other bits, but close enough for operators that depend on the batch.
    Close,
    Different,
}

impl ReplayCheck {
    /// By what the runner promises, and by the type that it computes in.
    #[must_use]
    pub fn of(info: &ModelInfo) -> Self {
        if info.exact {
            Self::Exact
        } else {
            Self::Within(tolerance_nats(&info.dtype))
        }
    }

    /// Compares.
    #[must_use]
    pub fn verdict(self, committed: f32, recomputed: f32) -> Verdict {
        if committed.to_bits() == recomputed.to_bits() {
            return Verdict::Same;
        }
        match self {
            // A NaN or an infinity makes the difference one too, and is not within anything.
            Self::Within(nats) if (committed - recomputed).abs() <= nats => Verdict::Close,
            _ => Verdict::Different,
        }
    }
}

/// How far a logprob of a model in this type may move with the batch.
fn tolerance_nats(dtype: &str) -> f32 {
    match dtype {
        "bf16" => TOLERANCE_BF16_NATS,
        "f16" => TOLERANCE_F16_NATS,
        _ => TOLERANCE_F32_NATS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_takes_no_other_bit() {
        let next = f32::from_bits(1.0_f32.to_bits() + 1);
        assert_eq!(ReplayCheck::Exact.verdict(1.0, 1.0), Verdict::Same);
        assert_eq!(ReplayCheck::Exact.verdict(1.0, next), Verdict::Different);
        assert_eq!(ReplayCheck::Exact.verdict(0.0, -0.0), Verdict::Different);
    }

    #[test]
    fn close_is_by_the_type() {
        for (dtype, close, far) in [("f32", 5e-4, 5e-3), ("f16", 0.05, 0.2), ("bf16", 0.4, 0.8)] {
            let check = ReplayCheck::Within(tolerance_nats(dtype));
            assert_eq!(check.verdict(-1.0, -1.0 - close), Verdict::Close, "{dtype}");
            assert_eq!(check.verdict(-1.0, -1.0 + far), Verdict::Different);
            for not_a_number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert_eq!(check.verdict(-1.0, not_a_number), Verdict::Different);
            }
        }
    }
}
