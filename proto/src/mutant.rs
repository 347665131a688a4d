//! Faults planted in the shipping code, to see that the simulation finds them.
//!
//! A plant is a word in a condition: `if drained || mutant::is(Mutant::AttachWithoutDrain)`. Without the feature
//! `mutants`, which nothing but the crate `tests` turns on, and only when it is asked to, [`is`] is `false` when the
//! code is compiled, and nothing of a plant is left. With it, one fault at a time is planted in a thread.

macro_rules! mutants {
    ($($name:ident: $rule:literal, $at:literal, $about:literal;)*) => {
        /// A fault: the rule that it breaks, and how.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Mutant {
            $(#[doc = concat!($rule, ", in `", $at, "`: ", $about, ".")] $name,)*
        }

        impl Mutant {
            /// All of them, rule by rule.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The rule that it breaks, or `raft`.
            pub fn rule(self) -> &'static str {
                match self { $(Self::$name => $rule,)* }
            }

            /// Where it is planted.
            pub fn at(self) -> &'static str {
                match self { $(Self::$name => $at,)* }
            }

            /// What goes wrong.
            pub fn about(self) -> &'static str {
                match self { $(Self::$name => $about,)* }
            }
        }
    };
}

mutants! {
    SkipAttachCheck: "R1", "replica/attach", "a replica takes requests of an attach that is over";
    SkipCopyCheck: "R1", "replica/attach", "a replica takes copies that were ordered under an attach that is over";
    AttachWithoutDrain: "R1", "replica/attach", "an attach is answered while older writes are with the disk";
    EpochNotStored: "R1", "replica/attach", "an attach is answered without its epoch on the disk";
    EpochReused: "R1", "metadata/state", "a gateway that comes back gets the epoch that it had";
    AckBeforeCommit: "R2", "mirror/foreground", "a write is acknowledged before its lost member's removal is committed";
    IgnoreDoubt: "R2", "mirror/membership", "an addition that raft has not decided counts for nothing";
    RefusalCountsAsDone: "R2", "mirror/foreground", "a member whose disk refused a write counts as having it";
    SetKeepsVersion: "R2", "metadata/state", "a set changes, and its version does not";
    StaleSetChange: "R2", "metadata/state", "a set is changed by an old session, from a version that is over";
    RemovedUnflushed: "R2", "mirror/membership", "a removal is proposed before those that stay have flushed";
    ForgottenRead: "R2", "mirror/foreground", "a read that was out at a member when it was lost is not sent to another";
    ReplyAfterLease: "R3", "volume/session", "answers are passed on when the lease is over";
    GrantNotNoted: "R3", "control/core", "the leader does not note a lease that it is about to grant";
    NewLeaderForgets: "R3", "control/lease", "a new leader takes it that nobody before it has granted anything";
    TakeOverInLease: "R3", "mirror/take_over", "a new owner does not wait for the older lease to end";
    ServedWithoutOne: "R3", "mirror/take_over", "regions are served while a member that lacks them may still be a base";
    ReadJoining: "R3", "mirror/foreground", "a joining replica is read";
    WritesShareLocks: "R4", "mirror/foreground", "writes take shared locks";
    UnlockEarly: "R4", "mirror/foreground", "a write's lock goes when it is acknowledged, though a joining replica is still at it";
    EqualiseWithoutLock: "R4", "mirror/equalise", "a region is equalised without its lock";
    AbortAtOnce: "R4", "volume/session", "an abort is answered at once, whatever becomes of the request";
    ReleasedTwice: "R4", "mirror/foreground", "a read's lock is given back twice";
    DirtyWithoutSync: "R5", "replica/dirty_log", "a region is changed when its dirty bit is written but not synced";
    CleanAsBoolean: "R6", "mirror/clean, replica/dirty_log", "a dirty bit is cleared whatever the flush number says";
    CleanWithoutAll: "R6", "mirror/clean", "bits are cleared while a replica is out of the set";
    CleanUnsettled: "R6", "mirror/clean", "bits are cleared before what a take-over found dirty is settled";
    ClearUnannounced: "R6", "mirror/clean", "a clean clears what the one before it did not announce";
    TrustOldImage: "R6", "mirror/take_over, mirror/join", "a replica with old files counts as one that has only restarted";
    EqualisedStaysDirty: "R6", "mirror/equalise", "a region that was equalised counts as being changed for ever";
    CompareSums: "R7", "replica/repair", "replicas compare their stored sums, not what is on their disks";
    ListBeforeBarrier: "R7", "mirror/join", "dirty regions are asked for while writes are out that a joining replica was not sent";
    JoinBeforeItCounts: "R7", "mirror/join", "a joining replica is proposed while writes are acknowledged without it";
    JoinWithoutFlush: "R7", "mirror/join", "a joining replica is proposed before it is flushed";
    JoinIgnoresItsOwn: "R7", "mirror/join", "only what is dirty on members is equalised, not what is on the joining replica";
    KeepTargetOfLateCopy: "R7", "mirror/equalise", "a replica to which a copy may still come keeps its attach";
    ServeUnsettled: "R8", "mirror/take_over", "regions that a take-over found dirty are served as they are";
    KeepRestarted: "R8", "mirror/state", "members that restarted are kept as if they had not";
    GoOnWithRestarted: "R8", "mirror/take_over", "where only restarted members are reached the others are not waited for";
    ReleaseToOlder: "R8", "mirror/take_over", "replicas that left before a member restarted count as knowing what it has lost";
    LostBaseForgotten: "R8", "mirror/take_over", "regions go on without those that they waited for when these are lost again";
    AccountedUnseen: "R8", "replica/dirty_log", "what became suspect after a session had looked counts as accounted for";
    StoreSetEarly: "R8", "mirror/membership", "members store a set that raft has not committed";
    SilentLoss: "R8", "mirror/take_over", "the loss of every cache is not told";
    FlushAtOnce: "R9", "replica/flush", "a flush is answered before anything has been synced for it";
    FuaIgnored: "R9", "replica/io", "a durable write is answered like any other";
    ReplayNothing: "R9", "mirror/take_over", "what was kept is not written again";
    ReplayNotBelieved: "R9", "mirror/replay", "a session that keeps all that it acknowledged says that it was lost";
    KeptTooShort: "R9", "mirror/replay", "a write is let go when one member has flushed it";
    LastMemberCaches: "R9", "mirror/foreground", "the last member's writes are not durable when they are acknowledged";
    SumsUnchecked: "R10", "replica/io, mirror/foreground", "nobody compares what was read with its sums";
    AllocatedAhead: "R10", "replica/flush", "an allocation goes to the disk along with its data";
    DistrustedTaken: "R10", "replica/repair", "a block that was taken over as bad may be taken for right";
    TornMapIsAllBad: "R10", "replica/layout", "a page of the map that is bad in part is bad as a whole";
    BadMapReadsAsZeroes: "R10", "replica/map", "blocks under a bad page of the map read as zeroes";
    FirstBadCopyIsAll: "R10", "mirror/foreground", "a block that is bad on one member is an error, whatever the others have";
    LogNeverCut: "R11", "raft/core", "the log is never cut";
    MadeUpRead: "R12", "mirror/foreground", "where no member is to be had, a read returns zeroes";
    ActOnOldNews: "R12", "control/core", "a node makes what its log says before it knows that this still holds";
    SendBeforePersist: "raft", "raft/core", "votes and acknowledgements are sent before they are on the disk";
    SnapshotForgets: "raft", "metadata/snapshot", "a machine made from a snapshot does not know what was answered";
}

/// Whether this fault is planted. Never, in what is shipped.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn is(_: Mutant) -> bool {
    false
}

#[cfg(feature = "mutants")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Whether this fault is planted in this thread.
#[cfg(feature = "mutants")]
pub fn is(mutant: Mutant) -> bool {
    PLANTED.get() == Some(mutant)
}

/// Plants a fault in this thread in place of the one that was there, or none.
#[cfg(feature = "mutants")]
pub fn plant(mutant: Option<Mutant>) {
    PLANTED.set(mutant);
}
