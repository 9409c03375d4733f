//! What a client is shown of a request: the committed log, as far as its credit reaches, then one terminal event.
//!
//! Invariant: positions in order, without gap or repeat, and nothing that is not in the log. A viewer without credit
//! costs nothing but its place: the log is the buffer.

use understudy_journal::{Admission, Outcome, TokenLog};
use understudy_protocol::message::{Sampling, ServerMessage, TokenEvent, TopLogprob, Usage};
use understudy_protocol::{ErrorBody, ErrorCode, Position};

use super::effect::Effect;

/// Token events that one message makes at most. A reader with much credit and a long log gets them in several turns,
/// so that many such readers on one connection do not fill memory before the connection can say that it is full.
const EVENTS_AT_ONCE: usize = 256;

/// The committed output with its text, and how it ended.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    pub(super) log: TokenLog,
    /// The text that each committed token completed.
    pub(super) pieces: Vec<Box<str>>,
    /// Text that came out at the end.
    pub(super) tail: String,
    pub(super) outcome: Option<Outcome>,
}

/// The connection that watches.
#[derive(Debug, Clone)]
pub(super) struct Viewer {
    pub(super) stream: u32,
    pub(super) next: Position,
    credit: u32,
    /// The connection takes nothing more for now.
    held: bool,
}

impl Viewer {
    /// Watches from `next` on.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidRequest`] if `next` is beyond what is committed.
    pub(super) fn new(
        stream: u32,
        next: Position,
        credit: u32,
        log: &TokenLog,
    ) -> Result<Self, ErrorBody> {
        let committed = log.next_position();
        if next > committed {
            let message =
                format!("next_position {next} is beyond the {committed} tokens of the request");
            return Err(ErrorBody::new(ErrorCode::InvalidRequest, message));
        }
        Ok(Self {
            stream,
            next,
            credit,
            held: false,
        })
    }

    /// The client takes `tokens` more events; the sum is capped at `max_credit`.
    pub(super) fn grant(&mut self, tokens: u32, max_credit: u32) {
        self.credit = self.credit.saturating_add(tokens).min(max_credit);
    }

    /// Stops, or lets go on, what [`Viewer::pump`] gives.
    pub(super) fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// A client that cancelled wants no more tokens: the terminal event is next, whatever the credit.
    pub(super) fn skip_to_end(&mut self, log: &TokenLog) {
        self.next = log.next_position();
    }

    /// What there is credit for, and the end when everything before it was shown. Returns whether that was the end.
    pub(super) fn pump(
        &mut self,
        admission: &Admission,
        transcript: &Transcript,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let committed = transcript.log.next_position();
        let mut room = EVENTS_AT_ONCE;
        while !self.held && self.credit > 0 && self.next < committed {
            if room == 0 {
                effects.push(Effect::More);
                return false;
            }
            let event = self.event(transcript, &admission.sampling);
            effects.push(Effect::Emit(ServerMessage::Token(event)));
            self.next += 1;
            self.credit -= 1;
            room -= 1;
        }
        let outcome = transcript.outcome.as_ref();
        let Some(outcome) = outcome.filter(|_| self.next == committed) else {
            return false;
        };
        effects.push(Effect::Emit(terminal(
            self.stream,
            outcome,
            admission,
            transcript,
        )));
        effects.push(Effect::StreamEnded {
            stream: self.stream,
        });
        true
    }

    fn event(&self, transcript: &Transcript, sampling: &Sampling) -> TokenEvent {
        let at = self.next as usize;
        let entry = &transcript.log.entries()[at];
        let wanted = sampling.logprobs || sampling.top_logprobs > 0;
        let alternatives = entry.top.iter();
        TokenEvent {
            stream: self.stream,
            position: self.next,
            id: entry.id,
            text: transcript.pieces[at].to_string(),
            logprob: wanted.then_some(entry.logprob),
            top_logprobs: alternatives
                .map(|&(id, logprob)| TopLogprob { id, logprob })
                .collect(),
        }
    }
}

fn terminal(
    stream: u32,
    outcome: &Outcome,
    admission: &Admission,
    transcript: &Transcript,
) -> ServerMessage {
    match outcome {
        Outcome::Finished(finish_reason) => ServerMessage::Finished {
            stream,
            finish_reason: *finish_reason,
            usage: Usage {
                prompt_tokens: admission.prompt.len() as u32,
                completion_tokens: transcript.log.next_position(),
            },
            text: transcript.tail.clone(),
        },
        Outcome::Failed(error) => ServerMessage::Error {
            stream: Some(stream),
            request: Some(admission.request),
            error: error.clone(),
        },
    }
}
