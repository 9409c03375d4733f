use super::*;

/// A directory that is gone at the end of the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, files: &[(&str, &str)]) -> Self {
        let path = std::env::temp_dir().join(format!(
            "understudy-model-dir-{name}-{}",
            std::process::id()
        ));
        fs::create_dir_all(&path).unwrap();
        for (file, text) in files {
            fs::write(path.join(file), text).unwrap();
        }
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const CONFIG: &str = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64,
    "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}"#;

#[test]
fn a_minimal_directory() {
    let scratch = Scratch::new("minimal", &[("config.json", CONFIG)]);
    let dir = ModelDir::open(&scratch.0).unwrap();
    assert_eq!(
        (dir.architecture.as_str(), dir.model_type.as_str()),
        ("LlamaForCausalLM", "llama")
    );
    assert_eq!((dir.context_length, dir.vocab_size), (64, Some(9)));
    assert_eq!(dir.eos_token_ids, [2]);
    assert_eq!(dir.generation, GenerationDefaults::default());
    assert_eq!(dir.chat_files().unwrap().template(), None);
    let error = dir.tokenizer_hash().unwrap_err().to_string();
    assert!(error.contains("tokenizer.json is missing"), "{error}");
}

#[test]
fn generation_defaults_win_over_the_configuration() {
    let generation = r#"{"eos_token_id": [2, 5], "temperature": 0.6, "top_p": 0.9, "do_sample": true, "unknown": {}}"#;
    let scratch = Scratch::new(
        "generation",
        &[
            ("config.json", CONFIG),
            ("generation_config.json", generation),
            ("tokenizer.json", "abc"),
        ],
    );
    let dir = ModelDir::open(&scratch.0).unwrap();
    assert_eq!(dir.eos_token_ids, [2, 5]);
    assert_eq!(
        (dir.generation.temperature, dir.generation.top_p),
        (Some(0.6), Some(0.9))
    );
    // SHA-256 of "abc" (FIPS 180-2).
    assert_eq!(
        dir.tokenizer_hash().unwrap(),
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
}

#[test]
fn templates_and_special_tokens() {
    let named = r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": null,
        "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
    let scratch = Scratch::new(
        "chat",
        &[("config.json", CONFIG), ("tokenizer_config.json", named)],
    );
    let dir = ModelDir::open(&scratch.0).unwrap();
    let files = dir.chat_files().unwrap();
    assert_eq!(files.template(), Some("D"));
    assert_eq!(
        files.special_tokens().collect::<Vec<_>>(),
        [("bos_token", "<s>"), ("eos_token", "</s>")]
    );
    fs::write(scratch.0.join("chat_template.jinja"), "J").unwrap();
    assert_eq!(dir.chat_files().unwrap().template(), Some("J"));
    fs::write(scratch.0.join("chat_template.jinja"), [0xff]).unwrap();
    assert!(
        dir.chat_files()
            .unwrap_err()
            .to_string()
            .contains("chat_template.jinja")
    );
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    let absent = ModelDir::open(Path::new("no/such/model"))
        .unwrap_err()
        .to_string();
    assert!(absent.contains("no/such/model does not exist"), "{absent}");
    let cases = [
        ("file-missing", &[][..], "config.json is missing"),
        (
            "truncated",
            &[("config.json", "{\"model_type\": ")],
            "truncated",
        ),
        (
            "no-type",
            &[(
                "config.json",
                r#"{"architectures": ["A"], "max_position_embeddings": 4}"#,
            )],
            "lacks model_type",
        ),
        (
            "no-architecture",
            &[("config.json", r#"{"model_type": "x"}"#)],
            "lacks architectures",
        ),
        (
            "no-context",
            &[(
                "config.json",
                r#"{"model_type": "x", "architectures": ["A"], "max_position_embeddings": 0}"#,
            )],
            "lacks max_position_embeddings",
        ),
        (
            "bad-generation",
            &[
                ("config.json", CONFIG),
                ("generation_config.json", r#"{"top_k": "x"}"#),
            ],
            "generation_config.json",
        ),
    ];
    for (name, files, part) in cases {
        let scratch = Scratch::new(name, files);
        let message = ModelDir::open(&scratch.0).unwrap_err().to_string();
        assert!(message.contains(part), "{name}: {message}");
    }
    let scratch = Scratch::new("is-a-file", &[("config.json", CONFIG)]);
    let message = ModelDir::open(&scratch.0.join("config.json"))
        .unwrap_err()
        .to_string();
    assert!(message.contains("is a file"), "{message}");
}
