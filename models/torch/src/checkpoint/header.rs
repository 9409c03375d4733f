//! The header of one safetensors file: parsed, then every claim in it checked against the others and against the file.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::{CheckpointError, Entry, StoredType};

/// The largest header that is parsed, in bytes; the format's reference implementation has the same limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// One tensor of a header, unchecked.
#[derive(Deserialize)]
pub struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's tensors, and the file offset at which tensor bytes start.
pub fn parse_header(
    path: &Path,
    file: &[u8],
) -> Result<Vec<(String, RawEntry, u64)>, CheckpointError> {
    let wrong = |reason: String| CheckpointError::Format {
        path: path.to_owned(),
        reason,
    };
    let truncated = |expected_bytes| CheckpointError::Truncated {
        path: path.to_owned(),
        expected_bytes,
        found_bytes: file.len() as u64,
    };
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(truncated(8));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(wrong(format!(
            "its header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed"
        )));
    }
    let Some(header) = rest.get(..length as usize) else {
        return Err(truncated(8 + length));
    };
    let header: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(header).map_err(|error| wrong(format!("header: {error}")))?;
    let mut entries = Vec::with_capacity(header.len());
    for (name, value) in header {
        if name == "__metadata__" {
            continue;
        }
        let raw = serde_json::from_value(value)
            .map_err(|error| wrong(format!("header of tensor \"{name}\": {error}")))?;
        entries.push((name, raw, 8 + length));
    }
    Ok(entries)
}

/// Checks a tensor's claims against each other and against the file.
pub fn locate(
    path: &Path,
    file: &[u8],
    index: usize,
    name: &str,
    raw: RawEntry,
    data_start: u64,
) -> Result<Entry, CheckpointError> {
    let wrong = |reason: String| CheckpointError::Format {
        path: path.to_owned(),
        reason,
    };
    let (from, to) = raw.data_offsets;
    let (start, end) = match (data_start.checked_add(from), data_start.checked_add(to)) {
        (Some(start), Some(end)) if start <= end => (start, end),
        _ => {
            return Err(wrong(format!(
                "tensor \"{name}\" claims the impossible offsets {from} to {to}"
            )));
        }
    };
    if end > file.len() as u64 {
        return Err(CheckpointError::Truncated {
            path: path.to_owned(),
            expected_bytes: end,
            found_bytes: file.len() as u64,
        });
    }
    if let Some(dtype) = StoredType::of(&raw.dtype) {
        let needed = raw
            .shape
            .iter()
            .try_fold(dtype.size_bytes() as u64, |bytes, size| {
                bytes.checked_mul(*size)
            });
        if needed != Some(end - start) {
            return Err(wrong(format!(
                "tensor \"{name}\" of shape {:?} and type {} takes {} bytes",
                raw.shape,
                raw.dtype,
                end - start
            )));
        }
    }
    Ok(Entry {
        file: index,
        dtype: raw.dtype,
        shape: raw.shape,
        start: start as usize,
        end: end as usize,
    })
}
