//! A gateway: the driver of its volume sessions, with their links, their leases and their questions to the cluster.
//! What it makes of the answers is decided by `client::gateway::decide`, as in the real one.

use std::collections::BTreeMap;
use std::sync::Arc;

use client::gateway::decide::{self, Want};
use client::link::{Due, Liveness};
use client::mirror::{Event as MirrorEvent, SetDecision, StopReason, TICK_MS};
use client::volume::{Ended, SessionInput, SessionOutput, Stripe, VolumeSession};
use node::control::core::{Reply as ControlReply, Request as ControlRequest};
use node::metadata::Command;
use proto::cluster::{ClusterView, GatewayInfo, OpenedSession, Refusal, RenewalOutcome, SessionRenewal};
use proto::frame::{HEADER_LEN, Header, Kind, PeerRole, Reply, Request};
use proto::id::{AttachId, Epoch, NodeId, ReplicaId, SetVersion, VolumeId};
use proto::limits::LEASE_RENEW_MS;

use super::ask::{Ask, Contact, Purpose};
use super::checker::Checker;
use super::net::{Packet, Party, Way};
use super::node::{decode_header, show_reply, show_request};
use super::world::{Event, MS, World};

const REDIAL_MS: u64 = 250;
/// How often liveness is looked at.
const LOOK_MS: u64 = 100;
/// Between attempts to open a volume.
const OPEN_AGAIN_MS: u64 = 500;
/// After a renewal that was not answered.
const RENEW_AGAIN_MS: u64 = 200;
/// How long a close may take until the session is left to the next one to reconcile.
const CLOSE_PATIENCE_MS: u64 = 20_000;
/// How often a member is asked for what it knows, in place of a stream of views.
const VIEW_EVERY: u64 = 200 * MS;
/// How often a forced recovery is looked at.
const RECOVERY_MS: u64 = 500;

#[derive(Debug)]
enum Link {
    Down { retry_at: u64 },
    Dialling,
    Up { conn: u64, greeted: bool, live: Liveness, look_at: u64 },
}

/// One session, from its opening to its end.
pub struct Session {
    /// Numbers the sessions of a run.
    number: u64,
    pub epoch: Epoch,
    pub volume: VolumeId,
    pub core: VolumeSession,
    links: BTreeMap<usize, Link>,
    /// On the gateway's clock.
    pub lease_until: u64,
    /// Requests: which client waits for it.
    pub ops: BTreeMap<u64, usize>,
    pub next_op: u64,
    pub closing: bool,
    close_until: u64,
    /// The forced recovery that was passed on.
    recovering: Option<u64>,
    recovery_at: Option<u64>,
    /// Mirrors in which nothing was left to settle at some time of this session: it keeps what they have
    /// acknowledged (R9).
    settled: Vec<bool>,
}

impl Session {
    /// Every mirror serves.
    pub fn is_serving(&self) -> bool {
        self.core.mirrors().iter().all(client::mirror::Mirror::is_serving)
    }
}

enum State {
    Idle {
        retry_at: u64,
    },
    /// The question that opens a session is out.
    Opening,
    Open(Box<Session>),
    /// The session is being given back.
    Giving,
    /// Nothing but an operator can help (R8).
    Refusing,
}

/// One volume at a gateway, from when it is wanted to when it is not.
struct Owner {
    want: Want,
    /// The highest epoch that a replica refused us for.
    fenced: Epoch,
    state: State,
}

/// See the module.
#[derive(Default)]
pub struct Gateway {
    pub boot: u32,
    pub alive: bool,
    /// It is to take volumes over although another's lease may live.
    pub take_over: bool,
    pub(super) contact: Contact,
    registered: bool,
    registering: bool,
    view: Option<Arc<ClusterView>>,
    follows: usize,
    renewing: bool,
    renew_at: u64,
    owners: BTreeMap<VolumeId, Owner>,
    /// How the last close ended.
    pub closed_clean: Option<bool>,
}

impl Gateway {
    pub fn name(gateway: usize) -> String {
        format!("gateway-{gateway}")
    }

    fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.owners.values().filter_map(|o| match &o.state {
            State::Open(session) => Some(&**session),
            _ => None,
        })
    }

    /// The open session of a volume.
    pub fn session(&self, volume: VolumeId) -> Option<&Session> {
        self.sessions().find(|s| s.volume == volume)
    }

    pub fn session_mut(&mut self, volume: VolumeId) -> Option<&mut Session> {
        match self.owners.get_mut(&volume).map(|o| &mut o.state) {
            Some(State::Open(session)) => Some(session),
            _ => None,
        }
    }

    pub fn has_sessions(&self) -> bool {
        self.sessions().next().is_some()
    }

    /// Mirrors' requests that replicas have not answered, at most by any one mirror.
    pub fn most_sent(&self) -> usize {
        let mirrors = self.sessions().flat_map(|s| s.core.mirrors());
        mirrors.map(client::mirror::Mirror::sent_requests).max().unwrap_or(0)
    }
}

impl World {
    pub fn start_gateway(&mut self, gateway: usize) {
        self.log(|| format!("gateway {gateway} starts"));
        let g = &mut self.gateways[gateway];
        *g = Gateway { boot: g.boot + 1, alive: true, take_over: g.take_over, follows: gateway, ..Gateway::default() };
        let boot = g.boot;
        self.after(TICK_MS * MS, Event::GatewayTick { gateway, boot });
        self.after(MS, Event::Follow { gateway, boot });
    }

    pub fn kill_gateway(&mut self, gateway: usize) {
        if !self.gateways[gateway].alive {
            return;
        }
        self.log(|| format!("gateway {gateway} is killed"));
        self.unstop(Party::Gateway(gateway));
        for volume in self.gateways[gateway].owners.keys().copied().collect::<Vec<_>>() {
            self.end_session(gateway, volume);
        }
        let g = &mut self.gateways[gateway];
        g.boot += 1;
        g.alive = false;
    }

    /// Whether initiators find the volume here.
    pub fn takes_requests(&self, gateway: usize) -> bool {
        self.session(gateway).is_some_and(|s| !s.closing)
    }

    /// The session of the volume that initiators use now.
    pub fn session(&self, gateway: usize) -> Option<&Session> {
        self.gateways[gateway].session(self.current().id)
    }

    // ---- what it should serve -------------------------------------------------------------------------------

    /// Some member's view arrives, instead of by a stream: like that it may be old, and come late.
    pub(super) fn follow(&mut self, gateway: usize, boot: u32) {
        if self.gateways[gateway].boot != boot {
            return;
        }
        self.after(VIEW_EVERY, Event::Follow { gateway, boot });
        let count = self.members.len();
        let member = self.gateways[gateway].follows % count;
        let (party, from) = (Party::Gateway(gateway), self.member_party(member));
        let cut = self.cut_from_control(party, from) || self.cut_from_control(from, party);
        let core = self.members[member].core.as_ref().filter(|_| !cut && !self.is_stopped(from));
        let known = self.gateways[gateway].view.as_ref().map_or(0, |v| v.revision);
        match core {
            Some(core) if core.raft().leader().is_some() => {
                let revision = core.machine().revision();
                if revision > known {
                    let view = Arc::new(core.machine().view(false));
                    let delay = self.net.delay(from, party, &mut self.rng);
                    self.next_answer += 1;
                    self.views.insert(self.next_answer, view);
                    self.after(delay, Event::ViewArrives { gateway, boot, view: self.next_answer });
                }
            }
            // It does not answer, or knows no leader.
            _ => self.gateways[gateway].follows += 1,
        }
    }

    pub(super) fn view_arrives(&mut self, gateway: usize, boot: u32, view: u64) {
        let view = self.views.remove(&view).expect("a view arrives once");
        let g = &mut self.gateways[gateway];
        if g.boot != boot || g.view.as_ref().is_some_and(|v| v.revision >= view.revision) {
            return;
        }
        g.contact.revision = g.contact.revision.max(view.revision);
        g.view = Some(view);
    }

