//! What initiators asked and were told, and whether one disk could have told them that.
//!
//! Every write carries a number of its own, in every sector; zeroes are number 0. Each sector is then a register:
//! the checker asks whether the answered requests on it can be put into one order that agrees with time (Gibbons
//! and Korach, *Testing shared memories*, 1997: with unique values it is enough to compare each value's *zone*, from
//! the first moment at which it must have been there to the last). A write that was not answered may have happened
//! or not, at any time after it was asked for.
//!
//! At each POWER ON (R8) the disk may go back: what was acknowledged and not flushed may be lost, once. The history
//! is cut there, and the next piece begins with any one value that a flush has not made impossible (R9). It is the
//! caller who says whether a POWER ON excuses anything: not where all that happened is that processes were killed,
//! since the page cache and the allocation journals keep everything then; and with R9's replay buffer only where the
//! session that acknowledged has ended (see `Setup::replay`). Each mirror of a volume loses its caches by itself.

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes, BytesMut};

/// Bytes in a sector: what an initiator writes at least.
pub const SECTOR: usize = 512;
/// Sectors in a block.
pub const BLOCK_SECTORS: u64 = 8;

/// A sector's value: the number of the write that wrote it; 0: zeroes.
pub type Value = u32;

/// What an initiator asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Read,
    Write,
    Zero,
    Flush,
}

/// What it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Nothing, or that it failed: it may have happened in part, or not.
    Nothing,
    Done,
    /// It never happened.
    Aborted,
}

#[derive(Clone, Debug)]
struct Record {
    asked: Asked,
    first: u64,
    count: u64,
    durable: bool,
    at: u64,
    told_at: Option<u64>,
    told: Told,
    /// When its session ended without an answer to it.
    given_up: Option<u64>,
    /// A read's values.
    values: Vec<Value>,
}

/// What was not flushed may be lost.
#[derive(Clone, Copy, Debug)]
struct PowerOn {
    at: u64,
    /// When initiators were told: no flush after that covers what was written before it.
    said: u64,
    /// Of the volume.
    mirror: usize,
}

/// A run's requests. Moments are numbers that rise with every entry.
#[derive(Debug, Default)]
pub struct History {
    records: Vec<Record>,
    power_ons: Vec<PowerOn>,
    moment: u64,
    /// Distinguishes this volume's bytes from another's that lay on the same space.
    salt: u64,
    /// Blocks of which nothing is claimed any more, and since when.
    given_up: BTreeMap<u64, u64>,
}

fn fill_of(value: u64, sector: u64, salt: u64) -> u64 {
    value.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sector ^ salt << 48
}

/// The bytes of `count` sectors from `first` as the write with this number writes them.
pub fn bytes_of(value: Value, first: u64, count: u64, salt: u64) -> Bytes {
    let mut out = BytesMut::with_capacity(count as usize * SECTOR);
    for sector in first..first + count {
        out.put_u64_le(value.into());
        out.put_u64_le(sector);
        let fill = fill_of(value.into(), sector, salt);
        for _ in 2..SECTOR / 8 {
            out.put_u64_le(fill);
        }
    }
    out.freeze()
}

/// The values of the sectors from `first`.
///
/// # Errors
/// Names a sector that holds what nobody wrote there.
pub fn values_of(first: u64, data: &[u8], salt: u64) -> Result<Vec<Value>, (u64, String)> {
    let word = |bytes: &[u8], i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
    let mut values = Vec::with_capacity(data.len() / SECTOR);
    for (i, bytes) in data.chunks(SECTOR).enumerate() {
        let sector = first + i as u64;
        let value = word(bytes, 0);
        let good = match value {
            0 => bytes.iter().all(|b| *b == 0),
            v => {
                let fill = fill_of(v, sector, salt);
                let filled = || bytes[16..].as_chunks().0.iter().all(|b| u64::from_le_bytes(*b) == fill);
                value <= Value::MAX.into() && word(bytes, 1) == sector && filled()
            }
        };
        if !good {
            return Err((sector, format!("sector {sector} holds {value} as if it were of sector {}", word(bytes, 1))));
        }
        values.push(value as Value);
    }
    Ok(values)
}

impl History {
    /// A volume's, which has this number among those of the run.
    pub fn new(salt: u64) -> Self {
        Self { salt, ..Self::default() }
    }

    /// See [`bytes_of`].
    pub fn salt(&self) -> u64 {
        self.salt
    }

