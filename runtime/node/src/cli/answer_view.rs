//! How the course of one request is printed, as text or as JSON lines. Formats only; it neither connects nor decides.
//!
//! JSON: one object a line. Tokens first, `{"position","id","text","logprob"}` and, where alternatives were asked for,
//! `"top_logprobs"`; then exactly one last object, with `finish_reason` and `usage`, or with `error`. The last object
//! also bears `request_id` and `seed`, so that the answer can be had again. With `--announce` an object with
//! `request_id`, `seed` and `prompt_tokens` comes before all tokens. Joining every `text` gives the whole answer.

use std::io::{self, Write};

use serde::Serialize;
use understudy_client::{Accepted, Event, Finished, Token};
use understudy_protocol::message::{FinishReason, TopLogprob, Usage};
use understudy_protocol::{Position, RequestId};

use super::output::Output;
use super::trouble::Trouble;

/// Prints one request.
pub struct AnswerView<'a, W> {
    out: &'a mut Output<W>,
    json: bool,
    announce: bool,
    request: Option<RequestId>,
    seed: Option<u64>,
    next_position: Position,
    ends_with_newline: bool,
}

#[derive(Serialize)]
struct AcceptedLine {
    request_id: RequestId,
    seed: u64,
    prompt_tokens: u32,
}

#[derive(Serialize)]
struct TokenLine<'a> {
    position: Position,
    id: u32,
    text: &'a str,
    logprob: Option<f32>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    top_logprobs: &'a [TopLogprob],
}

#[derive(Serialize)]
struct FinishedLine<'a> {
    finish_reason: FinishReason,
    usage: Usage,
    text: &'a str,
    request_id: Option<RequestId>,
    seed: Option<u64>,
}

#[derive(Serialize)]
struct ErrorLine<'a> {
    error: &'a Trouble,
    request_id: Option<RequestId>,
    seed: Option<u64>,
    next_position: Position,
}

impl<'a, W: Write> AnswerView<'a, W> {
    /// A view that prints positions from `next_position` on.
    pub fn new(
        out: &'a mut Output<W>,
        json: bool,
        announce: bool,
        next_position: Position,
    ) -> Self {
        Self {
            out,
            json,
            announce,
            request: None,
            seed: None,
            next_position,
            ends_with_newline: true,
        }
    }

    /// Names the request before the server does: for `resume`.
    pub fn set_request(&mut self, request: RequestId) {
        self.request = Some(request);
    }

    /// Whatever comes next on the stream.
    pub fn event(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::Accepted(accepted) => self.accepted(accepted),
            Event::Token(token) => self.token(token),
            Event::Finished(end) => self.finished(end),
        }
    }

    /// The request has been accepted, and can be resumed from now on.
    fn accepted(&mut self, accepted: &Accepted) -> io::Result<()> {
        let Accepted {
            request,
            prompt_tokens,
            seed,
        } = *accepted;
        self.request = Some(request);
        self.seed = Some(seed);
        if !self.announce {
            return Ok(());
        }
        if self.json {
            self.line(&AcceptedLine {
                request_id: request,
                seed,
                prompt_tokens,
            })
        } else {
            // Not part of the answer, and asked for: on stderr, whoever reads it.
            let _ = writeln!(io::stderr(), "request {request} seed {seed}");
            Ok(())
        }
    }

    /// A token.
    fn token(&mut self, token: &Token) -> io::Result<()> {
        self.next_position = token.position.saturating_add(1);
        if self.json {
            self.line(&TokenLine {
                position: token.position,
                id: token.id,
                text: &token.text,
                logprob: token.logprob,
                top_logprobs: &token.top_logprobs,
            })
        } else {
            self.text(&token.text)
        }
    }

    /// The request ended well.
    fn finished(&mut self, end: &Finished) -> io::Result<()> {
        if self.json {
            self.line(&FinishedLine {
                finish_reason: end.finish_reason,
                usage: end.usage,
                text: &end.text,
                request_id: self.request,
                seed: self.seed,
            })
        } else {
            self.text(&end.text)?;
            self.end_line()
        }
    }

    /// The request failed. The words for a person are the caller's.
    pub fn failed(&mut self, error: &Trouble) -> io::Result<()> {
        if self.json {
            self.line(&ErrorLine {
                error,
                request_id: self.request,
                seed: self.seed,
                next_position: self.next_position,
            })
        } else {
            self.end_line()
        }
    }

    /// Ends the line of an answer that stopped in the middle.
    pub fn end_line(&mut self) -> io::Result<()> {
        if self.json || self.ends_with_newline {
            return Ok(());
        }
        self.ends_with_newline = true;
        self.out.raw("\n")
    }

    fn text(&mut self, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.ends_with_newline = text.ends_with('\n');
        self.out.foreign(text)
    }

    fn line<T: Serialize>(&mut self, object: &T) -> io::Result<()> {
        let mut line = serde_json::to_string(object).map_err(io::Error::other)?;
        line.push('\n');
        self.out.raw(&line)
    }
}

