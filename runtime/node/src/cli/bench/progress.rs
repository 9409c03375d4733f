//! A bar (or, without a known end, a spinner) on stderr while a run lasts; nothing where stderr is no terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::record::Record;

/// Redraws even when no request ends.
const TICK: Duration = Duration::from_millis(200);

/// The bar.
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar up to `limit` requests.
    pub fn new(limit: Option<u64>) -> Self {
        let bar = match limit {
            Some(limit) => ProgressBar::new(limit),
            None => ProgressBar::new_spinner(),
        };
        let template = match limit {
            Some(_) => "{elapsed_precise} [{bar:30}] {pos}/{len} {msg}",
            None => "{elapsed_precise} {spinner} {pos} {msg}",
        };
        // The templates are constants; one that does not parse costs only its looks.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        Self { bar }
    }

    /// Shows where the run is.
    pub fn update(&self, record: &Record, wall: Duration) {
        let rate = record.output_tokens as f64 / wall.as_secs_f64().max(1e-9);
        self.bar.set_position(record.ended());
        self.bar
            .set_message(format!("{rate:.0} tokens/s, {} failed", record.failed));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
