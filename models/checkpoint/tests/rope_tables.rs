//! Rotary tables against those that transformers 5.23 computes, as bits of f32; tests/rope/README.md says how they were made.

use serde_json::Value;
use understudy_checkpoint::families;

fn bits(values: &Value) -> Vec<u32> {
    let values = values.as_array().unwrap();
    values
        .iter()
        .map(|bits| bits.as_u64().unwrap() as u32)
        .collect()
}

/// Distance in units of the last place of numbers of one sign; large if the signs differ.
fn ulps(a: f32, b: u32) -> u32 {
    a.to_bits().abs_diff(b)
}

#[test]
fn tables_are_those_of_transformers() {
    let text = include_str!("rope/tables.json");
    let cases: Value = serde_json::from_str(text).unwrap();
    for (name, case) in cases.as_object().unwrap() {
        // Within the original context, the factors for short texts.
        let limit = (name == "longrope_short").then_some(4096);
        let spec = families::from_json_within(&case["config"].to_string(), limit).unwrap();
        let rope = &spec.ropes[0];
        let expected = bits(&case["frequencies"]);
        let frequencies = rope.inverse_frequencies();
        assert_eq!(frequencies.len(), expected.len(), "{name}");
        let worst = frequencies
            .iter()
            .zip(&expected)
            .map(|(a, b)| ulps(*a, *b))
            .max();
        assert_eq!(worst, Some(0), "{name}");

        let (cos, sin) = rope.table(4097);
        let positions = case["positions"].as_array().unwrap();
        for (row, position) in positions.iter().enumerate() {
            let position = position.as_u64().unwrap() as usize;
            let start = position * frequencies.len();
            for (table, key) in [(&cos, "cos"), (&sin, "sin")] {
                for (i, expected) in bits(&case[key][row]).iter().enumerate() {
                    let found = table[start + i];
                    let expected = f32::from_bits(*expected);
                    // A library's cosine may be off by one unit of the last place.
                    assert!(
                        (found - expected).abs() <= 1.5e-7,
                        "{name}: {key} of pair {i} at {position} is {found}, not {expected}"
                    );
                }
            }
        }
    }
}
