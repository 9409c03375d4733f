//! `run`: one prompt through one checkpoint, without a cluster, by the same scheduler and sampler that serve.

use std::io::{IsTerminal, Read, Write};
use std::sync::Arc;

use anyhow::Context;
use serde_json::{Value, json};
use understudy_engine_core::breakdown::Measured;
use understudy_engine_core::detokenizer::Detokenizer;
use understudy_engine_core::frame::{AttemptId, SamplingParams, StartAttempt, StepToken};
use understudy_engine_core::runner::{BlockId, Chunk, ModelInfo, ModelRunner, StepError, Ticks};
use understudy_engine_core::scheduler::{Scheduler, SchedulerOptions};
use understudy_engine_core::server::ExitStatus;
use understudy_engine_core::tokenizer::TextTokenizer;

use super::{Failure, ModelArgs};

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue (needs the checkpoint's tokenizer.json); "-" reads standard input
    #[arg(
        long,
        required_unless_present = "token_ids",
        conflicts_with = "token_ids"
    )]
    prompt: Option<String>,
    /// Token ids to continue, such as 1,2,3
    #[arg(long, value_delimiter = ',')]
    token_ids: Option<Vec<u32>>,
    #[arg(long, default_value_t = 64)]
    max_tokens: u32,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    #[arg(long, default_value_t = 0)]
    top_k: u32,
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,
    #[arg(long, default_value_t = 0.0)]
    presence_penalty: f32,
    #[arg(long, default_value_t = 0.0)]
    frequency_penalty: f32,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[arg(long, default_value_t = 0)]
    min_tokens: u32,
    /// Ids that end the text, besides the model's own
    #[arg(long, value_delimiter = ',')]
    stop_token_ids: Vec<u32>,
    /// Go on past the model's end-of-text ids
    #[arg(long)]
    ignore_eos: bool,
    /// Added to the logits of single tokens: ID:BIAS, several separated by commas
    #[arg(long, value_delimiter = ',', value_parser = logit_bias, allow_hyphen_values = true)]
    logit_bias: Vec<(u32, f32)>,
    /// The only ids that may be chosen
    #[arg(long, value_delimiter = ',')]
    allowed_token_ids: Option<Vec<u32>>,
    /// Tokens to draft at most per step by looking up what followed the same tokens before (exact numerics only)
    #[arg(long, default_value_t = 0)]
    speculate: u32,
    /// Alternatives to print per position (with --json)
    #[arg(long, default_value_t = 0)]
    top_logprobs: u32,
    /// One JSON object a line: position, id, logprob, top, text where there is a tokenizer
    #[arg(long)]
    json: bool,
    /// With --json: every raw logit behind the first position too
    #[arg(long, requires = "json")]
    logits: bool,
}

/// Continues the prompt and prints.
pub fn run(args: &RunArgs) -> Result<(), Failure> {
    let tokenizer = tokenizer(args)?;
    let prompt = prompt(args, tokenizer.as_ref())?;
    let mut runner = Tap {
        inner: args.model.load(1)?,
        first: None,
    };
    let mut scheduler = Scheduler::new(runner.info(), SchedulerOptions::default());
    let start = StartAttempt {
        attempt: AttemptId {
            request: 1,
            epoch: 1,
        },
        prompt,
        sampling: args.sampling(),
        ..StartAttempt::default()
    };
    let start_ids = start.prompt.clone();
    scheduler
        .start(start)
        .map_err(|error| Failure::of(ExitStatus::Usage, error))?;
    let mut printer = Printer {
        args,
        text: tokenizer.map(|tokenizer| Detokenizer::new(Arc::new(tokenizer), &start_ids)),
    };
    while scheduler.has_work() {
        let outcome = scheduler
            .step(&mut runner)
            .map_err(|error| Failure::of(ExitStatus::StepFailed, error))?;
        let Some(outcome) = outcome else { break };
        if let Some((_, error)) = outcome.failed.into_iter().next() {
            return Err(Failure::of(ExitStatus::StepFailed, error));
        }
        for token in outcome.tokens {
            let logits = runner.first.as_deref().filter(|_| token.position == 0);
            printer.print(&token, logits).map_err(Failure::other)?;
        }
    }
    printer.end().map_err(Failure::other)
}

impl RunArgs {
    fn sampling(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            stop_token_ids: self.stop_token_ids.clone(),
            ignore_eos: self.ignore_eos,
            top_logprobs: self.top_logprobs,
            logit_bias: self.logit_bias.clone(),
            allowed_token_ids: self.allowed_token_ids.clone(),
            speculate: self.speculate,
        }
    }
}

/// A tokenizer is needed for a text, and used for output where there is one.
fn tokenizer(args: &RunArgs) -> Result<Option<TextTokenizer>, Failure> {
    let path = args.model.model.join("tokenizer.json");
    if args.prompt.is_none() && !path.exists() {
        return Ok(None);
    }
    TextTokenizer::from_file(&path)
        .map(Some)
        .map_err(|error| Failure::of(ExitStatus::LoadFailed, error))
}

