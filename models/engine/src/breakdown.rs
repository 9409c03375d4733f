//! Where a step's time goes: asked by benchmarks, never while serving.

use serde::Serialize;

use crate::runner::ModelRunner;

/// Milliseconds of an average step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Breakdown {
    /// Products with weights, and the activations between them.
    pub matmul: f64,
    pub attention: f64,
    pub norms: f64,
    pub embedding: f64,
    /// Indices, copies to and from a device, and what is in no other part.
    pub other: f64,
}

/// A runner that can tell where its time goes.
pub trait Measured: ModelRunner {
    /// From now on, the parts of steps are timed, from zero; on a device this makes steps slower. `false` ends it.
    fn measure(&mut self, _on: bool) {}

    /// What was timed since [`Self::measure`]; `None` if nothing was, or this runner does not tell.
    fn breakdown(&self) -> Option<Breakdown> {
        None
    }
}
