//! `y = x W^T` with weights packed once, at load or in a file ([`format`]).
//!
//! Invariant: a row of `y` depends on that row of `x` and on `W` alone: not on the other rows, their number, the threads or the
//! instruction set; and bfloat16 or half weights give the bits that the same values stored as `f32` give.

mod format;
mod int4;
mod int8;

use std::cell::{Cell, RefCell};

pub use format::{RowSource, WeightFormat};

use crate::buffer::{Buffer, Bytes, Pieces, numbers};
use crate::isa::{Isa, multiversion};
use crate::lanes::{Bf16, F16, Lanes, Weight, bf16_to_f32, f16_to_f32};
use crate::pool::Pool;
use crate::product::{Product, UNIT, product_bf16, product_f16, product_f32};
use format::Layout;

/// Outputs that stand side by side in a panel.
const PANEL: usize = 3 * UNIT;
/// Multiply-adds below which handing work to other threads costs more than it saves (about 2 microseconds of work).
const MIN_TASK_MULTIPLY_ADDS: usize = 1 << 16;
/// From this many rows on, narrow weights are widened to `f32` once per panel rather than once per few rows.
const MIN_ROWS_TO_WIDEN: usize = 12;
/// The same for AVX-512, which has registers for eight rows of a panel and unpacks codes fast.
const MIN_ROWS_TO_WIDEN_AVX512: usize = 64;

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

    /// The format that keeps every bit.
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        match self {
            Self::F32(_) => WeightFormat::F32,
            Self::Bf16(_) => WeightFormat::Bf16,
            Self::F16(_) => WeightFormat::F16,
        }
    }

    /// Copies row `index` of rows of `row.len()` values, widened.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, index: usize, row: &mut [f32]) {
        let range = index * row.len()..(index + 1) * row.len();
        match self {
            Self::F32(values) => row.copy_from_slice(&values[range]),
            Self::Bf16(values) => widen_row(&values[range], row, bf16_to_f32),
            Self::F16(values) => widen_row(&values[range], row, f16_to_f32),
        }
    }
}

#[inline(always)]
fn widen_row(narrow: &[u16], wide: &mut [f32], widen: impl Fn(u16) -> f32) {
    for (wide, narrow) in wide.iter_mut().zip(narrow) {
        *wide = widen(*narrow);
    }
}

/// A packed weight matrix.
pub struct PackedLinear {
    layout: Layout,
    image: Bytes,
}

