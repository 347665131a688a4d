//! Connections: bytes in order within one, in any order between two. What was sent arrives late, or never, but not
//! twice; closing does not call back what is on its way.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;

use super::rng::Rng;

/// A process, or rather the host that it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Party {
    Gateway(usize),
    Node(usize),
    /// A member with a vote and no storage.
    Witness(usize),
    /// The control plane's end of what gateways and members say to each other, whichever member it is: for cuts only.
    Control,
    /// Who gives the orders: creates, exports, deletes, recovers. Nothing happens to him.
    Operator,
}

/// What travels.
#[derive(Clone, Debug)]
pub enum Packet {
    /// Header and body, and the payload.
    Frame(Bytes, Bytes),
    /// The other side's end is closed.
    End,
}

/// The two directions of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// From who dialled.
    Forth,
    Back,
}

#[derive(Debug, Default)]
struct Pipe {
    queue: VecDeque<Packet>,
    /// When the last packet arrives: nothing overtakes it.
    last_at: u64,
    /// The sender's end is closed: nothing more is sent.
    ended: bool,
    /// The receiver's end is gone: what arrives is dropped.
    deaf: bool,
}

/// A connection.
#[derive(Debug)]
pub struct Conn {
    pub dialler: Party,
    pub listener: Party,
    forth: Pipe,
    back: Pipe,
}

impl Conn {
    fn pipe(&mut self, way: Way) -> &mut Pipe {
        match way {
            Way::Forth => &mut self.forth,
            Way::Back => &mut self.back,
        }
    }
    pub fn ends(&self, way: Way) -> (Party, Party) {
        match way {
            Way::Forth => (self.dialler, self.listener),
            Way::Back => (self.listener, self.dialler),
        }
    }
}

/// The network.
#[derive(Debug, Default)]
pub struct Net {
    conns: BTreeMap<u64, Conn>,
    next: u64,
    /// Directions in which nothing gets through, with how many faults cut them.
    cuts: BTreeMap<(Party, Party), u32>,
    pub slow: BTreeSet<Party>,
}

impl Net {
    pub fn connect(&mut self, dialler: Party, listener: Party) -> u64 {
        self.next += 1;
        self.conns.insert(self.next, Conn { dialler, listener, forth: Pipe::default(), back: Pipe::default() });
        self.next
    }

    pub fn conn(&self, id: u64) -> Option<&Conn> {
        self.conns.get(&id)
    }

    pub fn is_cut(&self, from: Party, to: Party) -> bool {
        self.cuts.contains_key(&(from, to))
    }

    /// Whether nothing is cut anywhere.
    pub fn is_whole(&self) -> bool {
        self.cuts.is_empty()
    }

    pub fn cut(&mut self, from: Party, to: Party) {
        *self.cuts.entry((from, to)).or_default() += 1;
    }

    pub fn heal(&mut self, from: Party, to: Party) {
        if let Some(n) = self.cuts.get_mut(&(from, to)) {
            *n -= 1;
            if *n == 0 {
                self.cuts.remove(&(from, to));
            }
        }
    }

    pub fn heal_all(&mut self) {
        self.cuts.clear();
        self.slow.clear();
    }

    /// How long something takes from one to the other.
    pub fn delay(&self, from: Party, to: Party, rng: &mut Rng) -> u64 {
        let slow = if self.slow.contains(&from) || self.slow.contains(&to) { 100 } else { 1 };
        rng.tail(20, 4_000) * slow
    }

    /// Sends; says when it is due, if the connection takes it.
    pub fn send(&mut self, now: u64, id: u64, way: Way, packet: Packet, rng: &mut Rng) -> Option<u64> {
        let (from, to) = self.conns.get(&id)?.ends(way);
        let delay = self.delay(from, to, rng);
        let pipe = self.conns.get_mut(&id)?.pipe(way);
        if pipe.ended {
            return None;
        }
        pipe.ended = matches!(packet, Packet::End);
        pipe.queue.push_back(packet);
        pipe.last_at = pipe.last_at.max(now + delay);
        Some(pipe.last_at)
    }

    /// The next packet, if it gets through now.
    pub fn receive(&mut self, id: u64, way: Way) -> Option<Packet> {
        let conn = self.conns.get_mut(&id)?;
        let (from, to) = conn.ends(way);
        if self.cuts.contains_key(&(from, to)) {
            return None;
        }
        let conn = self.conns.get_mut(&id)?;
        let pipe = conn.pipe(way);
        let packet = pipe.queue.pop_front();
        let deaf = pipe.deaf;
        if conn.forth.ended && conn.back.ended && conn.forth.queue.is_empty() && conn.back.queue.is_empty() {
            self.conns.remove(&id);
        }
        packet.filter(|_| !deaf)
    }

    /// `party` listens to none of its end's packets any more. What it sent is on its way, cut short if `reset`.
    pub fn close(&mut self, now: u64, id: u64, way_out: Way, reset: bool, rng: &mut Rng) -> Option<u64> {
        let conn = self.conns.get_mut(&id)?;
        let way_in = if way_out == Way::Forth { Way::Back } else { Way::Forth };
        conn.pipe(way_in).deaf = true;
        let out = conn.pipe(way_out);
        if reset && !out.ended {
            let keep = rng.below(out.queue.len() as u64 + 1) as usize;
            out.queue.truncate(keep);
        }
        self.send(now, id, way_out, Packet::End, rng)
    }

    /// Power is gone at one end: nobody says so.
    pub fn fall_silent(&mut self, id: u64, party: Party) {
        if let Some(conn) = self.conns.get_mut(&id) {
            let (way_out, way_in) =
                if conn.dialler == party { (Way::Forth, Way::Back) } else { (Way::Back, Way::Forth) };
            conn.pipe(way_in).deaf = true;
            conn.pipe(way_out).ended = true;
        }
    }

    /// What a host that has come back says about connections that it does not know.
    pub fn refuse_stale(&mut self, now: u64, party: Party, rng: &mut Rng) -> Vec<(u64, Way, u64)> {
        let mut due = Vec::new();
        for (id, conn) in &mut self.conns {
            let way = match party {
                p if conn.dialler == p => Way::Forth,
                p if conn.listener == p => Way::Back,
                _ => continue,
            };
            let pipe = conn.pipe(way);
            if pipe.ended && !matches!(pipe.queue.back(), Some(Packet::End)) {
                pipe.queue.push_back(Packet::End);
                pipe.last_at = pipe.last_at.max(now + rng.between(100, 2_000));
                due.push((*id, way, pipe.last_at));
            }
        }
        due
    }

    /// Connections that are there.
    pub fn open(&self) -> usize {
        self.conns.len()
    }

    /// Both connections' ends that `party` has.
    pub fn of(&self, party: Party) -> Vec<(u64, Way)> {
        self.conns
            .iter()
            .filter_map(|(id, conn)| match party {
                p if conn.dialler == p => Some((*id, Way::Forth)),
                p if conn.listener == p => Some((*id, Way::Back)),
                _ => None,
            })
            .collect()
    }

    /// Packets that wait, for when a cut has healed: connection, direction, how many.
    pub fn waiting(&self) -> Vec<(u64, Way, usize)> {
        let mut all = Vec::new();
        for (id, conn) in &self.conns {
            all.extend([(*id, Way::Forth, conn.forth.queue.len()), (*id, Way::Back, conn.back.queue.len())]);
        }
        all.retain(|(_, _, n)| *n > 0);
        all
    }
}
