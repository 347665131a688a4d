//! A connection of an iSCSI initiator, from its first byte: login and text negotiation, then the session, as
//! `client::iscsi::connection` drives them, without a socket.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};
use client::block::{BlockOutcome, BlockRequest, DeviceState};
use client::iscsi::login::{
    Agreed, DEFAULT_SEGMENT, Identity, Login, Next, OUR_FIRST_BURST, OUR_MAX_BURST, OUR_OUTSTANDING_R2T, OUR_SEGMENT,
    Parameters, Targets,
};
use client::iscsi::pdu::response::Body;
use client::iscsi::pdu::wire::{Digests, Pdu, Receiver, Sender};
use client::iscsi::pdu::{BHS_LEN, CmdSn, NO_TAG, Request, Response, request};
use client::iscsi::session::{self, Clear, IscsiSession, Outputs, PING_AFTER};
use client::iscsi::text::Outgoing;

use super::source::{Seen, Source};
use super::unit::{self, Unit};
use crate::sim::rng::Rng;

/// The target that can be logged in to.
const IQN: &str = "iqn.2026-11.io.md99:tank";
/// Bytes that may wait to be written while more is read, and what one more PDU may lead to.
const UNWRITTEN: usize = (8 << 20) + (4 << 20);
/// What a session may hold, as `client::iscsi::session` says: data of commands that have begun, unsolicited data of
/// those that have not, and the same for commands that came before their turn; what waits to be written; the device.
pub const MEMORY: usize = session::MEMORY as usize
    + 2 * (session::WINDOW as usize + session::MAX_IMMEDIATE) * OUR_FIRST_BURST as usize
    + UNWRITTEN
    + unit::MEMORY;

/// Numbers that only a peer with a memory has right (CmdSN, transfer tags) are put right.
const MEND: u8 = 1;
/// The session begins at once, on the terms that the second byte says.
const LOGGED_IN: u8 = 2;
/// The stream is given on as it is: without digests, and cut anywhere.
const RAW: u8 = 4;
/// Digests are wrong now and then.
const BAD_DIGESTS: u8 = 8;

struct OneTarget;

impl Targets for OneTarget {
    fn has_target(&self, name: &str) -> bool {
        name == IQN
    }
    fn has_session(&self, tsih: u16) -> bool {
        tsih == 1
    }
}

/// An R2T that the initiator has seen.
struct Wanted {
    itt: u32,
    ttt: u32,
    offset: u32,
    len: u32,
    data_sn: u32,
}

/// A session between its socket and its device.
struct Bench {
    session: IscsiSession,
    out: Outputs,
    unit: Unit,
    queue: Vec<(u64, BlockRequest, bool)>,
    others: Vec<u64>,
    rng: Rng,
    now: Instant,
    /// The initiator's end.
    initiator: Receiver,
    wanted: Vec<Wanted>,
    commands: BTreeMap<u32, u32>,
    statuses: BTreeMap<u32, u32>,
    barriers: u64,
}

impl Bench {
    fn new(agreed: &Agreed, seed: u64) -> Self {
        let now = Instant::now();
        let digests = agreed.parameters.digests;
        let portal = "127.0.0.1:3260".to_owned();
        let session = IscsiSession::new(agreed, IQN, portal, unit::info(), unit::state(), now);
        let wire = Sender::new(digests);
        let out = Outputs { requests: vec![], aborts: vec![], others: vec![], cleared: vec![], wire, close: None };
        Self {
            session,
            out,
            unit: Unit::new(),
            queue: Vec::new(),
            others: Vec::new(),
            rng: Rng::new(seed),
            now,
            initiator: Receiver::new(BytesMut::new(), digests, 0xff_ffff),
            wanted: Vec::new(),
            commands: BTreeMap::new(),
            statuses: BTreeMap::new(),
            barriers: 0,
        }
    }

    fn receive(&mut self, pdu: Pdu) {
        if let Ok(Request::Command(command)) = Request::decode(&pdu.bhs) {
            *self.commands.entry(command.itt).or_default() += 1;
        }
        self.session.receive(self.now, pdu, &mut self.out);
    }

