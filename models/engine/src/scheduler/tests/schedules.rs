//! Thousands of random schedules: whatever is shared, preempted, forked, drafted, cancelled, moved or carried along, every
//! attempt says what it says alone, and no block is lost.
//!
//! The same test with one of three bugs put in must fail; otherwise it would not be a test of these.

use super::*;
use crate::blocks::Sabotage;

const SCHEDULES: u64 = 3000;
/// A schedule that is not done by then never is.
const MAX_STEPS: usize = 20_000;

/// One request, and what has been seen of it.
struct Request {
    start: StartAttempt,
    /// Which of the two labs has it.
    lab: usize,
    seen: Vec<StepToken>,
    cancelled: bool,
}

impl Request {
    fn is_over(&self) -> bool {
        self.cancelled || self.seen.last().is_some_and(|token| token.finish.is_some())
    }
}

/// Two engines of one model, and everything asked of them.
struct World {
    dice: Dice,
    labs: [Lab; 2],
    requests: Vec<Request>,
    /// The model of the oracle: with the same bound on lengths, and room for everything.
    plain: FakeOptions,
    segments: Vec<Vec<u32>>,
    transfers: bool,
    steps: usize,
}

impl World {
    fn new(seed: u64, sabotage: Option<Sabotage>) -> Self {
        let mut dice = Dice::new(seed);
        let kv_blocks = dice.pick(&[3, 4, 5, 7, 9, 12, 20, 60]);
        let plain = FakeOptions {
            context_length: (kv_blocks * BLOCK).min(model().context_length),
            ..model()
        };
        let labs = [0, 1].map(|_| {
            let model = FakeOptions {
                max_sequences: 1 + dice.throw(6),
                kv_blocks: Some(kv_blocks),
                ..model()
            };
            let options = SchedulerOptions {
                max_waiting: 4 + dice.throw(30),
                step_tokens: 1 + dice.throw(50),
            };
            let mut lab = Lab::new(model, options);
            lab.scheduler.blocks.sabotage = sabotage;
            lab
        });
        let segments = (0..3)
            .map(|_| (0..BLOCK).map(|_| dice.throw(48) as u32).collect())
            .collect();
        Self {
            dice,
            labs,
            requests: Vec::new(),
            plain,
            segments,
            transfers: sabotage.is_none(),
            steps: 0,
        }
    }

    /// Whole blocks of few kinds, so that prefixes are shared and the same block comes after different ones; then some tokens.
    fn prompt(&mut self) -> Vec<u32> {
        let mut prompt = Vec::new();
        for _ in 0..self.dice.throw(6) {
            let segment = self.dice.throw(self.segments.len());
            prompt.extend(&self.segments[segment]);
        }
        let variant = self.dice.throw(3) as u32;
        prompt.extend((0..self.dice.throw(20) as u32).map(|index| (index + variant) % 48));
        prompt.truncate(self.plain.context_length - 1);
        if prompt.is_empty() {
            prompt.push(1);
        }
        prompt
    }

    fn sampling(&mut self) -> SamplingParams {
        let settings = settings();
        let mut sampling = settings[self.dice.throw(settings.len())].clone();
        sampling.max_tokens = sampling.min_tokens.max(1 + self.dice.throw(60) as u32);
        sampling.seed = self.dice.throw(4) as u64;
        sampling.speculate = self.dice.pick(&[0, 1, 3, 8, 16]);
        // The fake's text does not repeat itself unless it is made to, and without that no draft is right.
        match self.dice.throw(4) {
            0 => sampling.logit_bias = vec![(30, 12.0)],
            1 => sampling.allowed_token_ids = Some(vec![30, 31]),
            2 => sampling.logit_bias = vec![(30, 60.0), (31, 55.0)],
            _ => {}
        }
        sampling
    }

    fn add(&mut self, start: StartAttempt, lab: usize) {
        let mut request = Request {
            start,
            lab,
            seen: Vec::new(),
            cancelled: false,
        };
        // Full is an answer; whoever asked goes elsewhere.
        let answer = self.labs[lab].scheduler.start(request.start.clone());
        request.cancelled = match answer {
            Ok(_) => false,
            Err(AttemptError::Full { .. }) => true,
            Err(error) => panic!("{error}"),
        };
        self.requests.push(request);
    }

