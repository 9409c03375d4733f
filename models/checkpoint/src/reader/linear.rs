//! Rows of a linear map, put together from the tensors that its description names, widened to f32.
//!
//! What is looked up by name is looked up once, when the reader is made; a row is then a copy. Widening is exact: every bf16 and f16 number is
//! an f32 number.

use super::{Checkpoint, StoredTensor, StoredType};
use crate::spec::{BiasPart, LinearSpec, RowPattern};
use crate::tensor_error::TensorError;

/// Output rows of one map, `[outputs, inputs]`.
#[derive(Debug)]
pub struct LinearReader<'a> {
    inputs: usize,
    outputs: usize,
    parts: Vec<Part<'a>>,
    bias: Option<Vec<f32>>,
}

#[derive(Debug)]
struct Part<'a> {
    tensor: StoredTensor<'a>,
    /// The first output that is of this part.
    first: usize,
    rows: RowPattern,
    /// Elements between an output's neighbouring inputs, and between neighbouring outputs, in the file.
    input_stride: usize,
    output_stride: usize,
}

impl Checkpoint {
    /// A reader of `spec`'s rows; all of its tensors are found and of their shapes.
    ///
    /// # Errors
    /// [`TensorError`] for a tensor that is missing, quantized, or of another shape or type than the description says.
    ///
    /// # Panics
    /// If a row pattern reaches beyond its tensor or the parts are not all outputs: a family's mistake, not the file's.
    pub fn linear(&self, spec: &LinearSpec) -> Result<LinearReader<'_>, TensorError> {
        let mut parts = Vec::with_capacity(spec.weight.len());
        let mut first = 0;
        for part in &spec.weight {
            let (outputs, inputs) = (part.stored_outputs, spec.inputs);
            assert!(part.rows.end() <= outputs, "rows beyond {}", part.tensor);
            let (shape, input_stride, output_stride) = match part.transposed {
                true => ([inputs, outputs], outputs, 1),
                false => ([outputs, inputs], 1, inputs),
            };
            parts.push(Part {
                tensor: self.tensor(&part.tensor, &shape.map(as_i64))?,
                first,
                rows: part.rows,
                input_stride,
                output_stride,
            });
            first += part.rows.rows();
        }
        assert_eq!(first, spec.outputs, "parts of a map are not its outputs");
        Ok(LinearReader {
            inputs: spec.inputs,
            outputs: spec.outputs,
            parts,
            bias: self.bias(&spec.bias, spec.outputs)?,
        })
    }

    /// A one-dimensional tensor, such as a norm's weight.
    ///
    /// # Errors
    /// [`TensorError`] if it is missing or not of this length.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, TensorError> {
        let tensor = self.tensor(name, &[as_i64(len)])?;
        let mut values = vec![0.0; len];
        tensor.widen(0, 1, &mut values);
        Ok(values)
    }

    fn bias(&self, parts: &[BiasPart], outputs: usize) -> Result<Option<Vec<f32>>, TensorError> {
        if parts.is_empty() {
            return Ok(None);
        }
        let mut bias = Vec::with_capacity(outputs);
        for part in parts {
            let stored = self.vector(&part.tensor, part.stored_len)?;
            bias.extend((0..part.rows.rows()).map(|row| stored[part.rows.stored(row)]));
        }
        assert_eq!(bias.len(), outputs, "parts of a bias are not its outputs");
        Ok(Some(bias))
    }
}

impl<'a> LinearReader<'a> {
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// `[outputs]`; `None` if the map has none.
    #[must_use]
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// The type in which all parts are stored; `None` if they differ.
    #[must_use]
    pub fn stored_type(&self) -> Option<StoredType> {
        let (first, rest) = self.parts.split_first()?;
        let dtype = first.tensor.dtype;
        rest.iter()
            .all(|part| part.tensor.dtype == dtype)
            .then_some(dtype)
    }

    /// Copies output row `index` into `row`, `[inputs]`.
    ///
    /// # Panics
    /// If there is no such row or `row` has another length.
    pub fn row(&self, index: usize, row: &mut [f32]) {
        assert_eq!(
            row.len(),
            self.inputs,
            "a row has as many elements as inputs"
        );
        let (part, at) = self.locate(index);
        part.tensor.widen(at, part.input_stride, row);
    }

