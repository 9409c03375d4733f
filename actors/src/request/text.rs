//! The text of a request: a fold over its committed token ids.
//!
//! Detokenizing and stop strings happen here, at the gateway, and depend on nothing but the ids: a log that is brought
//! back gives the same pieces.

use understudy_engine_core::detokenizer::Detokenizer;
use understudy_engine_core::stop::{StopError, StopMatcher};
use understudy_engine_core::text::TextModel;
use understudy_journal::Admission;

/// The text that one token completed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Piece {
    pub text: String,
    /// A stop string is complete: the request ends here.
    pub stopped: bool,
}

/// See the module.
#[derive(Debug)]
pub struct TextFold {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// Ids that end the request. Their text is not part of the output.
    silent: Vec<u32>,
    /// Stop strings count from this many tokens on.
    min_tokens: u32,
    seen: u32,
    stopped: bool,
}

impl TextFold {
    /// A fold over the output of `admission`, none of which has been seen yet.
    ///
    /// # Errors
    /// If the stop strings are too many or of a wrong size.
    pub fn new(model: &TextModel, admission: &Admission) -> Result<Self, StopError> {
        let sampling = &admission.sampling;
        let mut silent = sampling.stop_token_ids.clone();
        if !sampling.ignore_eos {
            silent.extend_from_slice(model.eos_token_ids());
        }
        Ok(Self {
            detokenizer: model.detokenizer(&admission.prompt),
            stop: StopMatcher::new(admission.stop.clone(), admission.include_stop)?,
            silent,
            min_tokens: sampling.min_tokens.unwrap_or(0),
            seen: 0,
            stopped: false,
        })
    }

    /// Takes the next committed id.
    pub fn push(&mut self, id: u32) -> Piece {
        self.seen += 1;
        // Such an id comes only as the last one: the engine ends there, and holds it back before min_tokens.
        if self.stopped || self.silent.contains(&id) {
            return Piece::default();
        }
        let text = self.detokenizer.push(id);
        let outcome = match self.seen < self.min_tokens {
            true => self.stop.push_unsearched(&text),
            false => self.stop.push(&text),
        };
        self.stopped = outcome.stopped.is_some();
        Piece {
            text: outcome.text,
            stopped: self.stopped,
        }
    }

    /// Nothing follows: the text that was held back, or was an incomplete character.
    pub fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        let open = self.detokenizer.finish();
        let last = self.stop.push_unsearched(&open).text;
        last + &self.stop.finish()
    }
}
