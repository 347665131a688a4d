//! One run from beginning to end: work under faults, then healing, then everything must be well.

use std::panic::{AssertUnwindSafe, catch_unwind};

use client::mirror::Standing;
use proto::cluster::VolumeState;

use super::checker::Checker;
use super::world::{Counters, SECOND, Setup, World};

/// Faults end after this, whether the work is done or not.
const FAULTS_FOR: u64 = 600 * SECOND;
/// The first volume is ready within this where nothing goes wrong.
const READY_WITHIN: u64 = 30 * SECOND;
/// After healing a volume that is being re-created is there within this.
const RECREATED_WITHIN: u64 = 60 * SECOND;
/// After healing every request completes within this.
const ANSWERED_WITHIN: u64 = 60 * SECOND;
/// A mirror that waits for an operator after healing gets one after this.
const OPERATOR_AFTER: u64 = 20 * SECOND;
/// An operator is called so often: a session that ends before it has settled leaves its regions to the next one.
const OPERATOR_CALLS: usize = 3;
/// And all replicas are in sync, and clean, within this.
const EQUAL_WITHIN: u64 = 120 * SECOND;

/// How a run ended well.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// A hash over every event: the same for the same seed.
    pub digest: u64,
    /// Simulated time.
    pub seconds: u64,
    pub counters: Counters,
}

/// How a run ended badly.
#[derive(Clone, Debug)]
pub struct Failure {
    pub seed: u64,
    pub checker: Checker,
    pub what: String,
    pub status: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "seed {}: {:?}: {}\n{}", self.seed, self.checker, self.what, self.status)
    }
}

/// Runs what a seed stands for.
///
/// # Errors
/// What went wrong that must never go wrong.
pub fn run_seed(setup: Setup) -> Result<Outcome, Box<Failure>> {
    run_scenario(setup, |world| {
        if !world.setup.faults_at_once && !world.run_until(READY_WITHIN, |w| w.is_ready()) {
            return world.fail(Checker::Waits, "no volume is ready though everything is well".to_owned());
        }
        world.start_faults();
        world.run_until(FAULTS_FOR, |w| w.spent());
    })
}

/// Runs a scenario, then heals the world and checks it.
///
/// # Errors
/// As [`run_seed`].
pub fn run_scenario(setup: Setup, scenario: impl FnOnce(&mut World)) -> Result<Outcome, Box<Failure>> {
    run_story(setup, |world| {
        scenario(world);
        world.finish();
    })
}

/// Runs a scenario that need not end well: what is told of it in the end is checked, and nothing else.
///
/// # Errors
/// As [`run_seed`].
pub fn run_story(setup: Setup, story: impl FnOnce(&mut World)) -> Result<Outcome, Box<Failure>> {
    let seed = setup.seed;
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(setup);
        world.want_on(0, false);
        story(&mut world);
        world.check_histories();
        world
    }));
    let world = ran.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        let what = format!("panicked: {}", text.unwrap_or_default());
        Box::new(Failure { seed, checker: Checker::Assertion, what, status: String::new() })
    })?;
    if let Some((checker, what)) = world.failure() {
        return Err(Box::new(Failure { seed, checker: *checker, what: what.clone(), status: world.show_status() }));
    }
    Ok(Outcome { digest: world.digest(), seconds: world.seconds(), counters: world.counters.clone() })
}

impl World {
    /// Heals, and checks what must then come true.
    fn finish(&mut self) {
        if self.failure().is_some() {
            return;
        }
        self.heal();
        self.work.paused = true;
        if !self.run_until(RECREATED_WITHIN, |w| w.is_ready() && w.is_recreated()) {
            return self.fail(Checker::Waits, "no volume is ready though everything has healed".to_owned());
        }
        let well = |w: &mut World| w.idle() && w.is_serving() && w.waits_for_nothing();
        for _ in 0..OPERATOR_CALLS {
            if self.run_until(OPERATOR_AFTER, well) {
                break;
            }
            if !self.blocked_on().is_empty() {
                self.counters.recovers += 1;
                self.operator.recover = true;
            }
        }
        if !self.run_until(ANSWERED_WITHIN, |w| w.idle() && w.is_serving()) {
            return self.fail(Checker::Waits, "requests wait though everything is well".to_owned());
        }
        self.work.paused = false;
        self.allow(60);
        if !self.run_until(ANSWERED_WITHIN, |w| w.spent() && w.idle()) {
            return self.fail(Checker::Waits, "new requests wait though everything is well".to_owned());
        }
        self.work.paused = true;
        self.write_damaged_again();
        if !self.run_until(EQUAL_WITHIN, World::is_in_order) {
            let all_in = self
                .truth
                .living()
                .is_some_and(|v| v.mirrors.iter().all(|m| m.in_sync.members.len() == m.replicas.len()));
            let checker = if all_in { Checker::DirtyLeft } else { Checker::Waits };
            return self
                .fail(checker, "the mirror does not become equal and clean though everything is well".to_owned());
        }
        self.check_equal();
        self.read_everything();
        self.close_cleanly();
        self.check_equal();
        self.check_members_agree();
    }

    fn check_histories(&mut self) {
        if self.failure().is_some() {
            return;
        }
        let wrong = self.volumes.iter().enumerate().find_map(|(i, v)| v.check_history().err().map(|why| (i, why)));
        self.counters.given_up = self.volumes.iter().map(|v| v.history.given_up() as u64).sum();
        self.counters.terms =
            self.members.iter().filter_map(|m| m.core.as_ref()).map(|c| c.raft().term()).max().unwrap_or(0);
        if let Some((volume, why)) = wrong {
            self.fail(Checker::Register, format!("history of volume {volume}: {why}"));
        }
    }