impl std::fmt::Debug for PackedLinear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "PackedLinear([{}, {}], {:?}, {} bytes)",
            self.out_features(),
            self.in_features(),
            self.format(),
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
        let source = |output: usize, row: &mut [f32]| weight.row(output, row);
        let format = weight.format();
        Self::pack_rows(&Pool::new(1), format, out_features, in_features, &source)
    }

    /// Packs the rows that `source` gives into memory of its own.
    ///
    /// # Panics
    /// As [`PackedLinear::packed_bytes`].
    #[must_use]
    pub fn pack_rows(
        pool: &Pool,
        format: WeightFormat,
        out_features: usize,
        in_features: usize,
        source: &RowSource<'_>,
    ) -> Self {
        let size = Self::packed_bytes(format, out_features, in_features);
        let mut image = Buffer::<u8>::zeroed(size);
        Self::pack_into(pool, format, out_features, in_features, source, &mut image);
        Self::from_bytes(format, out_features, in_features, image.into())
    }

    /// Bytes of the packed image, scales and padding included: a multiple of 64.
    ///
    /// # Panics
    /// If int8 is asked for rows of more than 2^17 weights, whose sums could leave 32 bits.
    #[must_use]
    pub fn packed_bytes(format: WeightFormat, out_features: usize, in_features: usize) -> usize {
        layout(format, out_features, in_features).image_bytes()
    }

    /// Packs the rows that `source` gives into `image`, which starts at a multiple of 64 bytes. The bytes are the same on every machine.
    /// A `source` whose rows are exact in `format` (bfloat16 rows for bfloat16) loses nothing on the way through `f32`.
    ///
    /// # Panics
    /// If `image` is misaligned or not [`PackedLinear::packed_bytes`] long.
    pub fn pack_into(
        pool: &Pool,
        format: WeightFormat,
        out_features: usize,
        in_features: usize,
        source: &RowSource<'_>,
        image: &mut [u8],
    ) {
        let layout = layout(format, out_features, in_features);
        format::pack(layout, pool, source, image);
    }

    /// A matrix that lies packed in `image`, which it reads in place.
    ///
    /// # Panics
    /// If `image` is not [`PackedLinear::packed_bytes`] long.
    #[must_use]
    pub fn from_bytes(
        format: WeightFormat,
        out_features: usize,
        in_features: usize,
        image: Bytes,
    ) -> Self {
        let layout = layout(format, out_features, in_features);
        assert_eq!(image.len(), layout.image_bytes(), "image of {layout:?}");
        Self { layout, image }
    }

    /// How the weights are stored.
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        self.layout.format
    }

    /// The packed image, as [`PackedLinear::pack_into`] writes it.
    #[must_use]
    pub fn image(&self) -> &Bytes {
        &self.image
    }

    /// Length of an input row.
    #[must_use]
    pub fn in_features(&self) -> usize {
        self.layout.in_features
    }

    /// Length of an output row.
    #[must_use]
    pub fn out_features(&self) -> usize {
        self.layout.out_features
    }

    /// Bytes that the packed weights take, padding included.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.image.len()
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
        let (k, n) = (self.in_features(), self.out_features());
        assert!(
            Isa::available().contains(&isa),
            "this machine has no {}",
            isa.name()
        );
        assert_eq!(x.len(), rows * k, "x of [{rows}, {k}]");
        assert_eq!(y.len(), rows * n, "y of [{rows}, {n}]");
        if y.is_empty() {
            return;
        }
        let y = OutputRows {
            start: y.as_mut_ptr(),
            rows,
            stride: n,
        };
        if self.format() == WeightFormat::Int8 {
            self.forward_int8(isa, pool, x, &y);
        } else {
            self.over_panels(pool, rows, &|panel| {
                // SAFETY: panels write disjoint columns of `y`, and each panel belongs to one task.
                unsafe { self.panel(isa, panel, x, &y) };
            });
        }
    }

    /// Hands out panels. A task is at least `MIN_TASK_MULTIPLY_ADDS` of work; several tasks a thread even out a busy machine.
    fn over_panels(&self, pool: &Pool, rows: usize, work: &(dyn Fn(usize) + Sync)) {
        let panels = self.layout.panels();
        let panel_work = rows * PANEL * self.in_features();
        let per_task = MIN_TASK_MULTIPLY_ADDS
            .div_ceil(panel_work.max(1))
            .max(panels.div_ceil(8 * pool.threads()));
        pool.run(panels.div_ceil(per_task), &|task| {
            (task * per_task..((task + 1) * per_task).min(panels)).for_each(work);
        });
    }

    /// Quantises each row once, then computes panel by panel.
    fn forward_int8(&self, isa: Isa, pool: &Pool, x: &[f32], y: &OutputRows) {
        let (size, padded) = (self.in_features(), self.layout.padded_in());
        let mut scratch = QUANTISED.take();
        scratch.codes.resize(y.rows * padded, 0);
        scratch.scales.resize(y.rows, 0.0);
        let (codes, scales) = (
            Pieces::new(&mut scratch.codes),
            Pieces::new(&mut scratch.scales),
        );
        let per_task = MIN_TASK_MULTIPLY_ADDS.div_ceil(size.max(1));
        pool.run(y.rows.div_ceil(per_task), &|task| {
            for row in task * per_task..((task + 1) * per_task).min(y.rows) {
                // SAFETY: each row belongs to one task; the instruction set is there.
                unsafe {
                    let codes = codes.piece(row * padded..(row + 1) * padded);
                    let scale = &mut scales.piece(row..row + 1)[0];
                    let row = &x[row * size..][..size];
                    int8::quantise_row(isa, row, int8::flip(isa), codes, scale);
                }
            }
        });
        self.over_panels(pool, y.rows, &|panel| {
            let job = int8::Job {
                codes: &scratch.codes,
                row_scales: &scratch.scales,
                k: padded,
                weights: &self.image[self.layout.panel(panel)],
                scales: numbers(&self.image[self.layout.scales(panel)]),
                sums: numbers(&self.image[self.layout.sums(panel)]),
                valid: self.layout.width(panel).0,
                y: y.start.wrapping_add(panel * PANEL),
                y_stride: y.stride,
            };
            // SAFETY: panels write disjoint columns of `y`; lengths follow from the layout.
            unsafe { int8::product_int8(isa, job) };
        });
        QUANTISED.set(scratch);
    }

    /// One panel's columns of all rows.
    unsafe fn panel(&self, isa: Isa, panel: usize, x: &[f32], y: &OutputRows) {
        let column = panel * PANEL;
        let (valid, width) = self.layout.width(panel);
        let x = x.as_ptr();
        unsafe {
            WIDE.with_borrow_mut(|wide| {
                let wide = self.widened(isa, panel, y.rows, wide);
                if width == valid {
                    let target = y.start.add(column);
                    self.columns(isa, panel, wide, x, y.rows, target, y.stride);
                    return;
                }
                // The padded columns of the last panel do not exist in `y`: a few rows at a time go through a scratch block.
                let mut scratch = [0.0_f32; 8 * PANEL];
                for row in (0..y.rows).step_by(8) {
                    let rows = (y.rows - row).min(8);
                    let x = x.add(row * self.in_features());
                    self.columns(isa, panel, wide, x, rows, scratch.as_mut_ptr(), PANEL);
                    for r in 0..rows {
                        let target = y.start.add((row + r) * y.stride + column);
                        target.copy_from_nonoverlapping(scratch.as_ptr().add(r * PANEL), valid);
                    }
                }
            });
        }
    }

    /// The panel as `f32` in `scratch`, if that pays for so many rows.
    unsafe fn widened<'a>(
        &self,
        isa: Isa,
        panel: usize,
        rows: usize,
        scratch: &'a mut Vec<f32>,
    ) -> Option<&'a [f32]> {
        let min_rows = match (self.format(), isa) {
            (WeightFormat::F32, _) => return None,
            // Its widening loads hide behind the products of eight rows: measured equal to `f32` at 8 to 512 rows.
            (WeightFormat::Bf16 | WeightFormat::F16, Isa::Avx512) => return None,
            (_, Isa::Avx512) => MIN_ROWS_TO_WIDEN_AVX512,
            _ => MIN_ROWS_TO_WIDEN,
        };
        if rows < min_rows {
            return None;
        }
        let width = self.layout.width(panel).1;
        let len = width * self.layout.padded_in();
        if scratch.len() < len {
            scratch.resize(len, 0.0);
        }
        let (bytes, wide) = (&self.image[self.layout.panel(panel)], &mut scratch[..len]);
        unsafe {
            match self.format() {
                WeightFormat::Bf16 => widen_bf16(isa, numbers(bytes), wide),
                WeightFormat::F16 => widen_f16(isa, numbers(bytes), wide),
                _ => int4::widen_codes(isa, numbers(bytes), width, wide),
            }
        }
        Some(wide)
    }

    #[allow(clippy::too_many_arguments)]
    unsafe fn columns(
        &self,
        isa: Isa,
        panel: usize,
        wide: Option<&[f32]>,
        x: *const f32,
        rows: usize,
        y: *mut f32,
        y_stride: usize,
    ) {
        let k = self.in_features();
        let width = self.layout.width(panel).1;
        let bytes = &self.image[self.layout.panel(panel)];
        if self.format() == WeightFormat::Int4 {
            let job = int4::Job {
                rows,
                k,
                width,
                x,
                x_stride: k,
                words: numbers(bytes).as_ptr(),
                wide: wide.map_or(std::ptr::null(), <[f32]>::as_ptr),
                scales: numbers(&self.image[self.layout.scales(panel)]).as_ptr(),
                y,
                y_stride,
            };
            unsafe { int4::product_int4(isa, job) };
            return;
        }
        let product = Product {
            rows,
            k,
            columns: width,
            x,
            x_stride: k,
            w: bytes.as_ptr(),
            w_stride: width,
            y,
            y_stride,
            accumulate: false,
        };
        unsafe {
            match (self.format(), wide) {
                (_, Some(wide)) => product_f32(isa, product.with(wide.as_ptr())),
                (WeightFormat::Bf16, _) => product_bf16(isa, product.with(bytes.as_ptr().cast())),
                (WeightFormat::F16, _) => product_f16(isa, product.with(bytes.as_ptr().cast())),
                _ => product_f32(isa, product.with(bytes.as_ptr().cast())),
            }
        }
    }

    /// Copies row `output` of `W` (the weights of one output), widened, to `row`: an embedding that shares the head's weights.
    ///
    /// # Panics
    /// If `output` or the length of `row` is out of range.
    pub fn weight_row(&self, output: usize, row: &mut [f32]) {
        assert!(
            output < self.out_features(),
            "row {output} of {}",
            self.out_features()
        );
        assert_eq!(
            row.len(),
            self.in_features(),
            "row of {}",
            self.in_features()
        );
        let (panel, column) = (output / PANEL, output % PANEL);
        let width = self.layout.width(panel).1;
        let bytes = &self.image[self.layout.panel(panel)];
        let scales = &self.image[self.layout.scales(panel)];
        match self.format() {
            WeightFormat::F32 => {
                let w = numbers::<f32>(bytes);
                fill(row, |k| w[k * width + column]);
            }
            WeightFormat::Bf16 => {
                let w = numbers::<u16>(bytes);
                fill(row, |k| bf16_to_f32(w[k * width + column]));
            }
            WeightFormat::F16 => {
                let w = numbers::<u16>(bytes);
                fill(row, |k| f16_to_f32(w[k * width + column]));
            }
            WeightFormat::Int8 => {
                let scale = numbers::<f32>(scales)[column];
                let code = |k: usize| bytes[(k / 4 * width + column) * 4 + k % 4] as i8;
                fill(row, |k| f32::from(code(k)) * scale);
            }
            WeightFormat::Int4 => {
                let (w, scales) = (numbers(bytes), numbers(scales));
                fill(row, |k| int4::weight(w, scales, width, column, k));
            }
        }
    }
}

