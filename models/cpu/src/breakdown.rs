//! Where the time of a step goes.

use std::time::{Duration, Instant};

use understudy_engine_core::breakdown::Breakdown;

/// What was done since the last look at the clock.
#[derive(Debug, Clone, Copy)]
pub enum Part {
    Embedding,
    /// Products with weights, the head's too.
    Matmul,
    Attention,
    /// Norms, rotary embedding, activations, residuals.
    Elementwise,
}

const PARTS: usize = 4;

/// Charges the time since the last call; switched off, it does not look at the clock.
#[derive(Debug, Default)]
pub struct Stopwatch {
    last: Option<Instant>,
    spent: [Duration; PARTS],
    steps: u32,
}

impl Stopwatch {
    /// One that runs, or not.
    #[must_use]
    pub fn new(on: bool) -> Self {
        Self {
            last: on.then(Instant::now),
            ..Self::default()
        }
    }

    /// A step begins.
    pub fn start(&mut self) {
        if let Some(last) = &mut self.last {
            *last = Instant::now();
            self.steps += 1;
        }
    }

    /// What went on since the last call was `part`.
    pub fn charge(&mut self, part: Part) {
        if let Some(last) = &mut self.last {
            let now = Instant::now();
            self.spent[part as usize] += now - *last;
            *last = now;
        }
    }

    /// Milliseconds of an average step; `None` if nothing was timed.
    #[must_use]
    pub fn breakdown(&self) -> Option<Breakdown> {
        if self.steps == 0 {
            return None;
        }
        let per_step =
            |part: Part| self.spent[part as usize].as_secs_f64() * 1e3 / f64::from(self.steps);
        Some(Breakdown {
            matmul: per_step(Part::Matmul),
            attention: per_step(Part::Attention),
            norms: per_step(Part::Elementwise),
            embedding: per_step(Part::Embedding),
            other: 0.0,
        })
    }
}
