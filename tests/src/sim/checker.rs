//! Who found that something is wrong.

macro_rules! checkers {
    ($($name:ident: $about:literal;)*) => {
        /// One of the checks of a run.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Checker {
            $(#[doc = concat!($about, ".")] $name,)*
        }

        impl Checker {
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// What it asks for.
            pub fn about(self) -> &'static str {
                match self { $(Self::$name => $about,)* }
            }
        }
    };
}

checkers! {
    Register: "each sector's answers are those of one register: no read goes back, none misses an acknowledged write, \
        what was aborted never happened, and what was flushed, or read, survives the loss of every cache";
    Fenced: "R1: nothing is done under an attach that is older than one that was answered";
    Drained: "R1: when an attach is answered nothing older is with the disk";
    Epochs: "R1: epochs rise, and none is given out twice";
    Acknowledged: "R2: an acknowledged write is on every member of the committed set";
    SetVersions: "R2: a set is never empty, changes with its version, and is not proposed if it makes no sense";
    ReplyUnderLease: "R3: no answer without a lease";
    Leases: "R3: no older lease lives when a newer session counts on its end";
    Answered: "R4: every request is answered once, and before its session is closed";
    DirtyFirst: "R5: nothing changes a region on a disk before its dirty bit is durable there";
    CleanMeansEqual: "R6: where replicas differ the region is dirty on one of them; once everything has healed none do";
    Entered: "R7: a replica that enters the set has what was acknowledged, and has it durably if it was flushed";
    MetadataOld: "R8: the metadata are taken for old only if they are";
    Durable: "R9: what a flush covered, what was written durably, what the last member has, and what was acknowledged \
        when a member left, is on the medium";
    PowerOn: "R9: a session that had settled never says that what it acknowledged was lost";
    NobodyWrote: "R10: nothing is read that nobody wrote";
    Medium: "R10: a medium error only where no member may have the block";
    Allocated: "R10: what the map on the medium says is allocated has its data there";
    Bounds: "R11: requests, copies, connections, messages and logs are bounded";
    Waits: "R12: no request waits for ever once everything has healed";
    Files: "R12: a replica's files are made for a volume that is there, and can be opened";
    DirtyLeft: "no region is dirty once everything has healed";
    MembersAgree: "members that have applied the same hold the same";
    Raft: "no member must stop, and none sends what cannot be";
    Assertion: "the code's own assertions hold";
}
