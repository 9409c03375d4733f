//! Named f32 tensors in safetensors files, written whole or not at all.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tch::{Kind, Tensor};

/// Why a file of weights cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("cannot {action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is not a usable weights file: {reason}")]
    Format { path: PathBuf, reason: String },
}

/// Tensors by name, and the file's free-form metadata.
pub type Weights = (BTreeMap<String, Tensor>, HashMap<String, String>);

/// Writes `bytes` beside `path` and renames, so that a reader sees the old file or the new one.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), WeightsError> {
    let fail = |action| {
        move |source| WeightsError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    };
    let mut beside = path.as_os_str().to_owned();
    beside.push(".partial");
    let beside = PathBuf::from(beside);
    let mut file = std::fs::File::create(&beside).map_err(fail("create"))?;
    file.write_all(bytes).map_err(fail("write"))?;
    file.sync_all().map_err(fail("write"))?;
    std::fs::rename(&beside, path).map_err(fail("rename"))
}

/// Writes f32 copies of `tensors`.
pub fn save(
    path: &Path,
    tensors: &[(String, &Tensor)],
    metadata: HashMap<String, String>,
) -> Result<(), WeightsError> {
    let format_error = |reason: String| WeightsError::Format {
        path: path.to_owned(),
        reason,
    };
    let bytes: Vec<(&str, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), shape(tensor), little_endian(tensor)))
        .collect();
    let views = bytes
        .iter()
        .map(|(name, shape, data)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), data)
                .map_err(|error| format_error(error.to_string()))?;
            Ok((*name, view))
        })
        .collect::<Result<Vec<_>, WeightsError>>()?;
    let file = safetensors::serialize(views, Some(metadata))
        .map_err(|error| format_error(error.to_string()))?;
    write_atomically(path, &file)
}

fn shape(tensor: &Tensor) -> Vec<usize> {
    tensor.size().into_iter().map(|n| n as usize).collect()
}

fn little_endian(tensor: &Tensor) -> Vec<u8> {
    let flat = tensor.detach().to_kind(Kind::Float).contiguous();
    let mut values = vec![0_f32; flat.numel()];
    flat.copy_data(&mut values, flat.numel());
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// Reads a file of f32 tensors, such as [`save`] writes.
pub fn load(path: &Path) -> Result<Weights, WeightsError> {
    let format_error = |reason: String| WeightsError::Format {
        path: path.to_owned(),
        reason,
    };
    let bytes = std::fs::read(path).map_err(|source| WeightsError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    })?;
    let (_, header) =
        SafeTensors::read_metadata(&bytes).map_err(|error| format_error(error.to_string()))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let file = SafeTensors::deserialize(&bytes).map_err(|error| format_error(error.to_string()))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        if view.dtype() != Dtype::F32 {
            return Err(format_error(format!("tensor \"{name}\" is not f32")));
        }
        let values: Vec<f32> = view
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        let shape: Vec<i64> = view.shape().iter().map(|n| *n as i64).collect();
        tensors.insert(
            name.to_owned(),
            Tensor::from_slice(&values).view(&shape[..]),
        );
    }
    Ok((tensors, metadata))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = std::env::temp_dir().join(format!("understudy-weights-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("a.safetensors");
        let tensor = Tensor::from_slice(&[1.5_f32, -2.0, 3.25, 0.0, 1e-20, 7.0]).view([2, 3]);
        let metadata = HashMap::from([("step".to_owned(), "7".to_owned())]);
        save(&path, &[("x".to_owned(), &tensor)], metadata.clone()).unwrap();
        let (tensors, read) = load(&path).unwrap();
        assert_eq!(read, metadata);
        assert_eq!(tensors["x"], tensor);
        std::fs::write(&path, &std::fs::read(&path).unwrap()[..40]).unwrap();
        assert!(load(&path).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
