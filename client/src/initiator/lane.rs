//! A session that its caller's thread drives by itself: no task, no channel, no allocation per command. For measuring,
//! where the initiator's own cost must not show: a command at depth 1 is one `sendmsg` and one blocking `readv`.
//!
//! It carries no digests. Its framing is its own, so that a change to the target's does not change what it is
//! measured by.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};

use super::driver::Terms;
use super::{ATTENTIONS, Capacity, Error, Options, login};
use crate::block::SECTOR;
use crate::iscsi::pdu::response::Body;
use crate::iscsi::pdu::{BHS_LEN, Bhs, NO_TAG, Request, Response, request, response};
use crate::scsi::status;

/// Room for what is received besides read data that has a place.
const RECEIVE: usize = 64 * 1024;
/// Commands longer than this are received without reading ahead, so that their data is not copied.
const LARGE: usize = 32 * 1024;
/// Bytes that are read ahead then.
const AHEAD: usize = 512;
/// From so many missing bytes on, read data goes straight to its place.
const DIRECT: usize = 1024;
/// The longest data segment that is no read data.
const MAX_OTHER: usize = 16 * 1024;
/// Pieces in one `sendmsg`.
const PIECES: usize = 128;
/// A turn with nothing to read ends after this.
const TURN: Duration = Duration::from_millis(100);
/// SCSI statuses that ask for the command again: BUSY and TASK SET FULL.
const TRY_AGAIN: [u8; 2] = [0x08, status::TASK_SET_FULL];
/// A read does not wait.
const READABLE: PollFlags = PollFlags::IN.union(PollFlags::HUP).union(PollFlags::ERR);
/// Sense key of a unit attention.
const UNIT_ATTENTION: u8 = 6;

/// One command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// READ (16) of the lane's length.
    Read {
        /// First 512-byte block.
        lba: u64,
    },
    /// WRITE (16) of the lane's length.
    Write {
        /// First 512-byte block.
        lba: u64,
        /// Force unit access.
        fua: bool,
    },
    /// SYNCHRONIZE CACHE (16) of everything.
    Flush,
}

/// A command that has been answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its slot.
    pub slot: usize,
    /// SCSI status.
    pub status: u8,
    /// Sense key, 0 without sense.
    pub key: u8,
    /// Additional sense code and qualifier.
    pub code: u16,
}

impl Ended {
    /// Whether it did what it should.
    pub fn is_good(&self) -> bool {
        self.status == status::GOOD
    }

    /// Whether the target asks for it once more: a unit attention, or it is busy.
    pub fn is_try_again(&self) -> bool {
        TRY_AGAIN.contains(&self.status) || self.status == status::CHECK_CONDITION && self.key == UNIT_ATTENTION
    }

    /// As an error.
    pub fn error(&self) -> Error {
        Error::Status { status: self.status, key: self.key, code: self.code }
    }
}

#[derive(Default)]
struct Slot {
    read: Vec<u8>,
    write: Vec<u8>,
    /// Read data that has come.
    got: usize,
    busy: bool,
}

enum Piece {
    Header([u8; BHS_LEN]),
    Data { slot: usize },
}

struct Queued {
    piece: Piece,
    at: usize,
    end: usize,
}

/// Read data under way to its slot.
struct Incoming {
    slot: usize,
    missing: usize,
    padding: usize,
    status: Option<u8>,
}

/// A logged-in session.
pub struct Lane {
    stream: TcpStream,
    lun: u64,
    terms: Terms,
    slots: Vec<Slot>,
    bytes: usize,
    out: VecDeque<Queued>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    incoming: Option<Incoming>,
    /// Commands that wait for the target's window.
    waiting: VecDeque<(usize, [u8; 16])>,
}

