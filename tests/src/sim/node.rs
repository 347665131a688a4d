//! A storage node: the driver of one replica core, as thin as the real one should be.

use std::collections::BTreeMap;

use bytes::Bytes;
use node::replica::layout::Layout;
use node::replica::{
    Config, ConnId, CopyError, CopyToken, Create, DiskIo, FileKind, FileLengths, Input, OpId, OpenError, Output,
    ReplicaCore,
};
use proto::frame::{CopyTarget, HEADER_LEN, Header, PeerRole, Reply, Request};
use proto::id::{AttachId, Incarnation};

use super::disk::{Changed, Disk};
use super::net::{Packet, Party, Way};
use super::world::{Event, MS, SECOND, World, ids};

const TICK: u64 = 250 * MS;
/// How long a node waits for a peer's answer to a copy.
const COPY_TIMEOUT: u64 = 2 * SECOND;
/// How long it tries to reach a peer.
pub const DIAL_TIMEOUT: u64 = 1_500 * MS;
/// Map pages in memory: few, so that they come and go.
const CACHE_PAGES: usize = 2;

/// A copy on its way to a peer.
#[derive(Clone, Debug)]
struct Copy {
    peer: usize,
    attach: AttachId,
    request: Request,
}

#[derive(Debug)]
enum Peer {
    Dialling(Vec<u64>),
    Up(u64),
}

/// See the module.
pub struct Node {
    /// Numbers the cores that were opened, and the gaps between them.
    pub boot: u32,
    /// Numbers the processes: one may open several cores after one another.
    process: u32,
    pub core: Option<ReplicaCore>,
    pub disk: Disk,
    /// How often the host has lost power: another boot each time.
    power_cuts: u32,
    /// A core was made before.
    created: bool,
    /// The core faulted; a new one is opened when its disk is quiet.
    faulted: bool,
    pub is_open: bool,
    peers: BTreeMap<usize, Peer>,
    copies: BTreeMap<u64, Copy>,
}

impl Node {
    pub fn new(layout: &Layout) -> Self {
        Self {
            boot: 0,
            process: 0,
            core: None,
            disk: Disk::new(layout.data_len(), layout.meta_len()),
            power_cuts: 0,
            created: false,
            faulted: false,
            is_open: false,
            peers: BTreeMap::new(),
            copies: BTreeMap::new(),
        }
    }

    /// No process runs.
    pub fn is_down(&self) -> bool {
        self.core.is_none()
    }
}

pub fn decode_header(head: &Bytes) -> Header {
    let bytes: &[u8; HEADER_LEN] = head[..HEADER_LEN].try_into().expect("a header's length");
    Header::decode(bytes).expect("our own header")
}

pub fn data_addr(node: usize) -> String {
    format!("node-{node}:7400")
}

fn node_of(addr: &str) -> usize {
    addr.trim_start_matches("node-").trim_end_matches(":7400").parse().expect("an address of ours")
}

impl World {
    /// Starts a node's process, whose files are there or are made.
    pub fn start_node(&mut self, node: usize) {
        for (conn, way, at) in self.net.refuse_stale(self.now, Party::Node(node), &mut self.rng) {
            self.schedule(at, Event::Deliver { conn, way });
        }
        self.open_core(node);
        self.nodes[node].process += 1;
        let process = self.nodes[node].process;
        self.after(TICK, Event::NodeTick { node, process });
    }

    fn open_core(&mut self, node: usize) {
        let incarnation = Incarnation(self.rng.next());
        // Copies belong to a core, and so do the connections on which they are answered.
        for peer in std::mem::take(&mut self.nodes[node].peers).into_values() {
            if let Peer::Up(conn) = peer {
                self.close(conn, Way::Forth, false);
            }
        }
        let n = &mut self.nodes[node];
        n.copies.clear();
        n.boot += 1;
        let config = Config {
            ids: ids(node),
            blocks: self.setup.blocks,
            incarnation,
            boot: u128::from(n.power_cuts + 1).to_le_bytes(),
            cache_kept: !n.faulted,
            map_cache_pages: CACHE_PAGES,
        };
        let lengths = FileLengths { data: n.disk.data.bytes(), meta: n.disk.meta.bytes() };
        let mut out = Vec::new();
        n.core = Some(if n.created {
            ReplicaCore::open(config, lengths, &mut out)
        } else {
            ReplicaCore::create(config, Create::Clean, &mut out)
        });
        (n.faulted, n.is_open) = (false, false);
        self.log(|| format!("node {node} starts, incarnation {incarnation}"));
        self.node_outputs(node, out);
    }