    fn carry_out(&mut self) {
        for (tag, request) in self.out.requests.drain(..) {
            assert!(self.queue.iter().all(|(other, ..)| *other != tag), "two requests of one command at a time");
            self.queue.push((tag, request, false));
        }
        for tag in self.out.aborts.drain(..) {
            self.queue.iter_mut().filter(|(of, ..)| *of == tag).for_each(|(.., aborted)| *aborted = true);
        }
        self.others.extend(self.out.others.drain(..).map(|others| others.id));
        self.out.cleared.clear();
    }

    /// Ends one request of the device.
    fn complete_one(&mut self) {
        let at = self.rng.below(self.queue.len() as u64) as usize;
        let (tag, request, aborted) = self.queue.swap_remove(at);
        let outcome = match aborted && self.rng.chance(500) {
            true => BlockOutcome::Aborted,
            false => self.unit.perhaps(&mut self.rng, &request),
        };
        self.session.complete(tag, outcome, &mut self.out);
        self.carry_out();
    }

    /// What happens between two reads of the socket.
    fn turn(&mut self, seen: &mut Seen) {
        self.carry_out();
        for _ in 0..self.rng.below(4) {
            if !self.queue.is_empty() {
                self.complete_one();
            }
        }
        if !self.others.is_empty() && self.rng.chance(300) {
            let id = self.others.swap_remove(0);
            self.session.others_done(id, &mut self.out);
        }
        match self.rng.below(200) {
            0 => {
                self.barriers += 1;
                let clear = self.rng.pick(&[Clear::TaskSet, Clear::Reset, Clear::TaskSet, Clear::Cold]);
                self.session.clear(self.barriers, clear, &mut self.out);
            }
            1 => {
                self.now += PING_AFTER * 2;
                let _ = self.session.tick(self.now, &mut self.out);
            }
            2 => {
                let power_on = self.rng.below(3);
                self.session.update(unit::info(), DeviceState { power_on, ..unit::state() });
            }
            3 if self.rng.chance(100) => self.session.close(&mut self.out),
            _ => {}
        }
        self.carry_out();
        if self.rng.chance(700) || self.out.wire.pending() >= 8 << 20 {
            self.write(seen);
        }
    }

    /// The initiator reads all that waits for it.
    fn write(&mut self, seen: &mut Seen) {
        while !self.out.wire.is_empty() {
            let mut slices = [IoSlice::new(&[]); 16];
            let n = self.out.wire.slices(&mut slices);
            let most = if self.rng.chance(100) { 1 + self.rng.below(600) as usize } else { usize::MAX };
            let mut written = 0;
            for slice in &slices[..n] {
                let part = &slice[..slice.len().min(most - written)];
                let mut left = part;
                while !left.is_empty() {
                    let mut space = self.initiator.space();
                    let room = space.remaining_mut().min(left.len());
                    space.put_slice(&left[..room]);
                    left = &left[room..];
                    while let Some(pdu) = self.initiator.next(|_| Vec::new()).expect("a stream that can be read") {
                        assert!(pdu.digest_ok, "a wrong digest was sent");
                        heard(&pdu, &mut self.wanted, &mut self.statuses, seen);
                    }
                }
                written += part.len();
            }
            self.out.wire.advance(written);
            self.session.written(&mut self.out);
            self.carry_out();
        }
    }

    /// The connection ends; what the device was asked for is awaited.
    fn end(&mut self, seen: &mut Seen) {
        seen.words(&format!("{:?}", self.out.close));
        if self.rng.chance(500) {
            self.write(seen);
        }
        self.session.end(&mut self.out);
        self.carry_out();
        let mut steps = 0;
        while !self.queue.is_empty() {
            steps += 1;
            assert!(steps < 10_000, "the device is asked for ever more by a session that has ended");
            self.complete_one();
        }
        assert!(self.session.is_drained(), "commands are left when the device has done everything");
        for (itt, statuses) in &self.statuses {
            let commands = self.commands.get(itt).copied().unwrap_or(0);
            assert!(*statuses <= commands, "task {itt:#x}: {commands} commands, {statuses} answers");
        }
    }
}