impl Lane {
    /// Logs in, waits until pending unit attentions are cleared, and asks for the size. At most `depth` commands
    /// of `bytes` bytes, a multiple of 512, will be under way at once; what is written is made of `pattern`.
    ///
    /// # Errors
    /// No connection, a refused login, a time-out, or a device that is not ready.
    ///
    /// # Panics
    /// If `pattern` is empty.
    pub async fn connect(
        portal: SocketAddr,
        options: &Options,
        lun: u8,
        depth: usize,
        bytes: usize,
        pattern: &[u8],
    ) -> Result<(Lane, Capacity), Error> {
        let options = Options { header_digest: false, data_digest: false, ..options.clone() };
        let (wire, terms) = tokio::time::timeout(options.login_timeout, login::open(portal, &options, false))
            .await
            .map_err(|_| Error::LoginTimeout)??;
        let leftover = wire.receiver.into_leftover();
        let connect = |source| Error::Connect { portal, source };
        let stream = wire.stream.into_std().map_err(connect)?;
        stream.set_nonblocking(false).map_err(connect)?;
        stream.set_read_timeout(Some(TURN)).map_err(connect)?;
        let mut buffer = vec![0; RECEIVE].into_boxed_slice();
        let end = leftover.len();
        buffer[..end].copy_from_slice(&leftover);
        let slot = |_| Slot {
            read: vec![0; bytes.max(64)],
            write: pattern.iter().copied().cycle().take(bytes).collect(),
            ..Slot::default()
        };
        let mut lane = Lane {
            stream,
            lun: u64::from(lun) << 48,
            terms,
            slots: (0..depth.max(1)).map(slot).collect(),
            bytes,
            out: VecDeque::new(),
            buffer,
            start: 0,
            end,
            incoming: None,
            waiting: VecDeque::new(),
        };
        let timeout = options.login_timeout;
        tokio::task::spawn_blocking(move || {
            let capacity = lane.make_ready(timeout)?;
            Ok((lane, capacity))
        })
        .await
        .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }

    fn make_ready(&mut self, patience: Duration) -> Result<Capacity, Error> {
        self.alone([0; 16], 0, patience)?;
        let mut cdb = [0; 16];
        (cdb[0], cdb[1], cdb[13]) = (0x9e, 0x10, 32);
        self.alone(cdb, 32, patience)?;
        if self.slots[0].got < 12 {
            return Err(Error::Protocol("READ CAPACITY data is too short"));
        }
        let number = self.slots[0].read[..12].iter().fold(0u128, |n, &b| n << 8 | u128::from(b));
        Ok(Capacity { blocks: (number >> 32) as u64 + 1, block_len: number as u32 })
    }

    /// One command while nothing else is under way.
    fn alone(&mut self, cdb: [u8; 16], len: u32, patience: Duration) -> Result<(), Error> {
        let until = std::time::Instant::now() + patience;
        let mut ended = Vec::new();
        for left in (0..ATTENTIONS).rev() {
            self.slots[0].got = 0;
            self.command(0, cdb, false, len);
            while ended.is_empty() {
                if std::time::Instant::now() >= until {
                    return Err(Error::LoginTimeout);
                }
                self.turn(&mut ended)?;
            }
            let one: Ended = ended.remove(0);
            match one.is_good() {
                true => return Ok(()),
                false if left == 0 || !one.is_try_again() => return Err(one.error()),
                false => {}
            }
        }
        unreachable!("the last try returned")
    }

    /// What the slot's next write will carry.
    pub fn content(&mut self, slot: usize) -> &mut [u8] {
        &mut self.slots[slot].write
    }

    /// Begins a command in a slot that is free.
    ///
    /// # Panics
    /// If the slot is in use.
    pub fn begin(&mut self, slot: usize, io: Io) {
        assert!(!self.slots[slot].busy, "slot {slot} is in use");
        let mut cdb = [0; 16];
        let lba = match io {
            Io::Read { lba } => {
                cdb[0] = 0x88;
                lba
            }
            Io::Write { lba, fua } => {
                (cdb[0], cdb[1]) = (0x8a, u8::from(fua) << 3);
                lba
            }
            Io::Flush => {
                cdb[0] = 0x91;
                0
            }
        };
        cdb[2..10].copy_from_slice(&lba.to_be_bytes());
        if io != Io::Flush {
            cdb[10..14].copy_from_slice(&((self.bytes as u64 / SECTOR) as u32).to_be_bytes());
        }
        self.slots[slot].busy = true;
        self.slots[slot].got = 0;
        match self.terms.max_cmd_sn.ahead_of(self.terms.cmd_sn) {
            Some(_) if self.waiting.is_empty() => self.send(slot, cdb),
            _ => self.waiting.push_back((slot, cdb)),
        }
    }