    /// kill -9, or the host's power: the process is gone. With `power` its disk's cache is lost as well, and nobody
    /// is told.
    pub fn kill_node(&mut self, node: usize, power: bool) {
        if self.nodes[node].is_down() {
            return;
        }
        self.log(|| format!("node {node} {}", if power { "loses power" } else { "is killed" }));
        self.unstop(Party::Node(node));
        let n = &mut self.nodes[node];
        n.boot += 1;
        n.process += 1;
        n.core = None;
        (n.faulted, n.is_open) = (false, false);
        n.peers.clear();
        n.copies.clear();
        let changed = n.disk.process_gone(&mut self.rng);
        for what in changed {
            self.disk_changed(node, what);
        }
        if power {
            self.lossless = false;
            self.nodes[node].power_cuts += 1;
            self.nodes[node].disk.lose_cache(&mut self.rng);
            self.invariants.cache_lost(node, &self.nodes[node].disk);
        }
        for (conn, way) in self.net.of(Party::Node(node)) {
            if power {
                self.net.fall_silent(conn, Party::Node(node));
            } else {
                let reset = self.rng.chance(500);
                self.close(conn, way, reset);
            }
        }
    }

    pub(super) fn node_tick(&mut self, node: usize, process: u32) {
        if self.nodes[node].is_down() || self.nodes[node].process != process {
            return;
        }
        self.node_step(node, Input::Tick);
        self.after(TICK, Event::NodeTick { node, process });
    }

    pub(super) fn disk_ends(&mut self, node: usize, boot: u32, op: OpId) {
        if self.nodes[node].boot != boot {
            return;
        }
        let damaged = self.nodes[node].disk.would_change(op);
        let (result, changed) = self.nodes[node].disk.end(op, &mut self.rng);
        self.log(|| format!("  node {node} disk {} {}", op.0, if result.is_ok() { "done" } else { "FAILED" }));
        if let (Err(_), Some((FileKind::Data, pages))) = (&result, &damaged) {
            self.distrust(pages.clone());
        }
        self.disk_changed(node, changed);
        self.invariants.disk_moved(node, &self.nodes[node].disk);
        self.node_step(node, Input::DiskDone { op, result });
    }

    pub(super) fn node_step(&mut self, node: usize, input: Input) {
        let now = self.clock(Party::Node(node));
        let Some(core) = &mut self.nodes[node].core else { return };
        let mut out = Vec::new();
        core.step(now, input, &mut out);
        self.node_outputs(node, out);
        let n = &self.nodes[node];
        if n.faulted && n.core.as_ref().is_some_and(ReplicaCore::is_quiet) {
            // A failed sync has dropped the cache, or part of it: what it did not write is gone.
            self.lossless = false;
            self.nodes[node].disk.lose_cache(&mut self.rng);
            self.invariants.cache_lost(node, &self.nodes[node].disk);
            self.open_core(node);
        }
    }

    fn node_outputs(&mut self, node: usize, out: Vec<Output>) {
        for output in out {
            match output {
                Output::Reply { conn, channel, tag, attach, reply } => {
                    self.log(|| format!("  node {node} -> conn {} {attach} #{tag} {}", conn.0, show_reply(&reply)));
                    if let Reply::Attached(_) = &reply {
                        self.check_drained(node, attach);
                    }
                    let encoded = reply.encode(channel, attach, tag);
                    self.fold(&encoded.head);
                    self.send(conn.0, Way::Back, Packet::Frame(encoded.head, encoded.payload));
                }
                Output::Disk { op, io } => self.begin_disk(node, op, io),
                Output::SendCopy { to, token, request } => self.begin_copy(node, to, token, request),
                Output::CloseConnection { conn, reason } => {
                    self.fail(format!("node {node} closes connection {}: {reason}", conn.0));
                }
                Output::Opened(report) => {
                    self.nodes[node].created = true;
                    self.nodes[node].is_open = true;
                    self.log(|| format!("node {node} open: {report:?}"));
                    self.invariants.disk_moved(node, &self.nodes[node].disk);
                }
                // The process says so and is started again.
                Output::OpenFailed(error @ OpenError::Disk { .. }) => {
                    self.log(|| format!("node {node} could not open its replica: {error}"));
                    self.kill_node(node, false);
                    let boot = self.nodes[node].boot;
                    self.after(500 * MS, Event::NodeStarts { node, boot });
                    return;
                }
                Output::OpenFailed(error) => self.fail(format!("node {node} could not open its replica: {error}")),
                Output::Faulted(reason) => {
                    self.log(|| format!("node {node} faulted: {reason}"));
                    self.nodes[node].faulted = true;
                }
                Output::Notice(notice) => self.log(|| format!("  node {node} {notice:?}")),
            }
        }
    }

