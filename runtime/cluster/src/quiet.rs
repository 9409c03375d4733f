//! How often strangers may make this node write a line. Pure: time comes in.
//!
//! Whoever reaches the cluster port can cause a refusal, as often as it likes. Each address gets one line per reason and
//! [`INTERVAL`]; the next one says how many it stands for. What is not said is counted in the metrics all the same.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

/// Least time between two lines about the same address for the same reason.
pub(crate) const INTERVAL: Duration = Duration::from_secs(60);
/// Addresses and reasons that are remembered; while there are more, the others stay unsaid.
const MAX_ENTRIES: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct Quiet(HashMap<(IpAddr, &'static str), Said>);

#[derive(Debug)]
struct Said {
    at: Duration,
    /// How often it happened since then.
    unsaid: u64,
}

impl Quiet {
    /// Whether a line may be written now, and how many were not since the last one.
    pub(crate) fn may_say(
        &mut self,
        from: IpAddr,
        reason: &'static str,
        now: Duration,
    ) -> Option<u64> {
        let is_over = |said: &Said| now.saturating_sub(said.at) >= INTERVAL;
        if let Some(said) = self.0.get_mut(&(from, reason)) {
            if !is_over(said) {
                said.unsaid += 1;
                return None;
            }
            let unsaid = std::mem::take(&mut said.unsaid);
            said.at = now;
            return Some(unsaid);
        }
        if self.0.len() >= MAX_ENTRIES {
            self.0.retain(|_, said| !is_over(said));
        }
        if self.0.len() >= MAX_ENTRIES {
            return None;
        }
        self.0.insert((from, reason), Said { at: now, unsaid: 0 });
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn address(number: u32) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from_bits(number))
    }

    #[test]
    fn one_line_a_minute_for_each_address_and_reason() {
        let mut quiet = Quiet::default();
        assert_eq!(quiet.may_say(address(1), "cookie", SECOND), Some(0));
        for _ in 0..1000 {
            assert_eq!(quiet.may_say(address(1), "cookie", SECOND * 30), None);
        }
        assert_eq!(quiet.may_say(address(1), "config", SECOND * 30), Some(0));
        assert_eq!(quiet.may_say(address(2), "cookie", SECOND * 30), Some(0));
        assert_eq!(quiet.may_say(address(1), "cookie", SECOND * 61), Some(1000));
        assert_eq!(quiet.may_say(address(1), "cookie", SECOND * 62), None);
    }

    #[test]
    fn many_addresses_get_no_more_lines_than_are_remembered() {
        let mut quiet = Quiet::default();
        let mut lines = |now| {
            let said = |number: &u32| quiet.may_say(address(*number), "cookie", now).is_some();
            (0..100_000).filter(said).count()
        };
        assert_eq!(lines(SECOND), MAX_ENTRIES);
        assert_eq!(lines(SECOND * 2), 0);
        assert_eq!(
            lines(SECOND * 61),
            MAX_ENTRIES,
            "those of the first minute are forgotten"
        );
    }
}
