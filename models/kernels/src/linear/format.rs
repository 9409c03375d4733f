//! How packed weights lie in memory, and how they get there.
//!
//! ```text
//! panel of 48 outputs (the last one 16, 32 or 48 wide), then the next one:
//!   f32, bf16, f16   [in][width]                       one weight each
//!   int8             [in / 4][width][4]                four weights of an output side by side
//!   int4             [in / 8][width] u32               eight weights of an output in one word, lowest bits first
//! behind the panels, each part at a multiple of 64 bytes:
//!   int8             scales f32 [outputs], sums i32 [outputs]        a sum is that of an output's quantised weights
//!   int4             scales bf16, for each panel [in / 32][width]
//! ```
//!
//! `in` is padded with zero weights to a multiple of 4 or 32, `outputs` to one of 16. Numbers are little-endian.
//! Invariant: an image is a function of format, shape and weights alone, on every machine, so it can be kept in a file and shared.

use std::cell::RefCell;
use std::ops::Range;

use super::PANEL;
use super::int4::{GROUP, quantise_group};
use super::int8::quantise_row;
use crate::buffer::{LINE_BYTES, Pieces, numbers_mut};
use crate::isa::Isa;
use crate::lanes::{f32_to_bf16, f32_to_f16};
use crate::pool::Pool;
use crate::product::UNIT;

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// 4 bytes; sums in `f32`.
    F32,
    /// 2 bytes, the upper half of an `f32`; sums in `f32`.
    Bf16,
    /// 2 bytes, IEEE half; sums in `f32`.
    F16,
    /// 1 byte and a scale per output; activations are quantised per row, sums are integers.
    Int8,
    /// Half a byte and a scale per 32 weights of an output; sums in `f32`.
    Int4,
}

/// Gives row `output` of a weight matrix, widened: called once per row, from any thread.
pub type RowSource<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// Where the parts of an image lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub format: WeightFormat,
    pub out_features: usize,
    pub in_features: usize,
}

impl Layout {
    /// Terms of a stored output, padding included.
    pub fn padded_in(&self) -> usize {
        match self.format {
            WeightFormat::F32 | WeightFormat::Bf16 | WeightFormat::F16 => self.in_features,
            WeightFormat::Int8 => self.in_features.next_multiple_of(4),
            WeightFormat::Int4 => self.in_features.next_multiple_of(GROUP),
        }
    }

    fn padded_out(&self) -> usize {
        self.out_features.next_multiple_of(UNIT)
    }

    pub fn panels(&self) -> usize {
        self.out_features.div_ceil(PANEL)
    }

    /// Outputs of a panel that exist, and the width that they are padded to.
    pub fn width(&self, panel: usize) -> (usize, usize) {
        let valid = (self.out_features - panel * PANEL).min(PANEL);
        (valid, valid.next_multiple_of(UNIT))
    }

    /// Bytes of one output's weights.
    fn output_bytes(&self) -> usize {
        match self.format {
            WeightFormat::F32 => 4 * self.padded_in(),
            WeightFormat::Bf16 | WeightFormat::F16 => 2 * self.padded_in(),
            WeightFormat::Int8 => self.padded_in(),
            WeightFormat::Int4 => self.padded_in() / 2,
        }
    }

    pub fn panel(&self, panel: usize) -> Range<usize> {
        let start = panel * PANEL * self.output_bytes();
        start..start + self.width(panel).1 * self.output_bytes()
    }

    fn scales_start(&self) -> usize {
        (self.padded_out() * self.output_bytes()).next_multiple_of(LINE_BYTES)
    }

    /// Bytes of a panel's scales; none for the float formats.
    pub fn scales(&self, panel: usize) -> Range<usize> {
        let per_output = match self.format {
            WeightFormat::F32 | WeightFormat::Bf16 | WeightFormat::F16 => 0,
            WeightFormat::Int8 => 4,
            WeightFormat::Int4 => self.padded_in() / GROUP * 2,
        };
        let start = self.scales_start() + panel * PANEL * per_output;
        start..start + self.width(panel).1 * per_output
    }

    fn sums_start(&self) -> usize {
        let last = self.scales(self.panels().saturating_sub(1)).end;
        last.next_multiple_of(LINE_BYTES)
    }

    /// Bytes of a panel's sums; none but for int8.
    pub fn sums(&self, panel: usize) -> Range<usize> {
        let per_output = if self.format == WeightFormat::Int8 {
            4
        } else {
            0
        };
        let start = self.sums_start() + panel * PANEL * per_output;
        start..start + self.width(panel).1 * per_output
    }

