//! What is checked: bounds, and planted errors.

use crate::check::names;
use crate::state::Mask;

/// How often each thing may happen in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bounds {
    pub writes: u8,
    /// Writes that are to be durable when they are acknowledged.
    pub fuas: u8,
    pub reads: u8,
    /// Flushes that initiators ask for.
    pub flushes: u8,
    /// Flushes that an owner begins because it has kept something for long.
    pub overdue: u8,
    pub cleans: u8,
    /// Power cuts: a replica restarts, and has lost what it had not flushed, in part.
    pub cuts: u8,
    /// Power cuts of all replicas at once.
    pub all_cuts: u8,
    /// Power cuts while no gateway runs.
    pub blackouts: u8,
    /// Killed replicas: they restart, and have lost nothing.
    pub kills: u8,
    /// Flushes that a disk fails.
    pub faults: u8,
    /// Attaches given up though the replica runs: a partition, or a time-out.
    pub losses: u8,
    /// Members that an opening can't reach.
    pub unreached: u8,
    pub deaths: u8,
    /// Sessions opened after the first.
    pub opens: u8,
    pub closes: u8,
    /// Answers to a commit that are lost, so that the second asking finds the set changed.
    pub lost_answers: u8,
    /// Replicas that come back with an older image of their disk.
    pub images: u8,
}

/// A configuration to be checked.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub name: &'static str,
    pub about: &'static str,
    pub bounds: Bounds,
    /// The first so many of the replicas exist.
    pub replicas: usize,
    /// Members of the first set; the others have missed writes.
    pub members: u8,
    /// Answers to reads and writes may be late; otherwise they are heard when they are made.
    pub late: bool,
    /// Committed sets are stored by their members in no time.
    pub store_at_once: bool,
    /// A flush is over as soon as it has begun: nothing lands meanwhile.
    pub flush_at_once: bool,
    /// How many cleans an image must have missed before it is brought back; those that only announce one count.
    pub image_cleans: u8,
    /// Sometimes-properties that this configuration must reach.
    pub reaches: &'static [&'static str],
    pub mutant: Option<Mutant>,
}

impl Config {
    /// Whether anything is ever cleaned. If not, nobody keeps the books for it.
    pub fn cleans(&self) -> bool {
        self.bounds.cleans > 0 || self.bounds.closes > 0
    }

    /// The replicas of the definition.
    pub fn all(&self) -> Mask {
        (1 << self.replicas) - 1
    }
}

macro_rules! mutants {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// An error planted in the protocol.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Mutant {
            $($(#[doc = $doc])+ $name,)+
        }
        impl Mutant {
            pub const ALL: &[Self] = &[$(Self::$name),+];
            pub fn about(self) -> &'static str {
                match self {
                    $(Self::$name => concat!($($doc),+).trim_ascii(),)+
                }
            }
        }
    };
}

