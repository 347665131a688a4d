//! Errors planted in the protocol, each found in a small configuration, and by the property that is meant for it.

use model::check::names::*;
use model::{Config, Mutant, config, run};

/// Which configuration finds it, and which of the properties may say so.
fn expected(mutant: Mutant) -> (&'static str, &'static [&'static str]) {
    match mutant {
        Mutant::NoAttachCheck => ("B", &[MEMBERS]),
        Mutant::AttachWithoutDrain => ("B", &[MEMBERS]),
        Mutant::AckBeforeCommit => ("A", &[MEMBERS]),
        Mutant::StaleSet => ("A3", &[MEMBERS]),
        Mutant::StaleSession => ("B5", &[METADATA, MEMBERS]),
        Mutant::NoSurvivorFlush => ("A", &[LAST]),
        Mutant::IgnoreDoubt => ("A3", &[MEMBERS]),
        Mutant::ReturnedMemberCounts => ("A", &[LAST, FLUSHED]),
        Mutant::ReturnedCountsUnflushed => ("A", &[FLUSHED, KEPT]),
        Mutant::ReplyAfterLease => ("B4", &[READS]),
        Mutant::TakeOverUnderOldLease => ("B4", &[READS]),
        Mutant::ReadJoining => ("A3", &[READS]),
        Mutant::UnlockEarly => ("A4", &[MEMBERS, FLUSHED]),
        Mutant::EqualiseWithoutLock => ("A4", &[MEMBERS, FLUSHED]),
        Mutant::DirtyAfterData => ("A", &[DIRTY]),
        Mutant::CleanAsBoolean => ("C", &[DIRTY]),
        Mutant::CleanWithoutAll => ("C", &[DIRTY]),
        Mutant::ClearUnannounced => ("C4", &[MEMBERS, DIRTY]),
        Mutant::KeepOldImage => ("C2", &[MEMBERS, DIRTY]),
        Mutant::NoBarrier => ("A2", &[MEMBERS]),
        Mutant::JoinWithoutCounting => ("A4", &[FLUSHED]),
        Mutant::JoinWithoutFlush => ("A", &[FLUSHED]),
        Mutant::KeepTargetOfLostCopy => ("A3", &[MEMBERS, FLUSHED, READS]),
        Mutant::JoinToNobody => ("R2", &[MEMBERS]),
        Mutant::KeepRestarted => ("B2", &[MEMBERS]),
        Mutant::GoOnWithRestarted => ("B3", &[HELD]),
        Mutant::LastMemberWithoutFua => ("A", &[LAST]),
        Mutant::KilledIsLost => ("K3", &[HELD]),
        Mutant::KilledRanksAsCut => ("K", &[MEMBERS]),
        Mutant::KeptAfterCut => ("K3", &[MEMBERS, KEPT]),
        Mutant::WholeAfterCut => ("K3", &[MEMBERS, HELD]),
        Mutant::KeptAfterFault => ("K2", &[MEMBERS, KEPT]),
        Mutant::FlushOutlivesLoss => ("R5", &[FLUSHED]),
        Mutant::CompleteTooEarly => ("R5", &[KEPT, MEMBERS]),
        Mutant::LetGoEarly => ("R", &[KEPT]),
        Mutant::LetGoWithoutAll => ("R2", &[KEPT]),
        Mutant::LetGoWithoutAdded => ("A", &[KEPT]),
        Mutant::DurableNotKept => ("R3", &[FLUSHED, KEPT]),
        Mutant::ReplayInOrder => ("R3", &[FLUSHED]),
        Mutant::ReplayedIsDurable => ("R", &[KEPT]),
        Mutant::ReplayUnderOldFlush => ("R", &[KEPT]),
        Mutant::SecondLossForgets => ("R", &[KEPT]),
    }
}

#[test]
fn every_planted_error_is_found_by_the_property_meant_for_it() {
    for mutant in Mutant::ALL {
        let (name, properties) = expected(*mutant);
        let config = Config { mutant: Some(*mutant), ..config(name).expect("a configuration") };
        let outcome = run(&config, 2, None);
        let found: Vec<_> = outcome.broken.iter().map(|(property, _)| *property).collect();
        println!("{mutant:?} in {name}: {} states, {:?}: {found:?}", outcome.states, outcome.time);
        // What a member does not hold is not on its disk either: that may be seen first.
        let lost = properties.iter().any(|p| [MEMBERS, FLUSHED, LAST].contains(p));
        let meant = |p: &&str| properties.contains(p) || lost && *p == KEPT;
        assert!(found.iter().any(meant), "{mutant:?} in {name}: {found:?}");
    }
}