    /// Bytes of the whole image.
    pub fn image_bytes(&self) -> usize {
        if self.out_features == 0 {
            return 0;
        }
        let last = self.sums(self.panels() - 1).end;
        last.next_multiple_of(LINE_BYTES)
    }
}

thread_local! {
    /// Rows of the panel that is being packed.
    static ROWS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// The same, quantised.
    static CODES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Packs all panels into `image`, several at a time.
pub(super) fn pack(layout: Layout, pool: &Pool, source: &RowSource<'_>, image: &mut [u8]) {
    assert_eq!(image.len(), layout.image_bytes(), "image of {layout:?}");
    assert!(
        image.is_empty() || image.as_ptr().addr().is_multiple_of(LINE_BYTES),
        "an image must be aligned to {LINE_BYTES} bytes"
    );
    let image = Pieces::new(image);
    pool.run(layout.panels(), &|panel| {
        // SAFETY: the parts of different panels do not overlap.
        let (target, scales, sums) = unsafe {
            (
                image.piece(layout.panel(panel)),
                image.piece(layout.scales(panel)),
                image.piece(layout.sums(panel)),
            )
        };
        let (valid, width) = layout.width(panel);
        // Rows a power of two apart would all fall on the same lines of the cache.
        let stride = layout.padded_in() + UNIT;
        ROWS.with_borrow_mut(|rows| {
            rows.clear();
            rows.resize(width * stride, 0.0);
            for (column, row) in rows.chunks_exact_mut(stride).take(valid).enumerate() {
                source(panel * PANEL + column, &mut row[..layout.in_features]);
            }
            let rows = Rows { rows, stride };
            match layout.format {
                WeightFormat::F32 => {
                    pack_floats(rows, width, numbers_mut::<f32>(target), |value| value);
                }
                WeightFormat::Bf16 => {
                    pack_floats(rows, width, numbers_mut::<u16>(target), f32_to_bf16);
                }
                WeightFormat::F16 => {
                    pack_floats(rows, width, numbers_mut::<u16>(target), f32_to_f16);
                }
                WeightFormat::Int8 => {
                    pack_int8(layout, rows, target, numbers_mut(scales), numbers_mut(sums));
                }
                WeightFormat::Int4 => {
                    pack_int4(rows, width, numbers_mut(target), numbers_mut(scales));
                }
            }
        });
    });
}

/// The rows of a panel, `stride` apart.
#[derive(Clone, Copy)]
struct Rows<'a> {
    rows: &'a [f32],
    stride: usize,
}

fn pack_floats<T>(rows: Rows<'_>, width: usize, target: &mut [T], narrow: impl Fn(f32) -> T) {
    for (k, line) in target.chunks_exact_mut(width).enumerate() {
        for (column, value) in line.iter_mut().enumerate() {
            *value = narrow(rows.rows[column * rows.stride + k]);
        }
    }
}

fn pack_int8(
    layout: Layout,
    rows: Rows<'_>,
    target: &mut [u8],
    scales: &mut [f32],
    sums: &mut [i32],
) {
    let (size, width) = (layout.padded_in(), scales.len());
    CODES.with_borrow_mut(|codes| {
        codes.clear();
        codes.resize(size, 0);
        for (column, (scale, sum)) in scales.iter_mut().zip(sums).enumerate() {
            let row = &rows.rows[column * rows.stride..][..size];
            // SAFETY: the instruction set was detected.
            unsafe { quantise_row(Isa::best(), row, 0, codes, scale) };
            *sum = codes.iter().map(|code| i32::from(*code as i8)).sum();
            for (quad, codes) in codes.as_chunks::<4>().0.iter().enumerate() {
                target[(quad * width + column) * 4..][..4].copy_from_slice(codes);
            }
        }
    });
}

fn pack_int4(rows: Rows<'_>, width: usize, target: &mut [u32], scales: &mut [u16]) {
    for (group, scales) in scales.chunks_exact_mut(width).enumerate() {
        for (column, scale) in scales.iter_mut().enumerate() {
            let start = column * rows.stride + group * GROUP;
            let mut codes = [0_i32; GROUP];
            // SAFETY: the instruction set was detected.
            unsafe {
                quantise_group(Isa::best(), &rows.rows[start..][..GROUP], &mut codes, scale);
            }
            for (octet, codes) in codes.as_chunks::<8>().0.iter().enumerate() {
                target[(group * (GROUP / 8) + octet) * width + column] = codes
                    .iter()
                    .rev()
                    .fold(0, |word, code| word << 4 | (*code as u32 & 15));
            }
        }
    }
}
