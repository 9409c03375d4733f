//! The header of one safetensors file: parsed, then every claim in it checked against the others and against the file.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::{CheckpointError, Entry};

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
    // Of a type that nobody has told us of, only that its elements can be counted.
    let elements = raw
        .shape
        .iter()
        .try_fold(1_u64, |elements, size| elements.checked_mul(*size));
    let possible = match (elements, bits_of(&raw.dtype)) {
        (Some(elements), Some(bits)) => elements.checked_mul(bits) == (end - start).checked_mul(8),
        (Some(_), None) => true,
        (None, _) => false,
    };
    if !possible {
        return Err(wrong(format!(
            "tensor \"{name}\" of shape {:?} and type {} takes {} bytes",
            raw.shape,
            raw.dtype,
            end - start
        )));
    }
    Ok(Entry {
        file: index,
        dtype: raw.dtype,
        shape: raw.shape,
        start: start as usize,
        end: end as usize,
    })
}

/// Bits of an element, for every type that the format has.
fn bits_of(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}
