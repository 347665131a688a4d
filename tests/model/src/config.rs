//! What is checked: bounds, and planted errors.

/// How often each thing may happen in a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    pub writes: u8,
    pub reads: u8,
    /// Flushes that initiators ask for.
    pub flushes: u8,
    pub cleans: u8,
    /// Power cuts: a replica restarts, and has lost what it had not flushed, in part.
    pub cuts: u8,
    /// Killed replicas: they restart, and have lost nothing.
    pub kills: u8,
    /// Attaches given up though the replica runs, and members that an opening could not reach: partitions.
    pub losses: u8,
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
    /// Members of the first set; the others have missed writes.
    pub members: u8,
    /// Answers to reads and writes may be late; otherwise they are heard when they are made.
    pub late: bool,
    /// Committed sets are stored by their members in no time.
    pub store_at_once: bool,
    /// A flush is over as soon as it has begun: nothing lands meanwhile.
    pub flush_at_once: bool,
    /// The gateway keeps what no flush has covered, and writes it again (R9).
    pub replay: bool,
    /// Sometimes-properties that this configuration must reach.
    pub reaches: &'static [&'static str],
    pub mutant: Option<Mutant>,
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
    /// R1: answers under an attach that was given up count.
    BelieveOldAnswers,
    /// R2: a write that missed a member is acknowledged before raft has removed it.
    AckBeforeCommit,
    /// R2: raft commits a set that was proposed against an older version.
    StaleSetVersion,
    /// R2: raft commits a set of a session that another has superseded.
    StaleSession,
    /// R2: the survivors of a loss are not flushed before the set shrinks.
    NoSurvivorFlush,
    /// R2: acknowledgements do not wait until the shrunken set is stored.
    AckBeforeStored,
    /// R2: while a change is in doubt only the old set is asked for.
    IgnoreDoubt,
    /// R2, R9: a member that left and is back counts while its removal is not committed.
    ReturnedMemberCounts,
    /// R3: a read is answered after the lease has ended.
    ReplyAfterLease,
    /// R3: the lease is looked at when a read is asked for, not when it is answered.
    LeaseLookedAtBeforehand,
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
    /// R6: the gateway cleans what no flush has covered.
    CleanWithoutFlush,
    /// R6: the next clean begins before this one is durable everywhere.
    CleansOverlap,
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
    /// R7: the base is any member, restarted or not.
    AnyBase,
    /// R7: after a take-over a region is served before the flush.
    ServeBeforeFlush,
    /// R8: restarted members are kept though an intact one is there.
    KeepRestarted,
    /// R8: a take-over that reached restarted members only goes on without the others.
    GoOnWithRestarted,
    /// R9: the last member's writes are not durable when they are acknowledged.
    LastMemberWithoutFua,
}

const NONE: Bounds = Bounds {
    writes: 0,
    reads: 0,
    flushes: 0,
    cleans: 0,
    cuts: 0,
    kills: 0,
    losses: 0,
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
    members: 0b111,
    late: false,
    store_at_once: true,
    flush_at_once: true,
    replay: false,
    reaches: &[],
    mutant: None,
};

/// The configurations that are checked exhaustively.
pub const CONFIGS: &[Config] = &[
    Config {
        name: "A",
        about: "one gateway: writes, a loss or a power cut, the way back",
        bounds: Bounds { writes: 2, flushes: 1, cuts: 1, ..NONE },
        ..BASE
    },
];

/// The configuration of that name.
pub fn config(name: &str) -> Option<Config> {
    CONFIGS.iter().find(|c| c.name.eq_ignore_ascii_case(name)).copied()
}