    /// Keeps an owner for every volume that should be open here.
    fn reconcile(&mut self, gateway: usize, now: u64) {
        let Some(view) = self.gateways[gateway].view.clone() else { return };
        let wanted = decide::wants(&view, &Gateway::name(gateway), |_| false);
        let g = &mut self.gateways[gateway];
        for (volume, want) in &wanted {
            let fresh = || Owner { want: *want, fenced: Epoch(0), state: State::Idle { retry_at: 0 } };
            g.owners.entry(*volume).or_insert_with(fresh);
        }
        for volume in g.owners.keys().copied().collect::<Vec<_>>() {
            self.tend_owner(gateway, volume, wanted.get(&volume).copied().unwrap_or(Want::Nothing), &view, now);
        }
    }

    fn tend_owner(&mut self, gateway: usize, volume: VolumeId, want: Want, view: &ClusterView, now: u64) {
        let g = &mut self.gateways[gateway];
        let owner = g.owners.get_mut(&volume).expect("its volume is listed");
        owner.want = want;
        match &mut owner.state {
            State::Idle { .. } | State::Refusing if want == Want::Nothing => {
                g.owners.remove(&volume);
            }
            State::Idle { retry_at } if now >= *retry_at => {
                owner.state = State::Opening;
                let (take_over, since) = (g.take_over, g.contact.revision);
                let request = self.new_request(since);
                let name = Gateway::name(gateway);
                let open = ControlRequest::Open { request, volume, gateway: name, take_over };
                self.ask(Party::Gateway(gateway), Purpose::Open { volume }, open);
            }
            State::Open(session) => {
                let asked = view.volume(volume).and_then(|v| v.recover_unix_ms);
                if asked.is_some() && asked != session.recovering {
                    session.recovering = asked;
                    session.recovery_at = Some(now);
                    self.recover_here(gateway, volume);
                }
                if asked.is_none()
                    && let Some(session) = self.gateways[gateway].session_mut(volume)
                {
                    session.recovery_at = None;
                }
                if want == Want::Nothing {
                    self.close_session_of(gateway, volume);
                }
            }
            _ => {}
        }
    }

    fn recover_here(&mut self, gateway: usize, volume: VolumeId) {
        // What only a lost cache held is given up; the history may go back to what was flushed.
        self.log(|| format!("an operator recovers the volume on gateway {gateway}"));
        let width = self.gateways[gateway].session(volume).map_or(0, |s| s.core.mirrors().len());
        for mirror in 0..width {
            let history = self.history_of(volume);
            let said = history.moment();
            history.power_on(mirror, said);
        }
        self.work.forget(true);
        self.session_step(gateway, volume, SessionInput::Recover);
    }

    /// Begins a graceful end of the current volume's session.
    pub fn close_session(&mut self, gateway: usize) {
        let volume = self.current().id;
        self.close_session_of(gateway, volume);
    }

    fn close_session_of(&mut self, gateway: usize, volume: VolumeId) {
        let now = self.clock(Party::Gateway(gateway));
        let running = self.gateways[gateway].session_mut(volume).filter(|s| !s.closing);
        if let Some(session) = running {
            session.closing = true;
            session.close_until = now + CLOSE_PATIENCE_MS;
            self.log(|| format!("gateway {gateway} closes"));
            self.session_step(gateway, volume, SessionInput::Close);
        }
    }

    /// The session is over, without another answer.
    fn end_session(&mut self, gateway: usize, volume: VolumeId) {
        let retry_at = self.clock(Party::Gateway(gateway)) + OPEN_AGAIN_MS;
        let Some(owner) = self.gateways[gateway].owners.get_mut(&volume) else { return };
        if !matches!(owner.state, State::Open(_)) {
            return;
        }
        let State::Open(session) = std::mem::replace(&mut owner.state, State::Idle { retry_at }) else { return };
        self.log(|| format!("gateway {gateway} ends session {}", session.epoch));
        self.lease_over(volume, session.epoch);
        for link in session.links.values() {
            if let Link::Up { conn, .. } = link {
                let reset = self.rng.chance(500);
                self.close(*conn, Way::Forth, reset);
            }
        }
        for status in session.core.status() {
            self.counters.copied_bytes += status.copied_bytes;
            self.counters.restamped += status.restamped_blocks;
        }
        self.dropped(volume, session.ops.into_values());
    }

