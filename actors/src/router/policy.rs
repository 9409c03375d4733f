//! Which replica serves an attempt: a pure function of what is known.

/// What the policy knows of one replica that could serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Attempts of this gateway that run or wait there.
    pub outstanding: u32,
    /// Attempts of all gateways there, as last reported.
    pub reported: u32,
    /// What it takes at most.
    pub capacity: u32,
}

impl Candidate {
    /// The larger of what we know and what we heard: reports are late, and do not know what is under way.
    pub fn load(self) -> u32 {
        self.outstanding.max(self.reported)
    }
}

/// Index of the replica with the least outstanding work that has room, or `None` if none has.
///
/// Ties are broken by `salt` (the request id, say), so that several gateways do not all begin with the same replica.
pub fn least_outstanding(candidates: &[Candidate], salt: u64) -> Option<usize> {
    let open = |candidate: &Candidate| candidate.outstanding < candidate.capacity;
    let least = candidates
        .iter()
        .filter(|c| open(c))
        .map(|c| c.load())
        .min()?;
    let ties: Vec<usize> = (0..candidates.len())
        .filter(|&i| open(&candidates[i]) && candidates[i].load() == least)
        .collect();
    let pick = salt % ties.len() as u64;
    Some(ties[pick as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(outstanding: u32, reported: u32) -> Candidate {
        Candidate {
            outstanding,
            reported,
            capacity: 8,
        }
    }

    #[test]
    fn the_least_loaded_wins() {
        assert_eq!(
            least_outstanding(&[candidate(3, 0), candidate(1, 1), candidate(0, 5)], 9),
            Some(1)
        );
    }

    #[test]
    fn full_replicas_are_left_out() {
        assert_eq!(
            least_outstanding(&[candidate(8, 8), candidate(7, 7)], 0),
            Some(1)
        );
        assert_eq!(least_outstanding(&[candidate(8, 0)], 0), None);
        assert_eq!(least_outstanding(&[], 0), None);
    }

    #[test]
    fn ties_are_spread_by_the_salt() {
        let two = [candidate(2, 0), candidate(0, 0), candidate(0, 0)];
        assert_eq!(least_outstanding(&two, 0), Some(1));
        assert_eq!(least_outstanding(&two, 1), Some(2));
    }
}
