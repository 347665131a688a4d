//! What a scenario does to the world by name, rather than by chance.

use client::mirror::{MirrorStatus, Standing};
use client::volume::SessionInput;
use node::replica::layout::MAP_BLOCKS;

use super::disk::{PAGE, SECTOR};
use super::net::Party;
use super::world::{MS, SECOND, World};

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
        // After a failure nothing goes on, and it is the failure that is told.
        if !self.run_until(SOON, is_so) && self.failure().is_none() {
            panic!("not so: {what}\n{}", self.show_status());
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

    /// Flips a bit of a block of the volume at rest on a node; false if there is nothing at rest.
    pub fn flip(&mut self, node: usize, block: u64) -> bool {
        let (mirror, at) = self.current().place(block);
        let volume = self.current().id;
        let here = |r: &usize| self.replicas[*r].volume == volume && self.replicas[*r].mirror == mirror;
        match self.replicas_of(node).into_iter().find(here) {
            Some(replica) => self.flip_bit(replica, at),
            None => false,
        }
    }

    /// How many bytes a second a resync compares at most.
    pub fn limit_resync(&mut self, gateway: usize, limit: Option<u64>) {
        let volume = self.current().id;
        self.session_step(gateway, volume, SessionInput::LimitResync(limit));
    }

    /// Where the first mirror stands.
    ///
    /// # Panics
    /// If the gateway has no session.
    pub fn status(&self, gateway: usize) -> MirrorStatus {
        self.session(gateway).expect("a session").core.mirrors()[0].status()
    }

    /// The committed set of the first mirror, as nodes.
    pub fn in_sync(&self) -> Vec<usize> {
        let Some(volume) = self.truth.living() else { return Vec::new() };
        let set = &volume.mirrors[0].in_sync;
        let mut nodes: Vec<usize> = volume.mirrors[0]
            .replicas
            .iter()
            .filter(|r| set.members.contains(&r.id))
            .map(|r| r.node.0 as usize - 1)
            .collect();
        nodes.sort_unstable();
        nodes
    }

    /// Spoils the first sector of the page of a node's map that has a block of the volume. It is known by its sum, and
    /// none of the page's blocks is known any more.
    ///
    /// # Panics
    /// If nothing of it is at rest.
    pub fn spoil_map(&mut self, node: usize, block: u64) {
        let (mirror, at) = self.current().place(block);
        let volume = self.current().id;
        let here = |r: &usize| self.replicas[*r].volume == volume && self.replicas[*r].mirror == mirror;
        let replica = self.replicas_of(node).into_iter().find(here).expect("the node has a replica");
        let r = &mut self.replicas[replica];
        let index = at / MAP_BLOCKS;
        assert!(r.disk.meta.flip(r.layout.map(index) / PAGE, SECTOR, &mut self.rng), "the page is at rest");
        let blocks = index * MAP_BLOCKS..((index + 1) * MAP_BLOCKS).min(r.blocks);
        self.lose_trust();
        self.distrust(replica, blocks);
    }

    /// How many regions of a node's replica are suspect.
    pub fn suspect(&self, node: usize) -> u64 {
        let mut cores = self.replicas_of(node).into_iter().filter_map(|r| self.replicas[r].core.as_ref());
        cores.next().map_or(0, |core| core.dirty_regions().1)
    }

    /// Gateway 1 takes over from gateway 0, and reaches node 0 alone, which has lost its cache.
    fn reach_one_that_has_restarted(&mut self, while_down: impl FnOnce(&mut Self)) {
        self.write(0, 0, 10, 8, false);
        self.answered();
        self.kill_gateway(0);
        self.kill_node(0, true);
        for (gateway, node) in [(0, 1), (0, 2), (1, 1), (1, 2)] {
            self.cut(Party::Gateway(gateway), Party::Node(node));
        }
        while_down(self);
        self.start_node(0);
        self.want_on(1, true);
    }

    /// Gateway 1 takes over with node 0, which has lost its cache: region 0 waits for the other two, which it can't
    /// reach, and which leave the set.
    ///
    /// # Panics
    /// If it does not come to that.
    pub fn leave_two_behind(&mut self) {
        self.reach_one_that_has_restarted(|_| {});
        let alone = |w: &mut Self| w.takes_requests(1) && w.in_sync() == [0] && w.status(1).unsettled > 0;
        self.until("it goes on with one node", alone);
        // Until that one has been told.
        self.run_for(SECOND);
    }

    /// As [`Self::leave_two_behind`]; but between its decision and what it then tells node 0 gateway 1 writes a block,
    /// and node 0 finds by that write that it can't tell what it holds there, nor in the regions beside it.
    ///
    /// # Panics
    /// If it does not come to that.
    pub fn leave_two_behind_and_find_a_bad_page(&mut self, block: u64) {
        self.until("nothing is dirty", |w| w.is_in_order());
        self.reach_one_that_has_restarted(|w| w.spoil_map(0, block));
        self.until("it has decided", |w| w.takes_requests(1) && w.status(1).unsettled > 0);
        self.cut(Party::Control, Party::Gateway(1));
        self.write(0, 1, block, 4, false);
        self.until("the page is known to be bad", |w| w.suspect(0) == 4);
        assert!(!self.client_is_idle(0), "nothing is acknowledged before those who left are known to have left");
        self.join_up(Party::Control, Party::Gateway(1));
        self.answered();
        assert_eq!((self.in_sync(), self.suspect(0)), (vec![0], 4));
    }

    /// Node 0 is attached anew, without a restart: by the session of gateway 1, or by one of gateway 0. Returns whose it
    /// is.
    ///
    /// # Panics
    /// If it is not.
    pub fn attach_again(&mut self, same_session: bool) -> usize {
        if same_session {
            self.reset_link(1, 0);
        } else {
            self.start_gateway(0);
            self.want_on(0, true);
        }
        let gateway = usize::from(same_session);
        self.run_for(SECOND / 10);
        self.until("it waits again", |w| w.takes_requests(gateway) && w.status(gateway).unsettled > 0);
        self.run_for(SECOND);
        gateway
    }

    /// The last member is written where others are not, restarts, and is attached again; then the others are back, and
    /// that is read.
    ///
    /// # Panics
    /// If it does not come to that.
    pub fn read_what_others_have_missed(&mut self, same_session: bool) {
        self.open();
        self.leave_two_behind();
        // Another region than the one that waits.
        self.write(0, 1, 300, 8, false);
        self.answered();
        // From now on it can't tell the regions that the others know from those that they don't.
        self.kill_node(0, true);
        self.run_for(SECOND);
        self.start_node(0);
        self.until("all that it holds waits", |w| w.takes_requests(1) && w.status(1).unsettled >= 2);
        self.run_for(SECOND);
        let gateway = self.attach_again(same_session);
        for node in [1, 2] {
            self.join_up(Party::Gateway(gateway), Party::Node(node));
        }
        self.read(2, gateway, 300, 8);
        self.run_for(20 * SECOND);
    }

    /// The last member is written where it finds its map bad and others are not there, and is attached again; then the
    /// others are back, and that is read.
    ///
    /// # Panics
    /// If it does not come to that.
    pub fn read_what_was_written_under_a_bad_page(&mut self, same_session: bool) {
        // Beyond the map page of region 0, which waits and is not looked at.
        let block = MAP_BLOCKS + 40;
        self.open();
        self.write(0, 0, block - 4, 16, false);
        self.answered();
        self.leave_two_behind_and_find_a_bad_page(block);
        let gateway = self.attach_again(same_session);
        for node in [1, 2] {
            self.join_up(Party::Gateway(gateway), Party::Node(node));
        }
        self.read(2, gateway, block, 4);
        self.run_for(20 * SECOND);
    }

    /// All nodes write the same page of their maps when power goes. What it says of regions that nobody writes to is as
    /// good as before, and read.
    ///
    /// # Panics
    /// If it does not come to that.
    pub fn tear_the_map_page_of_what_is_clean(&mut self) {
        self.open();
        for (client, first) in [(0, 0), (1, 256), (2, 512)] {
            self.write(client, 0, first, 64, false);
        }
        self.answered();
        self.flush(0, 0);
        self.until("nothing is dirty", |w| w.is_in_order());
        self.write(0, 0, 10, 8, false);
        self.answered();
        self.flush(0, 0);
        let wait = self.rng.between(0, 5 * MS);
        self.run_for(wait);
        for node in 0..3 {
            self.kill_node(node, true);
        }
        for node in 0..3 {
            self.start_node(node);
        }
        for (client, first) in [(1, 256), (2, 512)] {
            self.read(client, 0, first, 64);
        }
        self.answered();
    }

    /// A replica joins the last member while nothing can be read there, and takes over as bad what it has missed. It is the
    /// last one then, and is asked for that after a write beside it has failed.
    ///
    /// # Panics
    /// If it does not come to that.
    pub fn read_what_was_taken_over_as_bad(&mut self) {
        self.open();
        self.write(0, 0, 0, 64, false);
        self.answered();
        self.kill_node(1, false);
        self.kill_node(2, false);
        self.until("only node 0 is left", |w| w.in_sync() == [0]);
        self.write(0, 0, 40, 4, false);
        self.answered();
        self.distrust_all(0);
        self.nodes[0].faults.read_errors = 1000;
        self.start_node(1);
        self.until("node 1 is in, and has nothing that it can vouch for", |w| w.in_sync() == [0, 1]);
        self.kill_node(0, false);
        self.until("only node 1 is left", |w| w.in_sync() == [1]);
        // The write may have left anything, so that what matches no sum may be taken for right.
        self.nodes[1].faults.full = true;
        self.write(0, 0, 10, 4, false);
        self.answered();
        self.calm(Party::Node(1));
        self.read(1, 0, 40, 4);
        self.answered();
        self.calm(Party::Node(0));
        self.start_node(0);
        self.start_node(2);
    }

    /// A take-over finds two regions dirty, of which one differs, and comes to that one only after a long while.
    ///
    /// # Panics
    /// If it does not come to that.
    pub fn clean_while_it_settles(&mut self) {
        self.open();
        // Allocated, so that there is something to compare.
        self.write(0, 0, 0, 8, false);
        self.write(1, 0, 300, 8, false);
        self.answered();
        self.until("nothing is dirty", |w| w.is_in_order());
        self.write(0, 0, 0, 8, false);
        self.answered();
        self.cut(Party::Gateway(0), Party::Node(2));
        self.write(0, 0, 300, 8, false);
        self.run_for(100 * MS);
        self.kill_gateway(0);
        self.want_on(1, true);
        self.until("the session is there", |w| w.session(1).is_some());
        // The second region's turn is in 16 seconds.
        self.limit_resync(1, Some(64 << 10));
        self.until("the first region is settled", |w| w.takes_requests(1) && w.status(1).unsettled == 1);
        self.run_for(10 * SECOND);
        assert_eq!((self.in_sync(), self.status(1).unsettled), (vec![0, 1, 2], 1));
        self.limit_resync(1, None);
    }

    /// Gateway 0 loses node 2, which leaves the set.
    fn cut_off_node_2(&mut self) {
        self.cut(Party::Gateway(0), Party::Node(2));
        self.reset_link(0, 2);
        self.until("node 2 has left", |w| w.in_sync() == [0, 1]);
    }

    fn somebody_joins(&self, gateway: usize) -> bool {
        self.status(gateway).replicas.iter().any(|r| matches!(r.standing, Standing::Joining { .. }))
    }

    /// A replica comes back while a write to a region that nobody has allocated is with the others, who have not got
    /// round to it; another region holds its join up.
    ///
    /// # Panics
    /// If it does not come to that.
    pub fn join_while_a_write_is_out(&mut self) {
        self.open();
        self.write(0, 0, 0, 8, false);
        self.write(1, 0, 300, 8, false);
        self.answered();
        // Its process goes on, and knows what it has allocated.
        self.cut_off_node_2();
        self.write(0, 0, 0, 8, false);
        self.write(1, 0, 300, 8, false);
        self.answered();
        // The second region in 16 seconds.
        self.limit_resync(0, Some(64 << 10));
        self.run_for(SECOND);
        (0..2).for_each(|node| self.nodes[node].faults.slow = 5_000);
        self.write(0, 0, 600, 8, false);
        self.join_up(Party::Gateway(0), Party::Node(2));
        self.until("node 2 is attached", |w| w.somebody_joins(0));
        self.run_for(50 * MS);
        assert!(!self.client_is_idle(0), "the write is out");
        (0..2).for_each(|node| self.nodes[node].faults.slow = 0);
        self.answered();
        self.limit_resync(0, None);
        self.until("node 2 is back", |w| w.in_sync() == [0, 1, 2]);
    }

    /// A node with a slow disk comes back, and is written to all the while.
    ///
    /// # Panics
    /// If it does not come to that.
    pub fn join_under_writes(&mut self) {
        self.open();
        self.write(0, 0, 0, 64, false);
        self.answered();
        self.cut_off_node_2();
        self.write(0, 0, 0, 64, false);
        self.answered();
        self.nodes[2].faults.slow = 100;
        self.join_up(Party::Gateway(0), Party::Node(2));
        let mut block = 64;
        for _ in 0..4_000 {
            for client in (0..3).filter(|client| self.client_is_idle(*client)).collect::<Vec<_>>() {
                self.write(client, 0, block, 1, false);
                block = 64 + (block - 63) % 400;
            }
            self.run_for(MS);
            if self.in_sync() == [0, 1, 2] {
                break;
            }
        }
        self.nodes[2].faults.slow = 0;
        self.answered();
        self.until("node 2 is back", |w| w.in_sync() == [0, 1, 2]);
    }

    /// A write reaches one node, and its gateway dies. The next one makes another node equal, while it has lost the third,
    /// and can't take it out of the set; what it lets be read then is read again from the third alone.
    ///
    /// # Panics
    /// If it does not come to that.
    pub fn read_what_a_lost_member_lacks(&mut self) {
        self.open();
        self.write(0, 0, 0, 64, false);
        self.answered();
        self.until("nothing is dirty", |w| w.is_in_order());
        for node in [1, 2] {
            self.cut(Party::Gateway(0), Party::Node(node));
        }
        self.write(0, 0, 10, 8, false);
        self.run_for(100 * MS);
        self.kill_gateway(0);
        // It does not decide without all of them before it has a lease of its own.
        self.cut(Party::Gateway(1), Party::Node(2));
        self.want_on(1, true);
        self.until("the session is there", |w| w.session(1).is_some());
        // The region's turn comes at once, and again in 16 seconds.
        self.limit_resync(1, Some(64 << 10));
        self.run_for(1500 * MS);
        self.join_up(Party::Gateway(1), Party::Node(2));
        self.until("it has decided", |w| w.takes_requests(1) && w.status(1).unsettled > 0);
        self.cut(Party::Gateway(1), Party::Control);
        self.reset_link(1, 2);
        self.until("node 2 is attached again", |w| w.somebody_joins(1));
        assert_eq!(self.in_sync(), [0, 1, 2], "its removal is not committed");
        self.flush(1, 1);
        self.run_for(200 * MS);
        self.read(2, 1, 10, 8);
        self.run_for(SECOND);
        self.kill_gateway(1);
        (0..2).for_each(|node| self.kill_node(node, false));
        self.start_gateway(0);
        self.join_up(Party::Gateway(0), Party::Node(2));
        self.want_on(0, true);
        self.until("it goes on with node 2", |w| w.takes_requests(0) && w.in_sync() == [2]);
        self.read(3, 0, 10, 8);
        self.answered();
        (0..2).for_each(|node| self.start_node(node));
    }

    /// Those that a region waits for are back, and are lost again before the region is equal.
    ///
    /// # Panics
    /// If it does not come to that.
    pub fn lose_those_that_were_waited_for(&mut self) {
        self.open();
        self.leave_two_behind();
        let waits = |w: &Self| w.status(1).waits.is_some_and(|why| why.contains("recover-volume"));
        assert!(waits(self), "they are waited for");
        for node in [1, 2] {
            self.join_up(Party::Gateway(1), Party::Node(node));
        }
        self.until("all are there", |w| !waits(w));
        for node in [1, 2] {
            self.nodes[node].faults.slow = 5_000;
            self.reset_link(1, node);
            self.cut(Party::Gateway(1), Party::Node(node));
        }
        assert!(self.status(1).unsettled > 0, "nothing is equal yet");
        self.read(2, 1, 10, 8);
        self.run_for(5 * SECOND);
        for node in [1, 2] {
            self.nodes[node].faults.slow = 0;
            self.join_up(Party::Gateway(1), Party::Node(node));
        }
        self.answered();
    }
}
