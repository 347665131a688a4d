//! What is measured: targets, and what a round on one gave.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::Serialize;

use super::figures::{Counts, Figures, Point, Recorder};
use super::pids::Reading;
use crate::failure::{Failure, Outcome};

/// A LUN behind a portal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Portal {
    /// As it was given.
    pub url: String,
    /// Where to connect.
    pub addr: SocketAddr,
    /// TargetName.
    pub target: String,
    /// LUN.
    pub lun: u8,
}

impl Portal {
    /// `iscsi://HOST:PORT/IQN/LUN`.
    ///
    /// # Errors
    /// What is not one, or a host without an address.
    pub fn parse(url: &str) -> Outcome<Self> {
        let bad = |what: &str| {
            Failure::usage(format!("--url {url}: {what}"))
                .next("write iscsi://HOST:PORT/IQN/LUN, as `cluster show-volume` prints it")
        };
        let rest = url.strip_prefix("iscsi://").ok_or_else(|| bad("it does not begin with iscsi://"))?;
        let mut parts = rest.split('/');
        let (Some(host), Some(target), Some(lun), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad("it is not a host, a target and a LUN"));
        };
        if host.contains('@') {
            return Err(bad("names and passwords (CHAP) are not supported"));
        }
        let lun = lun.parse().map_err(|_| bad("its LUN is no number from 0 to 255"))?;
        let with_port = match host.rsplit_once(':') {
            Some((_, port)) if port.parse::<u16>().is_ok() => host.to_owned(),
            _ => format!("{host}:3260"),
        };
        let addr = with_port.to_socket_addrs().ok().and_then(|mut all| all.next());
        let addr = addr.ok_or_else(|| bad(&format!("{host} has no address")))?;
        if target.is_empty() {
            return Err(bad("it names no target"));
        }
        Ok(Self { url: url.to_owned(), addr, target: target.to_owned(), lun })
    }
}

/// A round: one shape on one target, once.
#[derive(Clone, Debug, Serialize)]
pub struct Round {
    /// How long it was.
    pub seconds: f64,
    /// Figures.
    #[serde(flatten)]
    pub figures: Figures,
    /// Counts.
    #[serde(flatten)]
    pub counts: Counts,
    /// Over time.
    pub series: Vec<Point>,
}

impl Round {
    /// What was recorded until now, at a cost of so many seconds of processor time.
    pub fn new(recorder: Recorder, ended: Instant, load_seconds: f64) -> Self {
        let (mut figures, counts, series, seconds) = recorder.finish(ended);
        figures.load_us_per_io = load_seconds * 1e6 / counts.requests.max(1) as f64;
        Self { seconds, figures, counts, series }
    }

    /// Adds what the target's processes took for it.
    pub fn processes(&mut self, before: &Reading, after: &Reading) {
        let cpu = after.since(before).as_secs_f64();
        self.figures.target_us_per_io = Some(cpu * 1e6 / self.counts.requests.max(1) as f64);
        self.figures.target_s_per_gib = Some(cpu / (self.counts.bytes.max(1) as f64 / (1u64 << 30) as f64));
        self.figures.target_resident_bytes = Some(after.resident_bytes as f64);
    }

    /// Whether everything that was asked was answered well.
    pub fn is_clean(&self) -> bool {
        self.counts.errors == 0 && self.counts.unanswered == 0
    }
}

/// Locks; a panic elsewhere is somebody else's to tell.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_a_portal_a_target_and_a_lun() {
        let portal = Portal::parse("iscsi://127.0.0.1:3261/iqn.2026-11.io.md99:tank/1").unwrap();
        assert_eq!((portal.addr.port(), portal.lun), (3261, 1));
        assert_eq!(portal.target, "iqn.2026-11.io.md99:tank");
        assert_eq!(Portal::parse("iscsi://127.0.0.1/iqn.x:y/0").unwrap().addr.port(), 3260);
        for (url, why) in [
            ("127.0.0.1/iqn.x:y/0", "begin with iscsi://"),
            ("iscsi://127.0.0.1/iqn.x:y", "a host, a target and a LUN"),
            ("iscsi://127.0.0.1/iqn.x:y/0/1", "a host, a target and a LUN"),
            ("iscsi://127.0.0.1/iqn.x:y/256", "LUN"),
            ("iscsi://127.0.0.1//0", "no target"),
            ("iscsi://a%b@127.0.0.1/iqn.x:y/0", "CHAP"),
        ] {
            let failure = Portal::parse(url).unwrap_err();
            assert!(failure.to_string().contains(why) && failure.status() == 2, "{url}: {failure}");
        }
    }
}
