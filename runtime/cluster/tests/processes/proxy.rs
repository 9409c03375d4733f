//! A TCP proxy that can swallow everything, as a partition does: connections stay open and silent.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Default)]
struct Valves {
    towards_server: AtomicBool,
    towards_client: AtomicBool,
}

pub struct Proxy {
    address: SocketAddr,
    valves: Arc<Valves>,
}

impl Proxy {
    /// Forwards connections to `server`.
    pub fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let valves = Arc::new(Valves::default());
        let shared = valves.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(upstream) = TcpStream::connect(server) else {
                    continue;
                };
                let (from, to) = (client.try_clone().unwrap(), upstream.try_clone().unwrap());
                let valves = shared.clone();
                std::thread::spawn(move || forward(from, to, &valves.towards_server));
                let valves = shared.clone();
                std::thread::spawn(move || forward(upstream, client, &valves.towards_client));
            }
        });
        Self { address, valves }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Swallows what goes in both directions.
    pub fn block(&self, blocked: bool) {
        self.valves.towards_client.store(blocked, Ordering::SeqCst);
        self.block_towards_server(blocked);
    }

    /// Swallows what the dialing side sends.
    pub fn block_towards_server(&self, blocked: bool) {
        self.valves.towards_server.store(blocked, Ordering::SeqCst);
    }
}

/// A connection that lost bytes cannot go on, so it stays swallowed even when the valve opens again. The end of a
/// stream is swallowed too while the valve is shut.
fn forward(mut from: TcpStream, mut to: TcpStream, blocked: &AtomicBool) {
    let mut buffer = [0; 16 << 10];
    let mut lost = false;
    loop {
        let read = from.read(&mut buffer).unwrap_or(0);
        lost |= blocked.load(Ordering::SeqCst);
        if read == 0 {
            if !blocked.load(Ordering::SeqCst) {
                let _ = to.shutdown(Shutdown::Both);
            }
            return;
        }
        if !lost && to.write_all(&buffer[..read]).is_err() {
            return;
        }
    }
}