    pub(super) fn gateway_tick(&mut self, gateway: usize, boot: u32) {
        if self.gateways[gateway].boot != boot {
            return;
        }
        self.after(TICK_MS * MS, Event::GatewayTick { gateway, boot });
        let now = self.clock(Party::Gateway(gateway));
        self.register(gateway);
        self.reconcile(gateway, now);
        for volume in self.gateways[gateway].owners.keys().copied().collect::<Vec<_>>() {
            if self.gateways[gateway].session(volume).is_none() {
                continue;
            }
            self.tend_links(gateway, volume, now);
            self.session_step(gateway, volume, SessionInput::Tick);
            self.tend_session(gateway, volume, now);
        }
        self.renew(gateway, now);
    }

    fn register(&mut self, gateway: usize) {
        let g = &mut self.gateways[gateway];
        if g.registered || g.registering {
            return;
        }
        g.registering = true;
        let since = g.contact.revision;
        let info = GatewayInfo { name: Gateway::name(gateway), control_addr: String::new(), portal: String::new() };
        let request = self.new_request(since);
        let command = Command::RegisterGateway { gateway: info };
        self.ask(Party::Gateway(gateway), Purpose::Register, ControlRequest::Lead(request, command));
    }

    fn tend_session(&mut self, gateway: usize, volume: VolumeId, now: u64) {
        self.made_up_for(gateway, volume);
        let Some(session) = self.gateways[gateway].session_mut(volume) else { return };
        for (settled, mirror) in session.settled.iter_mut().zip(session.core.mirrors()) {
            *settled |= mirror.is_settled();
        }
        if session.closing && now >= session.close_until {
            self.log(|| format!("gateway {gateway} did not close in time"));
            return self.end_session(gateway, volume);
        }
        if session.recovery_at.is_some_and(|at| now >= at) {
            session.recovery_at = Some(now + RECOVERY_MS);
            let epoch = session.epoch;
            let since = self.gateways[gateway].contact.revision;
            let request = self.new_request(since);
            let command = Command::FinishRecovery { volume, epoch };
            self.ask(Party::Gateway(gateway), Purpose::FinishRecovery, ControlRequest::Lead(request, command));
        }
    }

    /// Renews the leases of all sessions together.
    fn renew(&mut self, gateway: usize, now: u64) {
        let g = &mut self.gateways[gateway];
        if g.renewing || now < g.renew_at || !g.registered {
            return;
        }
        g.renewing = true;
        let sessions =
            g.sessions().map(|s| SessionRenewal { volume: s.volume, epoch: s.epoch, report: None }).collect();
        let request = ControlRequest::Renew { gateway: Gateway::name(gateway), sessions };
        self.ask(Party::Gateway(gateway), Purpose::Renew, request);
    }

    // ---- links ----------------------------------------------------------------------------------------------

    fn tend_links(&mut self, gateway: usize, volume: VolumeId, now: u64) {
        let nodes: Vec<usize> = match self.gateways[gateway].session(volume) {
            Some(session) => session.links.keys().copied().collect(),
            None => return,
        };
        for node in nodes {
            let Some(session) = self.gateways[gateway].session_mut(volume) else { return };
            let number = session.number;
            let link = session.links.get_mut(&node).expect("listed above");
            match link {
                Link::Down { retry_at } if now >= *retry_at => {
                    *link = Link::Dialling;
                    let (micros, reached) = self.dial(Party::Gateway(gateway), node);
                    self.after(micros, Event::Dialled { gateway, volume, session: number, node, reached });
                }
                Link::Up { conn, live, look_at, greeted } if now >= *look_at => {
                    *look_at = now + LOOK_MS;
                    let (conn, greeted) = (*conn, *greeted);
                    match live.look(now) {
                        Due::GiveUp => {
                            self.log(|| format!("gateway {gateway}: node {node} is silent"));
                            self.close(conn, Way::Forth, false);
                            self.link_down(gateway, volume, node);
                        }
                        Due::Ping if greeted => {
                            let ping = Request::Ping.encode(0, AttachId::default(), 0);
                            self.send(conn, Way::Forth, Packet::Frame(ping.head, ping.payload));
                        }
                        _ => {}
                    }
                }
                _ => {}
            }
        }
    }

