//! Does the simulation find faults? Each of `proto::mutant` is planted, and seeds are run until the checker that is
//! meant for it finds it.
//!
//! A seed that fails for another reason is noted, and the next one is run. A seed counts only if the same run passes
//! without the fault. Seeds are those of every day, but for the classes of faults that some mutants want to be there; a
//! few have a story of their own.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use proto::mutant::{self, Mutant};

use super::checker::Checker;
use super::faults::Fault;
use super::run::{Failure, run_scenario, run_seed};
use super::world::{MS, Setup, World};

/// What is known of a mutant beforehand.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The checkers that follow from the rule which it breaks; one of them must find it.
    pub meant: &'static [Checker],
    /// What must go wrong in a run for it to show, besides what the seed says.
    pub wants: &'static [Fault],
    /// And nothing else does.
    pub only: bool,
    /// And it does so often.
    pub often: bool,
    /// This happens instead, where chance alone hardly ever brings it together.
    pub story: Option<fn(&mut World)>,
}

impl Plan {
    fn new(meant: &'static [Checker]) -> Self {
        Self { meant, wants: &[], only: false, often: false, story: None }
    }
    fn wants(self, wants: &'static [Fault]) -> Self {
        Self { wants, ..self }
    }
    fn only(self, wants: &'static [Fault]) -> Self {
        Self { wants, only: true, ..self }
    }
    fn often(self) -> Self {
        Self { often: true, ..self }
    }
    fn told(self, story: fn(&mut World)) -> Self {
        Self { story: Some(story), ..self }
    }
}

/// What is known of it.
pub fn plan(mutant: Mutant) -> Plan {
    use Checker::*;
    use Fault::*;
    /// Replicas hold different things, which is seen on their disks or by who reads.
    const DIFFER: &[Checker] = &[Register, CleanMeansEqual, Acknowledged, Entered];
    let plan = Plan::new;
    match mutant {
        Mutant::SkipAttachCheck => plan(&[Fenced]),
        Mutant::SkipCopyCheck => plan(&[Fenced]).wants(&[CutNodes]),
        Mutant::AttachWithoutDrain => plan(&[Drained]),
        Mutant::EpochNotStored => plan(&[Fenced]),
        Mutant::EpochReused => plan(&[Epochs]),
        Mutant::AckBeforeCommit => plan(&[Acknowledged]),
        Mutant::IgnoreDoubt => plan(&[Acknowledged]).wants(&[Reset, SyncFails]),
        Mutant::RefusalCountsAsDone => plan(&[Acknowledged]).wants(&[WriteErrors]),
        Mutant::SetKeepsVersion => plan(&[SetVersions]),
        Mutant::StaleSetChange => plan(&[SetVersions]).wants(&[TakeOver, Reset]),
        Mutant::RemovedUnflushed => plan(&[Durable]),
        Mutant::ForgottenRead => plan(&[Waits]).only(&[Reset, StopNode]),
        Mutant::ReplyAfterLease => plan(&[ReplyUnderLease]),
        Mutant::GrantNotNoted => plan(&[Leases]).wants(&[StopGateway]),
        Mutant::NewLeaderForgets => plan(&[Leases]).wants(&[StopGateway]),
        Mutant::TakeOverInLease => plan(&[Register]).only(&[Strand]),
        Mutant::ServedWithoutOne => plan(&[Register]).told(World::read_what_a_lost_member_lacks),
        Mutant::ReadJoining => plan(&[Register]),
        Mutant::WritesShareLocks => plan(DIFFER),
        Mutant::UnlockEarly => plan(DIFFER).only(&[Reset, SlowDisk]).often(),
        Mutant::EqualiseWithoutLock => plan(DIFFER),
        Mutant::AbortAtOnce => plan(&[Answered]),
        Mutant::ReleasedTwice => plan(&[Assertion]),
        Mutant::DirtyWithoutSync => plan(&[DirtyFirst]),
        Mutant::CleanAsBoolean => plan(&[CleanMeansEqual, DirtyFirst]).wants(&[Close]),
        Mutant::CleanWithoutAll => plan(&[CleanMeansEqual]),
        Mutant::CleanUnsettled => plan(&[CleanMeansEqual]).told(World::clean_while_it_settles),
        Mutant::ClearUnannounced => plan(DIFFER).only(&[OldImage, Close]),
        Mutant::TrustOldImage => plan(DIFFER).only(&[OldImage, Close]),
        Mutant::EqualisedStaysDirty => plan(&[DirtyLeft]),
        Mutant::CompareSums => plan(DIFFER).wants(&[PowerCut]),
        Mutant::ListBeforeBarrier => plan(&[Entered]).told(World::join_while_a_write_is_out),
        Mutant::JoinBeforeItCounts => plan(&[Entered]).told(World::join_under_writes),
        Mutant::JoinWithoutFlush => plan(&[Entered]),
        Mutant::JoinIgnoresItsOwn => plan(DIFFER).only(&[LoseFiles, Close]),
        Mutant::KeepTargetOfLateCopy => plan(DIFFER).only(&[CutNodes, Reset]).often(),
        Mutant::ServeUnsettled => plan(&[Register, Medium]).wants(&[TakeOver, PowerCut]),
        Mutant::KeepRestarted => plan(&[Register, Medium]).only(&[PowerCut, KillGateway, TakeOver]).often(),
        Mutant::GoOnWithRestarted => plan(&[Register]).only(&[Orphan]),
        Mutant::ReleaseToOlder => plan(&[Register]).told(|world| world.read_what_others_have_missed(true)),
        Mutant::LostBaseForgotten => plan(&[Register]).told(World::lose_those_that_were_waited_for),
        Mutant::AccountedUnseen => plan(&[Register]).told(|world| world.read_what_was_written_under_a_bad_page(true)),
        Mutant::StoreSetEarly => plan(&[MetadataOld]),
        Mutant::SilentLoss => plan(&[Register]).wants(&[PowerCutAll, TakeOver]),
        Mutant::FlushAtOnce => plan(&[Durable]),
        Mutant::FuaIgnored => plan(&[Durable]),
        Mutant::ReplayNothing => plan(&[Register]).wants(&[PowerCutAll]),
        Mutant::ReplayNotBelieved => plan(&[PowerOn]).wants(&[PowerCutAll]),
        Mutant::KeptTooShort => plan(&[Register, Entered]).only(&[PowerCutAll]).often(),
        Mutant::LastMemberCaches => plan(&[Durable]),
        Mutant::SumsUnchecked => plan(&[NobodyWrote]).wants(&[BitFlips]),
        Mutant::AllocatedAhead => plan(&[Allocated]),
        Mutant::DistrustedTaken => plan(&[Register, Durable]).told(World::read_what_was_taken_over_as_bad),
        Mutant::TornMapIsAllBad => plan(&[DirtyLeft, Medium]).told(World::tear_the_map_page_of_what_is_clean),
        Mutant::BadMapReadsAsZeroes => plan(&[Register]).only(&[PowerCut, PowerCutAll, KillGateway]).often(),
        Mutant::FirstBadCopyIsAll => plan(&[Medium]).wants(&[BitFlips]),
        Mutant::LogNeverCut => plan(&[Bounds]),
        Mutant::MadeUpRead => plan(&[Register]),
        Mutant::ActOnOldNews => plan(&[Files]).wants(&[Recreate, KillNode]),
        Mutant::SendBeforePersist => {
            plan(&[MembersAgree, Raft, Epochs, SetVersions, Leases]).wants(&[KillNode, KillWitness])
        }
        Mutant::SnapshotForgets => plan(&[MembersAgree]),
    }
}

