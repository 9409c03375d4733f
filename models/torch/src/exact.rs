//! Our own kernels on tensors: the arithmetic whose bits do not depend on batch, threads or instruction set.
//!
//! Invariant: every function takes contiguous f32 CPU tensors and returns fresh ones; none of them keeps a graph for gradients, so
//! training never comes here.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use understudy_kernels as kernels;
use understudy_kernels::{PackedLinear, Pool, WeightSlice};

/// The values of a contiguous f32 CPU tensor.
///
/// # Panics
/// If it is something else: a programming error.
#[must_use]
pub fn values(tensor: &Tensor) -> &[f32] {
    assert!(
        tensor.kind() == Kind::Float && tensor.device() == Device::Cpu && tensor.is_contiguous(),
        "{tensor:?} is no plain f32 tensor"
    );
    // SAFETY: checked above; the borrow keeps the tensor alive, and no one writes to a tensor that is not fresh.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<f32>(), tensor.numel()) }
}

/// A new tensor, and its memory to write to.
pub fn fresh(shape: &[i64], fill: impl FnOnce(&mut [f32])) -> Tensor {
    let tensor = Tensor::empty(shape, (Kind::Float, Device::Cpu));
    // SAFETY: just allocated, contiguous, and nobody else knows it. Uninitialised floats are written before they are read: each kernel
    // fills its whole output.
    fill(unsafe {
        std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), tensor.numel())
    });
    tensor
}

/// Packs a `[out, in]` CPU weight of kind f32, bf16 or f16.
///
/// # Panics
/// If it is something else: a programming error.
#[must_use]
pub fn pack(weight: &Tensor) -> PackedLinear {
    let weight = weight.detach().contiguous();
    assert!(
        weight.device() == Device::Cpu,
        "weights are packed on the CPU"
    );
    let (out_features, in_features) = weight.size2().expect("a linear weight has two dimensions");
    let count = weight.numel();
    // SAFETY: contiguous, of the matched kind, alive until the end of this function.
    let slice = unsafe {
        match weight.kind() {
            Kind::Float => {
                WeightSlice::F32(std::slice::from_raw_parts(weight.data_ptr().cast(), count))
            }
            Kind::BFloat16 => {
                WeightSlice::Bf16(std::slice::from_raw_parts(weight.data_ptr().cast(), count))
            }
            Kind::Half => {
                WeightSlice::F16(std::slice::from_raw_parts(weight.data_ptr().cast(), count))
            }
            other => panic!("weights of kind {other:?} cannot be packed"),
        }
    };
    PackedLinear::pack(slice, out_features as usize, in_features as usize)
}

/// `[rows, in] -> [rows, out]`.
pub fn linear(pool: &Pool, weight: &PackedLinear, bias: Option<&Tensor>, x: &Tensor) -> Tensor {
    let rows = x.numel() / weight.in_features();
    let out_features = weight.out_features();
    fresh(&[rows as i64, out_features as i64], |y| {
        weight.forward(pool, values(x), rows, y);
        if let Some(bias) = bias {
            for row in y.chunks_exact_mut(out_features) {
                kernels::add(values(bias), row);
            }
        }
    })
}

/// Rows `ids` of a packed `[vocab, hidden]` matrix, `-> [rows, hidden]`.
pub fn embed(weight: &PackedLinear, ids: &Tensor) -> Tensor {
    let ids: Vec<i64> = Vec::try_from(ids).expect("ids are a one-dimensional i64 tensor");
    let hidden = weight.in_features();
    fresh(&[ids.len() as i64, hidden as i64], |y| {
        for (row, id) in y.chunks_exact_mut(hidden).zip(&ids) {
            weight.weight_row(*id as usize, row);
        }
    })
}

/// Over the last dimension, `weight.numel()` long.
pub fn rms_norm(pool: &Pool, x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    fresh(&x.size(), |y| {
        kernels::rms_norm(pool, values(x), values(weight), eps as f32, y)
    })
}

/// `silu(gate) * up`.
pub fn silu_mul(pool: &Pool, gate: &Tensor, up: &Tensor) -> Tensor {
    fresh(&gate.size(), |y| {
        kernels::silu_mul(pool, values(gate), values(up), y)
    })
}

/// Rotary embedding of `x`, `[rows, heads, head_dim]`; `cos` and `sin` hold `[rows, head_dim / 2]` values.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let size = x.size();
    fresh(&size, |y| {
        y.copy_from_slice(values(x));
        kernels::rotate(
            y,
            size[1] as usize,
            values(cos),
            values(sin),
            size[2] as usize / 2,
        );
    })
}

/// The threads that layers share; cloning shares them.
pub type SharedPool = Arc<Pool>;