    fn begin_disk(&mut self, node: usize, op: OpId, io: DiskIo) {
        self.log(|| format!("  node {node} disk {} {}", op.0, show_io(&io)));
        let (micros, changed) = self.nodes[node].disk.begin(op, io, &mut self.rng);
        self.disk_changed(node, changed);
        let boot = self.nodes[node].boot;
        self.after(micros, Event::DiskEnds { node, boot, op: op.0 });
    }

    fn disk_changed(&mut self, node: usize, changed: Changed) {
        if let Some((file, pages)) = changed
            && let Err(what) = self.invariants.changed(node, &self.nodes[node].disk, file, pages)
        {
            self.fail(what);
        }
    }

    // ---- connections ----------------------------------------------------------------------------------------

    pub(super) fn node_receives(&mut self, node: usize, conn: u64, way: Way, packet: Packet) {
        if self.nodes[node].is_down() {
            return;
        }
        match (way, packet) {
            (Way::Forth, Packet::Frame(head, payload)) => {
                let header = decode_header(&head);
                let request = Request::decode(&header, &head[HEADER_LEN..], payload).expect("our own frame");
                let Header { channel, tag, attach, .. } = header;
                if let Request::Hello { .. } = request {
                    let hello = Reply::Done(header.kind).encode(channel, attach, tag);
                    self.send(conn, Way::Back, Packet::Frame(hello.head, hello.payload));
                    return;
                }
                self.log(|| format!("  node {node} <- conn {conn} {attach} #{tag} {}", show_request(&request)));
                self.node_step(node, Input::Heard { conn: ConnId(conn) });
                self.node_step(node, Input::Request { conn: ConnId(conn), channel, tag, attach, request });
            }
            (Way::Forth, Packet::End) => {
                self.close(conn, Way::Back, false);
                self.node_step(node, Input::ConnectionLost { conn: ConnId(conn) });
            }
            (Way::Back, Packet::Frame(head, payload)) => {
                let header = decode_header(&head);
                let reply = Reply::decode(&header, &head[HEADER_LEN..], payload).expect("our own frame");
                // Token 0 is the greeting's.
                if self.nodes[node].copies.remove(&header.tag).is_some() {
                    let result = match reply {
                        Reply::Done(_) => Ok(()),
                        Reply::Failed { code, .. } => Err(CopyError::Refused(code)),
                        other => panic!("{other:?} answers a copy"),
                    };
                    self.node_step(node, Input::CopySent { token: CopyToken(header.tag), result });
                }
            }
            (Way::Back, Packet::End) => {
                self.close(conn, Way::Forth, false);
                let peers = &mut self.nodes[node].peers;
                let gone = peers.iter().find(|(_, p)| matches!(p, Peer::Up(c) if *c == conn)).map(|(peer, _)| *peer);
                if let Some(peer) = gone {
                    peers.remove(&peer);
                    self.copies_failed(node, peer);
                }
            }
        }
    }

    fn copies_failed(&mut self, node: usize, peer: usize) {
        let copies = &self.nodes[node].copies;
        let tokens: Vec<u64> = copies.iter().filter(|(_, c)| c.peer == peer).map(|(t, _)| *t).collect();
        for token in tokens {
            self.nodes[node].copies.remove(&token);
            let result = Err(CopyError::Unreachable);
            self.node_step(node, Input::CopySent { token: CopyToken(token), result });
        }
    }

    fn begin_copy(&mut self, node: usize, to: CopyTarget, token: CopyToken, request: Request) {
        let peer = node_of(&to.addr);
        self.log(|| format!("  node {node} copy {} to node {peer} {} {}", token.0, to.attach, show_request(&request)));
        let n = &mut self.nodes[node];
        n.copies.insert(token.0, Copy { peer, attach: to.attach, request });
        match n.peers.get_mut(&peer) {
            Some(Peer::Up(conn)) => {
                let conn = *conn;
                self.send_copy(node, conn, token.0);
            }
            Some(Peer::Dialling(waiting)) => waiting.push(token.0),
            None => {
                n.peers.insert(peer, Peer::Dialling(vec![token.0]));
                let boot = n.boot;
                let (micros, reached) = self.dial(Party::Node(node), peer);
                self.after(micros, Event::PeerDialled { node, boot, peer, reached });
            }
        }
    }