    fn send(&mut self, slot: usize, cdb: [u8; 16]) {
        let len = if cdb[0] == 0x91 { 0 } else { self.bytes as u32 };
        self.command(slot, cdb, cdb[0] == 0x8a, len);
    }

    fn command(&mut self, slot: usize, cdb: [u8; 16], write: bool, len: u32) {
        let cmd_sn = self.terms.cmd_sn;
        self.terms.cmd_sn = cmd_sn.plus(1);
        let first = if write { len.min(self.terms.first_burst) as usize } else { 0 };
        let immediate = if self.terms.immediate_data { first.min(self.terms.max_send_segment) } else { 0 };
        let unsolicited = if self.terms.initial_r2t { immediate } else { first };
        let command = request::Command {
            immediate: false,
            last: unsolicited == immediate,
            read: !write && len > 0,
            write,
            attribute: 1,
            lun: self.lun,
            itt: slot as u32,
            expected_len: len,
            cmd_sn,
            exp_stat_sn: self.terms.exp_stat_sn,
            cdb,
        };
        self.queue(Request::Command(command).encode(), slot, 0, immediate);
        self.data_out(slot, NO_TAG, immediate, unsolicited);
    }

    /// Sends a part of a slot's data as one sequence.
    fn data_out(&mut self, slot: usize, ttt: u32, mut from: usize, to: usize) {
        let mut data_sn = 0;
        while from < to {
            let len = (to - from).min(self.terms.max_send_segment);
            let data = request::DataOut {
                last: from + len == to,
                lun: self.lun,
                itt: slot as u32,
                ttt,
                exp_stat_sn: self.terms.exp_stat_sn,
                data_sn,
                offset: from as u32,
            };
            self.queue(Request::DataOut(data).encode(), slot, from, from + len);
            data_sn += 1;
            from += len;
        }
    }

    fn queue(&mut self, mut bhs: Bhs, slot: usize, from: usize, to: usize) {
        bhs.set_data_len(to - from);
        self.out.push_back(Queued { piece: Piece::Header(bhs.0), at: 0, end: BHS_LEN });
        if to > from {
            self.out.push_back(Queued { piece: Piece::Data { slot }, at: from, end: to });
        }
    }

