//! Trains the demo model and writes it as a Hugging Face checkpoint directory.
//!
//! Invariant: step `n` of seed `s` always sees the same batch, and a resumed run is the same run (see [`Plan`]): it ends
//! with the bits of one that was never interrupted. With `--minutes` the learning rate also follows the clock; then two
//! runs differ, and none can be resumed. Without it they do not (same kind of machine, same thread count).

use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use fastrand::Rng;
use indicatif::{ProgressBar, ProgressStyle};
use tch::{Device, Kind, Reduction, Tensor};
use tokenizers::Tokenizer;
use understudy_checkpoint::families;

use super::batch::{Batch, GroupedAttention};
use super::dialogue::{Sample, Writer};
use super::optimizer::{Optimizer, Rates};
use super::plan::{self, Plan};
use super::tasks::{Item, Task, draw, fact_items};
use super::{config_json, tokenizer, weights};
use crate::layers::Purpose;
use crate::meter::Meter;
use crate::model::Model;

/// Arguments of `demo-train`.
#[derive(Debug, Clone, clap::Args)]
pub struct TrainArgs {
    /// Checkpoint directory to write (config.json, model.safetensors, tokenizer.json, …); files there are replaced
    #[arg(long)]
    pub out: PathBuf,
    /// Where weights and optimizer moments are kept for --resume
    #[arg(long, default_value = "target/demo-train/state.safetensors")]
    pub state: PathBuf,
    /// Go on from --state; every other option must be the interrupted run's
    #[arg(long, conflicts_with = "minutes")]
    pub resume: bool,
    /// Optimizer steps
    #[arg(long, default_value_t = 2400)]
    pub steps: u32,
    /// Also end after this many minutes: the learning rate then falls with the clock if that is ahead of the steps
    #[arg(long)]
    pub minutes: Option<f64>,
    /// Tokens of one step, padding aside
    #[arg(long, default_value_t = 4096)]
    pub tokens_per_step: usize,
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Threads for matrix products
    #[arg(long, default_value_t = 2)]
    pub threads: i32,
    /// Print held-out accuracy every so many steps
    #[arg(long, default_value_t = 100)]
    pub eval_every: u32,
    /// Write the checkpoint and the state every so many minutes
    #[arg(long, default_value_t = 5.0)]
    pub save_minutes: f64,
    /// Peak learning rate of Muon (matrices)
    #[arg(long, default_value_t = 0.02)]
    pub muon_rate: f64,
    /// Peak learning rate of AdamW (embedding and norms)
    #[arg(long, default_value_t = 0.004)]
    pub adam_rate: f64,
}

const MODEL_FILE: &str = "model.safetensors";
/// Steps over which the learning rate rises.
pub(super) const WARM_UP: u32 = 60;
/// The part of the run after which the learning rate falls in a straight line.
pub(super) const FALL_FROM: f64 = 0.35;
pub(super) const FINAL_RATE: f64 = 0.01;
/// Items per task in the accuracy that is printed while training.
const QUICK_ITEMS: usize = 120;

/// Everything that a run owns.
struct Run {
    args: TrainArgs,
    model: Model,
    /// The text that the model was made from.
    config: String,
    optimizer: Optimizer,
    tokenizer: Tokenizer,
    plan: Plan,
    step: u32,
    tokens: u64,
    /// Time spent by the interrupted runs before this one.
    spent: Duration,
    started: Instant,
}