/// How a mutant fared.
#[derive(Clone, Debug)]
pub struct Hunt {
    pub mutant: Mutant,
    /// The seed by which it was caught, and by whom.
    pub caught: Option<(u64, Checker)>,
    /// Checkers that it was not meant for and that found it before, and how often.
    pub others: BTreeMap<Checker, u64>,
    /// Seeds before that fail without it as well.
    pub unsound: Vec<u64>,
}

/// What a seed is for a mutant: the same world, in which at least the faults that it wants happen.
pub fn setup_for(mutant: Mutant, seed: u64, ops: u64) -> Setup {
    let plan = plan(mutant);
    if plan.story.is_some() {
        // Two pages of a replica's map.
        return Setup { blocks: 1600, ..Setup::quiet(seed) };
    }
    let mut setup = Setup::of_seed(seed, ops);
    if plan.only {
        setup.faults.clear();
    }
    if plan.often {
        setup.fault_every = 300 * MS;
    }
    for fault in plan.wants {
        if !setup.faults.contains(fault) {
            setup.faults.push(*fault);
        }
    }
    setup
}

/// How a seed ends with a mutant planted, where it ends well without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tried {
    Passes,
    Found(Checker),
    Unsound,
}

/// Runs a seed with a fault planted.
///
/// # Errors
/// What was found.
pub fn run_planted(mutant: Mutant, setup: Setup) -> Result<(), Box<Failure>> {
    mutant::plant(Some(mutant));
    let ran = run_healthy(mutant, setup);
    mutant::plant(None);
    ran
}

/// The same run without it.
///
/// # Errors
/// What was found.
pub fn run_healthy(mutant: Mutant, setup: Setup) -> Result<(), Box<Failure>> {
    match plan(mutant).story {
        Some(story) => run_scenario(setup, story).map(|_| ()),
        None => run_seed(setup).map(|_| ()),
    }
}

fn try_seed(mutant: Mutant, setup: &Setup) -> Tried {
    match run_planted(mutant, setup.clone()) {
        Ok(()) => Tried::Passes,
        Err(failure) => match run_healthy(mutant, setup.clone()) {
            Ok(()) => Tried::Found(failure.checker),
            Err(_) => Tried::Unsound,
        },
    }
}

/// Runs seeds, `most` of them from `from` on, until a meant checker finds the mutant. What comes of it does not depend
/// on the number of threads.
pub fn hunt(mutant: Mutant, from: u64, most: u64, ops: u64, threads: usize) -> Hunt {
    let meant = plan(mutant).meant;
    let (next, end) = (AtomicU64::new(from), AtomicU64::new(from + most));
    let tried = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end.load(Ordering::Relaxed) {
                        return;
                    }
                    let came = try_seed(mutant, &setup_for(mutant, seed, ops));
                    if matches!(came, Tried::Found(checker) if meant.contains(&checker)) {
                        // Those before it are still run to their end.
                        end.fetch_min(seed + 1, Ordering::Relaxed);
                    }
                    tried.lock().expect("nobody panics with it").insert(seed, came);
                }
            });
        }
    });
    let mut hunt = Hunt { mutant, caught: None, others: BTreeMap::new(), unsound: Vec::new() };
    for (seed, came) in tried.into_inner().expect("nobody panics with it") {
        match came {
            Tried::Passes => {}
            Tried::Unsound => hunt.unsound.push(seed),
            Tried::Found(checker) if meant.contains(&checker) => {
                hunt.caught = Some((seed, checker));
                break;
            }
            Tried::Found(checker) => *hunt.others.entry(checker).or_default() += 1,
        }
    }
    hunt
}
