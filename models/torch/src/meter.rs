//! Where a step's time goes, for those who ask: `bench` does, serving does not.

use std::cell::Cell;
use std::time::{Duration, Instant};

use tch::Device;
use understudy_engine_core::breakdown::Breakdown;

/// A part of a step that is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Embedding,
    Norms,
    /// Products with weights, and the activations between them.
    Matmul,
    Attention,
}

const PARTS: usize = 4;

/// Times the parts of steps, or, switched off, just runs them.
#[derive(Debug, Default)]
pub struct Meter {
    /// `None` is off; a GPU is waited for before and after each part.
    device: Option<Device>,
    parts: [Cell<Duration>; PARTS],
    whole: Cell<Duration>,
    steps: Cell<u32>,
}

impl Meter {
    /// One that times what is computed on `device`.
    #[must_use]
    pub fn on(device: Device) -> Self {
        Self {
            device: Some(device),
            ..Self::default()
        }
    }

    /// Runs a part of a step. Parts do not contain each other.
    pub fn time<T>(&self, part: Part, run: impl FnOnce() -> T) -> T {
        self.timed(&self.parts[part as usize], run)
    }

    /// Runs a step.
    pub fn step<T>(&self, run: impl FnOnce() -> T) -> T {
        self.steps.set(self.steps.get() + 1);
        self.timed(&self.whole, run)
    }

    fn timed<T>(&self, total: &Cell<Duration>, run: impl FnOnce() -> T) -> T {
        let Some(device) = self.device else {
            return run();
        };
        wait(device);
        let begun = Instant::now();
        let result = run();
        wait(device);
        total.set(total.get() + begun.elapsed());
        result
    }

    /// Milliseconds of an average step; `None` if nothing was timed.
    #[must_use]
    pub fn breakdown(&self) -> Option<Breakdown> {
        self.device.filter(|_| self.steps.get() > 0)?;
        let per_step =
            |total: &Cell<Duration>| total.get().as_secs_f64() * 1e3 / f64::from(self.steps.get());
        let [embedding, norms, matmul, attention] = self.parts.each_ref().map(per_step);
        let parts = embedding + norms + matmul + attention;
        Some(Breakdown {
            matmul,
            attention,
            norms,
            embedding,
            other: (per_step(&self.whole) - parts).max(0.0),
        })
    }
}

fn wait(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up_to_the_step() {
        let meter = Meter::on(Device::Cpu);
        let pause = |ms| std::thread::sleep(Duration::from_millis(ms));
        for _ in 0..2 {
            meter.step(|| {
                meter.time(Part::Matmul, || pause(4));
                meter.time(Part::Norms, || pause(1));
                pause(2);
            });
        }
        let found = meter.breakdown().unwrap();
        assert!(found.matmul >= 4.0 && found.norms >= 1.0 && found.other >= 2.0);
        assert_eq!((found.attention, found.embedding), (0.0, 0.0));
        assert_eq!(Meter::default().breakdown(), None);
    }
}