    /// The stored bytes of output row `index`; `None` if they do not lie together (a transposed tensor).
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn row_bytes(&self, index: usize) -> Option<&'a [u8]> {
        let (part, at) = self.locate(index);
        let size = part.tensor.dtype.size_bytes();
        (part.input_stride == 1).then(|| &part.tensor.bytes[at * size..(at + self.inputs) * size])
    }

    /// Copies the rows from `first` on into `rows`, `[n, inputs]`. Of a transposed tensor, several rows at once are read far faster than one
    /// by one: neighbouring outputs lie together.
    ///
    /// # Panics
    /// If there are no such rows or `rows` is no number of whole rows.
    pub fn rows(&self, first: usize, rows: &mut [f32]) {
        assert!(rows.len().is_multiple_of(self.inputs), "whole rows only");
        let mut index = first;
        let mut rest = rows;
        while !rest.is_empty() {
            let (part, at) = self.locate(index);
            let run = part.run(index).min(rest.len() / self.inputs);
            let (now, later) = rest.split_at_mut(run * self.inputs);
            if part.input_stride == 1 {
                part.tensor.widen(at, 1, now);
            } else {
                self.transposed(part, at, run, now);
            }
            index += run;
            rest = later;
        }
    }

    /// `run` neighbouring outputs of a transposed part, by input.
    fn transposed(&self, part: &Part<'_>, at: usize, run: usize, rows: &mut [f32]) {
        let mut column = vec![0.0; run];
        for input in 0..self.inputs {
            part.tensor
                .widen(at + input * part.input_stride, 1, &mut column);
            for (output, value) in column.iter().enumerate() {
                rows[output * self.inputs + input] = *value;
            }
        }
    }

    /// The part that has output `index`, and the element of its tensor at which that output starts.
    fn locate(&self, index: usize) -> (&Part<'a>, usize) {
        let after = self.parts.partition_point(|part| part.first <= index);
        assert!(after > 0 && index < self.outputs, "no output {index}");
        let part = &self.parts[after - 1];
        (
            part,
            part.rows.stored(index - part.first) * part.output_stride,
        )
    }
}

impl Part<'_> {
    /// How many outputs from `index` on lie together in the file.
    fn run(&self, index: usize) -> usize {
        let row = index - self.first;
        match self.rows.stride == self.rows.len {
            true => self.rows.rows() - row,
            false => self.rows.len - row % self.rows.len,
        }
    }
}

impl StoredTensor<'_> {
    /// Every `stride`th element from `first` on, exactly, as many as `into` holds.
    ///
    /// # Panics
    /// If the tensor has not so many.
    pub fn widen(&self, first: usize, stride: usize, into: &mut [f32]) {
        match self.dtype {
            StoredType::F32 => self.each(first, stride, into, f32::from_le_bytes),
            StoredType::Bf16 => self.each(first, stride, into, |bytes| {
                f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
            }),
            StoredType::F16 => self.each(first, stride, into, |bytes| {
                widen_f16(u16::from_le_bytes(bytes))
            }),
        }
    }

    fn each<const SIZE: usize>(
        &self,
        first: usize,
        stride: usize,
        into: &mut [f32],
        widen: impl Fn([u8; SIZE]) -> f32,
    ) {
        let (elements, _) = self.bytes.as_chunks::<SIZE>();
        if stride == 1 {
            let elements = &elements[first..first + into.len()];
            for (value, bytes) in into.iter_mut().zip(elements) {
                *value = widen(*bytes);
            }
            return;
        }
        for (index, value) in into.iter_mut().enumerate() {
            *value = widen(elements[first + index * stride]);
        }
    }
}

/// An IEEE half, exactly: subnormal halves are normal f32 numbers, and a NaN keeps its payload.
fn widen_f16(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let magnitude = u32::from(half & 0x7FFF);
    // Exponent and mantissa in their places; 2^112 moves the exponent's bias.
    let scaled = f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000);
    let bits = match magnitude {
        0x7C00.. => 0x7F80_0000 | ((magnitude & 0x3FF) << 13),
        _ => scaled.to_bits(),
    };
    f32::from_bits(sign | bits)
}

fn as_i64(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}