mutants! {
    /// R1: a replica carries out what comes under an older attach.
    NoAttachCheck,
    /// R1: an attach is answered while the disk still has writes of an older one.
    AttachWithoutDrain,
    /// R2: a write that missed a member is acknowledged before raft has removed it.
    AckBeforeCommit,
    /// R2: a session goes on with the set it knew, though raft says that another is committed.
    StaleSet,
    /// R2: raft commits a set of a session that another has superseded.
    StaleSession,
    /// R2: the survivors of a loss are not flushed before the set shrinks.
    NoSurvivorFlush,
    /// R2: while a change is in doubt only the old set is asked for.
    IgnoreDoubt,
    /// R2, R9: a member that left and is back counts while its removal is not committed.
    ReturnedMemberCounts,
    /// R2, R9: a replica that was lost after it was proposed, and is back, counts before it is flushed again.
    ReturnedCountsUnflushed,
    /// R3: a read is answered after the lease has ended.
    ReplyAfterLease,
    /// R3: a new owner that did not reach every member does not wait for the old lease.
    TakeOverUnderOldLease,
    /// R3: reads are served by joining replicas.
    ReadJoining,
    /// R4: the lock goes when a write is acknowledged, though a joining replica has not answered.
    UnlockEarly,
    /// R4, R7: equalising does not take the region's lock.
    EqualiseWithoutLock,
    /// R5: the dirty bit follows the data.
    DirtyAfterData,
    /// R6: a replica clears a dirty bit whatever has changed since the flush.
    CleanAsBoolean,
    /// R6: the gateway cleans though a replica of the definition is not in sync.
    CleanWithoutAll,
    /// R6: a clean clears what the one before it has not announced.
    ClearUnannounced,
    /// R6: an older image of a member is taken for the member.
    KeepOldImage,
    /// R7: a joining replica's region is listed while a write is out that it was not sent.
    NoBarrier,
    /// R7: a joining replica is proposed before it counts and is flushed.
    JoinWithoutCounting,
    /// R7: a joining replica counts, but is proposed before it is flushed.
    JoinWithoutFlush,
    /// R7: the target of a copy stays attached when the copy's source is lost.
    KeepTargetOfLostCopy,
    /// R7: a replica joins though no member is left to tell what it lacks, while a change is in doubt.
    JoinToNobody,
    /// R8: restarted members are kept though an intact one is there.
    KeepRestarted,
    /// R8: a take-over that reached restarted members only goes on without the others.
    GoOnWithRestarted,
    /// R9: the last member's writes are not durable when they are acknowledged.
    LastMemberWithoutFua,
    /// R8: a killed member that kept its cache counts as one that lost it.
    KilledIsLost,
    /// R8: what a power cut left may be the base where what a kill left is there.
    KilledRanksAsCut,
    /// R8: a replica says that it kept its cache although power was cut.
    KeptAfterCut,
    /// R8: a replica that lost its cache, and was killed before that was made good, says that it kept it.
    WholeAfterCut,
    /// R8: a replica says that it kept its cache although a sync has failed.
    KeptAfterFault,
    /// R9: a flush that was asked for before every cache was lost, and of which nothing was kept, goes on.
    FlushOutlivesLoss,
    /// R9: a new owner thinks that it keeps everything before what it found dirty is settled.
    CompleteTooEarly,
    /// R9: an acknowledged write is let go after a flush that had begun before.
    LetGoEarly,
    /// R9: it is let go while a member that is gone has not answered the flush.
    LetGoWithoutAll,
    /// R9: it is let go while a replica that is being added has not answered the flush.
    LetGoWithoutAdded,
    /// R9: durable writes are not kept, and older ones are written over them.
    DurableNotKept,
    /// R9: what is kept is written again in order, so that for a while older writes are over durable ones.
    ReplayInOrder,
    /// R9: what has been written again is let go before it is flushed.
    ReplayedIsDurable,
    /// R9: what has been written again is let go after a flush that had begun before.
    ReplayUnderOldFlush,
    /// R9: caches that are lost while it is written again end that.
    SecondLossForgets,
}

const NONE: Bounds = Bounds {
    writes: 0,
    fuas: 0,
    reads: 0,
    flushes: 0,
    overdue: 0,
    cleans: 0,
    cuts: 0,
    all_cuts: 0,
    blackouts: 0,
    kills: 0,
    faults: 0,
    losses: 0,
    unreached: 0,
    deaths: 0,
    opens: 0,
    closes: 0,
    lost_answers: 0,
    images: 0,
};

const BASE: Config = Config {
    name: "",
    about: "",
    bounds: NONE,
    replicas: 3,
    members: 0b111,
    late: false,
    store_at_once: true,
    flush_at_once: true,
    image_cleans: 0,
    reaches: &[],
    mutant: None,
};