fn fill(row: &mut [f32], value: impl Fn(usize) -> f32) {
    for (k, target) in row.iter_mut().enumerate() {
        *target = value(k);
    }
}

fn layout(format: WeightFormat, out_features: usize, in_features: usize) -> Layout {
    assert!(
        format != WeightFormat::Int8 || in_features <= int8::MAX_TERMS,
        "int8 sums of {in_features} terms; at most {}",
        int8::MAX_TERMS
    );
    Layout {
        format,
        out_features,
        in_features,
    }
}

#[inline(always)]
unsafe fn widen_body<L: Lanes, W: Weight>(narrow: &[u16], wide: &mut [f32]) {
    let wide = &mut wide[..narrow.len()];
    for at in (0..narrow.len()).step_by(UNIT) {
        for lane in (0..UNIT).step_by(L::WIDTH) {
            // SAFETY: panels are a multiple of `UNIT` long.
            unsafe {
                let weights: L = W::load(narrow.as_ptr().add(at + lane).cast());
                weights.store(wide.as_mut_ptr().add(at + lane));
            }
        }
    }
}

multiversion! { fn widen_bf16(narrow: &[u16], wide: &mut [f32]) => widen_body::<Bf16> }
multiversion! { fn widen_f16(narrow: &[u16], wide: &mut [f32]) => widen_body::<F16> }

/// Quantised rows of a call, kept for the next one.
#[derive(Default)]
struct Quantised {
    codes: Vec<u8>,
    scales: Vec<f32>,
}

thread_local! {
    static QUANTISED: Cell<Quantised> = Cell::default();
    /// A widened panel.
    static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The output matrix, shared between tasks that write disjoint columns.
struct OutputRows {
    start: *mut f32,
    rows: usize,
    stride: usize,
}
// SAFETY: tasks write disjoint elements only; see `forward_on`.
unsafe impl Sync for OutputRows {}

#[cfg(test)]
mod formats_tests;
#[cfg(test)]
mod tests;
