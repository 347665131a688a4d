//! The replica's side: what `node/src/replica` does with a request, its disk, and what a crash leaves of both.

use crate::config::{Config, Mutant};
use crate::state::*;

/// What taking a request led to.
pub enum Taken {
    /// It can't be taken now: it waits.
    Waits,
    /// It was refused, or its effect is all there is.
    Gone,
    /// The disk has it.
    Begun,
    /// Answered, with this for a read.
    Answered(u8),
    /// A copy is on its way to the target.
    Sent(Msg),
    /// The attach is there: the epoch that was stored before.
    Attached(u8),
    Listed {
        dirty: bool,
        suspect: bool,
    },
}

/// What is at the disk of this replica.
pub fn disk_writes(wire: &Wire, slot: usize) -> impl Iterator<Item = u8> {
    wire.all().iter().filter(move |m| m.slot as usize == slot && m.stage == Stage::Begun).filter_map(|m| match m.what {
        What::Write { value, .. } | What::Copy { value, .. } => Some(value),
        _ => None,
    })
}

fn at_disk(wire: &Wire, slot: usize, pred: impl Fn(&What) -> bool) -> bool {
    wire.all().iter().any(|m| m.slot as usize == slot && m.stage == Stage::Begun && pred(&m.what))
}

impl Replica {
    /// A value lands in the drive's cache.
    fn land(&mut self, value: u8, durable: bool) {
        self.value = value;
        if durable {
            self.maybe = 1 << value;
            if self.flushing.is_some() {
                self.flushing = Some(value);
            }
        } else {
            self.maybe |= 1 << value;
        }
        if self.flushing.is_some() {
            self.since |= 1 << value;
        }
    }

    /// `ReplicaCore::check_attach`, `check_copy`
    fn accepts(&self, cfg: &Config, attach: AttachId) -> bool {
        self.current == attach || cfg.mutant == Some(Mutant::NoAttachCheck) && attach <= self.newest
    }

    /// The replica reads a request.
    pub fn take(&mut self, cfg: &Config, wire: &Wire, msg: &Msg) -> Taken {
        let slot = msg.slot as usize;
        if msg.what == What::Attach {
            return self.attach(cfg, wire, slot, msg.attach);
        }
        // `CopyTo` is the source's; of a copy on its way, the target checks the attach when it arrives.
        if !self.accepts(cfg, msg.attach) {
            return Taken::Gone;
        }
        match msg.what {
            What::Attach => unreachable!("taken above"),
            What::List => Taken::Listed { dirty: self.dirty, suspect: self.suspect },
            What::Hash | What::Read => Taken::Answered(self.value),
            What::Write { .. } | What::Copy { .. } => {
                if at_disk(wire, slot, |w| matches!(w, What::Clean { .. })) {
                    // The pass that clears the bit is on its way: the next one sets it again (R5).
                    return Taken::Waits;
                }
                if cfg.mutant != Some(Mutant::DirtyAfterData) {
                    (self.dirty, self.dirty_disk) = (true, true);
                }
                Taken::Begun
            }
            What::Flush(no) => {
                if self.flushing.is_some() {
                    return Taken::Waits;
                }
                self.begun = if cfg.cleans() { self.begun.max(no) } else { 0 };
                (self.flushing, self.since) = (Some(self.value), 0);
                Taken::Begun
            }
            What::CopyTo { target, target_attach } => {
                let what = What::Copy { value: self.value, source: msg.slot, source_attach: msg.attach.0 };
                let attach = AttachId(target_attach);
                Taken::Sent(Msg { slot: target, attach, what, stage: Stage::Sent })
            }
            What::Clean { no, flush } => {
                if no < self.clean {
                    return Taken::Gone;
                }
                let changing = disk_writes(wire, slot).next().is_some();
                let covered = flush > 0 && flush <= self.completed;
                let unchanged = !changing && self.change.is_none_or(|change| change < flush);
                self.clean = no;
                if (covered && unchanged) || cfg.mutant == Some(Mutant::CleanAsBoolean) {
                    // Whether the disk says so yet is known when the pass has ended.
                    (self.dirty, self.suspect, self.whole) = (false, false, true);
                }
                Taken::Begun
            }
            What::Settle { flush } => {
                if flush <= self.completed || !cfg.cleans() {
                    self.suspect = false;
                    self.whole = true;
                }
                Taken::Gone
            }
            What::StoreSet { version, clean } => {
                if version < self.version {
                    return Taken::Gone;
                }
                self.version = version;
                self.clean = self.clean.max(clean);
                self.clean_disk = self.clean;
                self.kept_epoch = self.epoch;
                self.told = true;
                Taken::Answered(0)
            }
            What::MarkDirty => {
                (self.dirty, self.dirty_disk) = (true, true);
                Taken::Answered(0)
            }
        }
    }

