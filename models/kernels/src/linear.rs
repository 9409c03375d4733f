//! `y = x W^T` with weights packed once, at load.
//!
//! ```text
//! checkpoint: W [out][in], row-major          packed: panels of 48 outputs, each [in][48]
//!                                             (the last panel 16, 32 or 48 wide, padded with zeros)
//! ```
//!
//! Invariant: a row of `y` depends on that row of `x` and on `W` alone: not on the other rows, their number, the threads or the
//! instruction set; and bfloat16 or half weights give the bits that the same values stored as `f32` give.

use crate::buffer::Buffer;
use crate::isa::Isa;
use crate::lanes::{bf16_to_f32, f16_to_f32};
use crate::pool::Pool;
use crate::product::{Product, UNIT, product_bf16, product_f16, product_f32};

/// Outputs that stand side by side in a panel.
const PANEL: usize = 3 * UNIT;
/// Multiply-adds below which handing work to other threads costs more than it saves (about 2 microseconds of work).
const MIN_TASK_MULTIPLY_ADDS: usize = 1 << 16;

/// A weight matrix as it comes from a checkpoint, row-major `[out_features][in_features]`.
#[derive(Debug, Clone, Copy)]
pub enum WeightSlice<'a> {
    F32(&'a [f32]),
    /// Bit patterns of bfloat16.
    Bf16(&'a [u16]),
    /// Bit patterns of IEEE half.
    F16(&'a [u16]),
}

impl WeightSlice<'_> {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) | Self::F16(values) => values.len(),
        }
    }

    /// Whether there are no values.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

enum Storage {
    F32(Buffer<f32>),
    Bf16(Buffer<u16>),
    F16(Buffer<u16>),
}

/// A packed weight matrix.
pub struct PackedLinear {
    storage: Storage,
    in_features: usize,
    out_features: usize,
}

impl std::fmt::Debug for PackedLinear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "PackedLinear([{}, {}], {} bytes)",
            self.out_features,
            self.in_features,
            self.size_bytes()
        )
    }
}

impl PackedLinear {
    /// Packs `weight`, row-major `[out_features][in_features]`, in the width in which it comes.
    ///
    /// # Panics
    /// If the slice has another length.
    #[must_use]
    pub fn pack(weight: WeightSlice<'_>, out_features: usize, in_features: usize) -> Self {
        assert_eq!(
            weight.len(),
            out_features * in_features,
            "weight of [{out_features}, {in_features}]"
        );
        let storage = match weight {
            WeightSlice::F32(w) => Storage::F32(pack_panels(w, out_features, in_features)),
            WeightSlice::Bf16(w) => Storage::Bf16(pack_panels(w, out_features, in_features)),
            WeightSlice::F16(w) => Storage::F16(pack_panels(w, out_features, in_features)),
        };
        Self {
            storage,
            in_features,
            out_features,
        }
    }

