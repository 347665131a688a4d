//! The one clock of the client side: boot time, which goes on while the machine sleeps (R3).

/// Milliseconds of CLOCK_BOOTTIME.
pub fn now_ms() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(t.tv_sec).expect("boot time is positive") * 1_000 + t.tv_nsec as u64 / 1_000_000
}
