//! A gateway: the driver of one mirror core, with its links, its lease and its questions to the control plane.

use std::collections::BTreeMap;

use client::mirror::{
    Event as MirrorEvent, Input, Mirror, MirrorConfig, OpOutcome, Output, ReplicaDef, SetDecision, StopReason, TICK_MS,
};
use proto::frame::{HEADER_LEN, Header, PeerRole, Reply, Request};
use proto::id::{AttachId, Epoch, ReplicaId, SetVersion};
use proto::limits::{CLOCK_DRIFT_PERMILLE, LEASE_MS, LEASE_RENEW_MS};

use super::control::{Answer, Ask};
use super::net::{Packet, Party, Way};
use super::node::{data_addr, decode_header, show_reply, show_request};
use super::world::{Event, MS, SECOND, World, ids, node_id, replica_id};

/// A node that was silent for so long is taken for lost (§8).
const SILENT_MS: u64 = 1_500;
const PING_MS: u64 = 400;
const REDIAL_MS: u64 = 250;
/// The tag of pings: the mirror's own tags rise from 1.
const PING_TAG: u64 = u64::MAX;
/// An unanswered question is asked again after this.
const ASK_AGAIN: u64 = SECOND;

#[derive(Debug)]
enum Link {
    Down { retry_at: u64 },
    Dialling,
    Up { conn: u64, greeted: bool, heard_at: u64, pinged_at: u64 },
}

/// One session, from its opening to its end.
pub struct Session {
    /// Numbers the sessions of a run.
    number: u64,
    pub epoch: Epoch,
    pub mirror: Mirror,
    links: Vec<Link>,
    /// On the gateway's clock.
    lease_until: u64,
    renewed_at: u64,
    /// Outcomes that came while the lease was not live (R3).
    held: Vec<(u64, OpOutcome)>,
    /// The mirror's requests: which client waits for it.
    pub ops: BTreeMap<u64, usize>,
    pub next_op: u64,
    pub closing: bool,
}

/// See the module.
#[derive(Default)]
pub struct Gateway {
    pub boot: u32,
    pub alive: bool,
    /// It is to own the volume.
    pub wanted: bool,
    /// It is to take the volume over although another's lease may live.
    pub take_over: bool,
    pub session: Option<Session>,
    /// The question that opens a session is out, asked at this time of its clock.
    opening: Option<u64>,
    /// Questions without an answer: when they were asked.
    asked: BTreeMap<u64, u64>,
    next_ask: u64,
    /// Not to be opened again before this.
    pause_until: u64,
    /// How the last close ended.
    pub closed_clean: Option<bool>,
}

/// A lease as its holder counts it, less what clocks may differ by.
fn safe(lease_ms: u64) -> u64 {
    lease_ms - lease_ms * CLOCK_DRIFT_PERMILLE / 1000
}

impl Gateway {
    /// Whether initiators find the volume here.
    pub fn takes_requests(&self) -> bool {
        self.alive && self.session.as_ref().is_some_and(|s| !s.closing)
    }
}

impl World {
    pub fn start_gateway(&mut self, gateway: usize) {
        self.log(|| format!("gateway {gateway} starts"));
        let g = &mut self.gateways[gateway];
        g.boot += 1;
        g.alive = true;
        let boot = g.boot;
        self.after(TICK_MS * MS, Event::GatewayTick { gateway, boot });
    }

    pub fn kill_gateway(&mut self, gateway: usize) {
        if !self.gateways[gateway].alive {
            return;
        }
        self.log(|| format!("gateway {gateway} is killed"));
        self.unstop(Party::Gateway(gateway));
        self.end_session(gateway);
        let g = &mut self.gateways[gateway];
        g.boot += 1;
        g.alive = false;
        g.opening = None;
        g.asked.clear();
    }

    /// The volume is to be served here, and nowhere else.
    pub fn want_on(&mut self, gateway: usize, take_over: bool) {
        for (i, g) in self.gateways.iter_mut().enumerate() {
            g.wanted = i == gateway;
            g.take_over = take_over && i == gateway;
        }
    }

