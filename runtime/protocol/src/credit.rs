//! Credit: how many token events a stream's receiver has room for.
//!
//! The server spends one for each token event and stops sending at zero; the client gives back what it has consumed.
//! Terminal events and everything that is no token event need no credit.
//!
//! Invariant: what is under way to a client never exceeds the window it named, so a slow reader bounds memory on both
//! sides.

/// The server's side of one stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreditBalance {
    available: u32,
    max: u32,
}

impl CreditBalance {
    /// Starts with what the client granted, cut to `max` (the `max_credit` of the limits).
    pub fn new(initial: u32, max: u32) -> Self {
        Self {
            available: initial.min(max),
            max,
        }
    }

    /// Adds a grant; what goes beyond the maximum is lost.
    pub fn grant(&mut self, tokens: u32) {
        self.available = self.available.saturating_add(tokens).min(self.max);
    }

    /// Token events that may be sent now.
    pub fn available(&self) -> u32 {
        self.available
    }

    /// Takes one; false where there is none, and then nothing may be sent.
    #[must_use]
    pub fn spend(&mut self) -> bool {
        match self.available.checked_sub(1) {
            Some(left) => {
                self.available = left;
                true
            }
            None => false,
        }
    }
}

/// The client's side of one stream: grants half a window at a time, so that grants are few and the server never stalls
/// on a reader that keeps up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreditWindow {
    window: u32,
    consumed: u32,
}

impl CreditWindow {
    /// A window of `window` token events, at least 1, which is also the initial grant.
    pub fn new(window: u32) -> Self {
        Self {
            window: window.max(1),
            consumed: 0,
        }
    }

    /// The size of the window.
    pub fn window(&self) -> u32 {
        self.window
    }

    /// Notes one consumed token event; a number is what to grant now.
    pub fn consume(&mut self) -> Option<u32> {
        self.consumed += 1;
        (self.consumed >= self.window.div_ceil(2)).then(|| std::mem::take(&mut self.consumed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balance_never_exceeds_the_maximum_nor_goes_below_zero() {
        let mut balance = CreditBalance::new(10, 4);
        assert_eq!(balance.available(), 4);
        balance.grant(u32::MAX);
        assert_eq!(balance.available(), 4);
        for _ in 0..4 {
            assert!(balance.spend());
        }
        assert!(!balance.spend());
        balance.grant(1);
        assert!(balance.spend());
        assert!(!balance.spend());
    }

    #[test]
    fn a_reader_that_keeps_up_never_stalls_and_one_that_stops_is_sent_a_window() {
        for window in 1..=65 {
            let mut server = CreditBalance::new(window, 1000);
            let mut client = CreditWindow::new(window);
            for _ in 0..1000 {
                assert!(server.spend(), "stalled with a window of {window}");
                if let Some(tokens) = client.consume() {
                    server.grant(tokens);
                }
                assert!(server.available() <= window);
            }
        }
    }
}