    fn start_some(&mut self) {
        let prompt = self.prompt();
        let lab = self.dice.throw(2);
        let leader = attempt(self.requests.len() as u128, 1);
        for branch in 0..self.dice.pick(&[1, 1, 1, 2, 4]) {
            let sampling = SamplingParams {
                seed: branch,
                ..self.sampling()
            };
            let start = StartAttempt {
                suspect: self.dice.throw(8) == 0,
                priority: self.dice.pick(&[0, 0, 0, 1, -3]),
                fork_of: (branch > 0).then_some(leader),
                cache_salt: self.dice.pick(&[0, 0, 0, 9]),
                ..start(self.requests.len() as u128, &prompt, &sampling)
            };
            self.add(start, lab);
        }
    }

    fn live(&mut self) -> Option<usize> {
        let live: Vec<usize> = (0..self.requests.len())
            .filter(|&index| !self.requests[index].is_over())
            .collect();
        (!live.is_empty()).then(|| live[self.dice.throw(live.len())])
    }

    fn cancel_one(&mut self) {
        if let Some(index) = self.live() {
            let request = &mut self.requests[index];
            request.cancelled = true;
            let known = self.labs[request.lab]
                .scheduler
                .cancel(request.start.attempt);
            assert!(known, "an attempt that is not over is known");
        }
    }

