//! Faults that a fake engine commits when told to.
//!
//! Each has a command line option, and an environment variable so that a test can set it through a node: option
//! `--abort-at-step` is `UNDERSTUDY_FAKE_ABORT_AT_STEP`. With `--once FILE` a fault strikes only if it can create FILE,
//! so that the engine started in its place is well.

use std::{fs::OpenOptions, path::PathBuf, time::Duration};

/// The prefix of the environment variables.
const VARIABLE_PREFIX: &str = "UNDERSTUDY_FAKE_";

/// An option whose value cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("fake engine option {name}: {value:?} is not {expected}")]
pub struct FaultError {
    pub name: String,
    pub value: String,
    pub expected: &'static str,
}

/// What goes wrong, and when. Steps count from 1; positions count from the start of the prompt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Faults {
    /// Loading fails with a message.
    pub fail_at_start: bool,
    /// Loading takes this long.
    pub slow_load: Duration,
    /// The process aborts when any sequence computes this position.
    pub abort_at_position: Option<usize>,
    /// The process aborts when any sequence contains this token: a poison request.
    pub abort_on_token: Option<u32>,
    /// The process aborts in this step.
    pub abort_at_step: Option<u64>,
    /// The model thread blocks for ever in this step, while the heartbeat lives.
    pub hang_at_step: Option<u64>,
    /// This step gives an error.
    pub fail_at_step: Option<u64>,
    /// The model thread panics in this step.
    pub panic_at_step: Option<u64>,
    /// From this step on, logits are NaN.
    pub nan_at_step: Option<u64>,
    /// Created when the first fault strikes; no fault strikes while it exists. Loading faults and NaN excepted.
    pub once: Option<PathBuf>,
}

impl Faults {
    /// Names of all options, without the dashes.
    pub const OPTIONS: [&'static str; 10] = [
        "fail-at-start",
        "slow-load-ms",
        "abort-at-position",
        "abort-on-token",
        "abort-at-step",
        "hang-at-step",
        "fail-at-step",
        "panic-at-step",
        "nan-at-step",
        "once",
    ];

    /// The environment variable of an option.
    #[must_use]
    pub fn variable(option: &str) -> String {
        format!(
            "{VARIABLE_PREFIX}{}",
            option.to_ascii_uppercase().replace('-', "_")
        )
    }

    /// Sets one option by its name. Returns whether there is one of that name.
    ///
    /// # Errors
    /// [`FaultError`].
    pub fn set(&mut self, option: &str, value: &str) -> Result<bool, FaultError> {
        match option {
            "fail-at-start" => self.fail_at_start = flag(option, value)?,
            "slow-load-ms" => self.slow_load = Duration::from_millis(number(option, value)?),
            "abort-at-position" => self.abort_at_position = Some(number(option, value)?),
            "abort-on-token" => self.abort_on_token = Some(number(option, value)?),
            "abort-at-step" => self.abort_at_step = Some(number(option, value)?),
            "hang-at-step" => self.hang_at_step = Some(number(option, value)?),
            "fail-at-step" => self.fail_at_step = Some(number(option, value)?),
            "panic-at-step" => self.panic_at_step = Some(number(option, value)?),
            "nan-at-step" => self.nan_at_step = Some(number(option, value)?),
            "once" => self.once = Some(PathBuf::from(value)),
            _ => return Ok(false),
        }
        Ok(true)
    }

    pub(super) fn at_token(&self, position: usize, token: u32) {
        if (self.abort_at_position == Some(position) || self.abort_on_token == Some(token))
            && self.strikes()
        {
            std::process::abort();
        }
    }

    pub(super) fn at_step(&self, step: u64) -> Result<(), String> {
        if self.abort_at_step == Some(step) && self.strikes() {
            std::process::abort();
        }
        if self.hang_at_step == Some(step) && self.strikes() {
            loop {
                std::thread::park();
            }
        }
        if self.panic_at_step == Some(step) && self.strikes() {
            panic!("told to panic in step {step}");
        }
        if self.fail_at_step == Some(step) && self.strikes() {
            return Err(format!("told to fail in step {step}"));
        }
        Ok(())
    }

    pub(super) fn spoil(&self, step: u64, logits: &mut [f32]) {
        if self.nan_at_step.is_some_and(|first| step >= first) {
            logits.fill(f32::NAN);
        }
    }

    fn strikes(&self) -> bool {
        self.once.as_ref().is_none_or(|path| {
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(path)
                .is_ok()
        })
    }
}

/// Parses a number for an option.
pub(crate) fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, FaultError> {
    let error = || FaultError {
        name: name.to_owned(),
        value: value.to_owned(),
        expected: "a number it allows",
    };
    value.parse().map_err(|_| error())
}

fn flag(name: &str, value: &str) -> Result<bool, FaultError> {
    match value {
        "1" | "true" => Ok(true),
        "0" | "false" | "" => Ok(false),
        _ => Err(FaultError {
            name: name.to_owned(),
            value: value.to_owned(),
            expected: "0 or 1",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_can_be_set_and_changes_something() {
        for option in Faults::OPTIONS {
            let mut faults = Faults::default();
            assert!(faults.set(option, "1").unwrap());
            assert_ne!(faults, Faults::default(), "{option}");
        }
        assert!(!Faults::default().set("abort", "1").unwrap());
        assert!(Faults::default().set("hang-at-step", "soon").is_err());
        assert_eq!(
            Faults::variable("abort-at-position"),
            "UNDERSTUDY_FAKE_ABORT_AT_POSITION"
        );
    }
}