    /// Sends what the connection takes.
    fn flush(&mut self) -> Result<(), Error> {
        while !self.out.is_empty() {
            let mut slices = [IoSlice::new(&[]); PIECES];
            let mut n = 0;
            for (slice, queued) in slices.iter_mut().zip(&self.out) {
                let bytes = match &queued.piece {
                    Piece::Header(header) => &header[queued.at..queued.end],
                    Piece::Data { slot } => &self.slots[*slot].write[queued.at..queued.end],
                };
                *slice = IoSlice::new(bytes);
                n += 1;
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let sent = rustix::net::sendmsg(&self.stream, &slices[..n], &mut SendAncillaryBuffer::default(), flags);
            let mut sent = match sent {
                Ok(sent) => sent,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(_) => return Err(Error::ConnectionLost),
            };
            while sent > 0 {
                let front = self.out.front_mut().expect("what was sent was queued");
                let step = sent.min(front.end - front.at);
                front.at += step;
                sent -= step;
                if front.at == front.end {
                    self.out.pop_front();
                }
            }
        }
        Ok(())
    }

    /// Sends what was begun and takes what has come; waits a moment if nothing has.
    ///
    /// # Errors
    /// The connection was lost, or the target broke the protocol.
    pub fn turn(&mut self, ended: &mut Vec<Ended>) -> Result<(), Error> {
        self.flush()?;
        if !self.out.is_empty() {
            // The connection takes no more now: either side may be the one that has to read first.
            let mut fds = [PollFd::new(&self.stream, PollFlags::IN | PollFlags::OUT)];
            wait(&mut fds)?;
            if !fds[0].revents().intersects(READABLE) {
                return Ok(());
            }
        }
        self.read(ended)
    }

    /// The same for several lanes of one thread; tells which lane ended what.
    ///
    /// # Errors
    /// The first lane that failed, and how.
    pub fn turn_all(lanes: &mut [Lane], ended: &mut Vec<(usize, Ended)>) -> Result<(), (usize, Error)> {
        let mut batch = Vec::new();
        if let [lane] = lanes {
            lane.turn(&mut batch).map_err(|error| (0, error))?;
            ended.extend(batch.into_iter().map(|one| (0, one)));
            return Ok(());
        }
        let mut ready: Vec<usize> = Vec::with_capacity(lanes.len());
        for (index, lane) in lanes.iter_mut().enumerate() {
            lane.flush().map_err(|error| (index, error))?;
        }
        {
            let mut fds: Vec<PollFd<'_>> = lanes
                .iter()
                .map(|lane| {
                    let out = if lane.out.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
                    PollFd::new(&lane.stream, PollFlags::IN | out)
                })
                .collect();
            wait(&mut fds).map_err(|error| (0, error))?;
            ready.extend((0..fds.len()).filter(|&index| fds[index].revents().intersects(READABLE)));
        }
        for index in ready {
            lanes[index].read(&mut batch).map_err(|error| (index, error))?;
            ended.extend(batch.drain(..).map(|one| (index, one)));
        }
        Ok(())
    }

    fn read(&mut self, ended: &mut Vec<Ended>) -> Result<(), Error> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.end < MAX_OTHER + BHS_LEN {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let mut ahead = &mut self.buffer[self.end..];
        if self.bytes > LARGE {
            let room = ahead.len().min(AHEAD.max(MAX_OTHER * usize::from(self.start < self.end)));
            ahead = &mut ahead[..room];
        }
        let mut direct = 0;
        let got = match &self.incoming {
            Some(incoming) if self.start == self.end && incoming.missing >= DIRECT => {
                direct = incoming.missing;
                let slot = &mut self.slots[incoming.slot];
                let place = &mut slot.read[slot.got..slot.got + direct];
                rustix::io::readv(&self.stream, &mut [IoSliceMut::new(place), IoSliceMut::new(ahead)])
            }
            _ => rustix::io::readv(&self.stream, &mut [IoSliceMut::new(ahead)]),
        };
        match got {
            Ok(0) => return Err(Error::ConnectionLost),
            Ok(got) => {
                let placed = got.min(direct);
                if let Some(incoming) = &mut self.incoming
                    && placed > 0
                {
                    incoming.missing -= placed;
                    self.slots[incoming.slot].got += placed;
                }
                self.end += got - placed;
            }
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(_) => return Err(Error::ConnectionLost),
        }
        while self.next(ended)? {}
        while let Some((slot, cdb)) = self.waiting.front().copied()
            && self.terms.max_cmd_sn.ahead_of(self.terms.cmd_sn).is_some()
        {
            self.waiting.pop_front();
            self.send(slot, cdb);
        }
        Ok(())
    }

    /// Takes the next PDU out of what was read; whether there may be another.
    fn next(&mut self, ended: &mut Vec<Ended>) -> Result<bool, Error> {
        if let Some(incoming) = &mut self.incoming {
            let slot = &mut self.slots[incoming.slot];
            let here = (self.end - self.start).min(incoming.missing);
            slot.read[slot.got..slot.got + here].copy_from_slice(&self.buffer[self.start..self.start + here]);
            slot.got += here;
            incoming.missing -= here;
            self.start += here;
            if incoming.missing > 0 || self.end - self.start < incoming.padding {
                return Ok(false);
            }
            self.start += incoming.padding;
            let (slot, status) = (incoming.slot, incoming.status);
            self.incoming = None;
            if let Some(status) = status {
                self.finish(Ended { slot, status, key: 0, code: 0 }, ended);
            }
        }
        let have = &self.buffer[self.start..self.end];
        if have.len() < BHS_LEN {
            return Ok(false);
        }
        let mut bhs = Bhs([0; BHS_LEN]);
        bhs.0.copy_from_slice(&have[..BHS_LEN]);
        let (ahs, len) = (bhs.ahs_len(), bhs.data_len());
        let padding = len.wrapping_neg() & 3;
        let is_read = bhs.opcode() == response::DATA_IN;
        if !is_read && len > MAX_OTHER {
            return Err(Error::Protocol("a data segment that is too long"));
        }
        let whole = BHS_LEN + ahs + if is_read { 0 } else { len + padding };
        if have.len() < whole {
            return Ok(false);
        }
        let segment = BHS_LEN + ahs..BHS_LEN + ahs + if is_read { 0 } else { len };
        let sense = match have[segment].get(2..) {
            Some(sense) if sense.len() >= 14 => (sense[2] & 0xf, u16::from_be_bytes([sense[12], sense[13]])),
            _ => (0, 0),
        };
        self.start += whole;
        let response = Response::decode(&bhs).map_err(|_| Error::Protocol("unknown opcode"))?;
        if response.max_cmd_sn.ahead_of(self.terms.max_cmd_sn).is_some() {
            self.terms.max_cmd_sn = response.max_cmd_sn;
        }
        match response.body {
            Body::DataIn(data) => {
                let slot = self.slot(data.itt)?;
                let place = &self.slots[slot];
                if data.offset as usize != place.got || place.got + len > place.read.len() {
                    return Err(Error::Protocol("read data that was not asked for"));
                }
                let status = data.status.map(|(status, _)| status);
                if status.is_some() {
                    self.terms.exp_stat_sn = response.stat_sn.wrapping_add(1);
                }
                self.incoming = Some(Incoming { slot, missing: len, padding, status });
            }
            Body::Command { itt, response: outcome, status, .. } => {
                if outcome != 0 {
                    return Err(Error::Protocol("target failure"));
                }
                self.terms.exp_stat_sn = response.stat_sn.wrapping_add(1);
                let slot = self.slot(itt)?;
                self.finish(Ended { slot, status, key: sense.0, code: sense.1 }, ended);
            }
            Body::R2t { itt, ttt, offset, len, .. } => {
                let slot = self.slot(itt)?;
                let (from, to) = (offset as usize, offset as usize + len as usize);
                if len == 0 || to > self.slots[slot].write.len() {
                    return Err(Error::Protocol("an R2T for data that there is not"));
                }
                self.data_out(slot, ttt, from, to);
            }
            Body::NopIn { itt: NO_TAG, ttt, lun } => {
                if ttt != NO_TAG {
                    let (cmd_sn, exp_stat_sn) = (self.terms.cmd_sn, self.terms.exp_stat_sn);
                    let nop = request::NopOut { immediate: true, lun, itt: NO_TAG, ttt, cmd_sn, exp_stat_sn };
                    self.queue(Request::NopOut(nop).encode(), 0, 0, 0);
                }
            }
            // It may want to end soon; until then it answers.
            Body::Async { .. } => {}
            Body::Reject { .. } => return Err(Error::Protocol("the target rejected a PDU")),
            _ => return Err(Error::Protocol("an answer that nobody asked for")),
        }
        Ok(true)
    }

    fn slot(&self, itt: u32) -> Result<usize, Error> {
        let slot = itt as usize;
        if slot < self.slots.len() { Ok(slot) } else { Err(Error::Protocol("an answer to no command")) }
    }

    fn finish(&mut self, one: Ended, ended: &mut Vec<Ended>) {
        self.slots[one.slot].busy = false;
        ended.push(one);
    }

    /// Logs out, as far as the target answers soon, and closes the connection.
    pub fn log_out(mut self) {
        let logout = request::Logout {
            immediate: true,
            reason: 0,
            itt: NO_TAG - 1,
            cid: 0,
            cmd_sn: self.terms.cmd_sn,
            exp_stat_sn: self.terms.exp_stat_sn,
        };
        self.queue(Request::Logout(logout).encode(), 0, 0, 0);
        // The answer is no matter: the read waits for it, so that the next login does not meet this session.
        if self.flush().is_ok() {
            let _ = self.read(&mut Vec::new());
        }
    }
}

/// Waits until anything is ready, or the turn is over.
fn wait(fds: &mut [PollFd<'_>]) -> Result<(), Error> {
    let timeout = Timespec { tv_sec: 0, tv_nsec: TURN.as_nanos() as i64 };
    match rustix::event::poll(fds, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(_) => Err(Error::ConnectionLost),
    }
}