    /// There is a volume, and it can be opened.
    pub fn is_ready(&self) -> bool {
        self.truth.living().is_some_and(|v| v.state == VolumeState::Ready && self.current().id == v.id)
    }

    /// A block that no replica can vouch for is bad until it is written again (R10), and no replica joins before.
    fn write_damaged_again(&mut self) {
        for block in self.damaged_blocks() {
            // A gateway that asked for the session before everything healed may get it only now.
            if !self.run_until(10 * SECOND, |w| w.is_serving()) {
                return self.fail(Checker::Waits, "the volume is not served though everything is well".to_owned());
            }
            let Some(owner) = self.owner() else { return };
            self.write(0, owner, block, 1, false);
            if !self.run_until(10 * SECOND, |w| w.idle()) {
                return self.fail(Checker::Waits, format!("the write of block {block} waits"));
            }
        }
    }

    /// Gateways with a mirror that waits for replicas that won't come.
    fn blocked_on(&self) -> Vec<usize> {
        let waits = |w: &str| w.contains("recover-volume");
        let blocked =
            |s: &super::gateway::Session| s.core.status().iter().any(|m| m.waits.as_deref().is_some_and(waits));
        (0..self.gateways.len()).filter(|g| self.session(*g).is_some_and(blocked)).collect()
    }

    fn owner(&self) -> Option<usize> {
        self.operator.wanted.filter(|g| self.takes_requests(*g))
    }

    /// The wanted gateway serves, and no other.
    pub fn is_serving(&mut self) -> bool {
        let others = self.gateways.iter().filter(|g| g.has_sessions()).count();
        if others != 1 || !self.is_ready() {
            return false;
        }
        let Some(session) = self.owner().and_then(|g| self.session(g)) else { return false };
        let epoch = self.truth.volumes.get(&session.volume).map(|v| v.session.epoch);
        epoch == Some(session.epoch) && session.is_serving()
    }

    /// No mirror says that it waits: one that does for something else may wait for the operator next.
    fn waits_for_nothing(&self) -> bool {
        let session = self.owner().and_then(|g| self.session(g));
        session.is_some_and(|s| s.core.status().iter().all(|m| m.waits.is_none()))
    }

    /// Every replica in sync, nothing dirty, nothing going on.
    pub fn is_in_order(&mut self) -> bool {
        let Some(session) = self.owner().and_then(|g| self.session(g)) else { return false };
        // Asking for the status is dear; what is cheaper comes first.
        let ours = |r: &&super::node::Replica| r.volume == session.volume;
        let clean = |r: &super::node::Replica| r.core.as_ref().is_some_and(|c| c.dirty_regions().0 == 0);
        if !self.replicas.iter().filter(ours).all(clean) {
            return false;
        }
        session.core.status().iter().all(|status| {
            status.dirty_regions == 0
                && status.unsettled == 0
                && status.waits.is_none()
                && status.replicas.iter().all(|r| r.standing == Standing::InSync)
        })
    }

    fn read_everything(&mut self) {
        let Some(owner) = self.owner() else { return };
        let mut block = 0;
        let blocks = self.current().blocks;
        while block < blocks {
            let count = 64.min(blocks - block);
            self.read(0, owner, block, count);
            if !self.run_until(10 * SECOND, |w| w.idle()) {
                return self.fail(Checker::Waits, format!("the read of block {block} waits"));
            }
            block += count;
        }
    }

    /// A clean close leaves nothing dirty.
    fn close_cleanly(&mut self) {
        let Some(owner) = self.owner() else { return };
        self.gateways[owner].closed_clean = None;
        self.want_nowhere();
        if !self.run_until(20 * SECOND, |w| !w.gateways[owner].has_sessions()) {
            return self.fail(Checker::Waits, "the session does not close".to_owned());
        }
        if self.gateways[owner].closed_clean != Some(true) {
            self.fail(Checker::DirtyLeft, "a close with every replica in sync left dirty regions".to_owned());
        }
        self.run_for(SECOND);
    }

    /// Where everything stands, for who reads why a run did not end.
    pub fn show_status(&self) -> String {
        let mut lines = Vec::new();
        for (i, g) in self.gateways.iter().enumerate() {
            let session = self.volumes.last().and_then(|v| g.session(v.id));
            let status = session.map(|s| format!("session {}, {:?}", s.epoch, s.core.status()));
            lines.push(format!("gateway {i}: alive {}, {}", g.alive, status.as_deref().unwrap_or("no session")));
        }
        for (i, r) in self.replicas.iter().enumerate().filter(|(_, r)| !r.gone) {
            let dirty = r.core.as_ref().map(|c| c.dirty_regions());
            lines.push(format!(
                "replica {i} on node {} of mirror {}: {}, open {}, dirty and suspect {dirty:?}",
                r.node, r.mirror, r.id, r.is_open
            ));
        }
        for (i, m) in self.members.iter().enumerate() {
            let core = m.core.as_ref().map(|c| {
                format!("term {}, leader {:?}, applied {}", c.raft().term(), c.raft().leader(), c.machine().applied())
            });
            lines.push(format!("member {i}: {}", core.as_deref().unwrap_or("down")));
        }
        for v in self.truth.volumes.values() {
            lines.push(format!("volume {}: {}, {:?}, export {:?}", v.id, v.state, v.session, v.export));
            lines.extend(v.mirrors.iter().map(|m| format!("  mirror {}: {:?}", m.id, m.in_sync)));
        }
        lines.push(format!("operator: {:?}", self.operator));
        lines.join("\n")
    }
}