/// Trains by `args`, printing progress; the checkpoint stands in `args.out` at the end.
pub fn train(args: &TrainArgs) -> anyhow::Result<()> {
    tch::set_num_threads(args.threads);
    let mut run = Run::start(args.clone())?;
    let bar = progress_bar(args);
    let mut saved = Instant::now();
    while run.progress() < 1.0 {
        let (loss, norm) = run.train_step()?;
        let line = run.describe(loss, norm);
        match &bar {
            Some(bar) => {
                bar.set_position(u64::from(run.step));
                bar.set_message(line);
            }
            None if run.step % 10 == 0 => println!("{line}"),
            None => {}
        }
        if run.step % args.eval_every == 0 {
            let accuracy = run.quick_accuracy();
            match &bar {
                Some(bar) => bar.println(accuracy),
                None => println!("{accuracy}"),
            }
        }
        if saved.elapsed().as_secs_f64() > args.save_minutes * 60.0 {
            run.save()?;
            saved = Instant::now();
        }
    }
    run.save()?;
    if let Some(bar) = bar {
        bar.finish();
    }
    println!(
        "{}\n{} steps, {:.1} M tokens, {:.1} minutes; written to {}",
        run.quick_accuracy(),
        run.step,
        run.tokens as f64 / 1e6,
        run.elapsed().as_secs_f64() / 60.0,
        args.out.display()
    );
    let model = args.out.join(MODEL_FILE);
    let hash =
        plan::file_hash(&model).with_context(|| format!("cannot read {}", model.display()))?;
    println!("SHA-256 of {MODEL_FILE}: {hash}");
    Ok(())
}

fn progress_bar(args: &TrainArgs) -> Option<ProgressBar> {
    if !std::io::stderr().is_terminal() {
        return None;
    }
    let bar = ProgressBar::new(u64::from(args.steps));
    let style = "{bar:30} {pos}/{len} [{elapsed_precise} < {eta_precise}] {msg}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    Some(bar)
}

impl Run {
    fn start(args: TrainArgs) -> anyhow::Result<Self> {
        let text = tokenizer::build()?;
        let tokenizer = tokenizer::load(&text)?;
        let vocab_size = tokenizer.get_vocab_size(true);
        let config = config_json(vocab_size);
        let spec = families::from_json(&config)?;
        let mut parameters = Vec::new();
        tch::manual_seed(args.seed as i64);
        let model = Model::load(spec, Purpose::Training, &mut |name, shape| {
            let value = initial(name, shape).set_requires_grad(true);
            parameters.push((name.to_owned(), value.shallow_clone()));
            Ok(value)
        })?;
        let rates = Rates {
            muon: args.muon_rate,
            adam: args.adam_rate,
            weight_decay: 0.02,
            clip: 1.0,
        };
        let batches: Vec<Batch> = (0..plan::SAMPLED_BATCHES)
            .map(|step| draw_batch(&args, &tokenizer, step))
            .collect();
        let mut run = Self {
            plan: Plan::new(&args, rates, &text, &batches),
            optimizer: Optimizer::new(parameters, rates),
            args,
            model,
            config,
            tokenizer,
            step: 0,
            tokens: 0,
            spent: Duration::ZERO,
            started: Instant::now(),
        };
        if run.args.resume {
            run.resume()?;
        }
        let count: usize = run.optimizer.values().iter().map(|(_, v)| v.numel()).sum();
        println!(
            "{:.2} M parameters, {vocab_size} tokens in the vocabulary",
            count as f64 / 1e6
        );
        run.write_texts(&text)?;
        Ok(run)
    }

    fn resume(&mut self) -> anyhow::Result<()> {
        ensure!(
            self.args.minutes.is_none(),
            "a run with --minutes follows the clock and cannot be resumed"
        );
        let path = self.args.state.clone();
        let (tensors, metadata) = weights::load(&path).context("nothing to resume from")?;
        let number = |key: &str| -> anyhow::Result<u64> {
            let text = metadata.get(key).map(String::as_str).unwrap_or_default();
            text.parse()
                .with_context(|| format!("{} lacks {key}", path.display()))
        };
        self.plan.check(&path, &metadata)?;
        self.step = number("step")? as u32;
        self.tokens = number("tokens")?;
        self.spent = Duration::from_secs(number("seconds")?);
        self.optimizer
            .restore(&tensors, number("updates")? as i32)
            .map_err(|name| anyhow::anyhow!("{} does not fit: tensor {name}", path.display()))
    }

