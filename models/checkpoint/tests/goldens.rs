//! Every golden checkpoint holds exactly the tensors that its configuration describes, in both spellings of the configuration.

use std::io::Write;
use std::path::{Path, PathBuf};

use understudy_checkpoint::{Checkpoint, ModelSpec, check_all_used, families};

/// Directories of goldens, of both executors.
fn goldens() -> Vec<PathBuf> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut cases = Vec::new();
    for executor in ["cpu", "torch"] {
        let directory = models.join(executor).join("tests/golden");
        match std::fs::read_dir(&directory) {
            Ok(entries) => cases.extend(entries.map(|entry| entry.unwrap().path())),
            // Past the capture of the test harness: a test that tests nothing is to be seen.
            Err(_) => {
                let skipped = format!(
                    "SKIPPED: no goldens in {}
",
                    directory.display()
                );
                std::io::stderr().write_all(skipped.as_bytes()).unwrap();
            }
        }
    }
    cases.retain(|case| case.join("config.json").exists());
    cases.sort();
    cases
}

fn described(path: &Path) -> ModelSpec {
    let text = std::fs::read_to_string(path).unwrap();
    families::from_json(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn goldens_hold_exactly_what_is_described() {
    for case in goldens() {
        let checkpoint = Checkpoint::open(&case).unwrap();
        let spec = described(&case.join("config.json"));
        let old = case.join("config.alt.json");
        if old.exists() {
            assert_eq!(spec, described(&old), "{}", case.display());
        }
        let spec = spec.with_names_of(&checkpoint);
        check_all_used(checkpoint.names(), &spec)
            .unwrap_or_else(|error| panic!("{}: {error}", case.display()));
        for (name, shape) in spec.tensors() {
            let shape: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
            if let Err(error) = checkpoint.tensor(&name, &shape) {
                panic!("{}: {error}", case.display());
            }
        }
        for (_, map) in spec.linears() {
            let reader = checkpoint.linear(map).unwrap();
            reader.row(reader.outputs() - 1, &mut vec![0.0; reader.inputs()]);
        }
    }
}
