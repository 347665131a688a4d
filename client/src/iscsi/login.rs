//! The login phase as a target sees it (RFC 7143 §6.2, §6.3, §13): a core without I/O that takes Login Requests and
//! gives Login Responses, until it has agreed or refused.
//!
//! Stages: security (CSG 0; only `AuthMethod=None`), operational (CSG 1), full feature (3). An initiator may begin in
//! either of the first two. How each key's value comes about (§13) is one table, [`answer`].

use std::collections::BTreeSet;

use bytes::Bytes;

use super::pdu::wire::Digests;
use super::pdu::{CmdSn, Response, request, response};
use super::text::{self, Incoming, Outgoing};

/// MaxRecvDataSegmentLength during login, and until declared otherwise (RFC 7143 §13.12).
pub const DEFAULT_SEGMENT: u32 = 8192;

/// The data segment that we declare to take.
pub const OUR_SEGMENT: u32 = 256 * 1024;

/// The longest burst that we agree to (MaxBurstLength, §13.13).
pub const OUR_MAX_BURST: u32 = 1024 * 1024;

/// The longest unsolicited burst that we agree to (FirstBurstLength, §13.14). Times the commands of a session, it
/// bounds the memory that an initiator can take without asking.
pub const OUR_FIRST_BURST: u32 = 256 * 1024;

/// Ready-to-transfers outstanding for one command that we agree to (MaxOutstandingR2T, §13.17).
pub const OUR_OUTSTANDING_R2T: u32 = 8;

/// The longest iSCSI name (RFC 7143 §4.2.7.1).
pub const MAX_NAME: usize = 223;

/// Requests in one login; an initiator that needs more goes in circles.
pub const MAX_EXCHANGES: u32 = 64;

const _: () = assert!(OUR_FIRST_BURST <= OUR_MAX_BURST && OUR_SEGMENT >= DEFAULT_SEGMENT);

/// Status-Class and Status-Detail of a refused login (RFC 7143 §11.13.5).
pub mod status {
    /// Any mistake of the initiator that has no number of its own.
    pub const INITIATOR_ERROR: u16 = 0x0200;
    /// No authentication method in common.
    pub const AUTHENTICATION: u16 = 0x0201;
    /// No such target.
    pub const NOT_FOUND: u16 = 0x0203;
    /// None of the versions offered.
    pub const VERSION: u16 = 0x0205;
    /// A second connection for a session.
    pub const TOO_MANY_CONNECTIONS: u16 = 0x0206;
    /// InitiatorName or TargetName is missing.
    pub const MISSING_PARAMETER: u16 = 0x0207;
    /// A session type that does not exist.
    pub const SESSION_TYPE: u16 = 0x0209;
    /// A TSIH that does not exist.
    pub const NO_SESSION: u16 = 0x020a;
    /// The target takes no more sessions now.
    pub const OUT_OF_RESOURCES: u16 = 0x0302;
    /// The target is going away.
    pub const UNAVAILABLE: u16 = 0x0301;
}

/// What initiator and target have agreed on; begins with RFC 7143's defaults (§13).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// HeaderDigest and DataDigest.
    pub digests: Digests,
    /// Data segments that the initiator takes.
    pub max_send_segment: u32,
    /// Data segments that the target takes.
    pub max_recv_segment: u32,
    /// MaxBurstLength.
    pub max_burst: u32,
    /// FirstBurstLength.
    pub first_burst: u32,
    /// InitialR2T: no unsolicited Data-Out.
    pub initial_r2t: bool,
    /// ImmediateData: data in the command's own PDU.
    pub immediate_data: bool,
    /// MaxOutstandingR2T.
    pub max_outstanding_r2t: u32,
    /// DefaultTime2Wait in seconds.
    pub time2wait: u16,
    /// DefaultTime2Retain in seconds.
    pub time2retain: u16,
}