    pub(super) fn dialled(&mut self, gateway: usize, volume: VolumeId, number: u64, node: usize, reached: bool) {
        let now = self.clock(Party::Gateway(gateway));
        let Some(session) = self.gateways[gateway].session_mut(volume) else { return };
        if session.number != number || !matches!(session.links[&node], Link::Dialling) {
            return;
        }
        if !reached || self.nodes[node].is_down() {
            return self.link_down(gateway, volume, node);
        }
        let conn = self.net.connect(Party::Gateway(gateway), Party::Node(node));
        let up = Link::Up { conn, greeted: false, live: Liveness::new(now), look_at: now + LOOK_MS };
        session.links.insert(node, up);
        self.greet(conn, PeerRole::Gateway, volume);
    }

    fn link_down(&mut self, gateway: usize, volume: VolumeId, node: usize) {
        let now = self.clock(Party::Gateway(gateway));
        let Some(session) = self.gateways[gateway].session_mut(volume) else { return };
        session.links.insert(node, Link::Down { retry_at: now + REDIAL_MS });
        self.session_step(gateway, volume, SessionInput::LinkDown { node: NodeId(node as u64 + 1) });
    }

    /// Whose end of a connection this is.
    fn link_of(&mut self, gateway: usize, conn: u64) -> Option<(VolumeId, usize)> {
        let is = |l: &Link| matches!(l, Link::Up { conn: c, .. } if *c == conn);
        let found = |s: &Session| s.links.iter().find(|(_, l)| is(l)).map(|(node, _)| (s.volume, *node));
        self.gateways[gateway].sessions().find_map(found)
    }

    pub(super) fn gateway_receives(&mut self, gateway: usize, conn: u64, packet: Packet) {
        let now = self.clock(Party::Gateway(gateway));
        let Some((volume, at)) = self.link_of(gateway, conn) else { return };
        let node = NodeId(at as u64 + 1);
        let session = self.gateways[gateway].session_mut(volume).expect("found above");
        let Some(Link::Up { live, greeted, .. }) = session.links.get_mut(&at) else { unreachable!("found above") };
        match packet {
            Packet::Frame(head, payload) => {
                live.heard(now);
                let first = !std::mem::replace(greeted, true);
                let header = decode_header(&head);
                let Header { channel, tag, attach, kind, .. } = header;
                let reply = Reply::decode(&header, &head[HEADER_LEN..], payload).expect("our own frame");
                if first {
                    self.session_step(gateway, volume, SessionInput::LinkUp { node });
                } else if kind != Kind::Ping {
                    self.log(|| format!("  gateway {gateway} <- node {at} {attach} #{tag} {}", show_reply(&reply)));
                    self.session_step(gateway, volume, SessionInput::Reply { node, channel, tag, attach, reply });
                }
            }
            Packet::End => {
                self.close(conn, Way::Forth, false);
                self.link_down(gateway, volume, at);
            }
        }
    }

    /// Resets the connection between a gateway and a node; each end finds out when it does.
    pub fn reset_link(&mut self, gateway: usize, node: usize) {
        let Some(session) = self.session(gateway) else { return };
        let (volume, Some(Link::Up { conn, .. })) = (session.volume, session.links.get(&node)) else { return };
        let conn = *conn;
        self.log(|| format!("gateway {gateway}: connection to node {node} is reset"));
        self.close(conn, Way::Back, true);
        self.close(conn, Way::Forth, true);
        self.serves_no_more(node, conn);
        self.link_down(gateway, volume, node);
    }

    // ---- the session ----------------------------------------------------------------------------------------

    pub(super) fn session_step(&mut self, gateway: usize, volume: VolumeId, input: SessionInput) {
        let now = self.clock(Party::Gateway(gateway));
        let Some(session) = self.gateways[gateway].session_mut(volume) else { return };
        let mut out = std::mem::take(&mut self.session_scratch);
        session.core.step(now, session.lease_until, input, &mut out);
        let number = session.number;
        for output in out.drain(..) {
            if self.gateways[gateway].session(volume).is_none_or(|s| s.number != number) {
                break;
            }
            self.session_output(gateway, volume, output);
        }
        out.clear();
        self.session_scratch = out;
    }