/// The initiator has got a PDU.
fn heard(pdu: &Pdu, wanted: &mut Vec<Wanted>, statuses: &mut BTreeMap<u32, u32>, seen: &mut Seen) {
    let response = Response::decode(&pdu.bhs).expect("we send what can be read");
    seen.note(pdu.bhs.opcode());
    match response.body {
        Body::R2t { itt, ttt, offset, len, .. } => {
            assert!(len > 0 && len <= OUR_MAX_BURST, "an R2T for {len} bytes");
            wanted.push(Wanted { itt, ttt, offset, len, data_sn: 0 });
            if wanted.len() > 64 {
                wanted.remove(0);
            }
        }
        Body::Command { itt, status, residual, .. } => {
            *statuses.entry(itt).or_default() += 1;
            seen.note((status, std::mem::discriminant(&residual), pdu.segment().get(4..16).map(<[u8]>::to_vec)));
        }
        Body::DataIn(data) if data.status.is_some() => *statuses.entry(data.itt).or_default() += 1,
        Body::TaskManagement { response, .. } | Body::Logout { response, .. } => seen.note(("response", response)),
        Body::Reject { reason } => {
            assert!(pdu.segment().len() == BHS_LEN, "a reject carries the header");
            seen.note(("reject", reason));
        }
        Body::Text { last, more, .. } => seen.note(("text", last, more)),
        _ => {}
    }
}

/// Where the PDUs of a stream without digests begin, as their headers claim.
pub fn starts(stream: &[u8]) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut at = 0usize;
    while let Some(bhs) = stream.get(at..at + BHS_LEN) {
        starts.push(at);
        let data = usize::from(bhs[5]) << 16 | usize::from(bhs[6]) << 8 | usize::from(bhs[7]);
        at += BHS_LEN + usize::from(bhs[4]) * 4 + data.next_multiple_of(4);
    }
    starts
}

enum Stage {
    Login(Box<Login>),
    Session(Box<Bench>),
}

/// Puts right what depends on what came before. Reserved bytes of the header say how: byte 3 is how far ahead a CmdSN
/// is, byte 2 which R2T a Data-Out answers.
fn mend(pdu: &mut [u8], bench: &mut Bench) {
    let opcode = pdu[0] & 0x3f;
    match opcode {
        0x00..=0x02 | 0x04 | 0x06 if pdu[0] & 0x40 == 0 && pdu[3] < 16 => {
            let (expected, _) = bench.session.window();
            let cmd_sn = expected.plus(pdu[3].into());
            pdu[24..28].copy_from_slice(&cmd_sn.0.to_be_bytes());
        }
        0x05 if pdu[2] != 0 && !bench.wanted.is_empty() => {
            let at = usize::from(pdu[2] - 1) % bench.wanted.len();
            let wanted = &mut bench.wanted[at];
            let len = u32::from_be_bytes([0, pdu[5], pdu[6], pdu[7]]);
            for (at, number) in [(16, wanted.itt), (20, wanted.ttt), (36, wanted.data_sn), (40, wanted.offset)] {
                pdu[at..at + 4].copy_from_slice(&number.to_be_bytes());
            }
            pdu[1] = if len == wanted.len { 0x80 } else { pdu[1] & 0x7f };
            wanted.data_sn = wanted.data_sn.wrapping_add(1);
            wanted.offset = wanted.offset.wrapping_add(len);
            wanted.len = wanted.len.saturating_sub(len);
            if wanted.len == 0 {
                bench.wanted.remove(at);
            }
        }
        _ => {}
    }
}

/// The PDU as it stands on the wire, with digests.
fn with_digests(pdu: &[u8], digests: Digests, bad: Option<&mut Rng>) -> Vec<u8> {
    let header = (BHS_LEN + usize::from(pdu[4]) * 4).min(pdu.len());
    let mut wire = pdu[..header].to_vec();
    let flip = bad.map_or(0, |rng| if rng.chance(30) { 1 + rng.below(2) } else { 0 });
    if digests.header {
        wire.extend_from_slice(&(crc32c::crc32c(&pdu[..header]) ^ u32::from(flip == 1)).to_le_bytes());
    }
    wire.extend_from_slice(&pdu[header..]);
    if digests.data && pdu.len() > header {
        wire.extend_from_slice(&(crc32c::crc32c(&pdu[header..]) ^ u32::from(flip == 2)).to_le_bytes());
    }
    wire
}