impl Default for Parameters {
    fn default() -> Self {
        Parameters {
            digests: Digests::default(),
            max_send_segment: DEFAULT_SEGMENT,
            max_recv_segment: DEFAULT_SEGMENT,
            max_burst: 262_144,
            first_burst: 65_536,
            initial_r2t: true,
            immediate_data: true,
            max_outstanding_r2t: 1,
            time2wait: 2,
            // Responder's default as if negotiated with our 0: nothing is kept for a lost connection (§13.16).
            time2retain: 0,
        }
    }
}

/// Who logged in, to what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// InitiatorName.
    pub initiator: String,
    /// InitiatorAlias, empty if none.
    pub alias: String,
    /// Initiator part of the session id.
    pub isid: [u8; 6],
    /// TargetName; `None` for a discovery session, whatever the initiator said.
    pub target: Option<String>,
    /// Connection id.
    pub cid: u16,
}

/// What to do after a request.
#[derive(Debug)]
pub enum Next {
    /// Send this and wait for the next request.
    Respond(Response, Bytes),
    /// Send this and close the connection; `reason` is for the log.
    Refuse(Response, &'static str),
    /// Agreed: this is the last response. The TSIH is still to be filled in.
    Agreed(Response, Bytes, Box<Agreed>),
}

/// A finished login.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Who, to what.
    pub identity: Identity,
    /// On what terms.
    pub parameters: Parameters,
    /// The first command's number.
    pub cmd_sn: CmdSn,
    /// The next status number, after the last login response.
    pub stat_sn: u32,
}

/// What the login has to know about targets.
pub trait Targets {
    /// Whether this name can be logged in to.
    fn has_target(&self, name: &str) -> bool;
    /// Whether a session of this TSIH lives.
    fn has_session(&self, tsih: u16) -> bool;
}

/// The login of one connection.
#[derive(Debug)]
pub struct Login {
    portal_group_tag: u16,
    incoming: Incoming,
    outgoing: Outgoing,
    first: Option<request::Login>,
    stage: u8,
    exchanges: u32,
    stat_sn: u32,
    identity: Identity,
    discovery: bool,
    identified: bool,
    declared_segment: bool,
    told_group: bool,
    seen: BTreeSet<String>,
    parameters: Parameters,
    /// T and NSG of a request whose answer did not fit one segment.
    transit: Option<u8>,
}

impl Login {
    /// A login at a portal of this portal group.
    pub fn new(portal_group_tag: u16) -> Self {
        Login {
            portal_group_tag,
            incoming: Incoming::default(),
            outgoing: Outgoing::default(),
            first: None,
            stage: 0,
            exchanges: 0,
            stat_sn: 0,
            identity: Identity { initiator: String::new(), alias: String::new(), isid: [0; 6], target: None, cid: 0 },
            discovery: false,
            identified: false,
            declared_segment: false,
            told_group: false,
            seen: BTreeSet::new(),
            parameters: Parameters::default(),
            transit: None,
        }
    }

    /// Takes a request with its data segment.
    pub fn step(&mut self, request: &request::Login, segment: &[u8], targets: &dyn Targets) -> Next {
        self.try_step(request, segment, targets).unwrap_or_else(|(status, reason)| {
            let response = self.response(request, false, false, status);
            Next::Refuse(response, reason)
        })
    }

