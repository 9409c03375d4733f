//! The command line of an engine process; the real engine and the fake one take the same.
//!
//! ```text
//! understudy-engine serve --model DIR --fd N [--dtype D] [--device D] [--threads N]
//!                         [--max-sequences N] [--kv-blocks N] [--context-length N] [--max-waiting N] [--step-tokens N]
//! ```
//!
//! A node writes this line and an engine reads it, so it is strict: an unknown or repeated option is an error.

use std::{ffi::OsString, os::fd::RawFd, path::PathBuf};

use crate::scheduler::SchedulerOptions;

/// A command line that cannot be served.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0}; usage: serve --model DIR --fd N [--dtype f32|bf16|f16|auto] [--device auto|cpu|cuda:N] [--threads N] [--max-sequences N] [--kv-blocks N] [--context-length N] [--max-waiting N] [--step-tokens N]"
)]
pub struct ArgsError(String);

impl ArgsError {
    /// An error about an option of the caller's own.
    #[must_use]
    pub fn new(message: String) -> Self {
        Self(message)
    }
}

/// What `serve` is asked to do. Values that depend on the kind of engine (dtype, device) are checked by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineArgs {
    /// Checkpoint directory.
    pub model: PathBuf,
    /// The inherited socket to the node.
    pub fd: RawFd,
    /// `f32`, `bf16`, `f16`, or `auto`: as the checkpoint has it.
    pub dtype: String,
    /// `auto`, `cpu`, `cuda:0`.
    pub device: String,
    /// Compute threads; 0 lets the engine decide.
    pub threads: usize,
    /// Sequences that are computed at the same time at most.
    pub max_sequences: usize,
    /// Blocks of the KV cache; `None` lets the engine decide.
    pub kv_blocks: Option<usize>,
    /// A limit below the model's own context; `None` takes the model's.
    pub context_length: Option<usize>,
    /// Attempts that may wait for a place, and tokens per step.
    pub scheduler: SchedulerOptions,
}

impl Default for EngineArgs {
    fn default() -> Self {
        Self {
            model: PathBuf::new(),
            fd: -1,
            dtype: "auto".to_owned(),
            device: "auto".to_owned(),
            threads: 0,
            max_sequences: 16,
            kv_blocks: None,
            context_length: None,
            scheduler: SchedulerOptions::default(),
        }
    }
}

impl EngineArgs {
    /// Parses everything after the program's name. `extra` is offered each option that is not of this list, with a
    /// way to take its value; it answers whether it knew it.
    ///
    /// # Errors
    /// [`ArgsError`].
    pub fn parse(
        arguments: impl IntoIterator<Item = OsString>,
        mut extra: impl FnMut(&str, &mut Values<'_>) -> Result<bool, ArgsError>,
    ) -> Result<Self, ArgsError> {
        let mut arguments = arguments.into_iter();
        if arguments.next().as_deref() != Some("serve".as_ref()) {
            return Err(ArgsError(
                "the first argument must be the command \"serve\"".to_owned(),
            ));
        }
        let mut args = Self::default();
        let mut seen = Vec::new();
        while let Some(option) = arguments.next() {
            let name = option.to_string_lossy().into_owned();
            let mut values = Values {
                name: &name,
                rest: &mut arguments,
            };
            match name.as_str() {
                "--model" => args.model = PathBuf::from(values.take()?),
                "--fd" => args.fd = values.number()?,
                "--dtype" => args.dtype = values.text()?,
                "--device" => args.device = values.text()?,
                "--threads" => args.threads = values.number()?,
                "--max-sequences" => args.max_sequences = values.positive()?,
                "--kv-blocks" => args.kv_blocks = Some(values.positive()?),
                "--context-length" => args.context_length = Some(values.positive()?),
                "--max-waiting" => args.scheduler.max_waiting = values.number()?,
                "--step-tokens" => args.scheduler.step_tokens = values.positive()?,
                other => {
                    if !extra(other, &mut values)? {
                        return Err(ArgsError(format!("unknown option {other:?}")));
                    }
                }
            }
            if seen.contains(&name) {
                return Err(ArgsError(format!("option {name} is given twice")));
            }
            seen.push(name);
        }
        if args.model.as_os_str().is_empty() {
            return Err(ArgsError("--model is missing".to_owned()));
        }
        if args.fd < 0 {
            return Err(ArgsError(
                "--fd is missing; engines are started by a node, which passes its socket"
                    .to_owned(),
            ));
        }
        Ok(args)
    }
}

/// Takes the value of the option that is being parsed.
pub struct Values<'a> {
    name: &'a str,
    rest: &'a mut dyn Iterator<Item = OsString>,
}

impl Values<'_> {
    /// The next argument as it is.
    ///
    /// # Errors
    /// If there is none.
    pub fn take(&mut self) -> Result<OsString, ArgsError> {
        self.rest
            .next()
            .ok_or_else(|| ArgsError(format!("option {} lacks its value", self.name)))
    }

    /// The next argument as UTF-8.
    ///
    /// # Errors
    /// If there is none, or it is something else.
    pub fn text(&mut self) -> Result<String, ArgsError> {
        let value = self.take()?;
        value
            .into_string()
            .map_err(|value| ArgsError(format!("option {}: {value:?} is not UTF-8", self.name)))
    }

    /// The next argument as a number.
    ///
    /// # Errors
    /// If there is none, or it is something else.
    pub fn number<T: std::str::FromStr>(&mut self) -> Result<T, ArgsError> {
        let value = self.text()?;
        value.parse().map_err(|_| {
            ArgsError(format!(
                "option {}: {value:?} is not a number it allows",
                self.name
            ))
        })
    }

    /// The next argument as a number of at least 1.
    ///
    /// # Errors
    /// If there is none, or it is something else.
    pub fn positive(&mut self) -> Result<usize, ArgsError> {
        match self.number()? {
            0 => Err(ArgsError(format!(
                "option {}: must be at least 1",
                self.name
            ))),
            number => Ok(number),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<EngineArgs, ArgsError> {
        EngineArgs::parse(
            line.split_whitespace().map(OsString::from),
            |name, values| Ok(name == "--extra" && values.number::<u32>()? == 5),
        )
    }

    #[test]
    fn a_full_line() {
        let args = parse("serve --model m --fd 3 --dtype f32 --device cpu --threads 2 --max-sequences 4 --kv-blocks 77 --context-length 99 --max-waiting 0 --step-tokens 8 --extra 5").unwrap();
        assert_eq!((args.context_length, args.kv_blocks), (Some(99), Some(77)));
        assert_eq!(
            args.scheduler,
            SchedulerOptions {
                max_waiting: 0,
                step_tokens: 8
            }
        );
        assert_eq!((args.fd, args.threads, args.max_sequences), (3, 2, 4));
    }

    #[test]
    fn errors_name_the_option() {
        let cases = [
            ("", "serve"),
            ("run --model m", "serve"),
            ("serve --model m", "--fd"),
            ("serve --fd 3", "--model"),
            ("serve --model m --fd x", "--fd"),
            ("serve --model m --fd 3 --fd 4", "--fd is given twice"),
            (
                "serve --model m --fd 3 --max-sequences 0",
                "--max-sequences",
            ),
            ("serve --model m --fd 3 --what", "--what"),
            ("serve --model m --fd", "--fd lacks"),
        ];
        for (line, part) in cases {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