    fn session_output(&mut self, gateway: usize, volume: VolumeId, output: SessionOutput) {
        let session = self.gateways[gateway].session_mut(volume).expect("it is stepping");
        match output {
            SessionOutput::Send { node, channel, attach, tag, request } => {
                let node = node.0 as usize - 1;
                // A link that was lost in this very step takes nothing; the session is told so next.
                if let Some(Link::Up { conn, .. }) = session.links.get(&node) {
                    let conn = *conn;
                    self.log(|| {
                        format!(
                            "  gateway {gateway} -> node {node} mirror {channel} {attach} #{tag} {}",
                            show_request(&request)
                        )
                    });
                    let encoded = request.encode(channel, attach, tag);
                    self.fold(&encoded.head);
                    self.send(conn, Way::Forth, Packet::Frame(encoded.head, encoded.payload));
                }
            }
            SessionOutput::Ended { id, ended } => self.reply(gateway, volume, id, ended),
            SessionOutput::ProposeSet { mirror, version, members, awaited } => {
                let epoch = session.epoch;
                self.log(|| format!("gateway {gateway}: mirror {mirror} proposes {members:?} after version {version}"));
                self.propose(gateway, volume, epoch, mirror, version, members, awaited);
            }
            SessionOutput::PowerOn { mirror } => {
                let settled = session.settled[mirror];
                self.log(|| format!("gateway {gateway}: POWER ON, mirror {mirror}"));
                self.counters.power_ons += 1;
                if settled {
                    return self.fail(
                        Checker::PowerOn,
                        format!("R9: gateway {gateway} keeps what mirror {mirror} acknowledged, and lost it"),
                    );
                }
                self.power_on_said(volume, mirror);
            }
            SessionOutput::Stop(reason) => self.stopped_session(gateway, volume, &reason),
            SessionOutput::Closed { clean } => {
                let (epoch, open) = (session.epoch, session.ops.len());
                self.log(|| format!("gateway {gateway} closed, clean: {clean}"));
                // A close that could not be clean ends the session as a kill does; a clean one answers everything,
                // if not at once, should the lease have ended.
                if open > 0 && clean && self.lease_lives(gateway, volume) {
                    return self
                        .fail(Checker::Answered, format!("gateway {gateway} closed with {open} requests unanswered"));
                }
                self.gateways[gateway].closed_clean = Some(clean);
                self.end_session(gateway, volume);
                let g = &mut self.gateways[gateway];
                g.owners.get_mut(&volume).expect("it had a session").state = State::Giving;
                let since = g.contact.revision;
                let request = self.new_request(since);
                let command = Command::CloseSession { volume, epoch, clean };
                self.ask(Party::Gateway(gateway), Purpose::Close { volume }, ControlRequest::Lead(request, command));
            }
            SessionOutput::Log { mirror, event } => {
                self.log(|| format!("gateway {gateway}: mirror {mirror}: {event}"));
                match event {
                    MirrorEvent::Lost { .. } => self.counters.lost += 1,
                    MirrorEvent::SetChanged { .. } => self.counters.set_changes += 1,
                    MirrorEvent::Joining { .. } => self.counters.joins += 1,
                    MirrorEvent::Restamped { region, .. } => self.restamped(volume, mirror, region),
                    MirrorEvent::Distrusted { region, replica, .. } => self.distrusted(volume, region, replica),
                    _ => {}
                }
            }
        }
    }

    fn lease_lives(&self, gateway: usize, volume: VolumeId) -> bool {
        let now = self.clock(Party::Gateway(gateway));
        self.gateways[gateway].session(volume).is_some_and(|s| now < s.lease_until)
    }

    fn stopped_session(&mut self, gateway: usize, volume: VolumeId, reason: &StopReason) {
        self.log(|| format!("gateway {gateway} stops: {reason}"));
        self.end_session(gateway, volume);
        let owner = self.gateways[gateway].owners.get_mut(&volume).expect("it had a session");
        match reason {
            StopReason::MetadataIsOld { .. } => {
                owner.state = State::Refusing;
                self.counters.refusing += 1;
                if !self.voters_restored {
                    self.fail(Checker::MetadataOld, format!("R8: gateway {gateway} stops: {reason}"));
                }
            }
            StopReason::Fenced { epoch, .. } => owner.fenced = owner.fenced.max(*epoch),
            StopReason::Superseded => {}
        }
    }

