//! What a mirror could do at best without any protocol: one sender, and sinks behind loopback TCP, each a process that
//! writes every message to a file and answers 16 bytes. No checksums, no order, no membership.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cli::bench::figures::Recorder;
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

/// Bytes of an answer.
const ANSWER: usize = 16;
/// Bytes of a sink's file; it is written round and round.
const FILE: u64 = 256 << 20;
/// The same on a disk.
const FILE_SYNC: u64 = 64 << 20;
/// Before anything is measured it is written once in such pieces.
const FILL: usize = 1 << 20;
/// A sink that hears nothing for so long ends.
const SILENCE: Duration = Duration::from_secs(60);
/// Its first argument makes a process a sink.
pub const SINK: &str = "sink";

/// How much is sent at once.
#[derive(Clone, Debug)]
pub struct Fanout {
    /// Where the sinks' files are.
    pub dir: PathBuf,
    /// Sinks.
    pub sinks: usize,
    /// Bytes of a message.
    pub bytes: usize,
    /// Messages under way.
    pub depth: usize,
    /// Each message is on the disk before it is answered.
    pub sync: bool,
    /// For how long.
    pub time: Duration,
}

fn cpu() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

/// A process that ends with this value.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends to sinks that are started for it; returns the figures as JSON.
///
/// # Errors
/// When a sink cannot be started, or ends.
pub fn send(how: &Fanout) -> anyhow::Result<serde_json::Value> {
    let program = std::env::current_exe()?;
    let mut sinks = Vec::new();
    for number in 0..how.sinks {
        let path = how.dir.join(format!("sink-{number}-{}", std::process::id()));
        let child = Command::new(&program)
            .arg(SINK)
            .arg(&path)
            .arg(how.bytes.to_string())
            .arg(how.sync.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a sink")?;
        let mut child = Ends(child);
        let mut said = BufReader::new(child.0.stdout.take().expect("it is a pipe"));
        let mut port = String::new();
        said.read_line(&mut port)?;
        let port: u16 = port.trim().parse().context("a sink did not say its port")?;
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE))?;
        sinks.push((stream, said, child));
    }
    let message = vec![7u8; how.bytes];
    let mut answer = [0u8; ANSWER];
    let mut recorder = Recorder::new(Duration::from_millis(250));
    let mut begun = std::collections::VecDeque::with_capacity(how.depth);
    let (before, began) = (cpu(), Instant::now());
    loop {
        let more = began.elapsed() < how.time;
        while more && begun.len() < how.depth {
            begun.push_back(Instant::now());
            for (stream, _, _) in &mut sinks {
                stream.write_all(&message)?;
            }
        }
        let Some(since) = begun.pop_front() else { break };
        for (stream, _, _) in &mut sinks {
            stream.read_exact(&mut answer).context("a sink ended")?;
        }
        let now = Instant::now();
        recorder.answered(now, now - since, how.bytes as u64, false);
    }
    let sender = cpu() - before;
    let (figures, counts, _, _) = recorder.finish(Instant::now());
    let mut taken = 0.0;
    for (stream, mut said, mut child) in sinks {
        drop(stream);
        let mut line = String::new();
        said.read_line(&mut line)?;
        taken += line.trim().parse::<f64>().context("a sink did not say what it took")?;
        ensure!(child.0.wait()?.success(), "a sink failed");
    }
    let each = 1e6 / counts.requests.max(1) as f64;
    Ok(json!({
        "iops": figures.iops,
        "mb_per_s": figures.mb_per_s,
        "p50_us": figures.p50_us,
        "p99_us": figures.p99_us,
        "p999_us": figures.p999_us,
        "max_us": figures.max_us,
        "sender_us_per_op": sender * each,
        "sinks_us_per_op": taken * each,
    }))
}

/// A sink: says its port, serves one sender, says what processor time that took.
///
/// # Errors
/// When the file or the connection fails.
pub fn sink(path: &Path, bytes: usize, sync: bool) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    // Nobody else needs its name, and it goes with this process.
    std::fs::remove_file(path)?;
    // The space is there before, and was touched, as it is for whatever this is compared with.
    let size = if sync { FILE_SYNC } else { FILE };
    let piece = vec![3u8; FILL];
    for at in (0..size).step_by(FILL) {
        file.write_all_at(&piece, at).context("no space for a sink's file")?;
    }
    if sync {
        file.sync_all()?;
    }
    println!("{}", listener.local_addr()?.port());
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    let mut message = vec![0u8; bytes];
    let mut at = 0;
    let before = cpu();
    while stream.read_exact(&mut message).is_ok() {
        file.write_all_at(&message, at)?;
        if sync {
            file.sync_data()?;
        }
        at += bytes as u64;
        at = if at + bytes as u64 > size { 0 } else { at };
        stream.write_all(&[1; ANSWER])?;
    }
    println!("{}", cpu() - before);
    Ok(())
}
