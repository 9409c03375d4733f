//! What the operating system says about this process, read at the moment of a scrape.
//!
//! The names are those of every Prometheus client library, so that existing dashboards show them. The text is written
//! here rather than recorded, because CPU time is a counter with fractions, which the recorder does not hold.

use std::fmt::Write;
use std::fs;

/// Clock ticks per second in `/proc`, fixed by Linux's ABI to users (`USER_HZ`).
const TICKS_PER_SECOND: f64 = 100.0;

/// Figures of this process; what cannot be read is left out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProcessStats {
    /// Memory in RAM.
    pub resident_bytes: Option<u64>,
    /// Address space.
    pub virtual_bytes: Option<u64>,
    /// CPU time of all threads, in user and system mode.
    pub cpu_seconds: Option<f64>,
    /// File descriptors in use.
    pub open_fds: Option<u64>,
    /// File descriptors allowed.
    pub max_fds: Option<u64>,
    /// Start of the process, in seconds since 1970.
    pub start_time_seconds: Option<f64>,
}

impl ProcessStats {
    /// Reads `/proc/self`.
    pub fn read() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let status = text("/proc/self/status");
        let stat = text("/proc/self/stat");
        Self {
            resident_bytes: status_bytes(&status, "VmRSS:"),
            virtual_bytes: status_bytes(&status, "VmSize:"),
            cpu_seconds: cpu_seconds(&stat),
            // The directory that is being read is open too.
            open_fds: fs::read_dir("/proc/self/fd")
                .ok()
                .map(|entries| (entries.count() as u64).saturating_sub(1)),
            max_fds: max_fds(&text("/proc/self/limits")),
            start_time_seconds: start_time(&stat, &text("/proc/stat")),
        }
    }

    /// Appends the figures as Prometheus text.
    pub fn write_prometheus(&self, out: &mut String) {
        let mut write = |name: &str, kind: &str, help: &str, value: Option<f64>| {
            if let Some(value) = value {
                // Writing to a String cannot fail.
                let _ = write!(
                    out,
                    "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n\n"
                );
            }
        };
        let whole = |value: Option<u64>| value.map(|value| value as f64);
        write(
            "process_resident_memory_bytes",
            "gauge",
            "Resident memory size.",
            whole(self.resident_bytes),
        );
        write(
            "process_virtual_memory_bytes",
            "gauge",
            "Virtual memory size.",
            whole(self.virtual_bytes),
        );
        write(
            "process_cpu_seconds_total",
            "counter",
            "User and system CPU time spent.",
            self.cpu_seconds,
        );
        write(
            "process_open_fds",
            "gauge",
            "Open file descriptors.",
            whole(self.open_fds),
        );
        write(
            "process_max_fds",
            "gauge",
            "Allowed file descriptors.",
            whole(self.max_fds),
        );
        write(
            "process_start_time_seconds",
            "gauge",
            "Start of the process since 1970.",
            self.start_time_seconds,
        );
    }
}

/// A line such as `VmRSS: 1234 kB`.
fn status_bytes(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// Field `number` (from 1, as in proc(5)) of `/proc/self/stat`. The second field is the program's name in brackets, which
/// may itself hold spaces and brackets, so counting starts behind its last bracket.
fn stat_field(stat: &str, number: usize) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace()
        .nth(number.checked_sub(3)?)?
        .parse()
        .ok()
}

fn cpu_seconds(stat: &str) -> Option<f64> {
    Some((stat_field(stat, 14)? + stat_field(stat, 15)?) / TICKS_PER_SECOND)
}

fn start_time(stat: &str, system: &str) -> Option<f64> {
    let boot: f64 = system
        .lines()
        .find_map(|line| line.strip_prefix("btime "))?
        .trim()
        .parse()
        .ok()?;
    Some(boot + stat_field(stat, 22)? / TICKS_PER_SECOND)
}

fn max_fds(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "7 (odd) name) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 9 0 1000 9999 88 18446744073709551615";

    #[test]
    fn proc_texts_are_understood() {
        assert_eq!(
            status_bytes("VmSize:\t 20 kB\nVmRSS:\t  3 kB\n", "VmRSS:"),
            Some(3072)
        );
        assert_eq!(cpu_seconds(STAT), Some(3.0));
        assert_eq!(
            start_time(STAT, "cpu 1\nbtime 1700000000\n"),
            Some(1_700_000_010.0)
        );
        assert_eq!(
            max_fds("Limit Soft Hard Units\nMax open files            1024   4096   files\n"),
            Some(1024)
        );
    }

    #[test]
    fn broken_texts_give_nothing() {
        for text in [
            "",
            ")",
            "1 (a",
            "1 (a) S",
            "VmRSS: x kB",
            "Max open files unlimited",
        ] {
            assert_eq!(status_bytes(text, "VmRSS:"), None);
            assert_eq!(cpu_seconds(text), None);
            assert_eq!(start_time(text, text), None);
            assert_eq!(max_fds(text), None);
        }
    }

    #[test]
    fn this_process_has_figures_that_move() {
        let before = ProcessStats::read();
        assert!(
            before.resident_bytes.is_some_and(|bytes| bytes > 100_000),
            "{before:?}"
        );
        assert!(
            before.cpu_seconds.is_some() && before.max_fds.is_some(),
            "{before:?}"
        );
        let open: Vec<_> = (0..5)
            .map(|_| fs::File::open("/dev/null").expect("a file"))
            .collect();
        let after = ProcessStats::read();
        // Tests in parallel open and close files too; at least these five are open.
        assert!(
            after
                .open_fds
                .is_some_and(|count| count >= open.len() as u64),
            "{after:?}"
        );
        assert_eq!(after.start_time_seconds, before.start_time_seconds);
    }
}