#[cfg(test)]
mod tests {
    use understudy_protocol::{ErrorBody, ErrorCode};

    use super::*;

    const REQUEST: RequestId = RequestId(0xab);
    const USAGE: Usage = Usage {
        prompt_tokens: 3,
        completion_tokens: 2,
    };

    fn token(position: Position, text: &str, logprob: Option<f32>) -> Token {
        Token {
            position,
            id: 40 + position,
            text: text.to_owned(),
            logprob,
            top_logprobs: Vec::new(),
        }
    }

    fn end(finish_reason: FinishReason, text: &str) -> Finished {
        Finished {
            finish_reason,
            usage: USAGE,
            text: text.to_owned(),
        }
    }

    fn printed(
        json: bool,
        announce: bool,
        course: impl FnOnce(&mut AnswerView<'_, Vec<u8>>) -> io::Result<()>,
    ) -> String {
        let mut out = Output::plain(Vec::new());
        let mut view = AnswerView::new(&mut out, json, announce, 0);
        let accepted = Accepted {
            request: REQUEST,
            prompt_tokens: 3,
            seed: 9,
        };
        view.accepted(&accepted).expect("a vector takes everything");
        course(&mut view).expect("a vector takes everything");
        String::from_utf8(out.into_inner()).expect("utf-8")
    }

    #[test]
    fn json_lines_are_golden() {
        let lines = printed(true, true, |view| {
            view.token(&token(0, "one", Some(-0.1)))?;
            let mut second = token(1, " \"two\"\n", Some(f32::MIN_POSITIVE));
            second.top_logprobs = vec![TopLogprob {
                id: 5,
                logprob: -2.5,
            }];
            view.token(&second)?;
            view.finished(&end(FinishReason::Stop, "é"))
        });
        assert_eq!(
            lines,
            concat!(
                r#"{"request_id":"000000000000000000000000000000ab","seed":9,"prompt_tokens":3}"#,
                "\n",
                r#"{"position":0,"id":40,"text":"one","logprob":-0.1}"#,
                "\n",
                r#"{"position":1,"id":41,"text":" \"two\"\n","logprob":1.1754944e-38,"top_logprobs":[{"id":5,"logprob":-2.5}]}"#,
                "\n",
                r#"{"finish_reason":"stop","usage":{"prompt_tokens":3,"completion_tokens":2},"text":"é","request_id":"000000000000000000000000000000ab","seed":9}"#,
                "\n",
            )
        );
    }

    #[test]
    fn logprobs_keep_their_bits_through_json() {
        let mut random = fastrand::Rng::with_seed(11);
        for _ in 0..2000 {
            let value = -(f32::from_bits(random.u32(..)).abs());
            if !value.is_finite() {
                continue;
            }
            let line = printed(true, false, |view| view.token(&token(0, "x", Some(value))));
            let read: serde_json::Value = serde_json::from_str(&line).expect("one JSON object");
            let text = read["logprob"].to_string();
            assert_eq!(
                text.parse::<f32>().map(f32::to_bits),
                Ok(value.to_bits()),
                "{line}"
            );
        }
    }

    #[test]
    fn errors_tell_where_to_resume() {
        let error = Trouble::from(&ErrorBody {
            stage: Some("generating".to_owned()),
            ..ErrorBody::new(ErrorCode::DeadlineExceeded, "the deadline of 5 ms passed")
        });
        let lines = printed(true, false, |view| {
            view.token(&token(0, "one", None))?;
            view.failed(&error)
        });
        assert_eq!(
            lines,
            concat!(
                r#"{"position":0,"id":40,"text":"one","logprob":null}"#,
                "\n",
                r#"{"error":{"code":"deadline_exceeded","message":"the deadline of 5 ms passed","retriable":false,"stage":"generating"},"#,
                r#""request_id":"000000000000000000000000000000ab","seed":9,"next_position":1}"#,
                "\n",
            )
        );
    }

    #[test]
    fn text_is_the_answer_and_one_newline() {
        let text = |pieces: &[&str], rest: &str| {
            printed(false, false, |view| {
                for (position, piece) in (0..).zip(pieces) {
                    view.token(&token(position, piece, None))?;
                }
                view.finished(&end(FinishReason::Length, rest))
            })
        };
        assert_eq!(text(&["one", "", " two"], ""), "one two\n");
        assert_eq!(text(&["one\n"], ""), "one\n");
        assert_eq!(text(&["one\n"], "x"), "one\nx\n");
        assert_eq!(text(&[], ""), "");
    }
}