    /// Begins a graceful end of the session.
    pub fn close_session(&mut self, gateway: usize) {
        let running = self.gateways[gateway].session.as_mut().filter(|s| !s.closing);
        if let Some(session) = running {
            session.closing = true;
            self.log(|| format!("gateway {gateway} closes"));
            self.gateway_step(gateway, Input::Close);
        }
    }

    fn end_session(&mut self, gateway: usize) {
        let Some(session) = self.gateways[gateway].session.take() else { return };
        self.log(|| format!("gateway {gateway} ends session {}", session.epoch));
        for link in &session.links {
            if let Link::Up { conn, .. } = link {
                let reset = self.rng.chance(500);
                self.close(*conn, Way::Forth, reset);
            }
        }
        let status = session.mirror.status();
        self.counters.copied_bytes += status.copied_bytes;
        self.counters.restamped += status.restamped_blocks;
        self.dropped(session.ops.into_values());
    }

    pub(super) fn gateway_tick(&mut self, gateway: usize, boot: u32) {
        if self.gateways[gateway].boot != boot {
            return;
        }
        self.after(TICK_MS * MS, Event::GatewayTick { gateway, boot });
        let now = self.clock(Party::Gateway(gateway));
        let g = &mut self.gateways[gateway];
        if g.session.is_none() {
            if g.wanted && g.opening.is_none() && now >= g.pause_until {
                g.opening = Some(now);
                let take_over = g.take_over;
                self.ask(gateway, Ask::Open { take_over });
            }
            return;
        }
        if !g.wanted && self.healed {
            // It opened late what another is to serve: with nothing in the way it hands over by itself.
            self.close_session(gateway);
        }
        self.tend_links(gateway, now);
        self.gateway_step(gateway, Input::Tick);
        if let Some(session) = &mut self.gateways[gateway].session
            && now >= session.renewed_at + LEASE_RENEW_MS
        {
            session.renewed_at = now;
            let epoch = session.epoch;
            self.ask(gateway, Ask::Renew { epoch });
        }
    }

    // ---- links ----------------------------------------------------------------------------------------------

    fn tend_links(&mut self, gateway: usize, now: u64) {
        for node in 0..self.nodes.len() {
            let Some(session) = &mut self.gateways[gateway].session else { return };
            match &mut session.links[node] {
                Link::Down { retry_at } if now >= *retry_at => {
                    session.links[node] = Link::Dialling;
                    let number = session.number;
                    let (micros, reached) = self.dial(Party::Gateway(gateway), node);
                    self.after(micros, Event::Dialled { gateway, session: number, node, reached });
                }
                Link::Up { conn, heard_at, .. } if now > *heard_at + SILENT_MS => {
                    let conn = *conn;
                    self.log(|| format!("gateway {gateway}: node {node} is silent"));
                    self.close(conn, Way::Forth, false);
                    self.link_down(gateway, node);
                }
                Link::Up { conn, pinged_at, greeted: true, .. } if now >= *pinged_at + PING_MS => {
                    *pinged_at = now;
                    let conn = *conn;
                    let ping = Request::Ping.encode(0, AttachId::default(), PING_TAG);
                    self.send(conn, Way::Forth, Packet::Frame(ping.head, ping.payload));
                }
                _ => {}
            }
        }
    }

    pub(super) fn dialled(&mut self, gateway: usize, number: u64, node: usize, reached: bool) {
        let now = self.clock(Party::Gateway(gateway));
        let Some(session) = &mut self.gateways[gateway].session else { return };
        if session.number != number || !matches!(session.links[node], Link::Dialling) {
            return;
        }
        if !reached || self.nodes[node].is_down() {
            return self.link_down(gateway, node);
        }
        let conn = self.net.connect(Party::Gateway(gateway), Party::Node(node));
        session.links[node] = Link::Up { conn, greeted: false, heard_at: now, pinged_at: now };
        self.greet(conn, PeerRole::Gateway);
    }

    fn link_down(&mut self, gateway: usize, node: usize) {
        let now = self.clock(Party::Gateway(gateway));
        let Some(session) = &mut self.gateways[gateway].session else { return };
        session.links[node] = Link::Down { retry_at: now + REDIAL_MS };
        self.gateway_step(gateway, Input::LinkDown { slot: node });
    }

