//! Options of every connection that carries block data.

use std::io;
use std::os::fd::AsFd;

use rustix::net::sockopt;

/// How a connection's sender finds its speed, where the kernel has it. Servers and gateways share a fast network:
/// BBR, which some systems choose for the sake of the internet, paces with timers there, for a fifth of all the
/// processor time that a transfer takes. CUBIC is what Linux chooses by itself.
const CONGESTION: &str = "cubic";

/// Sends at once (no Nagle), and by [`CONGESTION`].
///
/// # Errors
/// The system's. A kernel that lacks the algorithm, or keeps it for others, is no error.
pub fn tune(socket: impl AsFd) -> io::Result<()> {
    sockopt::set_tcp_nodelay(&socket, true)?;
    // Without it the connection works all the same.
    let _ = sockopt::set_tcp_congestion(&socket, CONGESTION);
    Ok(())
}
