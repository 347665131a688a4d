//! A storage node: the driver of its replicas' cores, as thin as the real one should be, and its agent, which makes,
//! opens and deletes replicas as the metadata say. Its vote is in `voter`.

use std::collections::BTreeMap;

use bytes::Bytes;
use node::control::ReplicaWish;
use node::control::agent::{ReplicaAssignment, assignments};
use node::control::core::{Reply as ControlReply, Request as ControlRequest};
use node::data::plane::{is_unmade, made_as};
use node::metadata::Command;
use node::replica::layout::Layout;
use node::replica::{
    Config, ConnId, CopyError, CopyToken, Create, DiskIo, FileKind, FileLengths, Input, Notice, OpId, OpenError,
    Output, ReplicaCore, ReplicaIds,
};
use node::store::Found;
use proto::cluster::{Pool, Refusal, RequestId};
use proto::frame::{Code, CopyTarget, HEADER_LEN, Header, Kind, PeerRole, Reply, Request};
use proto::id::{AttachId, Incarnation, MirrorId, NodeId, ReplicaId, VolumeId};
use proto::limits::BLOCK_SIZE;

use super::checker::Checker;
use super::disk::{Changed, Disk, DiskFaults};
use super::invariants::Watched;
use super::net::{Packet, Party, Way};
use super::voter::control_addr;
use super::world::{Event, MS, SECOND, World, cluster_id};

const TICK: u64 = 250 * MS;
/// How long a node waits for a peer's answer to a copy.
const COPY_TIMEOUT: u64 = 3 * SECOND;
/// How long it tries to reach a peer.
pub const DIAL_TIMEOUT: u64 = 1_500 * MS;
/// Map pages in memory: few, so that they come and go.
const CACHE_PAGES: usize = 2;
/// Between a fault and the attempt to open the replica again, and between attempts that fail.
const REOPEN: u64 = 500 * MS;
/// An agent's wish that was not carried out is asked for again after this.
const AGENT_AGAIN: u64 = 200 * MS;
/// Copies to peers that wait for an answer (R11), as in the node's driver.
const MAX_COPIES: usize = 1024;

/// A copy on its way to a peer.
#[derive(Clone, Debug)]
struct Copy {
    peer: usize,
    volume: VolumeId,
    replica: usize,
    /// The core that waits for it.
    boot: u32,
    token: CopyToken,
    attach: AttachId,
    request: Request,
}

#[derive(Debug)]
enum Peer {
    Dialling(Vec<u64>),
    Up(u64),
}

/// A connection that somebody made to this node.
#[derive(Debug)]
struct Served {
    volume: VolumeId,
    role: PeerRole,
    /// The replica that each channel stands for.
    channels: BTreeMap<u32, usize>,
}

/// See the module.
#[derive(Default)]
pub struct Node {
    /// Numbers the processes, and the gaps between them.
    pub process: u32,
    pub up: bool,
    /// How its disks behave now.
    pub faults: DiskFaults,
    /// How often the host was started anew, most often after it had lost power.
    pub boots: u32,
    incarnation: u64,
    served: BTreeMap<u64, Served>,
    peers: BTreeMap<(usize, VolumeId), Peer>,
    copies: BTreeMap<u64, Copy>,
    next_copy: u64,
    /// The agent has asked for something, so that what is applied here is confirmed.
    confirms: bool,
    /// What the agent wants to be carried out.
    wish: Option<(RequestId, Command)>,
    /// The ticket under which it has asked for that.
    pub(super) asked: Option<u64>,
}

impl Node {
    /// No process runs.
    pub fn is_down(&self) -> bool {
        !self.up
    }
}

