//! Where the processes of a dev cluster listen: loopback ports that are free now, and that no outgoing connection
//! of this machine takes while their process is down.

use std::net::{SocketAddr, TcpListener};

use crate::failure::{Failure, Outcome};
use crate::load::Rng;

/// The lowest port that is chosen by itself.
const LOWEST: u16 = 10_000;
/// Random tries for a run of free ports.
const TRIES: usize = 200;

/// Whether nobody listens there.
///
/// # Errors
/// When somebody does, or the address cannot be listened on: named with what it was for.
pub fn check_free(addr: SocketAddr, purpose: &str) -> Outcome {
    match TcpListener::bind(addr) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            Err(Failure::new(format!("port {} of {} is in use; it is needed for {purpose}", addr.port(), addr.ip()))
                .next("stop what listens there, or choose others with --base-port and --portal (0: any free ones)"))
        }
        Err(error) => Err(Failure::new(format!("cannot listen on {addr} for {purpose}: {error}"))),
    }
}

/// A run of `count` free loopback ports, outside the range that the system gives to outgoing connections.
///
/// # Errors
/// When none is found.
pub fn free_run(count: u16) -> Outcome<u16> {
    let highest = ephemeral_from().saturating_sub(count).max(LOWEST + 1);
    let seed = uuid::Uuid::new_v4().as_u64_pair().0;
    let mut rng = Rng::new(seed);
    for _ in 0..TRIES {
        let base = LOWEST + rng.below(u64::from(highest - LOWEST)) as u16;
        let free = |port| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if (base..base + count).all(free) {
            return Ok(base);
        }
    }
    Err(Failure::new(format!("no run of {count} free ports was found on 127.0.0.1")).next("name one with --base-port"))
}

/// The first port that the system may give to an outgoing connection.
fn ephemeral_from() -> u16 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    range.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(32_768)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_named_with_its_purpose() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = taken.local_addr().unwrap();
        let text = check_free(addr, "the data plane of node-1").unwrap_err().to_string();
        assert!(text.contains(&addr.port().to_string()) && text.contains("node-1"), "{text}");
    }

    #[test]
    fn a_run_of_ports_is_free() {
        let base = free_run(8).unwrap();
        let listeners: Vec<_> = (base..base + 8).map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap()).collect();
        assert_eq!(listeners.len(), 8);
    }
}
