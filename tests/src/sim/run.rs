//! One run from beginning to end: work under faults, then healing, then everything must be well.

use std::panic::{AssertUnwindSafe, catch_unwind};

use client::mirror::{Input, Standing};

use super::history::BLOCK_SECTORS;
use super::world::{Counters, SECOND, Setup, World};

/// Faults end after this, whether the work is done or not.
const FAULTS_FOR: u64 = 240 * SECOND;
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
    pub what: String,
    pub status: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "seed {}: {}\n{}", self.seed, self.what, self.status)
    }
}

/// Runs what a seed stands for.
///
/// # Errors
/// What went wrong that must never go wrong.
pub fn run_seed(setup: Setup) -> Result<Outcome, Box<Failure>> {
    run_scenario(setup, |world| {
        world.want_on(0, false);
        world.start_faults();
        world.run_until(FAULTS_FOR, |w| w.spent());
    })
}

/// Runs a scenario, then heals the world and checks it.
///
/// # Errors
/// As [`run_seed`].
pub fn run_scenario(setup: Setup, scenario: impl FnOnce(&mut World)) -> Result<Outcome, Box<Failure>> {
    let seed = setup.seed;
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(setup);
        scenario(&mut world);
        world.finish();
        world
    }));
    let world = ran.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        let what = format!("panicked: {}", text.unwrap_or_default());
        Box::new(Failure { seed, what, status: String::new() })
    })?;
    if let Some(what) = world.failure() {
        return Err(Box::new(Failure { seed, what: what.to_owned(), status: world.show_status() }));
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
        let well = |w: &mut World| w.idle() && w.is_serving() && w.blocked_on().is_empty();
        for _ in 0..OPERATOR_CALLS {
            if self.run_until(OPERATOR_AFTER, well) {
                break;
            }
            for gateway in self.blocked_on() {
                // What only a lost cache held is given up; the history may go back to what was flushed.
                self.log(|| format!("an operator recovers the volume on gateway {gateway}"));
                self.counters.recovers += 1;
                self.history.power_on();
                self.gateway_step(gateway, Input::Recover);
            }
        }
        if !self.run_until(ANSWERED_WITHIN, |w| w.idle() && w.is_serving()) {
            return self.fail("requests wait though everything is well".to_owned());
        }
        self.work.paused = false;
        self.allow(60);
        if !self.run_until(ANSWERED_WITHIN, |w| w.spent() && w.idle()) {
            return self.fail("new requests wait though everything is well".to_owned());
        }
        self.work.paused = true;
        self.write_damaged_again();
        if !self.run_until(EQUAL_WITHIN, World::is_in_order) {
            return self.fail("the mirror does not become equal and clean though everything is well".to_owned());
        }
        self.check_equal();
        self.read_everything();
        self.close_cleanly();
        self.check_equal();
        if self.failure().is_none()
            && let Err(why) = self.history.check(self.setup.blocks * BLOCK_SECTORS)
        {
            self.fail(format!("history: {why}"));
        }
    }

    /// A block that no replica can vouch for is bad until it is written again (R10), and no replica joins before.
    fn write_damaged_again(&mut self) {
        for block in self.damaged_blocks() {
            // A gateway that asked for the session before everything healed may get it only now.
            if !self.run_until(10 * SECOND, |w| w.is_serving()) {
                return self.fail("the volume is not served though everything is well".to_owned());
            }
            let Some(owner) = self.owner() else { return };
            self.write(0, owner, block, 1, false);
            if !self.run_until(10 * SECOND, |w| w.idle()) {
                return self.fail(format!("the write of block {block} waits"));
            }
        }
    }

    /// Gateways whose mirror waits for replicas that won't come.
    fn blocked_on(&self) -> Vec<usize> {
        let waits = |w: &str| w.contains("recover-volume");
        let blocked = |s: &super::gateway::Session| s.mirror.status().waits.as_deref().is_some_and(waits);
        (0..self.gateways.len()).filter(|g| self.gateways[*g].session.as_ref().is_some_and(blocked)).collect()
    }

    fn owner(&self) -> Option<usize> {
        self.gateways.iter().position(|g| g.wanted && g.takes_requests())
    }

    /// The wanted gateway serves, and no other.
    pub fn is_serving(&mut self) -> bool {
        let others = self.gateways.iter().filter(|g| g.session.is_some()).count();
        others == 1
            && self.owner().is_some_and(|g| {
                self.gateways[g]
                    .session
                    .as_ref()
                    .is_some_and(|s| s.epoch == self.control.epoch && s.mirror.is_serving())
            })
    }

    /// Every replica in sync, nothing dirty, nothing going on.
    pub fn is_in_order(&mut self) -> bool {
        let Some(owner) = self.owner() else { return false };
        let session = self.gateways[owner].session.as_ref().expect("it takes requests");
        // Asking for the status is dear; what is cheaper comes first.
        if self.nodes.iter().any(|n| n.core.as_ref().is_none_or(|c| c.dirty_regions().0 > 0)) {
            return false;
        }
        let status = session.mirror.status();
        status.dirty_regions == 0
            && status.unsettled == 0
            && status.waits.is_none()
            && status.replicas.iter().all(|r| r.standing == Standing::InSync)
    }

    fn read_everything(&mut self) {
        let Some(owner) = self.owner() else { return };
        let mut block = 0;
        while block < self.setup.blocks {
            let count = 64.min(self.setup.blocks - block);
            self.read(0, owner, block, count);
            if !self.run_until(10 * SECOND, |w| w.idle()) {
                return self.fail(format!("the read of block {block} waits"));
            }
            block += count;
        }
    }

    /// A clean close leaves nothing dirty.
    fn close_cleanly(&mut self) {
        let Some(owner) = self.owner() else { return };
        for g in &mut self.gateways {
            g.wanted = false;
        }
        self.close_session(owner);
        if !self.run_until(20 * SECOND, |w| w.gateways[owner].session.is_none()) {
            return self.fail("the session does not close".to_owned());
        }
        if self.gateways[owner].closed_clean != Some(true) {
            self.fail("a close with every replica in sync left dirty regions".to_owned());
        }
        self.run_for(SECOND);
    }
}