    fn try_step(
        &mut self,
        request: &request::Login,
        segment: &[u8],
        targets: &dyn Targets,
    ) -> Result<Next, (u16, &'static str)> {
        let wrong = |reason| (status::INITIATOR_ERROR, reason);
        self.exchanges += 1;
        if self.exchanges > MAX_EXCHANGES {
            return Err(wrong("the login does not end"));
        }
        match &self.first {
            None => {
                self.stage = request.stage;
                self.identity.isid = request.isid;
                self.identity.cid = request.cid;
                self.stat_sn = request.exp_stat_sn;
                self.first = Some(*request);
                if request.version_min > 0 {
                    return Err((status::VERSION, "unsupported version"));
                }
                if request.tsih != 0 {
                    return Err(if targets.has_session(request.tsih) {
                        (status::TOO_MANY_CONNECTIONS, "a second connection for a session")
                    } else {
                        (status::NO_SESSION, "no such session")
                    });
                }
            }
            Some(first) => {
                if request.itt != first.itt
                    || request.isid != first.isid
                    || request.cid != first.cid
                    || request.tsih != first.tsih
                {
                    return Err(wrong("ITT, ISID, CID or TSIH changed during login"));
                }
            }
        }
        if request.stage != self.stage || self.stage > 1 {
            return Err(wrong("login stage out of order"));
        }
        if request.transit && (request.more || request.next_stage <= self.stage || request.next_stage == 2) {
            return Err(wrong("impossible stage transition"));
        }
        if !self.outgoing.is_empty() {
            // §6.2: an answer in several segments is fetched with empty requests.
            if !segment.is_empty() {
                return Err(wrong("text while our answer is not finished"));
            }
            return Ok(self.answer(request));
        }
        let pairs =
            self.incoming.push(segment, request.more).map_err(|_| wrong("login text is malformed or too long"))?;
        let Some(pairs) = pairs else {
            return Ok(Next::Respond(self.response(request, false, false, 0), Bytes::new()));
        };
        self.negotiate(&pairs)?;
        if !self.identified {
            self.identify(targets)?;
        }
        if !self.discovery && !self.told_group {
            // §13.9: in the first response of a normal session.
            self.told_group = true;
            self.outgoing.pair("TargetPortalGroupTag", &self.portal_group_tag.to_string());
        }
        if self.stage == 1 && !self.declared_segment {
            self.declared_segment = true;
            self.parameters.max_recv_segment = OUR_SEGMENT;
            self.outgoing.pair("MaxRecvDataSegmentLength", &OUR_SEGMENT.to_string());
        }
        self.transit = request.transit.then_some(request.next_stage);
        Ok(self.answer(request))
    }

    /// The next segment of our answer; with the last one the stage changes.
    fn answer(&mut self, request: &request::Login) -> Next {
        let (segment, more) = self.outgoing.segment(DEFAULT_SEGMENT as usize);
        if more {
            return Next::Respond(self.response(request, false, true, 0), segment);
        }
        let Some(next) = self.transit.take() else {
            return Next::Respond(self.response(request, false, false, 0), segment);
        };
        let mut response = self.response(request, true, false, 0);
        let response::Body::Login(body) = &mut response.body else { unreachable!("made above") };
        body.next_stage = next;
        self.stage = next;
        if next != 3 {
            return Next::Respond(response, segment);
        }
        let mut parameters = self.parameters.clone();
        parameters.first_burst = parameters.first_burst.min(parameters.max_burst);
        if self.discovery {
            self.identity.target = None;
        }
        let agreed =
            Agreed { identity: self.identity.clone(), parameters, cmd_sn: request.cmd_sn, stat_sn: self.stat_sn };
        Next::Agreed(response, segment, Box::new(agreed))
    }

    fn response(&mut self, request: &request::Login, transit: bool, more: bool, status: u16) -> Response {
        let stat_sn = self.stat_sn;
        self.stat_sn = self.stat_sn.wrapping_add(1);
        Response {
            stat_sn,
            exp_cmd_sn: request.cmd_sn,
            max_cmd_sn: request.cmd_sn,
            body: response::Body::Login(response::Login {
                transit,
                more,
                stage: request.stage,
                next_stage: 0,
                isid: request.isid,
                tsih: request.tsih,
                itt: request.itt,
                status,
            }),
        }
    }

    fn identify(&mut self, targets: &dyn Targets) -> Result<(), (u16, &'static str)> {
        // §6.3.1: the leading request names the initiator, the session type and the target.
        self.identified = true;
        if self.identity.initiator.is_empty() {
            return Err((status::MISSING_PARAMETER, "InitiatorName is missing"));
        }
        match &self.identity.target {
            _ if self.discovery => Ok(()),
            None => Err((status::MISSING_PARAMETER, "TargetName is missing")),
            Some(name) if targets.has_target(name) => Ok(()),
            Some(_) => Err((status::NOT_FOUND, "no such target")),
        }
    }

