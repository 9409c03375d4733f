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
        let too_large = matches!(budget, KvMemory::Bytes(bytes) if bytes > available_bytes);
        if fit < context || too_large {
            return Err(LoadError::KvMemory {
                needed_bytes: context.saturating_mul(self.block_bytes as u64),
                context_length: self.context_length,
                budget_bytes: bytes,
                available_bytes,
            });
        }
        let useful = context.saturating_mul(self.max_sequences as u64 + 1);
        Ok(usize::try_from(fit.min(useful)).unwrap_or(usize::MAX))
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
            Some(limit.saturating_sub(number(group.join("memory.current"))?))
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
    fn less_than_one_context_or_more_than_there_is_is_refused_with_numbers() {
        for (budget, available) in [
            (KvMemory::Bytes(6_999), 20_000),
            (KvMemory::Fraction(0.3), 20_000),
            (KvMemory::Bytes(30_000), 20_000),
        ] {
            let error = DEMAND.blocks(budget, available).unwrap_err().to_string();
            assert!(error.contains("100"), "{error}");
        }
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(available_bytes() > 1 << 20);
        assert!(available_bytes() <= total_bytes());
    }
}