    /// The request goes on from its log, here or in the other engine.
    fn resume_one(&mut self) {
        let Some(index) = self.live() else {
            return;
        };
        let request = &mut self.requests[index];
        let compare = self.dice.throw(request.seen.len().min(20) + 1);
        let lab = self.dice.throw(2);
        let mut start = resumed(&request.start, &request.seen, request.seen.len(), compare);
        start.attempt.epoch = request.start.attempt.epoch + 1;
        if lab != request.lab || self.dice.throw(2) == 0 {
            self.labs[request.lab]
                .scheduler
                .cancel(request.start.attempt);
        }
        request.lab = lab;
        match self.labs[lab].scheduler.start(start.clone()) {
            Ok(_) => request.start = start,
            Err(AttemptError::Full { .. }) => {
                request.cancelled = true;
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn carry_some(&mut self) -> Result<(), String> {
        if self.requests.is_empty() || !self.transfers {
            return Ok(());
        }
        let request = &self.requests[self.dice.throw(self.requests.len())];
        let from = self.dice.throw(2);
        let output = request.seen.iter().map(|token| token.token.id);
        let tokens: Vec<u32> = request.start.prompt.iter().copied().chain(output).collect();
        let lab = &mut self.labs[from];
        let frames = lab
            .scheduler
            .export_prefix(&mut lab.runner, &tokens, request.start.cache_salt)
            .map_err(|error| error.to_string())?;
        let lab = &mut self.labs[1 - from];
        for frame in frames {
            match lab.scheduler.import(&mut lab.runner, &frame) {
                Ok(_) | Err(crate::kv_frame::KvTransferError::NoRoom { .. }) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }

    /// Two steps of one engine, after which whoever was first has got on.
    fn step(&mut self, lab: usize) -> Result<(), String> {
        let first = self.first(lab);
        let lengths = self.labs[lab].scheduler.running_len();
        for _ in 0..2 {
            self.step_once(lab)?;
        }
        match (first, self.first(lab)) {
            (Some(before), Some(after)) if before == after => Err(format!(
                "{before:?} is first, and did not get on; {lengths} were running"
            )),
            _ => Ok(()),
        }
    }

    /// The first of all by rank, and how far it is.
    fn first(&self, lab: usize) -> Option<(AttemptId, usize, usize)> {
        let scheduler = &self.labs[lab].scheduler;
        let running = scheduler.running.iter().map(|r| (r.rank, &r.sequence));
        let waiting = scheduler.waiting.iter().map(|w| (w.rank, &w.sequence));
        let (_, first) = running.chain(waiting).min_by_key(|(rank, _)| *rank)?;
        Some((first.attempt(), first.known_len(), first.computed()))
    }

    fn step_once(&mut self, lab: usize) -> Result<(), String> {
        self.steps += 1;
        let Lab {
            scheduler, runner, ..
        } = &mut self.labs[lab];
        let had_work = scheduler.has_work();
        let outcome = scheduler.step(runner).map_err(|error| error.to_string())?;
        let tables = scheduler.running.iter().map(|r| r.table.as_slice());
        scheduler.blocks.verify(tables)?;
        let Some(outcome) = outcome else {
            return match had_work {
                true => Err("there was work, and none was done".to_owned()),
                false => Ok(()),
            };
        };
        let computed: usize = runner.steps.drain(..).flatten().map(|chunk| chunk.2).sum();
        if computed > scheduler.options.step_tokens {
            return Err(format!("{computed} tokens in a step"));
        }
        if let Some((attempt, error)) = outcome.failed.first() {
            return Err(format!("{attempt:?}: {error}"));
        }
        for token in &outcome.tokens {
            let request = &mut self.requests[token.attempt.request as usize];
            if request.cancelled || request.start.attempt != token.attempt {
                return Err("a token of an attempt that is over".to_owned());
            }
            if token.position as usize != request.seen.len() {
                return Err(format!("position {} is not the next", token.position));
            }
            request.seen.push(token.clone());
        }
        self.labs[lab].scheduler.recycle(outcome);
        Ok(())
    }

    fn act(&mut self) -> Result<(), String> {
        match self.dice.throw(12) {
            0..=2 => self.start_some(),
            3 => self.cancel_one(),
            4 => self.resume_one(),
            5 => self.carry_some()?,
            _ => {
                let lab = self.dice.throw(2);
                self.step(lab)?;
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), String> {
        for lab in 0..2 {
            while self.labs[lab].scheduler.has_work() {
                self.step(lab)?;
                if self.steps > MAX_STEPS {
                    return Err("it does not come to an end".to_owned());
                }
            }
            let counts = self.labs[lab].scheduler.block_counts();
            if counts.used != 0 {
                return Err(format!("blocks are lost: {counts:?}"));
            }
        }
        self.requests
            .iter()
            .try_for_each(|request| self.compare(request))
    }

    /// What was seen is what the request says alone: as it is, without forks, drafts, salts or neighbours.
    fn compare(&self, request: &Request) -> Result<(), String> {
        if !request.is_over() {
            return Err(format!("{:?} never ended", request.start.attempt));
        }
        let mut sampling = request.start.sampling.clone();
        sampling.speculate = 0;
        let whole = alone(&self.plain, &start(0, &request.start.prompt, &sampling));
        let bits = |token: &StepToken| {
            let tops = token.token.top.iter();
            let tops: Vec<(u32, u32)> = tops.map(|&(id, p)| (id, p.to_bits())).collect();
            let finish = token.finish;
            (token.token.id, token.token.logprob.to_bits(), tops, finish)
        };
        let seen: Vec<_> = request.seen.iter().map(bits).collect();
        let expected: Vec<_> = whole.iter().map(bits).collect();
        let complete = request.cancelled || seen.len() == expected.len();
        if complete && expected.starts_with(&seen) {
            Ok(())
        } else {
            Err(format!("other tokens than alone: {:?}", request.start))
        }
    }
}

fn run_schedule(seed: u64, sabotage: Option<Sabotage>) -> Result<[Totals; 2], String> {
    let mut world = World::new(seed, sabotage);
    for _ in 0..10 + world.dice.throw(60) {
        world.act()?;
    }
    world.finish()?;
    Ok([0, 1].map(|lab| world.labs[lab].scheduler.totals()))
}

#[test]
fn every_schedule_gives_the_tokens_of_a_lone_run_and_loses_no_block() {
    let mut sum = Totals::default();
    for seed in 0..SCHEDULES {
        let totals =
            run_schedule(seed, None).unwrap_or_else(|error| panic!("schedule {seed}: {error}"));
        for totals in totals {
            sum.preemptions += totals.preemptions;
            sum.prefix_hit_tokens += totals.prefix_hit_tokens;
            sum.drafted_tokens += totals.drafted_tokens;
            sum.accepted_tokens += totals.accepted_tokens;
        }
    }
    // Otherwise they would prove nothing.
    assert!(sum.preemptions > SCHEDULES, "{sum:?}");
    assert!(sum.prefix_hit_tokens > 50 * SCHEDULES, "{sum:?}");
    assert!(sum.accepted_tokens > 10 * SCHEDULES, "{sum:?}");
    assert!(
        sum.drafted_tokens > sum.accepted_tokens + 10 * SCHEDULES,
        "{sum:?}"
    );
}

#[test]
fn the_schedules_find_bugs_that_are_put_in() {
    for sabotage in [
        Sabotage::NoCopyOnWrite,
        Sabotage::HashWithoutParent,
        Sabotage::RegisterRejectedDrafts,
    ] {
        let found = (0..SCHEDULES).find(|&seed| run_schedule(seed, Some(sabotage)).is_err());
        assert!(found.is_some(), "{sabotage:?} goes unnoticed");
    }
}