/// Flags, terms, a seed, the stream: PDUs without digests.
pub fn run(input: &[u8], seen: &mut Seen) {
    let mut source = Source::new(input);
    let (flags, terms, seed) = (source.u8(), source.u8(), source.u8());
    let mut stream = source.rest().to_vec();
    let mut rng = Rng::new(seed.into());
    let (mut stage, mut receiver, mut digests);
    if flags & LOGGED_IN != 0 {
        let agreed = agreed(terms);
        digests = agreed.parameters.digests;
        receiver = Receiver::new(BytesMut::new(), digests, OUR_SEGMENT as usize);
        stage = Stage::Session(Box::new(Bench::new(&agreed, seed.into())));
    } else {
        digests = Digests::default();
        receiver = Receiver::new(BytesMut::new(), digests, DEFAULT_SEGMENT as usize);
        stage = Stage::Login(Box::new(Login::new(1)));
    }
    let mut cuts = if flags & RAW != 0 { Vec::new() } else { starts(&stream) };
    cuts.push(stream.len());
    if cuts[0] != 0 {
        cuts.insert(0, 0);
    }
    let mut place = 0;
    'stream: while place + 1 < cuts.len() {
        let (from, to) = (cuts[place], cuts[place + 1].min(stream.len()));
        place += 1;
        let pdu = &mut stream[from..to];
        if let Stage::Session(bench) = &mut stage
            && flags & (MEND | RAW) == MEND
            && pdu.len() >= BHS_LEN
        {
            mend(pdu, bench);
        }
        let wire = match flags & RAW == 0 && pdu.len() >= BHS_LEN {
            true => with_digests(pdu, digests, (flags & BAD_DIGESTS != 0).then_some(&mut rng)),
            false => pdu.to_vec(),
        };
        let mut left = &wire[..];
        while !left.is_empty() {
            let most = rng.pick(&[7, 1460, 1 << 16, 1 << 16]).min(left.len() as u64);
            let mut space = receiver.space();
            assert!(space.has_remaining_mut(), "never without room");
            let n = space.remaining_mut().min(rng.between(1, most) as usize);
            space.put_slice(&left[..n]);
            left = &left[n..];
            match &mut stage {
                Stage::Login(login) => match greet(login, &mut receiver, seen) {
                    Greeted::Waits => {}
                    Greeted::Ends => break 'stream,
                    Greeted::Agreed(agreed) => {
                        digests = agreed.parameters.digests;
                        let limit = OUR_SEGMENT.max(agreed.parameters.max_recv_segment) as usize;
                        let old = std::mem::replace(&mut receiver, Receiver::new(BytesMut::new(), digests, limit));
                        receiver = Receiver::new(old.into_leftover(), digests, limit);
                        stage = Stage::Session(Box::new(Bench::new(&agreed, seed.into())));
                    }
                },
                Stage::Session(bench) => {
                    loop {
                        match receiver.next(|bhs| bench.session.place(bhs)) {
                            Ok(Some(pdu)) => bench.receive(pdu),
                            Ok(None) => break,
                            Err(error) => {
                                seen.words(&error.to_string());
                                break 'stream;
                            }
                        }
                    }
                    bench.turn(seen);
                    if bench.out.close.is_some() {
                        break 'stream;
                    }
                }
            }
        }
    }
    if let Stage::Session(bench) = &mut stage {
        bench.end(seen);
    }
}

enum Greeted {
    Waits,
    Ends,
    Agreed(Box<Agreed>),
}

/// Takes what has come in the login phase.
fn greet(login: &mut Login, receiver: &mut Receiver, seen: &mut Seen) -> Greeted {
    loop {
        let pdu = match receiver.next(|_| Vec::new()) {
            Ok(Some(pdu)) => pdu,
            Ok(None) => return Greeted::Waits,
            Err(error) => {
                seen.words(&error.to_string());
                return Greeted::Ends;
            }
        };
        let Ok(Request::Login(request)) = Request::decode(&pdu.bhs) else { return Greeted::Ends };
        match login.step(&request, pdu.segment(), &OneTarget) {
            Next::Respond(response, text) => {
                assert!(text.len() <= DEFAULT_SEGMENT as usize, "a login response of {} bytes", text.len());
                response.encode();
                pairs(&text, seen);
            }
            Next::Refuse(response, reason) => {
                response.encode();
                seen.words(reason);
                return Greeted::Ends;
            }
            Next::Agreed(response, text, agreed) => {
                response.encode();
                pairs(&text, seen);
                let p = &agreed.parameters;
                seen.note((p.digests.header, p.digests.data, p.initial_r2t, p.immediate_data));
                let lengths = 512..=(1 << 24) - 1;
                assert!(lengths.contains(&p.max_send_segment) && lengths.contains(&p.max_recv_segment), "{p:?}");
                assert!((512..=OUR_MAX_BURST).contains(&p.max_burst), "{p:?}");
                assert!(p.first_burst <= p.max_burst.min(OUR_FIRST_BURST), "{p:?}");
                assert!((1..=OUR_OUTSTANDING_R2T).contains(&p.max_outstanding_r2t), "{p:?}");
                // Discovery is the portal's: see `portal`.
                let normal = agreed.identity.target.as_deref() == Some(IQN);
                assert!(normal || agreed.identity.target.is_none(), "{:?}", agreed.identity);
                return if normal { Greeted::Agreed(agreed) } else { Greeted::Ends };
            }
        }
    }
}

