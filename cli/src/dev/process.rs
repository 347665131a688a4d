//! Processes that outlive the command that started them, found again by their pid file. A pid alone may be a
//! stranger's by now: the file also holds when the process began, and in which boot of the machine.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::config::write_whole;
use crate::failure::{Failure, Outcome};

/// Between two looks at a process that is to end.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Names one process of this machine, ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its pid.
    pub pid: i32,
    /// When it began, in clock ticks after the boot.
    pub started_ticks: u64,
    /// Which boot.
    pub boot: String,
}

/// What a process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It runs.
    Running,
    /// It was stopped by a signal.
    Stopped,
    /// It is not there.
    Down,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Down => "down",
        })
    }
}

struct Stat {
    state: char,
    started_ticks: u64,
}

/// `/proc/PID/stat`; the name in parentheses may hold anything.
fn stat(pid: i32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_whitespace().collect();
    Some(Stat { state: fields.first()?.chars().next()?, started_ticks: fields.get(19)?.parse().ok()? })
}

fn boot() -> Outcome<String> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = std::fs::read_to_string(path).map_err(|error| Failure::path(path, "cannot read", error))?;
    Ok(text.trim().to_owned())
}

/// Whether all threads of a process have ended, though its parent may not have noticed.
fn has_ended(pid: i32) -> bool {
    let process = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let Some(process) = process else { return true };
    let mut ended = [PollFd::new(&process, PollFlags::IN)];
    matches!(poll(&mut ended, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1))
}

impl Identity {
    /// The identity of a process that was just started by us.
    ///
    /// # Errors
    /// When `/proc` cannot be read or the process has ended already.
    pub fn of(pid: i32) -> Outcome<Self> {
        let stat = stat(pid).ok_or_else(|| Failure::new(format!("process {pid} ended at once")))?;
        Ok(Self { pid, started_ticks: stat.started_ticks, boot: boot()? })
    }

    /// Reads a pid file; `None` where there is none, or one that is not whole.
    pub fn load(path: &Path) -> Option<Self> {
        serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()
    }

    /// Writes a pid file.
    ///
    /// # Errors
    /// When the file system says no.
    pub fn save(&self, path: &Path) -> Outcome {
        write_whole(path, &serde_json::to_string(self).expect("plain values"))
    }

    /// What it is doing now.
    pub fn state(&self) -> State {
        if boot().ok().as_ref() != Some(&self.boot) {
            return State::Down;
        }
        match stat(self.pid) {
            Some(stat) if stat.started_ticks == self.started_ticks => match stat.state {
                // Its first thread has ended; others may still hold its sockets and locks.
                'Z' | 'X' | 'x' if has_ended(self.pid) => State::Down,
                'T' | 't' => State::Stopped,
                _ => State::Running,
            },
            _ => State::Down,
        }
    }

    /// Bytes of its memory that are resident; 0 when it is down.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        if self.state() == State::Down { 0 } else { kib.unwrap_or(0) << 10 }
    }

    /// Sends it a signal. Returns whether it was there: a stranger who has its pid by now gets nothing, since the
    /// descriptor is opened first and names one process only.
    ///
    /// # Errors
    /// When the system does not allow it.
    pub fn signal(&self, signal: Signal) -> Outcome<bool> {
        let failed = |error: rustix::io::Errno| Failure::new(format!("cannot signal process {}: {error}", self.pid));
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(false) };
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(process) => process,
            Err(rustix::io::Errno::SRCH) => return Ok(false),
            Err(error) => return Err(failed(error)),
        };
        if self.state() == State::Down {
            return Ok(false);
        }
        match pidfd_send_signal(&process, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    /// Waits until it is down; `false` when it is not after `patience`.
    pub fn wait_down(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        loop {
            if self.state() == State::Down {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// How to start a daemon.
pub struct Start<'a> {
    /// `node` or `gateway`.
    pub role: &'a str,
    /// Its configuration.
    pub config: &'a Path,
    /// What it says is appended here.
    pub log: &'a Path,
    /// Its pid file.
    pub pid_file: &'a Path,
}

/// Starts a daemon as a process of its own session, with this very executable.
///
/// # Errors
/// When it cannot be started.
pub fn start(how: &Start<'_>) -> Outcome<Identity> {
    let executable = executable()?;
    let failed = |error: std::io::Error| Failure::path(&executable, "cannot start a daemon", error);
    let log = File::options()
        .create(true)
        .append(true)
        .open(how.log)
        .map_err(|error| Failure::path(how.log, "cannot open", error))?;
    let mut child = Command::new(&executable)
        .arg(how.role)
        .arg("--config")
        .arg(how.config)
        .arg("--detached")
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log)
        .spawn()
        .map_err(failed)?;
    let identity = Identity::of(child.id() as i32)?;
    // Whoever starts it may live on (demo, tests): it must not be kept as a zombie.
    std::thread::spawn(move || child.wait());
    identity.save(how.pid_file)?;
    Ok(identity)
}

/// The one binary: this process's, also when the file was replaced since.
fn executable() -> Outcome<PathBuf> {
    std::env::current_exe().map_err(|error| Failure::new(format!("cannot find this program's own file: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_that_is_a_strangers_by_now_is_down_and_gets_no_signal() {
        let mut own = Identity::of(std::process::id() as i32).unwrap();
        assert_eq!(own.state(), State::Running);
        assert!(own.resident_bytes() > 0);
        own.started_ticks += 1;
        assert_eq!(own.state(), State::Down);
        assert!(!own.signal(Signal::KILL).unwrap(), "or this test would not go on");
        let rebooted = Identity { boot: "another".into(), ..Identity::of(std::process::id() as i32).unwrap() };
        assert_eq!(rebooted.state(), State::Down);
    }
}
