//! How much memory there is, and how many KV blocks fit a budget.

use crate::LoadError;
use crate::options::KvMemory;

/// Blocks beyond which nothing is gained: a context for every sequence.
#[derive(Debug, Clone, Copy)]
pub struct KvDemand {
    pub block_bytes: usize,
    pub block_positions: usize,
    pub context_length: usize,
    pub max_sequences: usize,
}

impl KvDemand {
    fn blocks_per_context(&self) -> u64 {
        (self.context_length.div_ceil(self.block_positions)) as u64
    }

    /// How many blocks `budget` holds; never more than all sequences could fill, plus one context's for the prefix cache.
    ///
    /// # Errors
    /// [`LoadError::KvMemory`] if not even one sequence of the whole context fits.
    pub fn blocks(&self, budget: KvMemory, available_bytes: u64) -> Result<usize, LoadError> {
        let bytes = match budget {
            KvMemory::Fraction(fraction) => (available_bytes as f64 * fraction) as u64,
            KvMemory::Bytes(bytes) => bytes,
        };
        let context = self.blocks_per_context();
        let fit = bytes / self.block_bytes.max(1) as u64;
        if fit < context {
            return Err(LoadError::KvMemory {
                needed_bytes: context.saturating_mul(self.block_bytes as u64),
                context_length: self.context_length,
                budget_bytes: bytes,
                available_bytes,
            });
        }
        let useful = context.saturating_mul((self.max_sequences as u64).saturating_add(1));
        // Block numbers have 32 bits.
        let blocks = fit.min(useful).min(u64::from(u32::MAX));
        let taken_bytes = blocks.saturating_mul(self.block_bytes as u64);
        if taken_bytes > available_bytes {
            return Err(LoadError::KvBudget {
                taken_bytes,
                available_bytes,
            });
        }
        Ok(blocks as usize)
    }
}

/// Bytes that this process may still take: of the machine, and of its control group.
#[must_use]
pub fn available_bytes() -> u64 {
    machine_available().min(cgroup_available().unwrap_or(u64::MAX))
}

fn machine_available() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = meminfo.lines().find_map(|line| {
        line.strip_prefix("MemAvailable:")?
            .trim()
            .strip_suffix("kB")?
            .trim()
            .parse()
            .ok()
    });
    // Where the kernel does not say: all there is.
    kib.map_or_else(total_bytes, |kib: u64| kib << 10)
}

fn total_bytes() -> u64 {
    // SAFETY: plain queries.
    unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) as u64 * libc::sysconf(libc::_SC_PAGESIZE) as u64 }
}

/// What a group's `memory.stat` counts as its memory and the kernel gives back on demand: pages of files, such as those of a checkpoint
/// that was just read.
fn page_cache_bytes(stat: &str) -> u64 {
    let value = |line: &str, key| line.strip_prefix(key)?.trim().parse::<u64>().ok();
    stat.lines()
        .filter_map(|line| value(line, "inactive_file ").or_else(|| value(line, "active_file ")))
        .fold(0, u64::saturating_add)
}

/// Of the tightest limit between this process's control group and the root.
fn cgroup_available() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let number = |file: std::path::PathBuf| -> Option<u64> {
        std::fs::read_to_string(file).ok()?.trim().parse().ok()
    };
    std::path::Path::new(path)
        .ancestors()
        .filter_map(|group| {
            let group = std::path::Path::new("/sys/fs/cgroup").join(group.strip_prefix("/").ok()?);
            let limit = number(group.join("memory.max"))?;
            let current = number(group.join("memory.current"))?;
            let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
            Some(limit.saturating_sub(current.saturating_sub(page_cache_bytes(&stat))))
        })
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMAND: KvDemand = KvDemand {
        block_bytes: 1000,
        block_positions: 16,
        context_length: 100,
        max_sequences: 4,
    };

    #[test]
    fn a_budget_buys_blocks_up_to_what_is_of_use() {
        assert_eq!(DEMAND.blocks(KvMemory::Bytes(9_999), 20_000).unwrap(), 9);
        assert_eq!(DEMAND.blocks(KvMemory::Fraction(0.5), 20_000).unwrap(), 10);
        assert_eq!(DEMAND.blocks(KvMemory::Fraction(1.0), 1 << 40).unwrap(), 35);
    }

    #[test]
    fn less_than_one_context_is_refused_with_the_numbers_and_what_helps() {
        for (budget, available) in [
            (KvMemory::Bytes(6_999), 20_000),
            (KvMemory::Fraction(0.3), 20_000),
        ] {
            let error = DEMAND.blocks(budget, available).unwrap_err().to_string();
            assert!(
                error.contains("100 positions") && error.contains("raise kv_memory"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_budget_above_what_is_there_counts_as_far_as_it_is_used() {
        assert_eq!(DEMAND.blocks(KvMemory::Bytes(1 << 40), 36_000).unwrap(), 35);
        let error = DEMAND
            .blocks(KvMemory::Bytes(1 << 40), 34_000)
            .unwrap_err()
            .to_string();
        assert!(error.contains("lower kv_memory"), "{error}");
    }

    #[test]
    fn pages_of_files_count_as_available() {
        let stat =
            "anon 7\nfile 9\ninactive_anon 1\nactive_anon 2\ninactive_file 300\nactive_file 40\n";
        assert_eq!(page_cache_bytes(stat), 340);
        assert_eq!(page_cache_bytes(""), 0);
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(available_bytes() > 1 << 20);
        assert!(available_bytes() <= total_bytes());
    }
}