/// A replica: its files, and the core that has them open.
pub struct Replica {
    pub node: usize,
    pub id: ReplicaId,
    pub volume: VolumeId,
    /// Its mirror's place in the stripe.
    pub mirror: usize,
    mirror_id: MirrorId,
    pub blocks: u64,
    pub layout: Layout,
    pub disk: Disk,
    /// The files exist.
    files: bool,
    pub core: Option<ReplicaCore>,
    /// Numbers the cores.
    pub boot: u32,
    pub is_open: bool,
    /// Counts what has ended an era of its page cache: see `node::store::era`.
    pub era: u64,
    /// As what it is to be made should there be nothing in its files.
    unmade: Option<Create>,
    /// Not to be opened before this.
    retry_at: u64,
    /// Deleted against its tombstone.
    pub gone: bool,
    pub watched: Watched,
    /// A copy of its files, for who restores them.
    pub image: Option<(Disk, Watched)>,
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
    /// Starts a node's process: its vote, and as the metadata become known its replicas.
    pub fn start_node(&mut self, node: usize) {
        for (conn, way, at) in self.net.refuse_stale(self.now, Party::Node(node), &mut self.rng) {
            self.schedule(at, Event::Deliver { conn, way });
        }
        let incarnation = self.rng.next();
        let n = &mut self.nodes[node];
        n.process += 1;
        n.up = true;
        n.confirms = false;
        n.incarnation = incarnation;
        let process = n.process;
        self.log(|| format!("node {node} starts, incarnation {incarnation:x}"));
        self.start_member(node);
        self.after(TICK, Event::NodeTick { node, process });
        // Like the real one, it opens what it knows from the log's snapshot without waiting for anybody.
        self.after(MS, Event::Agent { node, process });
    }

