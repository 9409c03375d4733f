//! An engine process with a [`FakeRunner`] in place of LibTorch: same command line, same frames, same exit codes.
//!
//! Options of its own, each also as an environment variable (`--vocab-size` is `UNDERSTUDY_FAKE_VOCAB_SIZE`; the command
//! line wins): `--vocab-size N`, `--eos-token-id N`, `--salt N`, `--step-delay-us N`, `--step-ticks N`, and those of
//! [`Faults`](understudy_engine_core::fake::Faults). With a tokenizer.json in the model directory the vocabulary is its.

use std::{
    thread,
    time::{Duration, Instant},
};

use understudy_engine_core::{
    args::{ArgsError, EngineArgs, Values},
    fake::{FakeOptions, FakeRunner, Faults},
    model_dir::ModelDir,
    runner::ModelRunner,
    server::{ExitStatus, ServeOptions, inherited_socket, serve},
    tokenizer::TextTokenizer,
};

/// Options besides those of [`Faults`].
const OWN_OPTIONS: [&str; 5] = [
    "vocab-size",
    "eos-token-id",
    "salt",
    "step-delay-us",
    "step-ticks",
];

/// What the command line and the environment say of the fake itself.
#[derive(Default)]
struct FakeArgs {
    faults: Faults,
    vocab_size: Option<usize>,
    eos_token_ids: Option<Vec<u32>>,
    salt: u64,
    step_delay: Duration,
    step_ticks: u32,
}

impl FakeArgs {
    fn from_environment() -> Result<Self, String> {
        let mut args = Self::default();
        for option in Faults::OPTIONS.into_iter().chain(OWN_OPTIONS) {
            let variable = Faults::variable(option);
            if let Ok(value) = std::env::var(&variable) {
                args.set(option, &value)
                    .map_err(|error| format!("{variable}: {error}"))?;
            }
        }
        Ok(args)
    }

    fn set(&mut self, option: &str, value: &str) -> Result<bool, String> {
        let number = || {
            value
                .parse::<u64>()
                .map_err(|_| format!("{option}: {value:?} is not a number"))
        };
        match option {
            "vocab-size" => self.vocab_size = Some((number()? as usize).max(1)),
            "eos-token-id" => self.eos_token_ids = Some(vec![number()? as u32]),
            "salt" => self.salt = number()?,
            "step-delay-us" => self.step_delay = Duration::from_micros(number()?),
            "step-ticks" => self.step_ticks = number()? as u32,
            _ => {
                return self
                    .faults
                    .set(option, value)
                    .map_err(|error| error.to_string());
            }
        }
        Ok(true)
    }

    fn offer(&mut self, name: &str, values: &mut Values<'_>) -> Result<bool, ArgsError> {
        let Some(option) = name.strip_prefix("--") else {
            return Ok(false);
        };
        if ["numerics", "quantization", "kv-memory", "kv-dtype"].contains(&option) {
            // A hash is the same in every mode, and takes no memory to speak of.
            values.text()?;
            return Ok(true);
        }
        if !Faults::OPTIONS.contains(&option) && !OWN_OPTIONS.contains(&option) {
            return Ok(false);
        }
        let value = if option == "fail-at-start" {
            "1".to_owned()
        } else {
            values.text()?
        };
        self.set(option, &value).map_err(ArgsError::new)
    }
}

fn main() {
    let status = run().unwrap_or_else(|message| {
        eprintln!("understudy-engine-fake: {message}");
        ExitStatus::Usage
    });
    status.exit_now()
}

fn run() -> Result<ExitStatus, String> {
    let mut fake = FakeArgs::from_environment()?;
    let args = EngineArgs::parse(std::env::args_os().skip(1), |name, values| {
        fake.offer(name, values)
    })
    .map_err(|error| error.to_string())?;
    let socket = inherited_socket(args.fd).map_err(|error| error.to_string())?;
    let options = ServeOptions {
        scheduler: args.scheduler,
    };
    serve(socket, options, |progress| load(args, fake, progress)).map_err(|error| error.to_string())
}

fn load(
    args: EngineArgs,
    fake: FakeArgs,
    progress: &mut dyn FnMut(f32),
) -> Result<Box<dyn ModelRunner>, String> {
    let started = Instant::now();
    while let Some(left) = fake
        .faults
        .slow_load
        .checked_sub(started.elapsed())
        .filter(|left| !left.is_zero())
    {
        progress(started.elapsed().as_secs_f32() / fake.faults.slow_load.as_secs_f32());
        thread::sleep(left.min(Duration::from_millis(20)));
    }
    if fake.faults.fail_at_start {
        return Err("told to fail at start".to_owned());
    }
    Ok(Box::new(FakeRunner::new(shape(&args, &fake), fake.faults)))
}

/// The shape: options first, then what the model directory says, then defaults. An unreadable directory says nothing.
fn shape(args: &EngineArgs, fake: &FakeArgs) -> FakeOptions {
    let dir = ModelDir::open(&args.model).ok();
    let tokenizer = TextTokenizer::from_file(&args.model.join("tokenizer.json")).ok();
    let defaults = FakeOptions::default();
    let model_context = dir.as_ref().map(|dir| dir.context_length);
    let context_length = match (args.context_length, model_context) {
        (Some(limit), Some(model)) => limit.min(model),
        (limit, model) => limit.or(model).unwrap_or(defaults.context_length),
    };
    let vocab_size = fake
        .vocab_size
        .or(tokenizer.map(|tokenizer| tokenizer.vocab_size()))
        .unwrap_or(defaults.vocab_size);
    FakeOptions {
        vocab_size,
        context_length,
        max_sequences: args.max_sequences,
        kv_blocks: args.kv_blocks,
        check_all: false,
        eos_token_ids: fake
            .eos_token_ids
            .clone()
            .or(dir.map(|dir| dir.eos_token_ids))
            .unwrap_or_default(),
        salt: fake.salt,
        step_delay: fake.step_delay,
        step_ticks: fake.step_ticks,
    }
}
