//! A range of columns of a row-major matrix: the queries inside fused rows of queries, keys and values, say.
//!
//! ```text
//! row 0   ......[offset .. offset + size]..........   stride elements
//! row 1   ......[                       ]..........
//! ```

use std::ops::Range;

/// The columns to read.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) columns: (usize, usize),
}

/// The columns to change in place.
#[derive(Debug)]
pub struct ColumnsMut<'a> {
    pub(crate) values: &'a mut [f32],
    pub(crate) stride: usize,
    pub(crate) columns: (usize, usize),
}

fn check(len: usize, stride: usize, columns: &Range<usize>) {
    assert!(
        columns.start < columns.end && columns.end <= stride && len.is_multiple_of(stride),
        "columns {columns:?} of rows of {stride}, {len} values"
    );
}

impl<'a> Columns<'a> {
    /// `columns` of `values`, which are rows of `stride` elements.
    ///
    /// # Panics
    /// If there are no columns, they leave the row, or the last row is not whole.
    #[must_use]
    pub fn of(values: &'a [f32], stride: usize, columns: Range<usize>) -> Self {
        check(values.len(), stride, &columns);
        Self {
            values,
            stride,
            columns: (columns.start, columns.end),
        }
    }

    /// Whole rows of `size` elements.
    ///
    /// # Panics
    /// As [`Columns::of`].
    #[must_use]
    pub fn whole(values: &'a [f32], size: usize) -> Self {
        Self::of(values, size, 0..size)
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.values.len() / self.stride
    }

    /// Elements of a row that are in the range.
    #[must_use]
    pub fn size(&self) -> usize {
        self.columns.1 - self.columns.0
    }

    /// The range of a row.
    #[must_use]
    pub fn row(&self, row: usize) -> &'a [f32] {
        &self.values[row * self.stride..][self.columns.0..self.columns.1]
    }
}

impl<'a> ColumnsMut<'a> {
    /// As [`Columns::of`].
    ///
    /// # Panics
    /// As [`Columns::of`].
    #[must_use]
    pub fn of(values: &'a mut [f32], stride: usize, columns: Range<usize>) -> Self {
        check(values.len(), stride, &columns);
        Self {
            values,
            stride,
            columns: (columns.start, columns.end),
        }
    }

    /// As [`Columns::whole`].
    ///
    /// # Panics
    /// As [`Columns::of`].
    #[must_use]
    pub fn whole(values: &'a mut [f32], size: usize) -> Self {
        Self::of(values, size, 0..size)
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.values.len() / self.stride
    }

    /// Elements of a row that are in the range.
    #[must_use]
    pub fn size(&self) -> usize {
        self.columns.1 - self.columns.0
    }
}