    /// `take_attach`, `continue_attach`, `attach_stored`. What comes under older attaches is refused from the moment
    /// that this one is known; what the disk has already is awaited.
    fn attach(&mut self, cfg: &Config, wire: &Wire, slot: usize, id: AttachId) -> Taken {
        if id < self.newest || id <= self.current {
            return Taken::Gone;
        }
        (self.newest, self.current) = (id, AttachId::NONE);
        if at_disk(wire, slot, |_| true) && cfg.mutant != Some(Mutant::AttachWithoutDrain) {
            return Taken::Waits;
        }
        let stored = self.epoch;
        self.epoch = self.epoch.max(id.epoch());
        self.current = id;
        self.change = None;
        (self.begun, self.completed) = (0, 0);
        Taken::Attached(stored)
    }

    /// The disk has done it.
    pub fn finish(&mut self, cfg: &Config, msg: &Msg) {
        // Changes are counted under the attach that they began under.
        let own = msg.attach == self.current;
        match msg.what {
            What::Write { value, fua } => self.changed(cfg, value, fua, own),
            What::Copy { value, .. } => self.changed(cfg, value, false, own),
            What::Flush(no) => {
                let flushed = self.flushing.take().expect("it runs");
                self.maybe = 1 << flushed | self.since;
                self.since = 0;
                if own && cfg.cleans() {
                    self.completed = self.completed.max(no);
                }
            }
            What::Clean { .. } => {
                self.dirty_disk = self.dirty;
                self.clean_disk = self.clean;
            }
            other => unreachable!("{other:?} is not the disk's"),
        }
    }

    fn changed(&mut self, cfg: &Config, value: u8, fua: bool, own: bool) {
        self.land(value, fua);
        if own && cfg.cleans() {
            self.change = Some(self.begun);
        }
        if cfg.mutant == Some(Mutant::DirtyAfterData) {
            (self.dirty, self.dirty_disk) = (true, true);
        }
    }

    /// What its disk may hold after a power cut.
    pub fn after_cut(&self, wire: &Wire, slot: usize) -> u16 {
        disk_writes(wire, slot).fold(self.maybe | 1 << self.value, |all, value| all | 1 << value)
    }

    /// A process begins on what is there.
    fn restart(&mut self) {
        (self.since, self.flushing) = (0, None);
        self.newest = AttachId::new(self.epoch, 0);
        self.current = AttachId::NONE;
        self.told = false;
        self.suspect = self.dirty;
        self.change = None;
        (self.begun, self.completed) = (0, 0);
    }

    /// Power is cut: the disk is left with this value, and with what it says of a clean that was being written.
    pub fn cut(&mut self, cfg: &Config, value: u8, dirty: bool, clean: u8) {
        let whole = self.whole;
        self.lose(value, dirty, clean);
        match cfg.mutant {
            Some(Mutant::KeptAfterCut) => self.kept = whole,
            Some(Mutant::WholeAfterCut) => self.whole = whole,
            _ => {}
        }
    }

    /// A sync fails: what was not durable may be gone from the cache, and the machine does not restart.
    pub fn fault(&mut self, cfg: &Config, value: u8) {
        let whole = self.whole;
        self.lose(value, self.dirty_disk, self.clean_disk);
        if cfg.mutant == Some(Mutant::KeptAfterFault) {
            (self.kept, self.whole) = (whole, whole);
        }
    }

    fn lose(&mut self, value: u8, dirty: bool, clean: u8) {
        self.cut |= value != self.value;
        self.value = value;
        self.maybe = 1 << value;
        (self.dirty, self.dirty_disk) = (dirty, dirty);
        (self.clean, self.clean_disk) = (clean, clean);
        self.whole = !dirty;
        self.kept = false;
        self.restart();
    }

    /// The process is killed: the cache outlives it. Its successor waits for what was given to the disk (R1).
    pub fn kill(&mut self, landed: &[u8]) {
        for value in landed {
            self.land(*value, false);
        }
        self.dirty = self.dirty_disk;
        self.clean = self.clean_disk;
        self.kept = self.whole;
        self.restart();
    }

    /// An older image of the disk is brought back, by somebody who does not know better.
    pub fn restore(&mut self, image: &Image) {
        self.lose(image.value, image.dirty, image.clean);
        (self.epoch, self.kept_epoch, self.version) = (image.epoch, image.kept_epoch, image.version);
        self.imaged = true;
        self.whole = false;
        self.restart();
    }
}