    fn elapsed(&self) -> Duration {
        self.spent + self.started.elapsed()
    }

    /// 0 at the start, 1 at the end.
    fn progress(&self) -> f64 {
        let by_steps = f64::from(self.step) / f64::from(self.args.steps);
        let by_clock = self
            .args
            .minutes
            .map_or(0.0, |minutes| self.elapsed().as_secs_f64() / 60.0 / minutes);
        by_steps.max(by_clock)
    }

    fn rate_scale(&self) -> f64 {
        let rise = f64::from(self.step + 1) / f64::from(WARM_UP);
        let fall = (1.0 - self.progress()) / (1.0 - FALL_FROM);
        rise.min(fall).clamp(FINAL_RATE, 1.0)
    }

    /// Returns the mean loss over the learned tokens and the gradient's norm.
    fn train_step(&mut self) -> anyhow::Result<(f64, f64)> {
        let batch = draw_batch(&self.args, &self.tokenizer, self.step);
        self.tokens += batch.rows() as u64;
        let losses = token_losses(&self.model, &batch);
        let loss = (losses * &batch.weights).sum(Kind::Float) / batch.weights.sum(Kind::Float);
        loss.backward();
        let scale = self.rate_scale();
        let norm = self.optimizer.step(scale);
        self.step += 1;
        Ok((loss.double_value(&[]), norm))
    }

    fn describe(&self, loss: f64, norm: f64) -> String {
        let seconds = self.elapsed().as_secs_f64();
        format!(
            "step {} loss {loss:.4} gradient {norm:.2} rate {:.3} tokens/s {:.0} minutes {:.1}",
            self.step,
            self.rate_scale(),
            self.tokens as f64 / seconds,
            seconds / 60.0
        )
    }

    /// Held-out accuracy on a few items: every answer token is the most likely one after its true prefix, which is
    /// the same as an exact match of greedy generation.
    fn quick_accuracy(&self) -> String {
        let writer = Writer::new(&self.tokenizer);
        let mut line = format!("accuracy at step {}:", self.step);
        for (name, task, raw) in [
            ("count", Task::Count, false),
            ("count(raw)", Task::Count, true),
            ("fact", Task::Fact, false),
            ("arithmetic", Task::Arithmetic, false),
            ("arithmetic(raw)", Task::Arithmetic, true),
            ("word", Task::Word, false),
        ] {
            let samples: Vec<Sample> = quick_items(task)
                .iter()
                .map(|item| {
                    if raw {
                        writer.raw(item)
                    } else {
                        writer.chat(item)
                    }
                })
                .collect();
            let right = tch::no_grad(|| exact_matches(&self.model, &samples));
            line += &format!(
                " {name} {:.1}%",
                100.0 * right as f64 / samples.len() as f64
            );
        }
        line
    }

    fn save(&self) -> anyhow::Result<()> {
        let model = self.args.out.join(MODEL_FILE);
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        weights::save(&model, &self.optimizer.values(), format)?;
        let metadata = [
            ("step", u64::from(self.step)),
            ("updates", self.optimizer.updates() as u64),
            ("tokens", self.tokens),
            ("seconds", self.elapsed().as_secs()),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_string()));
        let metadata = metadata.into_iter().chain(self.plan.entries()).collect();
        create_parent(&self.args.state)?;
        weights::save(&self.args.state, &self.optimizer.state(), metadata)?;
        Ok(())
    }

    /// Everything of the checkpoint but the weights.
    fn write_texts(&self, tokenizer_json: &str) -> anyhow::Result<()> {
        let out = &self.args.out;
        std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
        for (name, text) in [
            ("config.json", self.config.clone()),
            ("generation_config.json", tokenizer::generation_json()),
            ("tokenizer.json", tokenizer_json.to_owned()),
            ("tokenizer_config.json", tokenizer::config_json()),
            ("chat_template.jinja", tokenizer::CHAT_TEMPLATE.to_owned()),
        ] {
            weights::write_atomically(&out.join(name), text.as_bytes())?;
        }
        Ok(())
    }
}

