//! Small checkpoints, made on the spot.

use std::path::Path;

use serde_json::{Map, Value, json};

/// One tensor of a file: name, type, shape, bytes.
pub type Tensor = (String, &'static str, Vec<usize>, Vec<u8>);

/// Writes `model.safetensors`.
pub fn write(directory: &Path, tensors: &[Tensor]) {
    let mut header = Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    std::fs::write(directory.join("model.safetensors"), file).unwrap();
}

/// The numbers 0, 1, 2, ... as f32.
pub fn counting(name: &str, shape: &[usize]) -> Tensor {
    let count = shape.iter().product::<usize>();
    let bytes = (0..count).flat_map(|i| (i as f32).to_le_bytes()).collect();
    (name.to_owned(), "F32", shape.to_vec(), bytes)
}