fn pairs(text: &Bytes, seen: &mut Seen) {
    for pair in text.split(|b| *b == 0).take(40) {
        seen.words(&String::from_utf8_lossy(pair));
    }
}

/// The terms of a session that is not logged in to.
fn agreed(terms: u8) -> Agreed {
    let small = terms & 16 != 0;
    let parameters = Parameters {
        digests: Digests { header: terms & 1 != 0, data: terms & 2 != 0 },
        initial_r2t: terms & 4 != 0,
        immediate_data: terms & 8 == 0,
        max_burst: if small { 1024 } else { OUR_MAX_BURST },
        first_burst: if small { 512 } else { OUR_FIRST_BURST },
        max_outstanding_r2t: if terms & 32 != 0 { OUR_OUTSTANDING_R2T } else { 1 },
        max_send_segment: if terms & 64 != 0 { 512 } else { 65536 },
        max_recv_segment: OUR_SEGMENT,
        ..Parameters::default()
    };
    let initiator = "iqn.1994-05.com.redhat:x".to_owned();
    let identity =
        Identity { initiator, alias: String::new(), isid: [0x80, 0, 0, 1, 0, 0], target: Some(IQN.into()), cid: 0 };
    Agreed { identity, parameters, cmd_sn: CmdSn(0xffff_fffa), stat_sn: 1 }
}

// --- seeds ---