    /// What becomes of a dial: how long it takes, and whether there is a connection at the end.
    pub(super) fn dial(&mut self, from: Party, node: usize) -> (u64, bool) {
        let to = Party::Node(node);
        let cut = self.net.is_cut(from, to) || self.net.is_cut(to, from);
        let delay = 2 * self.net.delay(from, to, &mut self.rng);
        match (cut, self.nodes[node].is_down()) {
            (true, _) => (DIAL_TIMEOUT, false),
            // A host without power does not answer; one without the process refuses.
            (false, true) => (if self.rng.chance(500) { delay } else { DIAL_TIMEOUT }, false),
            (false, false) => (delay, true),
        }
    }

    fn send_copy(&mut self, node: usize, conn: u64, token: u64) {
        let n = &self.nodes[node];
        let Some(copy) = n.copies.get(&token) else { return };
        let encoded = copy.request.encode(0, copy.attach, token);
        let boot = n.boot;
        self.fold(&encoded.head);
        self.send(conn, Way::Forth, Packet::Frame(encoded.head, encoded.payload));
        self.after(COPY_TIMEOUT, Event::CopyLate { node, boot, token });
    }

    pub(super) fn peer_dialled(&mut self, node: usize, boot: u32, peer: usize, reached: bool) {
        if self.nodes[node].boot != boot {
            return;
        }
        let Some(Peer::Dialling(waiting)) = self.nodes[node].peers.remove(&peer) else { return };
        if !reached || self.nodes[peer].is_down() {
            return self.copies_failed(node, peer);
        }
        let conn = self.net.connect(Party::Node(node), Party::Node(peer));
        self.nodes[node].peers.insert(peer, Peer::Up(conn));
        self.greet(conn, PeerRole::Node);
        for token in waiting {
            self.send_copy(node, conn, token);
        }
    }

    pub(super) fn greet(&mut self, conn: u64, role: PeerRole) {
        let ids = ids(0);
        let hello = Request::Hello { role, cluster: ids.cluster, volume: ids.volume, name: "sim".to_owned() };
        let encoded = hello.encode(0, AttachId::default(), 0);
        self.send(conn, Way::Forth, Packet::Frame(encoded.head, encoded.payload));
    }

    /// A peer has not answered in time: nobody waits for it, and it may still do what it was sent.
    pub(super) fn copy_late(&mut self, node: usize, boot: u32, token: u64) {
        if self.nodes[node].boot != boot || self.nodes[node].copies.remove(&token).is_none() {
            return;
        }
        self.counters.late_copies += 1;
        self.log(|| format!("  node {node} copy {token} is late"));
        self.node_step(node, Input::CopySent { token: CopyToken(token), result: Err(CopyError::Unreachable) });
    }
}

pub fn show_request(request: &Request) -> String {
    match request {
        Request::Write { block, fua, sums, .. } => {
            format!("Write {block}+{}{}", sums.len(), if *fua { " fua" } else { "" })
        }
        Request::CopyWrite { block, count, sums, .. } => {
            format!("CopyWrite {block}+{count}{}", if sums.is_empty() { " unallocated" } else { "" })
        }
        Request::Hashes { block, count, .. } => format!("Hashes {block}+{count}"),
        Request::CopyTo { block, blocks, target } => {
            let n: u32 = blocks.iter().map(|w| w.count_ones()).sum();
            format!("CopyTo {n} blocks from {block} to {} {}", target.addr, target.attach)
        }
        other => format!("{other:?}"),
    }
}

pub fn show_reply(reply: &Reply) -> String {
    match reply {
        Reply::Read { block, sums, .. } => format!("Read {block}+{}", sums.len()),
        Reply::Hashes(hashes) => {
            let bad = hashes.iter().filter(|h| !h.intact).count();
            format!("Hashes of {}, {bad} bad", hashes.len())
        }
        other => format!("{other:?}"),
    }
}

fn show_io(io: &DiskIo) -> String {
    match io {
        DiskIo::Write { file, offset, bytes } => format!("write {file} page {}+{}", offset / 4096, bytes.len() / 4096),
        DiskIo::Read { file, offset, len } => format!("read {file} page {}+{}", offset / 4096, len / 4096),
        DiskIo::Punch { offset, len } => format!("punch page {}+{}", offset / 4096, len / 4096),
        DiskIo::Sync { file } => format!("sync {file}"),
    }
}
