//! Whether the system may have killed a process for its memory.
//!
//! The kernel counts its out-of-memory kills since the machine's start; which process each one hit it tells nobody
//! without privileges. So any kill that may have been counted lately speaks against whoever was killed.

use std::time::{Duration, Instant};

/// How often the count is read, at least.
const INTERVAL: Duration = Duration::from_secs(1);

/// See the module. Of two readings, the older one is at least an interval old: a process that the kernel kills is counted
/// before it dies, and may take a while to die.
#[derive(Debug)]
pub(super) struct OomWatch {
    older: Option<u64>,
    newer: Option<u64>,
    read_at: Instant,
}

impl OomWatch {
    pub(super) fn new(now: Instant) -> Self {
        let kills = kills();
        Self {
            older: kills,
            newer: kills,
            read_at: now,
        }
    }

    pub(super) fn tick(&mut self, now: Instant) {
        if now.saturating_duration_since(self.read_at) >= INTERVAL {
            self.older = std::mem::replace(&mut self.newer, kills());
            self.read_at = now;
        }
    }

    /// Whether nothing was killed for its memory lately. Where the system does not say, it is not known to be so.
    pub(super) fn is_quiet(&self) -> bool {
        self.older.is_some() && self.older == kills()
    }
}

/// Out-of-memory kills on this machine since its start. `None` where the system does not count them.
fn kills() -> Option<u64> {
    in_vmstat(&std::fs::read_to_string("/proc/vmstat").ok()?)
}

fn in_vmstat(text: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    value?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_found_by_its_whole_name() {
        let text = "nr_free_pages 5\noom_kill_other 9\noom_kill 3\nballoon_inflate 0\n";
        assert_eq!(in_vmstat(text), Some(3));
        assert_eq!(in_vmstat("nr_free_pages 5\n"), None);
    }

    #[test]
    fn a_kill_speaks_for_an_interval_at_least() {
        let now = Instant::now();
        let mut watch = OomWatch::new(now);
        if watch.older.is_none() {
            eprintln!("SKIPPED: this system does not count its out-of-memory kills");
            return;
        }
        assert!(watch.is_quiet());
        // As if one had come between the two readings.
        watch.older = watch.older.map(|kills| kills.wrapping_sub(1));
        watch.tick(now + INTERVAL / 2);
        assert!(!watch.is_quiet());
        watch.tick(now + INTERVAL);
        assert!(watch.is_quiet());
    }
}