    /// kill -9, or the host's power: the process is gone. With `power` its disks' caches are lost as well, and
    /// nobody is told.
    pub fn kill_node(&mut self, node: usize, power: bool) {
        if self.nodes[node].is_down() {
            return;
        }
        self.log(|| format!("node {node} {}", if power { "loses power" } else { "is killed" }));
        self.unstop(Party::Node(node));
        self.kill_member(node);
        let n = &mut self.nodes[node];
        n.process += 1;
        n.up = false;
        n.served.clear();
        n.peers.clear();
        n.copies.clear();
        (n.wish, n.asked) = (None, None);
        if power {
            self.lose_trust();
            self.nodes[node].boots += 1;
        }
        for replica in self.replicas_of(node) {
            self.end_core(replica);
            if power {
                self.lose_cache(replica);
            }
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

    pub fn replicas_of(&self, node: usize) -> Vec<usize> {
        (0..self.replicas.len()).filter(|r| self.replicas[*r].node == node && !self.replicas[*r].gone).collect()
    }

    /// The core is gone; what it gave to the disk ends, or not, before another one opens the files (R1).
    fn end_core(&mut self, replica: usize) {
        let r = &mut self.replicas[replica];
        r.boot += 1;
        r.core = None;
        r.is_open = false;
        r.retry_at = 0;
        let changed = r.disk.process_gone(&mut self.rng);
        for what in changed {
            self.disk_changed(replica, what);
        }
    }

    fn lose_cache(&mut self, replica: usize) {
        self.lose_trust();
        let now = self.moment();
        let r = &mut self.replicas[replica];
        r.disk.lose_cache(&mut self.rng);
        r.watched.lost_at = now;
        self.disk_moved(replica);
        self.check_allocated(replica);
        self.cache_lost(replica);
    }

    /// What was in the replica's cache is not to be counted on: a sync has failed.
    fn end_era(&mut self, replica: usize) {
        self.lose_trust();
        let now = self.moment();
        let r = &mut self.replicas[replica];
        r.era += 1;
        r.watched.lost_at = now;
        self.cache_lost(replica);
    }

    // ---- the agent ------------------------------------------------------------------------------------------

    /// Makes, opens and deletes what the metadata say, as far as this node's member has applied them.
    pub(super) fn agent(&mut self, node: usize, process: u32) {
        if self.nodes[node].process != process || self.nodes[node].asked.is_some() {
            return;
        }
        if let Some((request, command)) = self.nodes[node].wish.clone() {
            return self.agent_asks(node, ControlRequest::Forward(request, command));
        }
        let Some(core) = &self.members[node].core else { return };
        let id = NodeId(node as u64 + 1);
        if !core.machine().members().contains_key(&id) {
            return;
        }
        let (view, confirmed) = (core.machine().view(false), core.is_confirmed());
        if !confirmed && !self.nodes[node].confirms {
            self.nodes[node].confirms = true;
            let (control_addr, data_addr) = (control_addr(node), data_addr(node));
            return self.agent_wants(node, view.revision, Command::UpdateMember { node: id, control_addr, data_addr });
        }
        if core.machine().pools_of(id).next().is_none() {
            let capacity = self.setup.pool_bytes;
            let pool =
                Pool { node: id, name: "p".into(), kind: "file".into(), path: "/p".into(), capacity, free: capacity };
            return self.agent_wants(node, view.revision, Command::ReportPools { node: id, pools: vec![pool] });
        }
        for placed in assignments(&view, id) {
            let replica = placed.replica;
            match placed.wish {
                ReplicaWish::Keep { created } => {
                    let at = self.enlist(node, &placed);
                    let r = &self.replicas[at];
                    if r.core.is_none() && self.now >= r.retry_at && (created || confirmed) {
                        self.open_files(at, created, confirmed);
                    }
                    if !created && self.replicas[at].is_open {
                        return self.agent_wants(node, view.revision, Command::ReplicaReady { node: id, replica });
                    }
                }
                ReplicaWish::Delete => {
                    self.delete_files(replica);
                    return self.agent_wants(node, view.revision, Command::ReplicaDeleted { node: id, replica });
                }
            }
        }
    }

    fn agent_wants(&mut self, node: usize, since: u64, command: Command) {
        let request = self.new_request(since);
        self.nodes[node].wish = Some((request, command.clone()));
        self.agent_asks(node, ControlRequest::Forward(request, command));
    }

    pub(super) fn agent_answered(&mut self, node: usize, ticket: u64, answer: Result<ControlReply, Refusal>) {
        let n = &mut self.nodes[node];
        if n.asked != Some(ticket) {
            return;
        }
        n.asked = None;
        // A definite refusal: the volume may have gone meanwhile, and the next view tells.
        let again = answer.is_err_and(|refusal| refusal.may_retry());
        if !again {
            n.wish = None;
        }
        let process = n.process;
        self.after(if again { AGENT_AGAIN } else { MS }, Event::Agent { node, process });
    }

    /// What the simulation knows of a replica that was placed here.
    fn enlist(&mut self, node: usize, placed: &ReplicaAssignment) -> usize {
        if let Some(at) = self.replica_at.get(&placed.replica) {
            return *at;
        }
        let blocks = placed.size / BLOCK_SIZE;
        let layout = Layout::new(blocks);
        self.replicas.push(Replica {
            node,
            id: placed.replica,
            volume: placed.volume,
            mirror: placed.mirror_index as usize,
            mirror_id: placed.mirror,
            blocks,
            layout,
            disk: Disk::new(&layout),
            files: false,
            core: None,
            boot: 0,
            is_open: false,
            era: 0,
            unmade: None,
            retry_at: 0,
            gone: false,
            watched: Watched::new(&layout),
            image: None,
        });
        let at = self.replicas.len() - 1;
        self.replica_at.insert(placed.replica, at);
        at
    }

    /// As the data plane does: a new replica is made, one that was made before is opened, and made anew only if its
    /// files are lost and the metadata are no older than this process.
    fn open_files(&mut self, replica: usize, created: bool, confirmed: bool) {
        let r = &mut self.replicas[replica];
        if r.gone {
            if !created || confirmed {
                self.fail(Checker::Files, format!("replica {replica} is made again, though its volume is deleted"));
            }
            return;
        }
        let written = (0..r.layout.data_len() / BLOCK_SIZE).any(|page| r.disk.data.cached(page).is_some());
        let found = Found { data: r.files && written, meta: r.files };
        r.unmade = match created {
            false => Some(made_as(found, Create::Clean)),
            true if confirmed => Some(made_as(found, Create::Lost)),
            true => None,
        };
        match (found.meta, r.unmade) {
            (true, _) => self.open_core(replica, None),
            (false, Some(create)) => self.make_files(replica, create),
            // Its files are gone, and whether it still belongs here is not known: nobody finds it until then.
            (false, None) => r.retry_at = self.now + REOPEN,
        }
    }

    fn make_files(&mut self, replica: usize, create: Create) {
        let r = &mut self.replicas[replica];
        r.files = true;
        r.disk.wipe_meta();
        let (lost_at, lacks) = (r.watched.lost_at, r.watched.lacks);
        r.watched = Watched::new(&r.layout);
        (r.watched.lost_at, r.watched.lacks) = (lost_at, lacks);
        self.open_core(replica, Some(create));
    }

    fn delete_files(&mut self, replica: ReplicaId) {
        let Some(at) = self.replica_at.get(&replica).copied() else { return };
        if self.replicas[at].gone {
            return;
        }
        self.log(|| format!("replica {at} is deleted"));
        self.end_core(at);
        let r = &mut self.replicas[at];
        r.gone = true;
        r.files = false;
        r.disk = Disk::gone();
    }

    /// Its files are lost, the node's process being down.
    pub fn lose_files(&mut self, replica: usize) {
        self.lose_trust();
        self.log(|| format!("replica {replica} has lost its files"));
        let now = self.moment();
        let r = &mut self.replicas[replica];
        assert!(r.core.is_none(), "files are lost under a running process");
        r.files = false;
        r.disk = Disk::new(&r.layout);
        r.watched = Watched::new(&r.layout);
        r.watched.lost_at = now;
        self.cache_lost(replica);
    }

    fn open_core(&mut self, replica: usize, create: Option<Create>) {
        let r = &mut self.replicas[replica];
        let n = &self.nodes[r.node];
        r.boot += 1;
        r.disk.drop_clean();
        let config = Config {
            ids: ReplicaIds { cluster: cluster_id(), volume: r.volume, mirror: r.mirror_id, replica: r.id },
            blocks: r.blocks,
            incarnation: Incarnation(n.incarnation),
            era: (u128::from(n.boots + 1) << 64 | u128::from(r.era)).to_le_bytes(),
            map_cache_pages: CACHE_PAGES,
        };
        let lengths = FileLengths { data: r.disk.data.bytes(), meta: r.disk.meta.bytes() };
        let mut out = Vec::new();
        r.core = Some(match create {
            Some(create) => ReplicaCore::create(config, create, &mut out),
            None => ReplicaCore::open(config, lengths, &mut out),
        });
        r.is_open = false;
        self.log(|| format!("replica {replica} opens, {create:?}"));
        self.replica_outputs(replica, out);
    }

    /// After a fault: the cache is dropped, and what the failed sync had not written is gone.
    pub(super) fn replica_opens(&mut self, replica: usize, boot: u32) {
        if self.replicas[replica].boot != boot {
            return;
        }
        if !self.replicas[replica].core.as_ref().is_some_and(ReplicaCore::is_quiet) {
            return self.after(REOPEN, Event::ReplicaOpens { replica, boot });
        }
        self.lose_cache(replica);
        self.open_core(replica, None);
    }

    pub(super) fn node_tick(&mut self, node: usize, process: u32) {
        if self.nodes[node].process != process {
            return;
        }
        for replica in self.replicas_of(node) {
            self.replica_step(replica, Input::Tick);
        }
        self.after(TICK, Event::NodeTick { node, process });
        let waits = |r: &usize| self.replicas[*r].core.is_none() && self.now >= self.replicas[*r].retry_at;
        if self.replicas_of(node).iter().any(waits) {
            self.agent(node, process);
        }
    }

    pub(super) fn disk_ends(&mut self, replica: usize, boot: u32, op: OpId) {
        if self.replicas[replica].boot != boot {
            return;
        }
        let r = &mut self.replicas[replica];
        let touched = r.disk.touches(op);
        let syncs = r.disk.is_sync(op);
        let (result, changed) = r.disk.end(op, &mut self.rng);
        self.log(|| format!("  replica {replica} disk {} {}", op.0, if result.is_ok() { "done" } else { "FAILED" }));
        if let (Err(_), Some((FileKind::Data, pages))) = (&result, &touched) {
            self.distrust(replica, pages.clone());
        }
        self.disk_changed(replica, changed);
        if syncs {
            self.disk_moved(replica);
            self.disk_betrays(replica);
            self.check_allocated(replica);
        }
        self.replica_step(replica, Input::DiskDone { op, result });
    }

    pub(super) fn replica_step(&mut self, replica: usize, input: Input) {
        let now = self.clock(Party::Node(self.replicas[replica].node));
        let Some(core) = &mut self.replicas[replica].core else { return };
        let mut out = std::mem::take(&mut self.scratch);
        core.step(now, input, &mut out);
        self.replica_outputs(replica, out);
    }

    fn replica_outputs(&mut self, replica: usize, mut out: Vec<Output>) {
        let node = self.replicas[replica].node;
        for output in out.drain(..) {
            match output {
                Output::Reply { conn, channel, tag, attach, reply } => {
                    self.log(|| {
                        format!("  replica {replica} -> conn {} {attach} #{tag} {}", conn.0, show_reply(&reply))
                    });
                    if !matches!(reply, Reply::Failed { .. }) {
                        self.check_fenced(replica, attach);
                    }
                    if let Reply::Attached(_) = &reply {
                        self.check_drained(replica, attach);
                        self.check_epoch_stored(replica, attach);
                    }
                    self.answer_frame(conn.0, channel, tag, attach, &reply);
                }
                Output::Disk { op, io } => self.begin_disk(replica, op, io),
                Output::SendCopy { to, token, request } => self.begin_copy(replica, &to, token, request),
                Output::CloseConnection { conn, reason } => {
                    self.fail(Checker::Bounds, format!("R11: node {node} closes connection {}: {reason}", conn.0));
                }
                Output::Opened(report) => {
                    self.replicas[replica].is_open = true;
                    self.log(|| format!("replica {replica} open: {report:?}"));
                    self.disk_moved(replica);
                    self.replica_opened(replica);
                    let process = self.nodes[node].process;
                    self.after(MS, Event::Agent { node, process });
                }
                Output::OpenFailed(error) => {
                    self.log(|| format!("replica {replica} can't be opened: {error}"));
                    self.end_core(replica);
                    self.replicas[replica].retry_at = self.now + REOPEN;
                    if matches!(error, OpenError::Disk { .. }) {
                        self.end_era(replica);
                    }
                    match self.replicas[replica].unmade {
                        Some(create) if is_unmade(&error) => return self.make_files(replica, create),
                        _ if is_unmade(&error) || matches!(error, OpenError::Disk { .. }) => {}
                        _ => self.fail(Checker::Files, format!("replica {replica} can't be opened: {error}")),
                    }
                    return;
                }
                Output::Faulted(reason) => {
                    self.log(|| format!("replica {replica} faulted: {reason}"));
                    let boot = self.replicas[replica].boot;
                    self.end_era(replica);
                    self.after(REOPEN, Event::ReplicaOpens { replica, boot });
                }
                Output::Notice(notice) => {
                    self.log(|| format!("  replica {replica} {notice:?}"));
                    if let Notice::ReadFailed { block } = notice {
                        self.unreadable(replica, block.0);
                    }
                }
            }
        }
        if self.scratch.capacity() < out.capacity() {
            self.scratch = out;
        }
    }

    fn answer_frame(&mut self, conn: u64, channel: u32, tag: u64, attach: AttachId, reply: &Reply) {
        let encoded = reply.encode(channel, attach, tag);
        self.fold(&encoded.head);
        self.send(conn, Way::Back, Packet::Frame(encoded.head, encoded.payload));
    }

    fn begin_disk(&mut self, replica: usize, op: OpId, io: DiskIo) {
        self.log(|| format!("  replica {replica} disk {} {}", op.0, show_io(&io)));
        let r = &mut self.replicas[replica];
        let faults = &mut self.nodes[r.node].faults;
        let (micros, changed) = r.disk.begin(op, io, faults, &mut self.rng);
        let boot = r.boot;
        self.disk_changed(replica, changed);
        self.after(micros, Event::DiskEnds { replica, boot, op: op.0 });
    }

    // ---- connections ----------------------------------------------------------------------------------------

    pub(super) fn node_receives(&mut self, node: usize, conn: u64, way: Way, packet: Packet) {
        if self.nodes[node].is_down() {
            return;
        }
        match (way, packet) {
            (Way::Forth, Packet::Frame(head, payload)) => self.requested(node, conn, &head, payload),
            (Way::Forth, Packet::End) => {
                self.close(conn, Way::Back, false);
                self.serves_no_more(node, conn);
            }
            (Way::Back, Packet::Frame(head, payload)) => {
                let header = decode_header(&head);
                let reply = Reply::decode(&header, &head[HEADER_LEN..], payload).expect("our own frame");
                // Tag 0 is the greeting's.
                let Some(copy) = self.nodes[node].copies.remove(&header.tag) else { return };
                let result = match reply {
                    Reply::Done(_) => Ok(()),
                    Reply::Failed { code, .. } => Err(CopyError::Refused(code)),
                    other => panic!("{other:?} answers a copy"),
                };
                self.copy_ended(copy, result);
            }
            (Way::Back, Packet::End) => {
                self.close(conn, Way::Forth, false);
                let peers = &mut self.nodes[node].peers;
                let gone = peers.iter().find(|(_, p)| matches!(p, Peer::Up(c) if *c == conn)).map(|(key, _)| *key);
                if let Some((peer, volume)) = gone {
                    peers.remove(&(peer, volume));
                    self.copies_failed(node, peer, volume);
                }
            }
        }
    }

    /// The node's end of a connection that was made to it is gone.
    pub(super) fn serves_no_more(&mut self, node: usize, conn: u64) {
        let Some(served) = self.nodes[node].served.remove(&conn) else { return };
        for replica in served.channels.into_values() {
            self.replica_step(replica, Input::ConnectionLost { conn: ConnId(conn) });
        }
    }

    fn requested(&mut self, node: usize, conn: u64, head: &Bytes, payload: Bytes) {
        let header = decode_header(head);
        let request = Request::decode(&header, &head[HEADER_LEN..], payload).expect("our own frame");
        let Header { channel, tag, attach, kind, .. } = header;
        if let Request::Hello { role, volume, .. } = request {
            self.nodes[node].served.insert(conn, Served { volume, role, channels: BTreeMap::new() });
            return self.answer_frame(conn, channel, tag, attach, &Reply::Done(kind));
        }
        self.log(|| format!("  node {node} <- conn {conn} {attach} #{tag} {}", show_request(&request)));
        let Some(served) = self.nodes[node].served.get(&conn) else { return };
        let (volume, role) = (served.volume, served.role);
        if let Request::Ping = request {
            for replica in served.channels.values().copied().collect::<Vec<_>>() {
                self.replica_step(replica, Input::Heard { conn: ConnId(conn) });
            }
            return self.answer_frame(conn, channel, tag, attach, &Reply::Done(Kind::Ping));
        }
        let here = |id: &ReplicaId| {
            let at = self.replica_at.get(id).copied();
            at.filter(|r| self.replicas[*r].volume == volume && self.replicas[*r].core.is_some())
        };
        let found = match (&request, role) {
            (Request::Attach { replica, .. }, PeerRole::Gateway) => here(replica).ok_or(Code::UnknownReplica),
            (Request::CopyWrite { replica, .. }, PeerRole::Node) => here(replica).ok_or(Code::UnknownReplica),
            (Request::CopyWrite { .. }, _) | (_, PeerRole::Node) => Err(Code::Invalid),
            (_, PeerRole::Gateway) => served.channels.get(&channel).copied().ok_or(Code::NotAttached),
        };
        let found = found.and_then(|r| match self.replicas[r].core {
            Some(_) => Ok(r),
            None if self.replicas[r].gone => Err(Code::UnknownReplica),
            None => Err(Code::Faulted),
        });
        match found {
            Ok(replica) => {
                if let Request::Attach { .. } = request {
                    let served = self.nodes[node].served.get_mut(&conn).expect("found above");
                    served.channels.insert(channel, replica);
                }
                self.replica_step(replica, Input::Heard { conn: ConnId(conn) });
                self.replica_step(replica, Input::Request { conn: ConnId(conn), channel, tag, attach, request });
            }
            Err(code) => {
                self.answer_frame(conn, channel, tag, attach, &Reply::Failed { kind, code, block: 0 });
            }
        }
    }

    fn copy_ended(&mut self, copy: Copy, result: Result<(), CopyError>) {
        // Answers to an older core's copies mean nothing to a newer one.
        if self.replicas[copy.replica].boot == copy.boot {
            self.replica_step(copy.replica, Input::CopySent { token: copy.token, result });
        }
    }

    fn copies_failed(&mut self, node: usize, peer: usize, volume: VolumeId) {
        let copies = &self.nodes[node].copies;
        let of_it = |c: &Copy| c.peer == peer && c.volume == volume;
        let tags: Vec<u64> = copies.iter().filter(|(_, c)| of_it(c)).map(|(t, _)| *t).collect();
        for tag in tags {
            let Some(copy) = self.nodes[node].copies.remove(&tag) else { continue };
            self.copy_ended(copy, Err(CopyError::Unreachable));
        }
    }

    fn begin_copy(&mut self, replica: usize, to: &CopyTarget, token: CopyToken, request: Request) {
        let (node, volume, boot) = {
            let r = &self.replicas[replica];
            (r.node, r.volume, r.boot)
        };
        let peer = node_of(&to.addr);
        self.log(|| {
            format!("  replica {replica} copy {} to node {peer} {} {}", token.0, to.attach, show_request(&request))
        });
        let n = &mut self.nodes[node];
        if n.copies.len() > MAX_COPIES {
            return self.fail(Checker::Bounds, format!("R11: node {node} has more than {MAX_COPIES} copies out"));
        }
        n.next_copy += 1;
        let tag = n.next_copy;
        n.copies.insert(tag, Copy { peer, volume, replica, boot, token, attach: to.attach, request });
        match n.peers.get_mut(&(peer, volume)) {
            Some(Peer::Up(conn)) => {
                let conn = *conn;
                self.send_copy(node, conn, tag);
            }
            Some(Peer::Dialling(waiting)) => waiting.push(tag),
            None => {
                n.peers.insert((peer, volume), Peer::Dialling(vec![tag]));
                let process = n.process;
                let (micros, reached) = self.dial(Party::Node(node), peer);
                self.after(micros, Event::PeerDialled { node, process, peer, volume, reached });
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

    fn send_copy(&mut self, node: usize, conn: u64, tag: u64) {
        let n = &self.nodes[node];
        let Some(copy) = n.copies.get(&tag) else { return };
        let encoded = copy.request.encode(0, copy.attach, tag);
        let process = n.process;
        self.fold(&encoded.head);
        self.send(conn, Way::Forth, Packet::Frame(encoded.head, encoded.payload));
        self.after(COPY_TIMEOUT, Event::CopyLate { node, process, tag });
    }

    pub(super) fn peer_dialled(&mut self, node: usize, process: u32, peer: usize, volume: VolumeId, reached: bool) {
        if self.nodes[node].process != process {
            return;
        }
        let Some(Peer::Dialling(waiting)) = self.nodes[node].peers.remove(&(peer, volume)) else { return };
        if !reached || self.nodes[peer].is_down() {
            return self.copies_failed(node, peer, volume);
        }
        let conn = self.net.connect(Party::Node(node), Party::Node(peer));
        self.nodes[node].peers.insert((peer, volume), Peer::Up(conn));
        self.greet(conn, PeerRole::Node, volume);
        for tag in waiting {
            self.send_copy(node, conn, tag);
        }
    }

    pub(super) fn greet(&mut self, conn: u64, role: PeerRole, volume: VolumeId) {
        let hello = Request::Hello { role, cluster: cluster_id(), volume, name: "sim".to_owned() };
        let encoded = hello.encode(0, AttachId::default(), 0);
        self.send(conn, Way::Forth, Packet::Frame(encoded.head, encoded.payload));
    }

    /// A peer has not answered in time: the connection is given up, nobody waits for what was sent on it, and it may
    /// still be done.
    pub(super) fn copy_late(&mut self, node: usize, process: u32, tag: u64) {
        if self.nodes[node].process != process {
            return;
        }
        let Some(copy) = self.nodes[node].copies.get(&tag) else { return };
        let (peer, volume) = (copy.peer, copy.volume);
        self.counters.late_copies += 1;
        self.log(|| format!("  node {node}: copy {tag} is late"));
        if let Some(Peer::Up(conn)) = self.nodes[node].peers.remove(&(peer, volume)) {
            self.close(conn, Way::Forth, false);
        }
        self.copies_failed(node, peer, volume);
    }

    fn disk_changed(&mut self, replica: usize, changed: Changed) {
        if let Some((file, pages)) = changed {
            self.check_dirty_before_data(replica, file, pages);
        }
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
        DiskIo::Sync { file: FileKind::Meta, map: false } => "sync meta file but for the map".to_owned(),
        DiskIo::Sync { file, .. } => format!("sync {file}"),
    }
}
