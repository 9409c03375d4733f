//! Examines a checkpoint of the demo model as it is served: chat template, scheduler, sampler, runner. Greedy answers to held-out
//! questions count as right if every token and the end are as expected.

mod papers;

use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use understudy_engine_core::breakdown::Measured;
use understudy_engine_core::chat::ChatMessage;
use understudy_engine_core::frame::{AttemptId, SamplingParams, StartAttempt};
use understudy_engine_core::scheduler::{Scheduler, SchedulerOptions};
use understudy_engine_core::text::TextModel;

use self::papers::{Form, Paper, papers};
use super::dialogue::Writer;
use super::tasks::{Item, Task, is_story};
use super::tokenizer::{self, END};
use crate::load::{LoadOptions, load};

/// Arguments of `demo-eval`.
#[derive(Debug, Clone, clap::Args)]
pub struct EvalArgs {
    /// Checkpoint directory
    #[arg(long, default_value = "models/demo")]
    pub model: PathBuf,
    /// Questions at most per row of the table where questions are drawn; two-digit sums and facts are always all there are
    #[arg(long, default_value_t = 400)]
    pub items: usize,
    #[arg(long, default_value_t = 2024)]
    pub seed: u64,
    /// Compute threads; 0 takes as many as the model's size warrants
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Print the rows as one JSON array
    #[arg(long)]
    pub json: bool,
    /// Also print up to this many wrong answers per row
    #[arg(long, default_value_t = 0)]
    pub show_errors: usize,
}

/// One row of the result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub task: String,
    /// "chat" or "plain".
    pub form: &'static str,
    /// Distinct questions.
    pub items: usize,
    /// Answers that equal the expected one in every token and end there.
    pub exact: usize,
    pub accuracy: f64,
}

/// Sequences computed side by side.
const SLOTS: usize = 64;
/// Longest answer, a count from 0 to 300 or a story, with room to overrun.
const MAX_TOKENS: u32 = 420;

/// Examines by `args` and prints a table, or JSON.
pub fn eval(args: &EvalArgs) -> anyhow::Result<()> {
    let mut room = Room::open(&args.model, args.threads)?;
    let mut rows = Vec::new();
    for paper in papers(args.items, args.seed) {
        for form in [Form::Chat, Form::Plain] {
            let row = examine(&mut room, &paper, form, args.show_errors)?;
            if !args.json {
                println!(
                    "{:<24} {:<5} {:>5} of {:>5}  {:>6.2} %",
                    row.task,
                    row.form,
                    row.exact,
                    row.items,
                    row.accuracy * 100.0
                );
            }
            rows.push(row);
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    }
    Ok(())
}

fn examine(room: &mut Room, paper: &Paper, form: Form, show_errors: usize) -> anyhow::Result<Row> {
    let items = paper.distinct(form);
    let bar = ProgressBar::new(items.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len}") {
        bar.set_style(style);
    }
    bar.set_prefix(paper.name);
    let outputs = room.answers(&items, form, &mut || bar.inc(1))?;
    let mut exact = 0;
    for (item, output) in items.iter().zip(&outputs) {
        let right = room.is_right(item, form, output);
        exact += usize::from(right);
        if !right && (bar.position() as usize - exact) < show_errors {
            let said = room.tokenizer.decode(output, false).unwrap_or_default();
            bar.suspend(|| eprintln!("{}: {:?} -> {said:?}", paper.name, form.prompt(item)));
        }
    }
    bar.finish_and_clear();
    Ok(Row {
        task: paper.name.to_owned(),
        form: form.name(),
        items: items.len(),
        exact,
        accuracy: exact as f64 / items.len().max(1) as f64,
    })
}

/// The model as a cluster would serve it.
struct Room {
    text: TextModel,
    runner: Box<dyn Measured>,
    /// The same tokenizer, for the answers as training wrote them.
    tokenizer: tokenizers::Tokenizer,
}

impl Room {
    fn open(model: &Path, threads: usize) -> anyhow::Result<Self> {
        let options = LoadOptions {
            threads,
            max_sequences: SLOTS,
            ..LoadOptions::default()
        };
        let text = std::fs::read_to_string(model.join("tokenizer.json"))?;
        Ok(Self {
            text: TextModel::load(model)?,
            runner: load(model, &options, &mut |_| {})?,
            tokenizer: tokenizer::load(&text)?,
        })
    }

    fn prompt(&self, item: &Item, form: Form) -> anyhow::Result<Vec<u32>> {
        Ok(match form {
            Form::Plain => self.text.encode_prompt(&item.raw_prompt)?,
            Form::Chat => self.text.encode_chat(&[ChatMessage {
                role: "user".to_owned(),
                content: item.question.clone(),
            }])?,
        })
    }

    /// Greedy answers in the order of `items`, the end token included where one came; `done` is called at each answer's end.
    fn answers(
        &mut self,
        items: &[&Item],
        form: Form,
        done: &mut dyn FnMut(),
    ) -> anyhow::Result<Vec<Vec<u32>>> {
        let options = SchedulerOptions {
            max_waiting: items.len(),
            ..SchedulerOptions::default()
        };
        let mut scheduler = Scheduler::new(self.runner.info(), options);
        for (index, item) in items.iter().enumerate() {
            scheduler.start(StartAttempt {
                attempt: AttemptId {
                    request: index as u128,
                    epoch: 1,
                },
                prompt: self.prompt(item, form)?,
                sampling: SamplingParams {
                    max_tokens: MAX_TOKENS,
                    ..SamplingParams::default()
                },
                ..StartAttempt::default()
            })?;
        }
        let mut outputs = vec![Vec::new(); items.len()];
        while let Some(outcome) = scheduler.step(&mut *self.runner)? {
            if let Some((_, error)) = outcome.failed.into_iter().next() {
                return Err(error.into());
            }
            for token in outcome.tokens {
                outputs[token.attempt.request as usize].push(token.token.id);
                if token.finish.is_some() {
                    done();
                }
            }
        }
        Ok(outputs)
    }

    /// Exactly the expected tokens and the end; of a story, that it has a story's form, is about what was asked for, and ends.
    fn is_right(&self, item: &Item, form: Form, output: &[u32]) -> bool {
        let writer = Writer::new(&self.tokenizer);
        if item.task != Task::Story {
            return output == writer.answer(item, form == Form::Plain);
        }
        let Some((&END, story)) = output.split_last() else {
            return false;
        };
        let said = self.tokenizer.decode(story, false).unwrap_or_default();
        match form {
            Form::Plain => is_story(&format!("{}{said}", item.raw_prompt), ""),
            Form::Chat => is_story(&said, &item.question),
        }
    }
}

#[cfg(test)]
mod tests;