/// The batch of step `step`.
fn draw_batch(args: &TrainArgs, tokenizer: &Tokenizer, step: u32) -> Batch {
    // A stream of its own for every step: nothing to store for --resume.
    let mut rng = Rng::with_seed(args.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(step));
    let writer = Writer::new(tokenizer);
    let mut samples = Vec::new();
    let mut tokens = 0;
    while tokens < args.tokens_per_step {
        let sample = writer.draw(&mut rng);
        tokens += sample.ids.len();
        samples.push(sample);
    }
    Batch::new(samples)
}

fn create_parent(path: &Path) -> anyhow::Result<()> {
    match path.parent() {
        Some(parent) => std::fs::create_dir_all(parent)
            .with_context(|| format!("cannot create {}", parent.display())),
        None => Ok(()),
    }
}

/// Gains start at 1, the blocks' outputs at 0 (each block begins as the identity), the rest is noise.
fn initial(name: &str, shape: &[i64]) -> Tensor {
    let float = (Kind::Float, Device::Cpu);
    if shape.len() == 1 {
        return Tensor::ones(shape, float);
    }
    if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") {
        return Tensor::zeros(shape, float);
    }
    let deviation = match name.contains("embed_tokens") {
        true => 0.03,
        false => 0.6 / (shape[1] as f64).sqrt(),
    };
    Tensor::randn(shape, float) * deviation
}

/// `[learned]`: the loss of every learned token, in nats. Only those rows pass the head.
fn token_losses(model: &Model, batch: &Batch) -> Tensor {
    learned_logits(model, batch).cross_entropy_loss(
        &batch.targets,
        None::<&Tensor>,
        Reduction::None,
        -100,
        0.0,
    )
}

fn learned_logits(model: &Model, batch: &Batch) -> Tensor {
    let mut attention = GroupedAttention {
        groups: &batch.groups,
    };
    let hidden = model.forward(
        &batch.ids,
        &batch.positions,
        &mut attention,
        &Meter::default(),
    );
    model.logits(&hidden.index_select(0, &batch.learned_rows))
}

/// How many samples are answered exactly.
fn exact_matches(model: &Model, samples: &[Sample]) -> usize {
    let batch = Batch::new(samples.to_vec());
    let right = learned_logits(model, &batch)
        .argmax(-1, false)
        .eq_tensor(&batch.targets)
        .to_kind(Kind::Int64);
    let right: Vec<i64> = Vec::try_from(&right).unwrap_or_default();
    let mut exact = vec![true; samples.len()];
    for (owner, right) in batch.owners.iter().zip(right) {
        exact[*owner] &= right == 1;
    }
    exact.into_iter().filter(|exact| *exact).count()
}

/// The same held-out items every time; two-digit sums only.
fn quick_items(task: Task) -> Vec<Item> {
    let mut rng = Rng::with_seed(77);
    if task == Task::Fact {
        return fact_items();
    }
    let easy = |item: &Item| {
        let digits = |text: &str| text.split(['+', '-', '=']).all(|part| part.len() <= 2);
        match task {
            Task::Arithmetic => digits(&item.raw_prompt),
            Task::Count => item.answer_text().len() < 500,
            _ => true,
        }
    };
    std::iter::repeat_with(|| draw(task, &mut rng, true))
        .filter(easy)
        .take(QUICK_ITEMS)
        .collect()
}

#[cfg(test)]
impl TrainArgs {
    /// A short run in `dir`.
    pub(super) fn for_tests(dir: &Path) -> Self {
        Self {
            out: dir.join("model"),
            state: dir.join("state.safetensors"),
            resume: false,
            steps: 4,
            minutes: None,
            tokens_per_step: 200,
            seed: 5,
            threads: 1,
            eval_every: 100,
            save_minutes: 60.0,
            muon_rate: 0.02,
            adam_rate: 0.004,
        }
    }
}

#[cfg(test)]
mod tests;