    fn propose(
        &mut self,
        gateway: usize,
        volume: VolumeId,
        epoch: Epoch,
        mirror: usize,
        expected: SetVersion,
        mut members: Vec<ReplicaId>,
        mut awaited: Vec<ReplicaId>,
    ) {
        members.sort_unstable();
        awaited.sort_unstable();
        let since = self.gateways[gateway].contact.revision;
        let request = self.new_request(since);
        let mirror_id = self.mirror_id(volume, mirror);
        self.note_proposed(volume, mirror, &members);
        let command =
            Command::ChangeSet { volume, mirror: mirror_id, epoch, expected, members: members.clone(), awaited };
        let purpose = Purpose::Propose { volume, epoch, mirror, expected, members };
        self.ask(Party::Gateway(gateway), purpose, ControlRequest::Lead(request, command));
    }

    // ---- answers --------------------------------------------------------------------------------------------

    pub(super) fn renewal_failed(&mut self, ask: Ask) {
        let Party::Gateway(gateway) = ask.from else { return };
        let now = self.clock(ask.from);
        let g = &mut self.gateways[gateway];
        g.renewing = false;
        g.renew_at = now + RENEW_AGAIN_MS;
    }

    pub(super) fn gateway_answered(&mut self, gateway: usize, ask: Ask, answer: Result<ControlReply, Refusal>) {
        let now = self.clock(ask.from);
        let g = &mut self.gateways[gateway];
        match ask.purpose.clone() {
            Purpose::Register => {
                g.registering = false;
                g.registered = answer.is_ok();
            }
            Purpose::Open { volume } => {
                let Some(owner) = g.owners.get_mut(&volume).filter(|o| matches!(o.state, State::Opening)) else {
                    return;
                };
                owner.state = State::Idle { retry_at: now + OPEN_AGAIN_MS };
                match answer {
                    Ok(ControlReply::Opened(opened)) if decide::is_forgotten(opened.epoch, owner.fenced) => {
                        self.log(|| format!("gateway {gateway}: the metadata are an old image"));
                        let owner = self.gateways[gateway].owners.get_mut(&volume).expect("found above");
                        owner.state = State::Refusing;
                        self.counters.refusing += 1;
                        if !self.voters_restored {
                            self.fail(Checker::MetadataOld, format!("R8: gateway {gateway} finds the metadata old"));
                        }
                    }
                    Ok(ControlReply::Opened(opened)) => {
                        g.take_over = false;
                        self.opened(gateway, volume, opened);
                    }
                    _ => {}
                }
            }
            Purpose::Renew => {
                g.renewing = false;
                g.renew_at = now + LEASE_RENEW_MS;
                if let Ok(ControlReply::Renewed(renewals)) = answer {
                    for result in renewals.results {
                        self.renewed(gateway, ask.sent, result.volume, result.epoch, &result.outcome);
                    }
                }
            }
            Purpose::Propose { volume, epoch, mirror, expected, members } => {
                let decision = decide::set_decision(match &answer {
                    Ok(ControlReply::Set(set, _)) => Ok(set),
                    Ok(_) => unreachable!("a set was asked for"),
                    Err(refusal) => Err(refusal),
                });
                match decision {
                    Some(decision) => self.set_decided(gateway, volume, epoch, mirror, decision),
                    // Decided long ago: what is committed now tells how.
                    None if matches!(answer, Err(Refusal::Forgotten { .. })) => {
                        let purpose = Purpose::Decided { volume, epoch, mirror, expected, members };
                        self.ask(Party::Gateway(gateway), purpose, ControlRequest::Status);
                    }
                    None => self.fail(Checker::SetVersions, format!("a proposed set is refused: {answer:?}")),
                }
            }
            Purpose::Decided { volume, epoch, mirror, expected, members } => {
                let Ok(ControlReply::Status(status)) = answer else { return };
                let id = self.mirror_id(volume, mirror);
                let decision = decide::decided_before(&status.view, volume, id, epoch, &members, expected);
                if let Some(decision) = decision {
                    self.set_decided(gateway, volume, epoch, mirror, decision);
                }
            }
            Purpose::Close { volume } => {
                if let Some(owner) = g.owners.get_mut(&volume).filter(|o| matches!(o.state, State::Giving)) {
                    owner.state = State::Idle { retry_at: now + OPEN_AGAIN_MS };
                }
            }
            Purpose::FinishRecovery | Purpose::Operator => {}
        }
    }

