//! CPU kernels of our own on plain slices: products, attention, normalisation, rotary embedding, activation, `exp` and `ln`.
//!
//! Why not the library's: its results depend on how many rows a call has, on the thread count and on the instruction set, and a replayed request
//! must get the bits that it got the first time, whoever its neighbours are. Here every output element is computed by the same IEEE operations in
//! the same order on every machine:
//!
//! * products: one chain of fused multiply-adds per element over `k` ([`linear`], [`attention`]);
//! * sums over a row: 16 interleaved chains, joined in a fixed order ([`elementwise`], softmax);
//! * `exp`, `ln`, and the sines of rotary tables: our own polynomials ([`math`], [`rope`]).
//!
//! Batch, neighbours, threads, registers and storage layout choose *when* and *where* an element is computed, never *how*.
//! The tests compare every instruction set of the machine with the scalar path, bit for bit.

pub mod activation;
pub mod attention;
pub mod buffer;
pub mod elementwise;
pub mod isa;
pub mod kv;
pub mod lanes;
pub mod linear;
pub mod math;
pub mod pool;
mod product;
pub mod rope;
pub mod rows;
#[cfg(test)]
mod testing;

pub use activation::{Activation, activate, gated, soft_cap};
pub use attention::{Attend, RowPlace, attend};
pub use buffer::{Buffer, Bytes, SharedMemory};
pub use elementwise::{
    add, add_rms_norm, exp_slice, layer_norm, rms_norm, rms_norm_heads, rotate, rotate_heads,
    silu_mul,
};
pub use isa::Isa;
pub use kv::{BLOCK, KvBlocks, KvFormat};
pub use lanes::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub use linear::{PackedLinear, RowSource, WeightFormat, WeightSlice};
pub use math::{erf, exp, gelu_erf, gelu_tanh, ln, tanh};
pub use pool::Pool;
pub use rows::{Columns, ColumnsMut};
