//! Connecting, logging in, and discovery, as an initiator.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::driver::{Driver, Terms};
use super::{Error, Options};
use crate::iscsi::pdu::response::Body;
use crate::iscsi::pdu::wire::{Digests, Pdu, Receiver, Sender};
use crate::iscsi::pdu::{CmdSn, NO_TAG, Request, Response, request};
use crate::iscsi::text::{Incoming, Outgoing, number};

/// MaxRecvDataSegmentLength until declared (RFC 7143 §13.12).
const DEFAULT_SEGMENT: usize = 8192;
/// Exchanges in a login before it is given up.
const MAX_EXCHANGES: usize = 32;
/// How long a discovery may take.
const DISCOVERY_TIME: Duration = Duration::from_secs(15);

/// A target that a portal told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// TargetName.
    pub name: String,
    /// TargetAddress values, as `address:port,group`.
    pub addresses: Vec<String>,
}

pub(super) struct Wire {
    pub(super) stream: TcpStream,
    pub(super) receiver: Receiver,
    sender: Sender,
}

impl Wire {
    async fn send(&mut self, request: &Request, data: Bytes) -> Result<(), Error> {
        self.sender.push(request.encode(), [data]);
        while !self.sender.is_empty() {
            let mut slices = [std::io::IoSlice::new(&[]); 8];
            let n = self.sender.slices(&mut slices);
            match self.stream.write_vectored(&slices[..n]).await {
                Ok(written) if written > 0 => self.sender.advance(written),
                _ => return Err(Error::ConnectionLost),
            }
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<(Response, Pdu), Error> {
        loop {
            let pdu = self.receiver.next(|_| Vec::new()).map_err(|_| Error::Protocol("bad framing"))?;
            if let Some(pdu) = pdu {
                let response = Response::decode(&pdu.bhs).map_err(|_| Error::Protocol("unknown opcode"))?;
                return Ok((response, pdu));
            }
            let mut space = self.receiver.space();
            match self.stream.read_buf(&mut space).await {
                Ok(n) if n > 0 => {}
                _ => return Err(Error::ConnectionLost),
            }
        }
    }
}

pub(super) async fn open(portal: SocketAddr, options: &Options, discovery: bool) -> Result<(Wire, Terms), Error> {
    let refused = |source| Error::Connect { portal, source };
    let stream = TcpStream::connect(portal).await.map_err(refused)?;
    stream.set_nodelay(true).map_err(refused)?;
    let receiver = Receiver::new(BytesMut::new(), Digests::default(), DEFAULT_SEGMENT);
    let mut wire = Wire { stream, receiver, sender: Sender::new(Digests::default()) };

    let mut text = Outgoing::default();
    text.pair("InitiatorName", &options.initiator);
    text.pair("SessionType", if discovery { "Discovery" } else { "Normal" });
    let digest = |on: bool| if on { "CRC32C,None" } else { "None" };
    let yes = |on: bool| if on { "Yes" } else { "No" };
    text.pair("HeaderDigest", digest(options.header_digest));
    text.pair("DataDigest", digest(options.data_digest));
    text.pair("MaxRecvDataSegmentLength", &options.max_recv_segment.to_string());
    text.pair("ErrorRecoveryLevel", "0");
    text.pair("DefaultTime2Wait", "0");
    text.pair("DefaultTime2Retain", "0");
    if !discovery {
        text.pair("TargetName", &options.target);
        text.pair("MaxConnections", "1");
        text.pair("InitialR2T", yes(options.initial_r2t));
        text.pair("ImmediateData", yes(options.immediate_data));
        text.pair("MaxBurstLength", &options.max_burst.to_string());
        text.pair("FirstBurstLength", &options.first_burst.to_string());
        text.pair("MaxOutstandingR2T", &options.max_outstanding_r2t.to_string());
        text.pair("DataPDUInOrder", "Yes");
        text.pair("DataSequenceInOrder", "Yes");
    }

    let mut terms = Terms {
        digests: Digests::default(),
        max_send_segment: DEFAULT_SEGMENT,
        first_burst: options.first_burst,
        initial_r2t: true,
        immediate_data: true,
        cmd_sn: CmdSn(1),
        max_cmd_sn: CmdSn(1),
        exp_stat_sn: 0,
    };
    let mut incoming = Incoming::default();
    for _ in 0..MAX_EXCHANGES {
        let (segment, more) = text.segment(DEFAULT_SEGMENT);
        let request = request::Login {
            transit: !more,
            more,
            stage: 1,
            next_stage: if more { 0 } else { 3 },
            version_max: 0,
            version_min: 0,
            isid: options.isid,
            tsih: 0,
            itt: 0,
            cid: 0,
            cmd_sn: terms.cmd_sn,
            exp_stat_sn: terms.exp_stat_sn,
        };
        wire.send(&Request::Login(request), segment).await?;
        let (response, pdu) = wire.next().await?;
        let Body::Login(login) = response.body else { return Err(Error::Protocol("no login response")) };
        if login.status != 0 {
            return Err(Error::Login { status: login.status });
        }
        terms.exp_stat_sn = response.stat_sn.wrapping_add(1);
        terms.max_cmd_sn = response.max_cmd_sn;
        let pairs = incoming.push(pdu.segment(), login.more).map_err(|_| Error::Protocol("bad login text"))?;
        for (key, value) in pairs.unwrap_or_default() {
            let n = number(&value);
            match (key.as_str(), n) {
                ("HeaderDigest", _) => terms.digests.header = value == "CRC32C",
                ("DataDigest", _) => terms.digests.data = value == "CRC32C",
                ("InitialR2T", _) => terms.initial_r2t = value == "Yes",
                ("ImmediateData", _) => terms.immediate_data = value == "Yes",
                ("MaxRecvDataSegmentLength", Some(n @ 512..=0xff_ffff)) => terms.max_send_segment = n as usize,
                ("FirstBurstLength", Some(n @ 512..=0xff_ffff)) => terms.first_burst = n as u32,
                _ => {}
            }
        }
        if login.transit && login.next_stage == 3 {
            wire.sender.set(terms.digests);
            wire.receiver.set(terms.digests, options.max_recv_segment as usize);
            return Ok((wire, terms));
        }
    }
    Err(Error::Protocol("the login does not end"))
}

pub(super) async fn connect(portal: SocketAddr, options: &Options) -> Result<Driver, Error> {
    let (wire, terms) = open(portal, options, false).await?;
    Ok(Driver::new(wire.stream, wire.receiver, wire.sender, terms))
}

/// Asks a portal which targets there are (RFC 7143 §4.3, SendTargets=All).
///
/// # Errors
/// As for [`Session::connect`](super::Session::connect).
pub async fn discover(portal: SocketAddr) -> Result<Vec<Found>, Error> {
    tokio::time::timeout(DISCOVERY_TIME, ask(portal)).await.map_err(|_| Error::LoginTimeout)?
}

async fn ask(portal: SocketAddr) -> Result<Vec<Found>, Error> {
    let (mut wire, terms) = open(portal, &Options::new(""), true).await?;
    let mut request = request::Text {
        immediate: false,
        last: true,
        more: false,
        lun: 0,
        itt: 1,
        ttt: NO_TAG,
        cmd_sn: terms.cmd_sn,
        exp_stat_sn: terms.exp_stat_sn,
    };
    let mut text = Bytes::from_static(b"SendTargets=All\0");
    let mut incoming = Incoming::default();
    let pairs = loop {
        wire.send(&Request::Text(request), std::mem::take(&mut text)).await?;
        let (response, pdu) = wire.next().await?;
        let Body::Text { last, more, ttt, .. } = response.body else {
            return Err(Error::Protocol("no text response"));
        };
        request.exp_stat_sn = response.stat_sn.wrapping_add(1);
        request.cmd_sn = request.cmd_sn.plus(1);
        request.ttt = ttt;
        // The text is whole when F says so; C, and an empty segment, only that it goes on.
        let more = more || !last;
        if let Some(pairs) = incoming.push(pdu.segment(), more).map_err(|_| Error::Protocol("bad text"))? {
            break pairs;
        }
    };
    let logout = request::Logout {
        immediate: false,
        reason: 0,
        itt: 2,
        cid: 0,
        cmd_sn: request.cmd_sn,
        exp_stat_sn: request.exp_stat_sn,
    };
    wire.send(&Request::Logout(logout), Bytes::new()).await?;
    let _ = wire.next().await;
    let mut found: Vec<Found> = Vec::new();
    for (key, value) in pairs {
        match (key.as_str(), found.last_mut()) {
            ("TargetName", _) => found.push(Found { name: value, addresses: vec![] }),
            ("TargetAddress", Some(target)) => target.addresses.push(value),
            _ => {}
        }
    }
    Ok(found)
}