    fn set_decided(&mut self, gateway: usize, volume: VolumeId, epoch: Epoch, mirror: usize, decision: SetDecision) {
        if self.gateways[gateway].session(volume).is_some_and(|s| s.epoch == epoch) {
            self.session_step(gateway, volume, SessionInput::SetDecided { mirror, decision });
        }
    }

    fn renewed(&mut self, gateway: usize, sent: u64, volume: VolumeId, epoch: Epoch, outcome: &RenewalOutcome) {
        let Some(session) = self.gateways[gateway].session_mut(volume).filter(|s| s.epoch == epoch) else { return };
        match outcome {
            RenewalOutcome::Granted { lease_ms } => {
                session.lease_until = session.lease_until.max(decide::lease_until(sent, *lease_ms));
                let until = session.lease_until;
                self.check_lease(gateway, volume, epoch, until);
                self.session_step(gateway, volume, SessionInput::Tick);
            }
            RenewalOutcome::Refused { current } => {
                if decide::is_superseded(current.as_ref(), epoch) {
                    self.log(|| format!("gateway {gateway} is superseded"));
                    self.end_session(gateway, volume);
                }
            }
        }
    }

    fn opened(&mut self, gateway: usize, volume: VolumeId, opened: OpenedSession) {
        let now = self.clock(Party::Gateway(gateway));
        self.log(|| format!("gateway {gateway} opens session {}", opened.epoch));
        self.counters.sessions += 1;
        let old_lease_until = decide::old_lease_until(now, opened.old_lease_ms);
        self.check_opening(gateway, volume, opened.epoch, old_lease_until);
        let view = self.gateways[gateway].view.clone().expect("it knows of the volume");
        let rng = &mut self.rng;
        let mirrors = decide::mirror_configs(&view, &opened, old_lease_until, || {
            let mut seed = [0; 32];
            seed[..8].copy_from_slice(&rng.next().to_le_bytes());
            seed
        });
        let nodes = mirrors.iter().flat_map(|m| &m.replicas).map(|r| r.node.0 as usize - 1);
        let links = nodes.map(|node| (node, Link::Down { retry_at: 0 })).collect();
        let stripe = Stripe { chunk: u64::from(opened.volume.chunk_size), width: mirrors.len() as u64 };
        let session = Session {
            number: self.counters.sessions,
            epoch: opened.epoch,
            volume,
            settled: vec![false; mirrors.len()],
            core: VolumeSession::new(now, stripe, mirrors),
            links,
            lease_until: 0,
            ops: BTreeMap::new(),
            next_op: 1,
            closing: false,
            close_until: 0,
            recovering: None,
            recovery_at: None,
        };
        let g = &mut self.gateways[gateway];
        g.owners.get_mut(&volume).expect("it was opening").state = State::Open(Box::new(session));
        g.renew_at = 0;
        self.tend_links(gateway, volume, now);
    }

    /// A request's outcome reaches its initiator.
    fn reply(&mut self, gateway: usize, volume: VolumeId, id: u64, ended: Ended) {
        let session = self.gateways[gateway].session_mut(volume).expect("a session replies");
        let epoch = session.epoch;
        let Some(client) = session.ops.remove(&id) else {
            return self.fail(Checker::Answered, format!("gateway {gateway} answers request {id}, which is not open"));
        };
        if !self.lease_lives(gateway, volume) {
            return self
                .fail(Checker::ReplyUnderLease, format!("R3: gateway {gateway} answers request {id} without a lease"));
        }
        self.answered_by(volume, epoch, client, ended);
    }
}