/// The configurations that are checked exhaustively.
pub const CONFIGS: &[Config] = &[
    Config {
        name: "A",
        about: "one gateway: a write, an initiator's flush and two power cuts, down to the last member and back",
        bounds: Bounds { writes: 1, flushes: 1, cuts: 2, ..NONE },
        reaches: &[names::ACKED, names::SHRUNK, names::JOINED, names::ALONE],
        ..BASE
    },
    Config {
        name: "A2",
        about: "one gateway: two writes, a power cut, a partition, a commit whose answer is lost",
        bounds: Bounds { writes: 2, cuts: 1, losses: 1, ..NONE },
        reaches: &[names::COPIED, names::SHRUNK, names::JOINED],
        ..BASE
    },
    Config {
        name: "A3",
        about: "one gateway: a replica that missed a write comes back between a write, a read and a partition, and a commit's answer is lost",
        bounds: Bounds { writes: 1, reads: 1, losses: 1, lost_answers: 1, ..NONE },
        members: 0b011,
        late: true,
        reaches: &[names::READ_BACK, names::COPIED, names::JOINED, names::DOUBT],
        ..BASE
    },
    Config {
        name: "A4",
        about: "one gateway: a replica that missed a write comes back while two more are made",
        bounds: Bounds { writes: 2, cuts: 1, ..NONE },
        members: 0b011,
        reaches: &[names::COPIED, names::JOINED],
        ..BASE
    },
    Config {
        name: "B",
        about: "a second gateway opens while the first one lives, with late answers: leases and fences",
        bounds: Bounds { writes: 2, reads: 1, opens: 1, ..NONE },
        late: true,
        reaches: &[names::TAKEN_OVER, names::FENCED, names::READ_BACK],
        ..BASE
    },
    Config {
        name: "B4",
        about: "a second gateway opens while the first one lives, and can't reach a member that the first one can",
        bounds: Bounds { writes: 1, reads: 1, opens: 1, unreached: 1, ..NONE },
        late: true,
        reaches: &[names::TAKEN_OVER, names::FENCED, names::SHRUNK, names::READ_BACK],
        ..BASE
    },
    Config {
        name: "B5",
        about: "a second gateway opens while the first one adds a replica",
        bounds: Bounds { writes: 1, opens: 1, ..NONE },
        members: 0b011,
        reaches: &[names::TAKEN_OVER, names::JOINED],
        ..BASE
    },
    Config {
        name: "B2",
        about: "the gateway dies, then replicas lose power: who is kept, what waits, what may be lost",
        bounds: Bounds { writes: 1, flushes: 1, deaths: 1, opens: 1, blackouts: 3, ..NONE },
        reaches: &[names::TAKEN_OVER, names::RESTARTED, names::SOME_KEPT, names::JOINED],
        ..BASE
    },
    Config {
        name: "B3",
        about: "the same with members that can't be reached",
        bounds: Bounds { writes: 1, deaths: 1, opens: 1, blackouts: 2, unreached: 2, ..NONE },
        reaches: &[names::BLOCKED, names::RELEASED, names::RESTARTED],
        ..BASE
    },
    Config {
        name: "C",
        about: "dirty bits: a clean that races with a write and a power cut",
        bounds: Bounds { writes: 2, cleans: 1, cuts: 1, ..NONE },
        flush_at_once: false,
        reaches: &[names::CLEANED],
        ..BASE
    },
    Config {
        name: "C1",
        about: "a session closes, with a power cut",
        bounds: Bounds { writes: 1, cuts: 1, closes: 1, ..NONE },
        flush_at_once: false,
        reaches: &[names::CLEANED, names::CLEAN_CLOSE],
        ..BASE
    },
    Config {
        name: "C2",
        about: "a replica comes back with an older image of its disk, to the session that cleaned after it was taken",
        bounds: Bounds { writes: 1, cleans: 1, images: 1, ..NONE },
        image_cleans: 1,
        reaches: &[names::OLD_IMAGE, names::CLEANED],
        ..BASE
    },
    Config {
        name: "C3",
        about: "an older image, two cleans old, comes back to the next session",
        bounds: Bounds { writes: 2, cleans: 2, images: 1, deaths: 1, opens: 1, ..NONE },
        image_cleans: 4,
        reaches: &[names::OLD_IMAGE, names::CLEANED],
        ..BASE
    },
    Config {
        name: "C4",
        about: "an older image, of whatever age, comes back to the next session",
        bounds: Bounds { writes: 1, cleans: 1, images: 1, deaths: 1, opens: 1, ..NONE },
        image_cleans: 0,
        reaches: &[names::OLD_IMAGE, names::CLEANED],
        ..BASE
    },
    Config {
        name: "E",
        about: "replicas are killed, which loses nothing, or lose power, and the gateway dies",
        bounds: Bounds { writes: 1, deaths: 1, opens: 1, kills: 1, blackouts: 1, ..NONE },
        reaches: &[names::TAKEN_OVER, names::SOME_KEPT],
        ..BASE
    },
    Config {
        name: "R",
        about: "both replicas lose power while the owner lives, and again: what it keeps, and when it lets go of it",
        bounds: Bounds { writes: 2, overdue: 1, all_cuts: 2, ..NONE },
        replicas: 2,
        members: 0b011,
        reaches: &[names::REPLAYED, names::REPLAYED_AGAIN, names::LET_GO],
        ..BASE
    },
    Config {
        name: "R2",
        about: "one of them leaves or is out of reach, and then both lose power",
        bounds: Bounds { writes: 1, overdue: 1, losses: 1, unreached: 1, all_cuts: 1, ..NONE },
        replicas: 2,
        members: 0b011,
        reaches: &[names::REPLAYED, names::SHRUNK, names::LET_GO],
        ..BASE
    },
    Config {
        name: "R3",
        about: "the same, of a write that is durable when it is acknowledged, after one that is not",
        bounds: Bounds { writes: 1, fuas: 1, flushes: 1, all_cuts: 1, ..NONE },
        replicas: 2,
        members: 0b011,
        reaches: &[names::REPLAYED, names::LET_GO],
        ..BASE
    },
    Config {
        name: "R4",
        about: "all lose power while a replica is added and something is kept",
        bounds: Bounds { writes: 1, all_cuts: 1, ..NONE },
        members: 0b011,
        reaches: &[names::REPLAYED, names::JOINED, names::LET_GO],
        ..BASE
    },
    Config {
        name: "R5",
        about: "all lose power before a new owner has settled what it found dirty, with a flush out",
        bounds: Bounds { writes: 1, flushes: 1, all_cuts: 1, deaths: 1, opens: 1, ..NONE },
        replicas: 2,
        members: 0b011,
        reaches: &[names::RESTARTED, names::TAKEN_OVER],
        ..BASE
    },
    Config {
        name: "K",
        about: "a killed member, one that lost power, and one that can't be reached; then a new owner",
        bounds: Bounds { writes: 1, deaths: 1, opens: 1, kills: 1, blackouts: 1, unreached: 1, ..NONE },
        replicas: 2,
        members: 0b011,
        reaches: &[names::BLOCKED, names::RELEASED, names::SOME_KEPT, names::KILLED_ONLY],
        ..BASE
    },
    Config {
        name: "K2",
        about: "a failed flush and a kill, then a new owner",
        bounds: Bounds { writes: 1, flushes: 1, deaths: 1, opens: 1, kills: 1, faults: 1, ..NONE },
        replicas: 2,
        members: 0b011,
        reaches: &[names::RESTARTED],
        ..BASE
    },
    Config {
        name: "K3",
        about: "power cuts and a kill, then a new owner",
        bounds: Bounds { writes: 1, deaths: 1, opens: 1, kills: 1, blackouts: 2, ..NONE },
        replicas: 2,
        members: 0b011,
        reaches: &[names::KILLED_ONLY, names::RESTARTED],
        ..BASE
    },
];

/// The configuration of that name.
pub fn config(name: &str) -> Option<Config> {
    CONFIGS.iter().find(|c| c.name.eq_ignore_ascii_case(name)).copied()
}