    /// Every copy of this block was damaged at once: nothing is claimed of it from here on.
    pub fn give_up_block(&mut self, block: u64) {
        let now = self.now();
        self.given_up.entry(block).or_insert(now);
    }

    /// Whether nothing is claimed of a block.
    pub fn is_given_up(&self, block: u64) -> bool {
        self.given_up.contains_key(&block)
    }

    /// Blocks of which nothing is claimed.
    pub fn given_up(&self) -> usize {
        self.given_up.len()
    }

    fn now(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    /// A request over sectors is asked for; returns its number, which is its value if it writes.
    pub fn ask(&mut self, asked: Asked, first: u64, count: u64, durable: bool) -> Value {
        let at = self.now();
        let values = Vec::new();
        let (told_at, told, given_up) = (None, Told::Nothing, None);
        self.records.push(Record { asked, first, count, durable, at, told_at, told, given_up, values });
        self.records.len() as Value
    }

    /// It was answered.
    pub fn tell(&mut self, number: Value, told: Told, values: Vec<Value>) {
        let now = self.now();
        let record = &mut self.records[number as usize - 1];
        assert!(record.told_at.is_none(), "request {number} answered twice");
        (record.told_at, record.told, record.values) = (Some(now), told, values);
    }

    /// What the read that was asked for last returned.
    pub fn last_read(&self) -> &[Value] {
        let read = self.records.iter().rev().find(|r| r.asked == Asked::Read && r.told == Told::Done);
        read.map_or(&[], |r| &r.values)
    }

    /// It will never be answered: its session is over.
    pub fn give_up(&mut self, number: Value) {
        let now = self.now();
        self.records[number as usize - 1].given_up = Some(now);
    }

    /// POWER ON was announced for one mirror at the moment `said`, and may lose now what was not flushed there.
    pub fn power_on(&mut self, mirror: usize, said: u64) {
        let at = self.now();
        self.power_ons.push(PowerOn { at, said, mirror });
    }

    /// The next moment.
    pub fn moment(&mut self) -> u64 {
        self.now()
    }

    pub fn len(&self) -> usize {
        self.records.len()
    }

    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Everything that was asked of a sector, a line for each request: when, what, when and how it was answered.
    pub fn story(&self, sector: u64) -> Vec<(Value, String)> {
        let about = |record: &Record| (record.first..record.first + record.count).contains(&sector);
        let tell = |(i, r): (usize, &Record)| {
            let value = r.values.get((sector.saturating_sub(r.first)) as usize);
            let found = value.map_or(String::new(), |value| format!(" found {value}"));
            let told = match r.told_at {
                Some(at) => format!("{:?} at {at}", r.told),
                None => r.given_up.map_or("not answered".into(), |at| format!("given up at {at}")),
            };
            let (asked, first, end, at) = (r.asked, r.first, r.first + r.count, r.at);
            (i as Value + 1, format!("{:>6}: {asked:?} {first}..{end} asked at {at}, {told}{found}", i + 1))
        };
        self.records.iter().enumerate().filter(|(_, record)| about(record)).map(tell).collect()
    }

    /// The first sector that could not have been so.
    pub fn wrong_sector(&self, sectors: u64) -> Option<u64> {
        let why = self.check(sectors, |_| 0).err()?;
        why.strip_prefix("sector ")?.split(' ').next()?.parse().ok()
    }

    /// Checks every sector; `mirror` says where one lies.
    ///
    /// # Errors
    /// Says which sector could not have been so, and why.
    pub fn check(&self, sectors: u64, mirror: impl Fn(u64) -> usize) -> Result<(), String> {
        let mut of_sector: Vec<Vec<u32>> = vec![Vec::new(); sectors as usize];
        for (i, record) in self.records.iter().enumerate().filter(|(_, r)| r.told != Told::Aborted) {
            if record.asked == Asked::Read && record.told != Told::Done {
                continue;
            }
            for sector in record.first..record.first + record.count {
                of_sector[sector as usize].push(i as u32);
            }
        }
        let flushes: Vec<&Record> =
            self.records.iter().filter(|r| r.asked == Asked::Flush && r.told == Told::Done).collect();
        for (sector, entries) in of_sector.iter().enumerate() {
            let sector = sector as u64;
            // The sectors of a block most often share their history.
            if !sector.is_multiple_of(BLOCK_SECTORS)
                && self.same(sector - 1, &of_sector[sector as usize - 1], sector, entries)
            {
                continue;
            }
            if self.is_given_up(sector / BLOCK_SECTORS) {
                continue;
            }
            let mirror = mirror(sector);
            let register = Register { history: self, sector, mirror, entries, flushes: &flushes };
            register.check().map_err(|why| format!("sector {sector} (block {}): {why}", sector / BLOCK_SECTORS))?;
        }
        Ok(())
    }

    fn value_read(&self, record: usize, sector: u64) -> Value {
        let r = &self.records[record];
        r.values[(sector - r.first) as usize]
    }

    fn same(&self, a: u64, of_a: &[u32], b: u64, of_b: &[u32]) -> bool {
        of_a == of_b
            && of_a.iter().all(|i| {
                let i = *i as usize;
                self.records[i].asked != Asked::Read || self.value_read(i, a) == self.value_read(i, b)
            })
    }
}

/// A value that may be there when a piece of the history begins.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    value: Value,
    /// When the write was answered; otherwise it may come to pass at any time.
    done: Option<u64>,
}