    pub(super) fn gateway_receives(&mut self, gateway: usize, conn: u64, packet: Packet) {
        let now = self.clock(Party::Gateway(gateway));
        let Some(session) = &mut self.gateways[gateway].session else { return };
        let link = |l: &Link| matches!(l, Link::Up { conn: c, .. } if *c == conn);
        let Some(node) = session.links.iter().position(link) else { return };
        let Link::Up { heard_at, greeted, .. } = &mut session.links[node] else { unreachable!("found above") };
        match packet {
            Packet::Frame(head, payload) => {
                *heard_at = now;
                let first = !std::mem::replace(greeted, true);
                let header = decode_header(&head);
                let Header { channel, tag, attach, .. } = header;
                let reply = Reply::decode(&header, &head[HEADER_LEN..], payload).expect("our own frame");
                if first {
                    self.gateway_step(gateway, Input::LinkUp { slot: node });
                } else if tag != PING_TAG {
                    assert_eq!(channel as usize, node, "answers come on the channel that was asked on");
                    self.log(|| format!("  gateway {gateway} <- node {node} {attach} #{tag} {}", show_reply(&reply)));
                    self.gateway_step(gateway, Input::Reply { slot: node, tag, attach, reply });
                }
            }
            Packet::End => {
                self.close(conn, Way::Forth, false);
                self.link_down(gateway, node);
            }
        }
    }

    /// Resets the connection between a gateway and a node; each end finds out when it does.
    pub fn reset_link(&mut self, gateway: usize, node: usize) {
        let Some(session) = &self.gateways[gateway].session else { return };
        let Link::Up { conn, .. } = session.links[node] else { return };
        self.log(|| format!("gateway {gateway}: connection to node {node} is reset"));
        self.close(conn, Way::Back, true);
        self.close(conn, Way::Forth, true);
        self.node_step(node, node::replica::Input::ConnectionLost { conn: node::replica::ConnId(conn) });
        self.link_down(gateway, node);
    }

    // ---- the mirror -----------------------------------------------------------------------------------------

    pub(super) fn gateway_step(&mut self, gateway: usize, input: Input) {
        let now = self.clock(Party::Gateway(gateway));
        let Some(session) = &mut self.gateways[gateway].session else { return };
        let mut out = Vec::new();
        session.mirror.step(now, input, &mut out);
        for output in out {
            self.mirror_output(gateway, now, output);
        }
    }

    fn mirror_output(&mut self, gateway: usize, now: u64, output: Output) {
        let Some(session) = &mut self.gateways[gateway].session else { return };
        match output {
            Output::Send { slot, attach, tag, request } => {
                // A link that was lost in this very step takes nothing; the mirror is told so next.
                if let Link::Up { conn, .. } = session.links[slot] {
                    self.log(|| {
                        format!("  gateway {gateway} -> node {slot} {attach} #{tag} {}", show_request(&request))
                    });
                    let encoded = request.encode(slot as u32, attach, tag);
                    self.fold(&encoded.head);
                    self.send(conn, Way::Forth, Packet::Frame(encoded.head, encoded.payload));
                }
            }
            Output::GiveUp { slot, attach } => {
                self.log(|| format!("gateway {gateway} gives up {attach} at node {slot}"))
            }
            Output::Complete { id, outcome } => {
                let live = now < session.lease_until;
                if outcome == OpOutcome::Done {
                    self.acknowledged(gateway, id);
                }
                if live {
                    self.reply(gateway, id, outcome);
                } else {
                    self.gateways[gateway].session.as_mut().expect("it is stepping").held.push((id, outcome));
                    self.counters.held_replies += 1;
                }
            }
            Output::ProposeSet { version, members, awaited } => {
                let epoch = session.epoch;
                self.log(|| format!("gateway {gateway} proposes {members:?} after version {version}"));
                self.ask(gateway, Ask::Propose { epoch, version, members, awaited });
            }
            Output::PowerOn => {
                self.log(|| format!("gateway {gateway}: POWER ON"));
                self.counters.power_ons += 1;
                if !self.lossless {
                    self.history.power_on();
                }
            }
            Output::Stop(reason) => {
                if let StopReason::MetadataIsOld { .. } = reason {
                    self.fail(format!("gateway {gateway} stops: {reason}"));
                }
                self.log(|| format!("gateway {gateway} stops: {reason}"));
                self.end_session(gateway);
                self.pause(gateway);
            }
            Output::Closed { clean } => {
                let (epoch, open) = (session.epoch, session.ops.len() - session.held.len());
                self.log(|| format!("gateway {gateway} closed, clean: {clean}"));
                // A close that could not be clean ends the session as a kill does; a clean one answers everything.
                if open > 0 && clean {
                    return self.fail(format!("gateway {gateway} closed with {open} requests unanswered"));
                }
                self.gateways[gateway].closed_clean = Some(clean);
                self.end_session(gateway);
                self.ask(gateway, Ask::Close { epoch });
                self.pause(gateway);
            }
            Output::Log(event) => {
                self.log(|| format!("gateway {gateway}: {event}"));
                match event {
                    MirrorEvent::Lost { .. } => self.counters.lost += 1,
                    MirrorEvent::SetChanged { .. } => self.counters.set_changes += 1,
                    MirrorEvent::Joining { .. } => self.counters.joins += 1,
                    _ => {}
                }
            }
        }
    }

