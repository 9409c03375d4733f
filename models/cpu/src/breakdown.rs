//! Where the time of a step goes.

use std::time::{Duration, Instant};

/// Seconds by kind of work, summed over steps.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Breakdown {
    pub steps: u64,
    pub embedding: Duration,
    /// Products with weights, the head's left out.
    pub matmul: Duration,
    pub attention: Duration,
    /// Norms, rotary embedding, activations, residuals.
    pub elementwise: Duration,
    pub head: Duration,
}

/// What was done since the last look at the clock.
#[derive(Debug, Clone, Copy)]
pub enum Part {
    Embedding,
    Matmul,
    Attention,
    Elementwise,
    Head,
}

/// Charges the time since the last call.
#[derive(Debug)]
pub struct Stopwatch {
    last: Instant,
    pub spent: Breakdown,
}

impl Default for Stopwatch {
    fn default() -> Self {
        Self {
            last: Instant::now(),
            spent: Breakdown::default(),
        }
    }
}

impl Stopwatch {
    /// A step begins.
    pub fn start(&mut self) {
        self.last = Instant::now();
        self.spent.steps += 1;
    }

    /// What went on since the last call was `part`.
    pub fn charge(&mut self, part: Part) {
        let now = Instant::now();
        let spent = match part {
            Part::Embedding => &mut self.spent.embedding,
            Part::Matmul => &mut self.spent.matmul,
            Part::Attention => &mut self.spent.attention,
            Part::Elementwise => &mut self.spent.elementwise,
            Part::Head => &mut self.spent.head,
        };
        *spent += now - self.last;
        self.last = now;
    }
}