    /// Length of an input row.
    #[must_use]
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Length of an output row.
    #[must_use]
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Bytes that the packed weights take, padding included.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        match &self.storage {
            Storage::F32(w) => w.len() * 4,
            Storage::Bf16(w) | Storage::F16(w) => w.len() * 2,
        }
    }

    /// `y [rows][out_features] = x [rows][in_features] W^T`.
    ///
    /// # Panics
    /// If a slice's length does not match.
    pub fn forward(&self, pool: &Pool, x: &[f32], rows: usize, y: &mut [f32]) {
        self.forward_on(Isa::best(), pool, x, rows, y);
    }

    /// [`PackedLinear::forward`] on a chosen instruction set, which must be one of [`Isa::available`].
    ///
    /// # Panics
    /// If a slice's length does not match or the machine lacks `isa`.
    pub fn forward_on(&self, isa: Isa, pool: &Pool, x: &[f32], rows: usize, y: &mut [f32]) {
        assert!(
            Isa::available().contains(&isa),
            "this machine has no {}",
            isa.name()
        );
        assert_eq!(
            x.len(),
            rows * self.in_features,
            "x of [{rows}, {}]",
            self.in_features
        );
        assert_eq!(
            y.len(),
            rows * self.out_features,
            "y of [{rows}, {}]",
            self.out_features
        );
        if rows == 0 {
            return;
        }
        let panels = self.out_features.div_ceil(PANEL);
        let panel_work = rows * PANEL * self.in_features;
        // A task is at least `MIN_TASK_MULTIPLY_ADDS` of work; several tasks a thread even out a busy machine.
        let per_task = MIN_TASK_MULTIPLY_ADDS
            .div_ceil(panel_work.max(1))
            .max(panels.div_ceil(4 * pool.threads()));
        let y = OutputRows {
            start: y.as_mut_ptr(),
            rows,
            stride: self.out_features,
        };
        pool.run(panels.div_ceil(per_task), &|task| {
            for panel in task * per_task..((task + 1) * per_task).min(panels) {
                // SAFETY: panels write disjoint columns of `y`, and each panel belongs to one task.
                unsafe { self.panel(isa, panel, x, &y) };
            }
        });
    }

    /// One panel's columns of all rows.
    unsafe fn panel(&self, isa: Isa, panel: usize, x: &[f32], y: &OutputRows) {
        let column = panel * PANEL;
        let valid = (self.out_features - column).min(PANEL);
        let width = valid.next_multiple_of(UNIT);
        if width == valid {
            unsafe {
                self.columns(
                    isa,
                    panel,
                    width,
                    x.as_ptr(),
                    y.rows,
                    y.start.add(column),
                    y.stride,
                )
            };
            return;
        }
        // The padded columns of the last panel do not exist in `y`: a few rows at a time go through a scratch block.
        let mut scratch = [0.0_f32; 8 * PANEL];
        for row in (0..y.rows).step_by(8) {
            let rows = (y.rows - row).min(8);
            unsafe {
                self.columns(
                    isa,
                    panel,
                    width,
                    x.as_ptr().add(row * self.in_features),
                    rows,
                    scratch.as_mut_ptr(),
                    PANEL,
                );
                for r in 0..rows {
                    let target = y.start.add((row + r) * y.stride + column);
                    target.copy_from_nonoverlapping(scratch.as_ptr().add(r * PANEL), valid);
                }
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    unsafe fn columns(
        &self,
        isa: Isa,
        panel: usize,
        width: usize,
        x: *const f32,
        rows: usize,
        y: *mut f32,
        y_stride: usize,
    ) {
        let offset = panel * PANEL * self.in_features;
        let (k, columns) = (self.in_features, width);
        let (x_stride, w_stride, accumulate) = (self.in_features, width, false);
        unsafe {
            match &self.storage {
                Storage::F32(w) => {
                    let w = w.as_ptr().add(offset);
                    product_f32(
                        isa,
                        Product {
                            rows,
                            k,
                            columns,
                            x,
                            x_stride,
                            w,
                            w_stride,
                            y,
                            y_stride,
                            accumulate,
                        },
                    );
                }
                Storage::Bf16(w) => {
                    let w = w.as_ptr().add(offset).cast();
                    product_bf16(
                        isa,
                        Product {
                            rows,
                            k,
                            columns,
                            x,
                            x_stride,
                            w,
                            w_stride,
                            y,
                            y_stride,
                            accumulate,
                        },
                    );
                }
                Storage::F16(w) => {
                    let w = w.as_ptr().add(offset).cast();
                    product_f16(
                        isa,
                        Product {
                            rows,
                            k,
                            columns,
                            x,
                            x_stride,
                            w,
                            w_stride,
                            y,
                            y_stride,
                            accumulate,
                        },
                    );
                }
            }
        }
    }

    /// Copies row `output` of `W` (the weights of one output), widened, to `row`: an embedding that shares the head's weights.
    ///
    /// # Panics
    /// If `output` or the length of `row` is out of range.
    pub fn weight_row(&self, output: usize, row: &mut [f32]) {
        assert!(
            output < self.out_features,
            "row {output} of {}",
            self.out_features
        );
        assert_eq!(row.len(), self.in_features, "row of {}", self.in_features);
        let (panel, column) = (output / PANEL, output % PANEL);
        let width = (self.out_features - panel * PANEL)
            .min(PANEL)
            .next_multiple_of(UNIT);
        let first = panel * PANEL * self.in_features + column;
        for (k, value) in row.iter_mut().enumerate() {
            let index = first + k * width;
            *value = match &self.storage {
                Storage::F32(w) => w[index],
                Storage::Bf16(w) => bf16_to_f32(w[index]),
                Storage::F16(w) => f16_to_f32(w[index]),
            };
        }
    }
}

/// The output matrix, shared between tasks that write disjoint columns.
struct OutputRows {
    start: *mut f32,
    rows: usize,
    stride: usize,
}
// SAFETY: tasks write disjoint elements only; see `forward_on`.
unsafe impl Sync for OutputRows {}

fn pack_panels<T: crate::buffer::Element>(
    weight: &[T],
    out_features: usize,
    in_features: usize,
) -> Buffer<T> {
    let mut packed = Buffer::zeroed(out_features.next_multiple_of(UNIT) * in_features);
    for first in (0..out_features).step_by(PANEL) {
        let valid = (out_features - first).min(PANEL);
        let width = valid.next_multiple_of(UNIT);
        let panel = &mut packed[first * in_features..][..width * in_features];
        for column in 0..valid {
            let row = &weight[(first + column) * in_features..][..in_features];
            for (k, value) in row.iter().enumerate() {
                panel[k * width + column] = *value;
            }
        }
    }
    packed
}

#[cfg(test)]
mod tests;