    fn pause(&mut self, gateway: usize) {
        let now = self.clock(Party::Gateway(gateway));
        self.gateways[gateway].pause_until = now + self.rng.between(0, 500);
    }

    // ---- the control plane ----------------------------------------------------------------------------------

    fn ask(&mut self, gateway: usize, ask: Ask) {
        let now = self.clock(Party::Gateway(gateway));
        let g = &mut self.gateways[gateway];
        g.next_ask += 1;
        let (id, boot) = (g.next_ask, g.boot);
        g.asked.insert(id, now);
        self.asked.insert((gateway, id), ask);
        self.send_ask(gateway, boot, id);
    }

    fn send_ask(&mut self, gateway: usize, boot: u32, id: u64) {
        let party = Party::Gateway(gateway);
        let lost = self.net.is_cut(party, Party::Control) || self.faults_on && self.rng.chance(20);
        if !lost {
            let delay = self.net.delay(party, Party::Control, &mut self.rng);
            self.after(delay, Event::AskArrives { gateway, boot, id });
        }
        self.after(ASK_AGAIN, Event::AskAgain { gateway, boot, id });
    }

    pub(super) fn ask_again(&mut self, gateway: usize, boot: u32, id: u64) {
        if self.gateways[gateway].boot != boot || !self.gateways[gateway].asked.contains_key(&id) {
            return;
        }
        // A renewal that was not answered is not worth asking again: the next one is under way.
        if matches!(self.asked[&(gateway, id)], Ask::Renew { .. }) {
            self.gateways[gateway].asked.remove(&id);
            return;
        }
        self.send_ask(gateway, boot, id);
    }

    pub(super) fn ask_arrives(&mut self, gateway: usize, boot: u32, id: u64) {
        let now = self.clock(Party::Control);
        let ask = self.asked[&(gateway, id)].clone();
        let Some(answer) = self.control.ask(now, gateway, id, ask) else { return };
        self.log(|| format!("control plane answers gateway {gateway} #{id}: {answer:?}"));
        let party = Party::Gateway(gateway);
        if self.net.is_cut(Party::Control, party) || (self.faults_on && self.rng.chance(20)) {
            return;
        }
        let delay = self.net.delay(Party::Control, party, &mut self.rng);
        self.answers.push(answer);
        let at = self.answers.len() - 1;
        self.after(delay, Event::AnswerArrives { gateway, boot, id, at });
    }