    fn negotiate(&mut self, pairs: &[(String, String)]) -> Result<(), (u16, &'static str)> {
        // The session type decides which keys are irrelevant, wherever in the text it stands.
        if let Some((_, value)) = pairs.iter().find(|(key, _)| key == "SessionType") {
            self.discovery = match value.as_str() {
                "Discovery" => true,
                "Normal" => false,
                _ => return Err((status::SESSION_TYPE, "unknown session type")),
            };
        }
        for (key, value) in pairs {
            if !self.seen.insert(key.clone()) {
                // §6.3: negotiating a key twice in a login is an error of the initiator.
                return Err((status::INITIATOR_ERROR, "a key was sent twice"));
            }
            if let Some(answer) = self.key(key, value)? {
                self.outgoing.pair(key, &answer);
            }
        }
        if self.parameters.initial_r2t && !self.parameters.immediate_data {
            // §13.14: irrelevant, so that nothing depends on it.
            self.parameters.first_burst = self.parameters.first_burst.min(self.parameters.max_burst);
        }
        Ok(())
    }

    fn key(&mut self, key: &str, value: &str) -> Result<Option<String>, (u16, &'static str)> {
        let wrong = |reason| (status::INITIATOR_ERROR, reason);
        let operational = self.stage == 1;
        match key {
            "InitiatorName" | "TargetName" => {
                if self.identified || value.is_empty() || value.len() > MAX_NAME {
                    return Err(wrong("a name is late, empty or too long"));
                }
                // §4.2.7.2: names are compared in their normalized form, which is lower case for the ASCII in use.
                let name = value.to_lowercase();
                match key {
                    "InitiatorName" => self.identity.initiator = name,
                    _ => self.identity.target = Some(name),
                }
                return Ok(None);
            }
            "SessionType" => return Ok(None),
            "InitiatorAlias" => {
                value.chars().take(255).collect::<String>().clone_into(&mut self.identity.alias);
                return Ok(None);
            }
            "AuthMethod" => {
                if self.stage != 0 {
                    return Err(wrong("AuthMethod outside the security stage"));
                }
                return if value.split(',').any(|method| method == "None") {
                    Ok(Some("None".into()))
                } else {
                    Err((status::AUTHENTICATION, "no authentication method in common"))
                };
            }
            // Declared by targets only (§13.7–§13.9).
            "TargetAlias" | "TargetAddress" | "TargetPortalGroupTag" => return Ok(Some("Reject".into())),
            _ => {}
        }
        match answer(key, value, &mut self.parameters, self.discovery) {
            Answer::Is(_) | Answer::Irrelevant | Answer::Declared if !operational => {
                Err(wrong("an operational key in the security stage"))
            }
            Answer::Is(value) => Ok(Some(value)),
            Answer::Declared => Ok(None),
            Answer::Irrelevant => Ok(Some("Irrelevant".into())),
            Answer::Reject => Ok(Some("Reject".into())),
            Answer::Impossible => Err(wrong("a key's value is outside its range")),
            Answer::Unknown => Ok(Some("NotUnderstood".into())),
        }
    }
}

/// How a key's value is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The negotiated value.
    Is(String),
    /// A declaration: not answered.
    Declared,
    /// The key means nothing in this session (§6.2).
    Irrelevant,
    /// The value is not acceptable; the default holds.
    Reject,
    /// The value is against the protocol: the login fails.
    Impossible,
    /// A key we do not know (§6.2).
    Unknown,
}

