//! Gives a target its kept inputs, then changed ones, and keeps what went wrong.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::mutate::mutate;
use super::source::Seen;
use super::{Target, memory};
use crate::sim::rng::Rng;

/// An input that keeps a thread busy for so long, in seconds of this process's processor time, never ends: all of them
/// take milliseconds. Processor time, since the machine may be slow, or do something else.
const ENDLESS_S: i64 = 120;
/// Inputs that are kept in memory because they led to something new.
const MAX_POOL: usize = 4096;

/// When to end.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After so many changed inputs.
    Inputs(u64),
    /// After this time.
    Time(Duration),
}

/// What a run was.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    pub inputs: u64,
    /// Different things that inputs have led to.
    pub features: usize,
    /// Bytes that one input held at the most.
    pub most: usize,
}

/// An input that the target did not take as it should.
#[derive(Debug)]
pub struct Failure {
    pub why: String,
    pub file: PathBuf,
}

#[derive(Default)]
struct Now {
    input: Vec<u8>,
    /// When it began; `None`: between inputs.
    began_s: Option<i64>,
}

struct Slot {
    target: &'static str,
    seed: u64,
    now: Mutex<Now>,
}

thread_local! {
    static SLOT: RefCell<Option<Arc<Slot>>> = const { RefCell::new(None) };
}

impl Slot {
    fn now(&self) -> std::sync::MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the input down and says how to repeat it.
    fn save(&self, why: &str) -> PathBuf {
        let now = self.now();
        let dir = std::env::var_os("HOSTILE_OUT").map_or_else(std::env::temp_dir, PathBuf::from);
        let name = format!("hostile-{}-{:08x}", self.target, crc32fast::hash(&now.input));
        let file = dir.join(name);
        if let Err(error) = std::fs::write(&file, &now.input) {
            eprintln!("{}: {error}", file.display());
        }
        let (target, seed, path) = (self.target, self.seed, file.display());
        eprintln!(
            "hostile: target {target}, seed {seed}: {why}\n  input: {path}\n  \
             again: cargo run --release -p tests --bin hostile -- --target {target} --replay {path}"
        );
        file
    }
}

/// For what can't be caught: the input is kept, and the process ends.
pub(super) fn give_up(why: &str) {
    let slot = SLOT.try_with(|slot| slot.try_borrow().ok().and_then(|slot| slot.clone()));
    if let Ok(Some(slot)) = slot {
        slot.save(why);
        let _ = std::io::stderr().flush();
        std::process::exit(101);
    }
}

fn processor_s() -> i64 {
    rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime).tv_sec
}

fn watch(slot: Weak<Slot>) {
    while let Some(slot) = slot.upgrade() {
        let began = slot.now().began_s;
        if began.is_some_and(|began| processor_s() - began > ENDLESS_S) {
            slot.save("it does not end");
            std::process::exit(101);
        }
        drop(slot);
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Where a target's inputs are kept.
pub fn corpus_dir(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target.name)
}

/// The kept inputs, by name, and those that the target makes itself.
pub fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(corpus_dir(target)).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    let kept = files.iter().map(|file| std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display())));
    let mut inputs: Vec<Vec<u8>> = kept.collect();
    inputs.extend((target.seeds)());
    inputs
}

/// Gives an input to a target.
///
/// # Panics
/// When the target does, or holds more memory than it may.
pub fn check(target: &Target, input: &[u8]) -> (Seen, usize) {
    let mut seen = Seen::default();
    let before = memory::begin();
    (target.run)(input, &mut seen);
    let most = memory::most_above(before);
    assert!(most <= target.memory, "{most} bytes were held, at most {} are allowed", target.memory);
    (seen, most)
}

struct Driver {
    target: &'static Target,
    slot: Arc<Slot>,
    features: BTreeSet<u64>,
    inputs: u64,
    most: usize,
}

impl Driver {
    /// Whether the input led to something new.
    fn give(&mut self, input: &[u8]) -> Result<bool, Failure> {
        {
            let mut now = self.slot.now();
            now.input.clear();
            now.input.extend_from_slice(input);
            now.began_s = Some(processor_s());
        }
        let checked = catch_unwind(AssertUnwindSafe(|| check(self.target, input)));
        self.slot.now().began_s = None;
        self.inputs += 1;
        match checked {
            Ok((seen, most)) => {
                self.most = self.most.max(most);
                let before = self.features.len();
                self.features.extend(seen.into_features());
                Ok(self.features.len() > before)
            }
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let why = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                let why = why.unwrap_or_else(|| "a panic".into());
                let file = self.slot.save(&why);
                Err(Failure { why, file })
            }
        }
    }
}

/// Gives a target its kept inputs, and changed ones until it is enough. The same seed gives the same inputs.
///
/// # Errors
/// The first input that went wrong.
pub fn drive(target: &'static Target, until: Until, seed: u64) -> Result<Report, Failure> {
    let slot = Arc::new(Slot { target: target.name, seed, now: Mutex::default() });
    SLOT.set(Some(slot.clone()));
    let watched = Arc::downgrade(&slot);
    std::thread::spawn(move || watch(watched));
    let mut driver = Driver { target, slot, features: BTreeSet::new(), inputs: 0, most: 0 };
    let mut pool = corpus(target);
    for input in &pool {
        driver.give(input)?;
    }
    let kept = driver.inputs;
    let mut rng = Rng::new(seed);
    let began = Instant::now();
    loop {
        let enough = match until {
            Until::Inputs(inputs) => driver.inputs - kept >= inputs,
            Until::Time(time) => began.elapsed() >= time,
        };
        if enough || pool.is_empty() {
            break;
        }
        let pick = |rng: &mut Rng| rng.below(pool.len() as u64) as usize;
        let (base, other) = (pick(&mut rng), pick(&mut rng));
        let mut input = pool[base].clone();
        mutate(&mut rng, &mut input, &pool[other], target.words, target.records);
        if driver.give(&input)? && pool.len() < MAX_POOL {
            pool.push(input);
        }
    }
    SLOT.set(None);
    Ok(Report { inputs: driver.inputs, features: driver.features.len(), most: driver.most })
}

/// Gives one file to a target.
///
/// # Errors
/// What went wrong.
pub fn replay(target: &'static Target, file: &Path) -> Result<Report, Failure> {
    let input = match std::fs::read(file) {
        Ok(input) => input,
        Err(error) => return Err(Failure { why: error.to_string(), file: file.into() }),
    };
    let slot = Arc::new(Slot { target: target.name, seed: 0, now: Mutex::default() });
    SLOT.set(Some(slot.clone()));
    let mut driver = Driver { target, slot, features: BTreeSet::new(), inputs: 0, most: 0 };
    driver.give(&input)?;
    SLOT.set(None);
    Ok(Report { inputs: 1, features: driver.features.len(), most: driver.most })
}