fn pdu(request: Request, data: &[u8]) -> Vec<u8> {
    let mut bhs = request.encode();
    bhs.set_data_len(data.len());
    let mut bytes = bhs.0.to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn login_pdu(stage: u8, next: Option<u8>, more: bool, pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut text = Outgoing::default();
    pairs.iter().for_each(|(key, value)| text.pair(key, value));
    let login = request::Login {
        transit: next.is_some(),
        more,
        stage,
        next_stage: next.unwrap_or(0),
        version_max: 0,
        version_min: 0,
        isid: [0x80, 0, 0, 1, 0, 0],
        tsih: 0,
        itt: 1,
        cid: 0,
        cmd_sn: CmdSn(1),
        exp_stat_sn: 0,
    };
    pdu(Request::Login(login), &text.segment(usize::MAX).0)
}

fn command_pdu(itt: u32, cdb: &[u8], expected_len: u32, read: bool, data: &[u8], last: bool) -> Vec<u8> {
    let mut padded = [0; 16];
    padded[..cdb.len()].copy_from_slice(cdb);
    let command = request::Command {
        immediate: false,
        last,
        read,
        write: !read && expected_len > 0,
        attribute: 1,
        lun: 0,
        itt,
        expected_len,
        cmd_sn: CmdSn(0),
        exp_stat_sn: 0,
        cdb: padded,
    };
    pdu(Request::Command(command), data)
}

fn data_pdu(which: u8, data: &[u8]) -> Vec<u8> {
    let out = request::DataOut { last: false, lun: 0, itt: NO_TAG, ttt: NO_TAG, exp_stat_sn: 0, data_sn: 0, offset: 0 };
    let mut bytes = pdu(Request::DataOut(out), data);
    bytes[2] = which;
    bytes
}

fn manage_pdu(itt: u32, function: request::Function, referenced: u32) -> Vec<u8> {
    let management = request::TaskManagement {
        immediate: true,
        function,
        lun: 0,
        itt,
        referenced,
        cmd_sn: CmdSn(0xffff_fffa),
        exp_stat_sn: 0,
        ref_cmd_sn: CmdSn(0xffff_fffb),
    };
    pdu(Request::TaskManagement(management), &[])
}

fn others() -> Vec<Vec<u8>> {
    use request::Function;
    let nop =
        |itt, ttt| request::NopOut { immediate: itt == NO_TAG, lun: 0, itt, ttt, cmd_sn: CmdSn(0), exp_stat_sn: 0 };
    let text = |ttt, more: bool, text: &[u8]| {
        let request = request::Text {
            immediate: false,
            last: !more,
            more,
            lun: 0,
            itt: 77,
            ttt,
            cmd_sn: CmdSn(0),
            exp_stat_sn: 0,
        };
        pdu(Request::Text(request), text)
    };
    let logout = |reason| {
        let request = request::Logout { immediate: false, reason, itt: 99, cid: 0, cmd_sn: CmdSn(0), exp_stat_sn: 0 };
        pdu(Request::Logout(request), &[])
    };
    let mut all = vec![
        pdu(Request::NopOut(nop(5, NO_TAG)), b"ping"),
        pdu(Request::NopOut(nop(NO_TAG, 1)), &[]),
        text(NO_TAG, false, b"SendTargets=\0"),
        text(NO_TAG, true, b"X-a=1\0MaxRecvDataSegmentLength=51"),
        text(1, false, b"2\0Y=\0"),
        pdu(Request::Snack { itt: 3 }, &[]),
        logout(2),
        logout(0),
    ];
    let functions = [
        Function::AbortTask,
        Function::AbortTaskSet,
        Function::ClearTaskSet,
        Function::LunReset,
        Function::TargetColdReset,
        Function::TaskReassign,
    ];
    all.extend(functions.into_iter().map(|function| manage_pdu(200, function, 3)));
    all
}

/// A session's PDUs: unit attention, then writes of every way of sending data, a read.
fn work() -> Vec<Vec<u8>> {
    vec![
        command_pdu(1, &[0], 0, false, &[], true),
        command_pdu(2, &[0x2a, 0, 0, 0, 0, 8, 0, 0, 1, 0], 512, false, &[7; 512], true),
        command_pdu(3, &[0x2a, 0, 0, 0, 0, 0, 0, 0, 6, 0], 3072, false, &[], true),
        data_pdu(1, &[1; 1024]),
        data_pdu(1, &[2; 1024]),
        data_pdu(1, &[3; 1024]),
        data_pdu(1, &[4; 2048]),
        command_pdu(4, &[0x2a, 0, 0, 0, 0, 0, 0, 0, 2, 0], 1024, false, &[5; 300], false),
        {
            let out =
                request::DataOut { last: true, lun: 0, itt: 4, ttt: NO_TAG, exp_stat_sn: 0, data_sn: 0, offset: 300 };
            pdu(Request::DataOut(out), &[6; 724])
        },
        command_pdu(5, &[0x28, 0, 0, 0, 0, 0, 0, 0, 16, 0], 8192, true, &[], true),
        command_pdu(6, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0, false, &[], true),
    ]
}

pub fn seeds() -> Vec<Vec<u8>> {
    let named = [("InitiatorName", "iqn.1994-05.com.redhat:x"), ("TargetName", IQN), ("SessionType", "Normal")];
    let operational = [
        ("HeaderDigest", "CRC32C,None"),
        ("DataDigest", "None,CRC32C"),
        ("MaxRecvDataSegmentLength", "65536"),
        ("MaxBurstLength", "16776192"),
        ("FirstBurstLength", "262144"),
        ("InitialR2T", "No"),
        ("ImmediateData", "Yes"),
        ("MaxOutstandingR2T", "65535"),
        ("DefaultTime2Wait", "2"),
        ("DefaultTime2Retain", "20"),
        ("MaxConnections", "1"),
        ("ErrorRecoveryLevel", "0"),
        ("DataPDUInOrder", "Yes"),
        ("DataSequenceInOrder", "Yes"),
        ("IFMarker", "No"),
        ("TaskReporting", "RFC3720"),
        ("iSCSIProtocolLevel", "1"),
    ];
    let short = login_pdu(1, Some(3), false, &[&named[..], &operational[..]].concat());
    let security = login_pdu(0, Some(1), false, &[&named[..], &[("AuthMethod", "CHAP,None")]].concat());
    let rest = login_pdu(1, Some(3), false, &operational);
    let discovery = login_pdu(1, Some(3), false, &[named[0], ("SessionType", "Discovery")]);
    let mut parts = vec![login_pdu(0, None, true, &named[..2])];
    parts.push(login_pdu(0, None, false, &[("X-com.example", "yes")]));
    parts.push(login_pdu(0, Some(1), false, &[]));
    parts.push(rest.clone());
    let with = |head: &[u8], pdus: &[Vec<u8>]| [head.to_vec(), pdus.concat()].concat();
    let mut seeds = vec![
        with(&[MEND, 0, 1], &[vec![short.clone()], work()].concat()),
        with(&[MEND, 0, 2], &[vec![security, rest], others()].concat()),
        with(&[MEND, 0, 3], &[parts, work()].concat()),
        with(&[MEND, 0, 4], &[discovery]),
        with(&[RAW, 0, 5], &[short]),
    ];
    for (terms, flags) in (0..128).step_by(7).zip([0, BAD_DIGESTS].into_iter().cycle()) {
        let head = [MEND | LOGGED_IN | flags, terms, terms];
        seeds.push(with(&head, &work()));
        let few: Vec<Vec<u8>> = others().into_iter().skip(usize::from(terms) % 14).take(1).collect();
        seeds.push(with(&head, &[work()[..6].to_vec(), few.clone(), work()[6..].to_vec()].concat()));
        seeds.push(with(&head, &[vec![command_pdu(1, &[0], 0, false, &[], true)], few].concat()));
    }
    for (cdb, data) in unit::examples() {
        let head = [MEND | LOGGED_IN, 32, cdb[0]];
        let ready = command_pdu(1, &[0], 0, false, &[], true);
        let read = data.is_empty();
        let len = if read { 4096 } else { data.len() as u32 };
        seeds.push(with(&head, &[ready, command_pdu(2, &cdb, len, read, &data, true)]));
    }
    seeds
}

/// Streams from the first byte on, with the numbers that a right initiator would give: for those who can't mend.
pub fn whole_streams() -> Vec<Vec<u8>> {
    let named = [("InitiatorName", "iqn.1994-05.com.redhat:x"), ("TargetName", IQN)];
    let login = login_pdu(1, Some(3), false, &[&named[..], &[("InitialR2T", "No")]].concat());
    let discovery = login_pdu(1, Some(3), false, &[named[0], ("SessionType", "Discovery")]);
    let all = pdu(
        Request::Text(request::Text {
            immediate: false,
            last: true,
            more: false,
            lun: 0,
            itt: 7,
            ttt: NO_TAG,
            cmd_sn: CmdSn(0),
            exp_stat_sn: 0,
        }),
        b"SendTargets=All\0X-other=1\0",
    );
    let numbered = |pdus: Vec<Vec<u8>>| {
        let mut cmd_sn = 0u32;
        pdus.into_iter().flat_map(move |mut pdu| {
            if !matches!(pdu[0], 0x03 | 0x05 | 0x43) {
                cmd_sn += u32::from(pdu[0] & 0x40 == 0);
                pdu[24..28].copy_from_slice(&cmd_sn.to_be_bytes());
            }
            pdu
        })
    };
    let stream = |head: &[u8], pdus: Vec<Vec<u8>>| head.iter().copied().chain(numbered(pdus)).collect::<Vec<u8>>();
    let mut streams = vec![
        stream(&login, work()),
        stream(&login, [work()[..2].to_vec(), others()].concat()),
        stream(&discovery, vec![all.clone(), all, others().remove(0), others().remove(7)]),
        stream(&discovery, work()),
        stream(&login, vec![login.clone()]),
    ];
    streams.extend(others().into_iter().map(|pdu| stream(&discovery, vec![pdu])));
    streams
}

pub fn records(input: &[u8]) -> Vec<usize> {
    starts(input.get(3..).unwrap_or_default()).into_iter().map(|at| at + 3).collect()
}

pub const WORDS: &[&[u8]] = &[
    b"MaxRecvDataSegmentLength=512\0",
    b"MaxRecvDataSegmentLength=16777215\0",
    b"MaxBurstLength=512\0",
    b"FirstBurstLength=16777215\0",
    b"ImmediateData=No\0",
    b"InitialR2T=No\0",
    b"SessionType=Discovery\0",
    b"SendTargets=All\0",
    b"HeaderDigest=CRC32C\0",
    b"DataDigest=CRC32C\0",
    b"=",
    b"\0",
    b"0x",
    b"18446744073709551616",
    &[0xff; 4],
    &[0x2a],
    &[0x8a],
    &[0x28],
    &[0x40],
];