/// Negotiates one operational key (RFC 7143 §13) into `p`.
pub fn answer(key: &str, value: &str, p: &mut Parameters, discovery: bool) -> Answer {
    fn digest(value: &str, on: &mut bool) -> Answer {
        // §13.1: the first in the initiator's order that we know.
        for choice in value.split(',') {
            match choice {
                "CRC32C" => {
                    *on = true;
                    return Answer::Is("CRC32C".into());
                }
                "None" => {
                    *on = false;
                    return Answer::Is("None".into());
                }
                _ => {}
            }
        }
        Answer::Reject
    }
    fn yes(value: &str) -> Option<bool> {
        match value {
            "Yes" => Some(true),
            "No" => Some(false),
            _ => None,
        }
    }
    fn word(yes: bool) -> Answer {
        Answer::Is(if yes { "Yes" } else { "No" }.into())
    }
    // Numbers with range; the result is the lesser or the greater of both sides' values.
    fn between(value: &str, range: std::ops::RangeInclusive<u64>) -> Option<u32> {
        text::number(value).filter(|n| range.contains(n)).map(|n| n as u32)
    }
    const LENGTHS: std::ops::RangeInclusive<u64> = 512..=(1 << 24) - 1;
    let normal_only = matches!(
        key,
        "MaxConnections"
            | "InitialR2T"
            | "ImmediateData"
            | "MaxBurstLength"
            | "FirstBurstLength"
            | "MaxOutstandingR2T"
            | "DataPDUInOrder"
            | "DataSequenceInOrder"
            | "TaskReporting"
    );
    if discovery && normal_only {
        return Answer::Irrelevant;
    }
    match key {
        "HeaderDigest" => digest(value, &mut p.digests.header),
        "DataDigest" => digest(value, &mut p.digests.data),
        "MaxConnections" => match between(value, 1..=65535) {
            Some(_) => Answer::Is("1".into()),
            None => Answer::Impossible,
        },
        "InitialR2T" => match yes(value) {
            Some(offer) => {
                // OR (§13.10); we need none.
                p.initial_r2t = offer;
                word(offer)
            }
            None => Answer::Impossible,
        },
        "ImmediateData" => match yes(value) {
            Some(offer) => {
                // AND (§13.11); we take it.
                p.immediate_data = offer;
                word(offer)
            }
            None => Answer::Impossible,
        },
        "MaxRecvDataSegmentLength" => match between(value, LENGTHS) {
            Some(offer) => {
                p.max_send_segment = offer;
                Answer::Declared
            }
            None => Answer::Impossible,
        },
        "MaxBurstLength" => match between(value, LENGTHS) {
            Some(offer) => {
                p.max_burst = offer.min(OUR_MAX_BURST);
                Answer::Is(p.max_burst.to_string())
            }
            None => Answer::Impossible,
        },
        "FirstBurstLength" => match between(value, LENGTHS) {
            Some(offer) => {
                p.first_burst = offer.min(OUR_FIRST_BURST);
                Answer::Is(p.first_burst.to_string())
            }
            None => Answer::Impossible,
        },
        "DefaultTime2Wait" => match between(value, 0..=3600) {
            Some(offer) => {
                // The greater (§13.15); we ask for none.
                p.time2wait = offer as u16;
                Answer::Is(offer.to_string())
            }
            None => Answer::Impossible,
        },
        "DefaultTime2Retain" => match between(value, 0..=3600) {
            Some(_) => {
                // The lesser (§13.16); we keep nothing.
                p.time2retain = 0;
                Answer::Is("0".into())
            }
            None => Answer::Impossible,
        },
        "MaxOutstandingR2T" => match between(value, 1..=65535) {
            Some(offer) => {
                p.max_outstanding_r2t = offer.min(OUR_OUTSTANDING_R2T);
                Answer::Is(p.max_outstanding_r2t.to_string())
            }
            None => Answer::Impossible,
        },
        // OR (§13.18, §13.19); ours is Yes.
        "DataPDUInOrder" | "DataSequenceInOrder" => match yes(value) {
            Some(_) => word(true),
            None => Answer::Impossible,
        },
        "ErrorRecoveryLevel" => match between(value, 0..=2) {
            Some(_) => Answer::Is("0".into()),
            None => Answer::Impossible,
        },
        "TaskReporting" => match value.split(',').any(|v| v == "RFC3720") {
            // §13.23: the semantics that every implementation has.
            true => Answer::Is("RFC3720".into()),
            false => Answer::Reject,
        },
        // §13.25: obsolete, and to be answered so.
        "IFMarker" | "OFMarker" | "IFMarkInt" | "OFMarkInt" => Answer::Reject,
        _ => Answer::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct One;

    impl Targets for One {
        fn has_target(&self, name: &str) -> bool {
            name == "iqn.2026-11.io.md99:tank"
        }

        fn has_session(&self, tsih: u16) -> bool {
            tsih == 7
        }
    }

    fn first() -> request::Login {
        request::Login {
            transit: true,
            more: false,
            stage: 1,
            next_stage: 3,
            version_max: 0,
            version_min: 0,
            isid: [0x80, 0, 0, 0, 0, 1],
            tsih: 0,
            itt: 5,
            cid: 0,
            cmd_sn: CmdSn(1),
            exp_stat_sn: 0,
        }
    }

    const NAMES: &str = "InitiatorName=iqn.x:i\0TargetName=iqn.2026-11.io.md99:tank\0SessionType=Normal\0";

    fn status_of(request: request::Login, text: &str) -> u16 {
        match Login::new(1).step(&request, text.as_bytes(), &One) {
            Next::Respond(r, _) | Next::Refuse(r, _) | Next::Agreed(r, _, _) => match r.body {
                response::Body::Login(body) => body.status,
                body => panic!("{body:?}"),
            },
        }
    }

    #[test]
    fn logins_are_refused_with_the_status_that_says_why() {
        type Row<'a> = (fn(&mut request::Login), &'a str, u16);
        let table: &[Row] = &[
            (|_| (), NAMES, 0),
            (|_| (), "InitiatorName=iqn.x:i\0TargetName=iqn.other\0", status::NOT_FOUND),
            (|_| (), "TargetName=iqn.2026-11.io.md99:tank\0", status::MISSING_PARAMETER),
            (|_| (), "InitiatorName=iqn.x:i\0", status::MISSING_PARAMETER),
            (|_| (), "InitiatorName=iqn.x:i\0SessionType=Odd\0", status::SESSION_TYPE),
            (|_| (), "InitiatorName=iqn.x:i\0SessionType=Discovery\0", 0),
            (|_| (), "InitiatorName=a\0InitiatorName=a\0", status::INITIATOR_ERROR),
            (|_| (), "garbage\0", status::INITIATOR_ERROR),
            (|r| r.version_min = 1, NAMES, status::VERSION),
            (|r| r.tsih = 9, NAMES, status::NO_SESSION),
            (|r| r.tsih = 7, NAMES, status::TOO_MANY_CONNECTIONS),
            (|r| r.next_stage = 2, NAMES, status::INITIATOR_ERROR),
            (|r| r.stage = 3, NAMES, status::INITIATOR_ERROR),
            (|r| r.more = true, NAMES, status::INITIATOR_ERROR),
            (|r| r.stage = 0, "InitiatorName=iqn.x:i\0AuthMethod=CHAP\0", status::AUTHENTICATION),
        ];
        for (change, text, expected) in table {
            let mut request = first();
            change(&mut request);
            assert_eq!(status_of(request, text), *expected, "{text:?}");
        }
    }

    #[test]
    fn every_key_is_answered_by_its_rule() {
        let is = |v: &str| Answer::Is(v.into());
        for (key, value, expected) in [
            ("HeaderDigest", "CRC32C,None", is("CRC32C")),
            ("HeaderDigest", "None,CRC32C", is("None")),
            ("DataDigest", "X-other,CRC32C", is("CRC32C")),
            ("DataDigest", "X-other", Answer::Reject),
            ("MaxConnections", "8", is("1")),
            ("InitialR2T", "No", is("No")),
            ("InitialR2T", "Yes", is("Yes")),
            ("InitialR2T", "Maybe", Answer::Impossible),
            ("ImmediateData", "No", is("No")),
            ("MaxRecvDataSegmentLength", "262144", Answer::Declared),
            ("MaxRecvDataSegmentLength", "511", Answer::Impossible),
            ("MaxBurstLength", "16776192", is("1048576")),
            ("MaxBurstLength", "0x1000", is("4096")),
            ("FirstBurstLength", "16777216", Answer::Impossible),
            ("FirstBurstLength", "65536", is("65536")),
            ("DefaultTime2Wait", "2", is("2")),
            ("DefaultTime2Retain", "20", is("0")),
            ("MaxOutstandingR2T", "1", is("1")),
            ("MaxOutstandingR2T", "16", is("8")),
            ("DataPDUInOrder", "No", is("Yes")),
            ("DataSequenceInOrder", "Yes", is("Yes")),
            ("ErrorRecoveryLevel", "2", is("0")),
            ("IFMarker", "No", Answer::Reject),
            ("X-com.example.key", "1", Answer::Unknown),
        ] {
            assert_eq!(answer(key, value, &mut Parameters::default(), false), expected, "{key}={value}");
        }
        assert_eq!(answer("MaxBurstLength", "65536", &mut Parameters::default(), true), Answer::Irrelevant);
    }

    #[test]
    fn security_then_operational_then_full_feature() {
        let mut login = Login::new(1);
        let mut request = first();
        request.stage = 0;
        request.next_stage = 1;
        let Next::Respond(r, text) = login.step(&request, format!("{NAMES}AuthMethod=CHAP,None\0").as_bytes(), &One)
        else {
            panic!("refused")
        };
        assert_eq!(r.stat_sn, 0);
        assert_eq!(
            text::parse(&text).unwrap(),
            [("AuthMethod".into(), "None".into()), ("TargetPortalGroupTag".into(), "1".into())]
        );
        request.stage = 1;
        request.next_stage = 3;
        let keys = b"InitialR2T=No\0MaxRecvDataSegmentLength=65536\0FirstBurstLength=262144\0";
        let Next::Agreed(r, text, agreed) = login.step(&request, keys, &One) else { panic!("refused") };
        assert_eq!((r.stat_sn, agreed.stat_sn), (1, 2));
        assert_eq!(
            text::parse(&text).unwrap(),
            [
                ("InitialR2T".into(), "No".into()),
                ("FirstBurstLength".into(), "262144".into()),
                ("MaxRecvDataSegmentLength".into(), OUR_SEGMENT.to_string()),
            ]
        );
        assert_eq!(agreed.parameters.max_send_segment, 65536);
        assert!(!agreed.parameters.initial_r2t);
        assert_eq!(agreed.identity.target.as_deref(), Some("iqn.2026-11.io.md99:tank"));
    }

    #[test]
    fn a_text_continued_over_requests_is_one_text() {
        let mut login = Login::new(1);
        let mut request = first();
        request.transit = false;
        request.more = true;
        let (a, b) = NAMES.as_bytes().split_at(20);
        assert!(matches!(login.step(&request, a, &One), Next::Respond(_, text) if text.is_empty()));
        request.transit = true;
        request.more = false;
        assert!(matches!(login.step(&request, b, &One), Next::Agreed(..)));
    }

    proptest! {
        #[test]
        fn arbitrary_requests_never_panic(
            steps in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 48), "[A-Za-z0-9=,\\x00]{0,200}"), 1..5)
        ) {
            let mut login = Login::new(1);
            for (bytes, text) in steps {
                let mut bhs = super::super::pdu::Bhs::new(0x43);
                bhs.0[1..].copy_from_slice(&bytes[1..]);
                if let Ok(super::super::pdu::Request::Login(request)) = super::super::pdu::Request::decode(&bhs) {
                    let _ = login.step(&request, text.as_bytes(), &One);
                }
            }
        }
    }
}