/// A write and the reads that returned it.
#[derive(Clone, Copy, Debug)]
struct Cluster {
    value: Value,
    /// The write began.
    begun: u64,
    /// It had ended, if it was answered.
    ended: Option<u64>,
    /// The first moment at which the value must have been there.
    first: Option<u64>,
    /// The last moment at which something that needs it began.
    last: u64,
    was_read: bool,
}

impl Cluster {
    fn new(value: Value, begun: u64, ended: Option<u64>) -> Self {
        Self { value, begun, ended, first: ended, last: begun, was_read: false }
    }
    fn read(&mut self, begun: u64, ended: u64) {
        self.first = Some(self.first.map_or(ended, |f| f.min(ended)));
        self.last = self.last.max(begun);
        self.was_read = true;
    }
}

struct Register<'a> {
    history: &'a History,
    sector: u64,
    mirror: usize,
    entries: &'a [u32],
    flushes: &'a [&'a Record],
}

impl Register<'_> {
    fn check(&self) -> Result<(), String> {
        let mut candidates = vec![Candidate { value: 0, done: Some(0) }];
        let mut from = 0;
        let here = self.history.power_ons.iter().filter(|p| p.mirror == self.mirror);
        for (to, said) in here.map(|p| (p.at, p.said)).chain([(u64::MAX, u64::MAX)]) {
            candidates = self.check_piece(from, to, said, candidates)?;
            from = to;
        }
        Ok(())
    }

    fn writes_value(&self, entry: usize) -> Value {
        if self.history.records[entry].asked == Asked::Zero { 0 } else { entry as Value + 1 }
    }

    /// Checks what was answered between two moments; returns what may be there afterwards if caches are lost then, of
    /// which initiators were told at `said`.
    fn check_piece(&self, from: u64, to: u64, said: u64, candidates: Vec<Candidate>) -> Result<Vec<Candidate>, String> {
        let records = &self.history.records;
        let mut clusters: Vec<Cluster> =
            candidates.iter().map(|c| Cluster::new(c.value, from, c.done.map(|_| from))).collect();
        let old = clusters.len();
        let mut durable: Vec<u64> = Vec::new();
        let done_at = |r: &Record| r.told_at.filter(|_| r.told == Told::Done);
        for i in self.entries.iter().map(|i| *i as usize).filter(|i| records[*i].asked != Asked::Read) {
            let r = &records[i];
            let done = done_at(r);
            // Before its session was over it was tried again after the caches were lost (R8).
            let over = r.given_up.or(r.told_at).is_some_and(|at| at <= from);
            if r.at > to || done.is_some_and(|at| at <= from) || (done.is_none() && over) {
                continue;
            }
            let begun = r.at.max(from);
            let ended = done.filter(|at| *at < to);
            if let Some(ended) = ended {
                let counts = |told: u64| told < to && (told < said || ended >= said);
                let flushed = |f: &&&Record| ended < f.at && f.told_at.is_some_and(counts);
                if r.durable || self.flushes.iter().any(|f| flushed(&f)) {
                    // Where it began before the piece it may be older than what was there then.
                    durable.push(r.at);
                }
            }
            clusters.push(Cluster::new(self.writes_value(i), begun, ended));
        }
        // A request that was under way when the piece began stands in it for itself, later in the list.
        let by_value: BTreeMap<Value, usize> =
            clusters.iter().enumerate().filter(|(_, c)| c.value != 0).map(|(i, c)| (c.value, i)).collect();
        let zeroes: Vec<usize> = (0..clusters.len()).filter(|i| clusters[*i].value == 0).collect();
        for i in self.entries.iter().map(|i| *i as usize).filter(|i| records[*i].asked == Asked::Read) {
            let ended = records[i].told_at.expect("answered");
            if ended <= from || ended > to {
                continue;
            }
            let begun = records[i].at;
            let value = self.history.value_read(i, self.sector);
            if begun < from && self.could_be_read(value, begun, from) {
                // It saw its value before the loss, or after it; nothing follows from it.
                continue;
            }
            let begun = begun.max(from);
            let at = if value == 0 {
                let could = |c: &Cluster| {
                    let gone = |o: &Cluster| c.ended.is_some_and(|e| e < o.begun) && o.ended.is_some_and(|e| e < begun);
                    c.begun < ended && !clusters.iter().any(gone)
                };
                let mut possible = zeroes.iter().copied().filter(|z| could(&clusters[*z]));
                match (possible.next(), possible.next()) {
                    (None, _) => return Err(format!("read {} returned zeroes, which were overwritten", i + 1)),
                    (Some(only), None) => only,
                    // Whose zeroes they were can't be told.
                    _ => continue,
                }
            } else {
                *by_value.get(&value).ok_or_else(|| self.describe_lost(i, value))?
            };
            if clusters[at].begun >= ended {
                return Err(format!("read {} returned {value} before it was written", i + 1));
            }
            clusters[at].read(begun, ended);
        }
        self.check_zones(&clusters)?;
        let established = from > 0 && clusters[..old].iter().any(|c| c.was_read);
        let done = |i: usize, c: &Cluster| if i < old { candidates[i].done } else { c.ended };
        let next = clusters.iter().enumerate().filter(|(i, c)| {
            let replaced = done(*i, c).is_some_and(|done| durable.iter().any(|d| done < *d));
            !replaced && (*i >= old || !established || c.was_read)
        });
        Ok(next.map(|(i, c)| Candidate { value: c.value, done: done(i, c) }).collect())
    }

    /// Whether a read that was asked for at `asked`, before the loss at `loss`, may have seen this value before that.
    fn could_be_read(&self, value: Value, asked: u64, loss: u64) -> bool {
        let records = self.entries.iter().map(|i| (*i as usize, &self.history.records[*i as usize]));
        let writes: Vec<_> = records.filter(|(_, r)| r.asked != Asked::Read).collect();
        let done_at = |r: &Record| r.told_at.filter(|_| r.told == Told::Done);
        let replaced = |done: u64| {
            // A loss in between may have brought it back.
            let here = |mirror: usize| mirror == self.mirror;
            let lost = self.history.power_ons.iter().any(|p| here(p.mirror) && (done..asked).contains(&p.at));
            !lost && writes.iter().any(|(_, o)| done < o.at && done_at(o).is_some_and(|at| at < asked))
        };
        let written = writes.iter().filter(|(i, r)| self.writes_value(*i) == value && r.at < loss);
        let mut ends = written.map(|(_, r)| done_at(r)).chain((value == 0).then_some(Some(0)));
        ends.any(|done| done.is_none_or(|done| !replaced(done)))
    }

    fn describe_lost(&self, read: usize, value: Value) -> String {
        let why = match self.history.records.get(value as usize - 1) {
            Some(w) if w.told == Told::Aborted => "was aborted",
            Some(w) if w.told == Told::Done => "a flushed write, or a loss, had replaced",
            _ => "could not be there",
        };
        format!("read {} returned {value}, which {why}", read + 1)
    }

    fn check_zones(&self, clusters: &[Cluster]) -> Result<(), String> {
        let zones = clusters.iter().filter_map(|c| c.first.map(|first| (first, c.last, c.value)));
        let (mut forward, backward): (Vec<_>, Vec<_>) = zones.partition(|(first, last, _)| first < last);
        forward.sort_unstable();
        let say = |a: Value, b: Value| format!("{a} was there, then {b}, then {a} again, or a read went back in time");
        for pair in forward.windows(2) {
            if pair[1].0 < pair[0].1 {
                return Err(say(pair[0].2, pair[1].2));
            }
        }
        for (first, last, value) in backward {
            let at = forward.partition_point(|(f, _, _)| *f < last);
            if at > 0 && forward[at - 1].1 > first {
                return Err(say(forward[at - 1].2, value));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Story(History);

    impl Story {
        fn new() -> Self {
            Self(History::default())
        }
        fn write(&mut self) -> Value {
            self.0.ask(Asked::Write, 0, 1, false)
        }
        fn wrote(&mut self) -> Value {
            let value = self.write();
            self.done(value);
            value
        }
        fn done(&mut self, value: Value) {
            self.0.tell(value, Told::Done, Vec::new());
        }
        fn flushed(&mut self) {
            let flush = self.0.ask(Asked::Flush, 0, 0, false);
            self.done(flush);
        }
        fn read(&mut self, value: Value) {
            let read = self.0.ask(Asked::Read, 0, 1, false);
            self.0.tell(read, Told::Done, vec![value]);
        }
        fn power_on(&mut self) {
            let said = self.0.moment();
            self.0.power_on(0, said);
        }
        fn holds(&self) -> bool {
            self.0.check(1, |_| 0).is_ok()
        }
    }

    #[test]
    fn a_read_returns_the_last_write() {
        let mut s = Story::new();
        let a = s.wrote();
        s.read(a);
        let b = s.wrote();
        s.read(b);
        assert!(s.holds());
        s.read(a);
        assert!(!s.holds());
    }

    #[test]
    fn an_unanswered_write_may_appear_but_not_vanish() {
        let mut s = Story::new();
        let a = s.wrote();
        let b = s.write();
        s.read(a);
        s.read(b);
        assert!(s.holds());
        s.read(a);
        assert!(!s.holds());
    }

    #[test]
    fn an_acknowledged_write_that_nobody_read_still_counts() {
        let mut s = Story::new();
        let a = s.wrote();
        s.wrote();
        s.read(a);
        assert!(!s.holds());
    }

    #[test]
    fn only_power_on_takes_unflushed_writes_and_no_flushed_ones() {
        let mut s = Story::new();
        let a = s.wrote();
        s.flushed();
        let b = s.wrote();
        s.power_on();
        s.read(a);
        s.read(a);
        assert!(s.holds());
        s.read(b);
        assert!(!s.holds(), "one value only");

        let mut s = Story::new();
        let a = s.wrote();
        s.wrote();
        s.flushed();
        s.power_on();
        s.read(a);
        assert!(!s.holds());
    }

    #[test]
    fn a_flush_covers_nothing_of_before_a_power_on_that_was_told() {
        for told in [false, true] {
            let mut s = Story::new();
            let a = s.wrote();
            s.flushed();
            s.wrote();
            let said = if told { s.0.moment() } else { u64::MAX };
            s.flushed();
            s.0.power_on(0, said);
            s.read(a);
            assert_eq!(s.holds(), told);
        }
    }

    #[test]
    fn a_read_under_way_at_a_loss_may_have_seen_what_was_there_before() {
        let mut s = Story::new();
        let a = s.wrote();
        let old = s.wrote();
        let [read, wrong] = [0; 2].map(|_| s.0.ask(Asked::Read, 0, 1, false));
        s.wrote();
        s.flushed();
        s.power_on();
        s.0.tell(read, Told::Done, vec![old]);
        assert!(s.holds());
        s.0.tell(wrong, Told::Done, vec![a]);
        assert!(!s.holds(), "it was replaced before the read was asked for");
    }

    #[test]
    fn a_durable_write_under_way_at_a_loss_may_be_older_than_what_was_there_then() {
        for begun_before in [true, false] {
            let mut s = Story::new();
            let durable = |s: &mut Story| s.0.ask(Asked::Write, 0, 1, true);
            let early = if begun_before { durable(&mut s) } else { 0 };
            let b = s.wrote();
            s.power_on();
            s.read(b);
            let a = if begun_before { early } else { durable(&mut s) };
            s.done(a);
            s.power_on();
            s.read(b);
            assert_eq!(s.holds(), begun_before);
        }
    }

    #[test]
    fn zeroes_are_a_value_like_others() {
        let mut s = Story::new();
        s.read(0);
        let a = s.wrote();
        s.read(a);
        assert!(s.holds());
        s.read(0);
        assert!(!s.holds());
    }

    #[test]
    fn an_aborted_write_never_shows() {
        let mut s = Story::new();
        let a = s.write();
        s.0.tell(a, Told::Aborted, Vec::new());
        s.read(0);
        assert!(s.holds());
        s.read(a);
        assert!(!s.holds());
    }
}
