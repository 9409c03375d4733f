//! Ports for the servers of a test.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};

/// Below the range from which systems take the ports of outgoing connections, and above the ports that services have.
const FIRST: u32 = 20_000;
const COUNT: u32 = 12_000;

/// Ports on the loopback interface that nobody listens at, each given once in this process. Others start their search
/// elsewhere in the range.
pub fn free<const N: usize>() -> [u16; N] {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    std::array::from_fn(|_| {
        let found = (0..COUNT).find_map(|_| {
            let offset = std::process::id().wrapping_mul(97) % COUNT;
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let port = (FIRST + (offset + number) % COUNT) as u16;
            TcpListener::bind((Ipv4Addr::LOCALHOST, port))
                .is_ok()
                .then_some(port)
        });
        found.expect("a free port")
    })
}