fn prompt(args: &RunArgs, tokenizer: Option<&TextTokenizer>) -> Result<Vec<u32>, Failure> {
    let (text, tokenizer) = match (&args.prompt, tokenizer) {
        (Some(text), Some(tokenizer)) => (text, tokenizer),
        _ => return Ok(args.token_ids.clone().unwrap_or_default()),
    };
    let mut piped = String::new();
    let text = if text == "-" {
        std::io::stdin()
            .read_to_string(&mut piped)
            .context("cannot read the prompt from standard input")
            .map_err(Failure::other)?;
        &piped
    } else {
        text
    };
    tokenizer
        .encode(text, true)
        .map_err(|error| Failure::of(ExitStatus::Usage, error))
}

/// `ID:BIAS`.
fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text.split_once(':').and_then(|(id, bias)| {
        let (id, bias) = (id.trim().parse().ok()?, bias.trim().parse().ok()?);
        Some((id, bias))
    });
    parsed.ok_or_else(|| format!("{text:?} is no token id and bias, such as 17:-2.5"))
}

/// A runner that remembers the logits behind the first token.
struct Tap {
    inner: Box<dyn Measured>,
    first: Option<Vec<f32>>,
}

impl ModelRunner for Tap {
    fn info(&self) -> &ModelInfo {
        self.inner.info()
    }

    fn set_ticks(&mut self, ticks: Ticks) {
        self.inner.set_ticks(ticks);
    }

    fn execute(&mut self, chunks: &[Chunk<'_>], logits: &mut Vec<f32>) -> Result<(), StepError> {
        self.inner.execute(chunks, logits)?;
        // Pieces of a long prompt have none.
        if self.first.is_none() && !logits.is_empty() {
            let last_row = logits.len() - self.inner.info().vocab_size;
            self.first = Some(logits[last_row..].to_vec());
        }
        Ok(())
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), StepError> {
        self.inner.copy_block(from, to)
    }

    fn export_block(&mut self, block: BlockId, out: &mut Vec<u8>) -> Result<(), StepError> {
        self.inner.export_block(block, out)
    }

    fn import_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), StepError> {
        self.inner.import_block(block, bytes)
    }
}

/// What a token adds to the text. The last one adds what was held back for the rest of a character, too: none will come.
fn new_text(text: &mut Detokenizer, token: &StepToken) -> String {
    let mut new = text.push(token.token.id);
    if token.finish.is_some() {
        new.push_str(&text.finish());
    }
    new
}

struct Printer<'a> {
    args: &'a RunArgs,
    /// `None` where there is no tokenizer: ids are printed.
    text: Option<Detokenizer>,
}

impl Printer<'_> {
    fn print(&mut self, token: &StepToken, logits: Option<&[f32]>) -> anyhow::Result<()> {
        let text = self.text.as_mut().map(|text| new_text(text, token));
        let mut out = std::io::stdout().lock();
        if self.args.json {
            writeln!(out, "{}", self.line(token, text, logits)?)?;
        } else if let Some(text) = text {
            write!(out, "{text}")?;
            out.flush()?;
        } else {
            write!(out, "{} ", token.token.id)?;
        }
        Ok(())
    }

    fn line(
        &self,
        token: &StepToken,
        text: Option<String>,
        logits: Option<&[f32]>,
    ) -> anyhow::Result<Value> {
        let mut line = json!({
            "position": token.position,
            "id": token.token.id,
            "logprob": token.token.logprob,
            "top": token.token.top,
        });
        if let Some(text) = text {
            line["text"] = Value::String(text);
        }
        if let Some(logits) = logits.filter(|_| self.args.logits) {
            line["logits"] = json!(logits);
        }
        if let Some(finish) = token.finish {
            line["finish_reason"] = serde_json::to_value(finish)?;
        }
        Ok(line)
    }

    fn end(&self) -> anyhow::Result<()> {
        if !self.args.json && std::io::stdout().is_terminal() {
            println!();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use understudy_engine_core::frame::{FinishReason, OutputToken};

    use super::*;

    #[test]
    fn a_character_that_is_never_completed_is_printed_at_the_end() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/tokenizer.json");
        let tokenizer = Arc::new(TextTokenizer::from_file(path.as_ref()).unwrap());
        let token = |token: &str, finish| StepToken {
            attempt: AttemptId {
                request: 1,
                epoch: 1,
            },
            position: 0,
            token: OutputToken {
                id: tokenizer.token_to_id(token).unwrap(),
                logprob: 0.0,
                top: Vec::new(),
            },
            finish,
            waited_ms: None,
        };
        let mut text = Detokenizer::new(Arc::clone(&tokenizer), &[]);
        // The two bytes of an e with an acute accent, in the byte alphabet.
        let (first, second) = ("\u{c3}", "\u{a9}");
        assert_eq!(new_text(&mut text, &token(first, None)), "");
        assert_eq!(new_text(&mut text, &token(second, None)), "\u{e9}");
        let last = token(first, Some(FinishReason::Length));
        assert_eq!(new_text(&mut text, &last), "\u{fffd}");
    }
}
