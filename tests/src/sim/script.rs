//! What a scenario does to the world by name, rather than by chance.

use client::mirror::MirrorStatus;

use super::net::Party;
use super::world::{SECOND, World};

/// Long enough for anything that does not wait for a fault to end.
const SOON: u64 = 30 * SECOND;

impl World {
    /// Gateway 0 opens the volume, and every replica is in sync.
    ///
    /// # Panics
    /// If that does not come true.
    pub fn open(&mut self) {
        self.want_on(0, false);
        self.until("the volume is open", |w| w.is_serving());
    }

    /// Lets time pass until something is so.
    ///
    /// # Panics
    /// If it does not come true soon.
    pub fn until(&mut self, what: &str, is_so: impl FnMut(&mut Self) -> bool) {
        if !self.run_until(SOON, is_so) {
            panic!("not so: {what}; {:?}\n{}", self.failure(), self.show_status());
        }
    }

    /// The requests of all clients are answered.
    ///
    /// # Panics
    /// If they are not, soon.
    pub fn answered(&mut self) {
        self.until("every request is answered", |w| w.idle());
    }

    /// Whether a client's request is answered.
    pub fn client_is_idle(&self, client: usize) -> bool {
        self.work.clients[client].is_none()
    }

    /// Nothing gets from one to the other.
    pub fn cut(&mut self, from: Party, to: Party) {
        self.log(|| format!("{from:?} does not reach {to:?} any more"));
        self.net.cut(from, to);
    }

    /// It does again, and what was sent arrives.
    pub fn join_up(&mut self, from: Party, to: Party) {
        self.log(|| format!("{from:?} reaches {to:?} again"));
        self.net.heal(from, to);
        self.stir_network();
    }

    /// SIGSTOP.
    pub fn halt(&mut self, party: Party) {
        self.stop(party);
    }

    /// SIGCONT.
    pub fn go_on(&mut self, party: Party) {
        self.resume(party);
    }

    /// An initiator gives its request up.
    pub fn give_up(&mut self, client: usize) {
        if let Some(out) = &self.work.clients[client] {
            let number = out.number;
            self.abort(client, number);
        }
    }

    /// Flips a bit of a block at rest; false if there is nothing at rest.
    pub fn flip(&mut self, node: usize, block: u64) -> bool {
        self.lossless = false;
        self.nodes[node].disk.data.flip(block, &mut self.rng)
    }

    /// Where the mirror stands.
    ///
    /// # Panics
    /// If the gateway has no session.
    pub fn status(&self, gateway: usize) -> MirrorStatus {
        self.gateways[gateway].session.as_ref().expect("a session").mirror.status()
    }

    /// The committed set, as nodes.
    pub fn members(&self) -> Vec<usize> {
        let all = 0..self.nodes.len();
        all.filter(|n| self.control.members.contains(&super::world::replica_id(*n))).collect()
    }
}