    pub(super) fn answer_arrives(&mut self, gateway: usize, boot: u32, id: u64, at: usize) {
        let g = &mut self.gateways[gateway];
        if g.boot != boot {
            return;
        }
        let Some(asked_at) = g.asked.remove(&id) else { return };
        let about = match &self.asked[&(gateway, id)] {
            Ask::Renew { epoch } | Ask::Propose { epoch, .. } | Ask::Close { epoch } => Some(*epoch),
            Ask::Open { .. } => None,
        };
        if about.is_some() && g.session.as_ref().map(|s| s.epoch) != about {
            return;
        }
        match self.answers[at].clone() {
            Answer::Opened { epoch, old_lease_ms, version, members, awaited } => {
                g.opening = None;
                g.take_over = false;
                if g.session.is_none() {
                    self.opened(gateway, asked_at, epoch, old_lease_ms, version, members, awaited);
                }
            }
            Answer::InUse => {
                g.opening = None;
                self.pause(gateway);
            }
            Answer::Renewed => {
                let session = g.session.as_mut().expect("checked above");
                session.lease_until = session.lease_until.max(asked_at + safe(LEASE_MS));
                let now = self.clock(Party::Gateway(gateway));
                if now < self.gateways[gateway].session.as_ref().expect("checked above").lease_until {
                    let session = self.gateways[gateway].session.as_mut().expect("checked above");
                    for (op, outcome) in std::mem::take(&mut session.held) {
                        self.reply(gateway, op, outcome);
                    }
                }
            }
            Answer::Superseded => self.gateway_superseded(gateway),
            Answer::Decided(SetDecision::Superseded) => self.gateway_superseded(gateway),
            Answer::Decided(decision) => self.gateway_step(gateway, Input::SetDecided(decision)),
            Answer::Closed => {}
        }
    }

    fn gateway_superseded(&mut self, gateway: usize) {
        self.log(|| format!("gateway {gateway} is superseded"));
        self.end_session(gateway);
        self.pause(gateway);
    }

    fn opened(
        &mut self,
        gateway: usize,
        asked_at: u64,
        epoch: Epoch,
        old_lease_ms: u64,
        version: SetVersion,
        members: Vec<ReplicaId>,
        awaited: Vec<ReplicaId>,
    ) {
        let now = self.clock(Party::Gateway(gateway));
        self.log(|| format!("gateway {gateway} opens session {epoch}"));
        self.counters.sessions += 1;
        let mut hash_seed = [0; 32];
        hash_seed[..8].copy_from_slice(&self.rng.next().to_le_bytes());
        let replicas = (0..self.nodes.len())
            .map(|node| ReplicaDef { replica: replica_id(node), node: node_id(node), data_addr: data_addr(node) })
            .collect();
        let cfg = MirrorConfig {
            mirror: ids(0).mirror,
            epoch,
            blocks: self.setup.blocks,
            chunk_blocks: self.setup.chunk_blocks,
            replicas,
            version,
            members,
            awaited,
            min_in_sync: self.setup.min_in_sync.min(self.nodes.len()),
            write_cache: self.setup.write_cache,
            old_lease_until: match old_lease_ms {
                0 => 0,
                ms => now + ms + ms * CLOCK_DRIFT_PERMILLE / 1000,
            },
            hash_seed,
        };
        let links = (0..self.nodes.len()).map(|_| Link::Down { retry_at: 0 }).collect();
        self.gateways[gateway].session = Some(Session {
            number: self.counters.sessions,
            epoch,
            mirror: Mirror::new(now, cfg),
            links,
            lease_until: asked_at + safe(LEASE_MS),
            renewed_at: asked_at,
            held: Vec::new(),
            ops: BTreeMap::new(),
            next_op: 1,
            closing: false,
        });
        self.tend_links(gateway, now);
    }

    /// Where everything stands, for who reads why a run did not end.
    pub fn show_status(&self) -> String {
        let mut lines = Vec::new();
        for (i, g) in self.gateways.iter().enumerate() {
            let status = g.session.as_ref().map(|s| format!("{:?}", s.mirror.status()));
            lines.push(format!("gateway {i}: wanted {}, {}", g.wanted, status.as_deref().unwrap_or("no session")));
        }
        for (i, n) in self.nodes.iter().enumerate() {
            let dirty = n.core.as_ref().map(|c| c.dirty_regions());
            lines.push(format!("node {i}: open {}, dirty and suspect {dirty:?}", n.is_open));
        }
        let c = &self.control;
        lines.push(format!("set version {}, {:?}, awaited {:?}, epoch {}", c.version, c.members, c.awaited, c.epoch));
        lines.join("\n")
    }
}
