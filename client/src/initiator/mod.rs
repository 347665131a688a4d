//! A small iSCSI initiator over TCP, on the target's PDU codec: for `demo`, tests and `bench`. One connection per
//! session, ErrorRecoveryLevel 0. [`lane`] is a session without tasks, for `bench`. It never retries by itself after a lost connection: what was outstanding then may or
//! may not have happened, and only the caller knows what that means.

mod driver;
pub mod lane;
mod login;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::iscsi::pdu::request::Function;
use crate::iscsi::pdu::response::Residual;
use crate::scsi::status;

pub use login::{Found, discover};

/// Calls that wait for the driver; callers wait beyond it.
const MAX_QUEUED: usize = 256;
/// How often a command that is answered by a unit attention is sent again by the convenience functions.
const ATTENTIONS: usize = 4;

/// What a session is to be like. The target's answers decide what it will be like.
#[derive(Clone, Debug)]
pub struct Options {
    /// InitiatorName.
    pub initiator: String,
    /// Initiator part of the session id: the same again reinstates the session.
    pub isid: [u8; 6],
    /// TargetName.
    pub target: String,
    /// Ask for CRC32C over headers.
    pub header_digest: bool,
    /// Ask for CRC32C over data.
    pub data_digest: bool,
    /// InitialR2T: send no unsolicited Data-Out.
    pub initial_r2t: bool,
    /// ImmediateData: send data in the command's PDU.
    pub immediate_data: bool,
    /// The data segment that we take.
    pub max_recv_segment: u32,
    /// MaxBurstLength.
    pub max_burst: u32,
    /// FirstBurstLength.
    pub first_burst: u32,
    /// MaxOutstandingR2T.
    pub max_outstanding_r2t: u32,
    /// How long connecting and logging in may take. A target that is waiting for an older session's commands (design
    /// R4) answers late.
    pub login_timeout: Duration,
}

impl Options {
    /// The usual options for this target.
    pub fn new(target: impl Into<String>) -> Self {
        Options {
            initiator: "iqn.2026-11.io.md99:initiator".into(),
            isid: [0x80, 0x6d, 0x64, 0x39, 0x39, 1],
            target: target.into(),
            header_digest: false,
            data_digest: false,
            initial_r2t: false,
            immediate_data: true,
            max_recv_segment: 256 * 1024,
            max_burst: 1024 * 1024,
            first_burst: 256 * 1024,
            max_outstanding_r2t: 4,
            login_timeout: Duration::from_secs(15),
        }
    }
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection could be made.
    #[error("cannot connect to {portal}: {source}")]
    Connect {
        /// The portal.
        portal: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The login was refused (RFC 7143 §11.13.5).
    #[error("login refused with status {status:#06x}")]
    Login {
        /// Status-Class and Status-Detail.
        status: u16,
    },
    /// Connecting and logging in took too long.
    #[error("the login timed out")]
    LoginTimeout,
    /// The connection was lost, or the session is over; what was outstanding may or may not have happened.
    #[error("connection lost")]
    ConnectionLost,
    /// The target did what RFC 7143 does not allow.
    #[error("the target broke the protocol: {0}")]
    Protocol(&'static str),
    /// The command was aborted by a task management function of ours.
    #[error("the command was aborted")]
    Aborted,
    /// A status other than GOOD.
    #[error("SCSI status {status:#04x}, sense key {key:#x}, code {code:#06x}")]
    Status {
        /// SCSI status.
        status: u8,
        /// Sense key, 0 if there is no sense.
        key: u8,
        /// Additional sense code and qualifier.
        code: u16,
    },
}

/// A SCSI command.
#[derive(Clone, Debug, Default)]
pub struct Command {
    /// Command descriptor block, padded with zeroes.
    pub cdb: [u8; 16],
    /// LUN in SAM's 8-byte form.
    pub lun: u64,
    /// Data for the target.
    pub data_out: Bytes,
    /// Bytes expected from the target; not together with `data_out`.
    pub data_in: u32,
    /// Task attribute (RFC 7143 §11.3.1); 0 means simple.
    pub attribute: u8,
}

impl Command {
    /// A command of this CDB on LUN 0, without data.
    ///
    /// # Panics
    /// If the CDB is longer than 16 bytes.
    pub fn new(cdb: &[u8]) -> Self {
        let mut command = Command::default();
        command.cdb[..cdb.len()].copy_from_slice(cdb);
        command
    }

    /// Expects up to so many bytes.
    #[must_use]
    pub fn input(mut self, len: u32) -> Self {
        self.data_in = len;
        self
    }

    /// Sends these bytes.
    #[must_use]
    pub fn output(mut self, data: Bytes) -> Self {
        self.data_out = data;
        self
    }
}

/// The answer to a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// SCSI status.
    pub status: u8,
    /// Sense data as the target sent it; empty if none.
    pub sense: Bytes,
    /// Data from the target.
    pub data: Bytes,
    /// How expected and real length differ.
    pub residual: Residual,
}

impl Response {
    /// Sense key, and additional sense code with qualifier, of fixed-format sense; zeroes without.
    pub fn sense_code(&self) -> (u8, u16) {
        match self.sense.get(..14) {
            Some(s) => (s[2] & 0xf, u16::from_be_bytes([s[12], s[13]])),
            None => (0, 0),
        }
    }
}

/// Size of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Logical blocks.
    pub blocks: u64,
    /// Bytes in one.
    pub block_len: u32,
}

pub(crate) enum Call {
    Command { itt: u32, command: Command, done: oneshot::Sender<Result<Response, Error>> },
    Manage { function: Function, referenced: u32, done: oneshot::Sender<Result<u8, Error>> },
    Nop { data: Bytes, done: oneshot::Sender<Result<Bytes, Error>> },
    Logout { done: oneshot::Sender<Result<(), Error>> },
}

/// A session. Clones share it; it is closed without a logout when the last is dropped.
#[derive(Clone, Debug)]
pub struct Session {
    calls: mpsc::Sender<Call>,
    next_itt: Arc<AtomicU32>,
}

/// A command that has been issued.
pub struct Issued {
    itt: u32,
    done: oneshot::Receiver<Result<Response, Error>>,
}

impl Issued {
    /// Its initiator task tag, for task management.
    pub fn itt(&self) -> u32 {
        self.itt
    }

    /// Waits for the answer. There is no time-out.
    ///
    /// # Errors
    /// The connection was lost, or the command aborted.
    pub async fn response(self) -> Result<Response, Error> {
        self.done.await.unwrap_or(Err(Error::ConnectionLost))
    }
}

impl Session {
    /// Connects and logs in; waits until pending unit attentions are cleared.
    ///
    /// # Errors
    /// No connection, a refused login, or a time-out.
    pub async fn connect(portal: SocketAddr, options: &Options) -> Result<Session, Error> {
        let driver = tokio::time::timeout(options.login_timeout, login::connect(portal, options))
            .await
            .map_err(|_| Error::LoginTimeout)??;
        let (calls, queue) = mpsc::channel(MAX_QUEUED);
        tokio::spawn(driver.run(queue));
        let session = Session { calls, next_itt: Arc::new(AtomicU32::new(1)) };
        session.test_unit_ready().await?;
        Ok(session)
    }

    /// Whether the session has ended.
    pub fn is_closed(&self) -> bool {
        self.calls.is_closed()
    }

    /// Sends a command; returns when it is queued. Cancelling leaves it unsent or running.
    ///
    /// # Errors
    /// [`Error::ConnectionLost`].
    pub async fn issue(&self, command: Command) -> Result<Issued, Error> {
        // The tag above all is for "none"; the driver's own tags have the top bit.
        let itt = self.next_itt.fetch_add(1, Ordering::Relaxed) & 0x7fff_ffff;
        let (done, receiver) = oneshot::channel();
        let call = Call::Command { itt, command, done };
        self.calls.send(call).await.map_err(|_| Error::ConnectionLost)?;
        Ok(Issued { itt, done: receiver })
    }

    /// Sends a command and waits for its answer, whatever its status is.
    ///
    /// # Errors
    /// The connection was lost, or the command aborted.
    pub async fn execute(&self, command: Command) -> Result<Response, Error> {
        self.issue(command).await?.response().await
    }

    /// As [`execute`](Self::execute); another status than GOOD is an error, after unit attentions have been passed
    /// over by sending the command again.
    ///
    /// # Errors
    /// As `execute`, and [`Error::Status`].
    pub async fn checked(&self, command: Command) -> Result<Response, Error> {
        let mut left = ATTENTIONS;
        loop {
            let response = self.execute(command.clone()).await?;
            if response.status == status::GOOD {
                return Ok(response);
            }
            let (key, code) = response.sense_code();
            left -= 1;
            if key != 6 || left == 0 {
                return Err(Error::Status { status: response.status, key, code });
            }
        }
    }

    /// Sends a task management function; gives the response code (RFC 7143 §11.6.1).
    ///
    /// # Errors
    /// The connection was lost.
    pub async fn manage(&self, function: Function, referenced: u32) -> Result<u8, Error> {
        let (done, receiver) = oneshot::channel();
        let call = Call::Manage { function, referenced, done };
        self.calls.send(call).await.map_err(|_| Error::ConnectionLost)?;
        receiver.await.unwrap_or(Err(Error::ConnectionLost))
    }

    /// Pings with data, which comes back.
    ///
    /// # Errors
    /// The connection was lost.
    pub async fn ping(&self, data: Bytes) -> Result<Bytes, Error> {
        let (done, receiver) = oneshot::channel();
        self.calls.send(Call::Nop { data, done }).await.map_err(|_| Error::ConnectionLost)?;
        receiver.await.unwrap_or(Err(Error::ConnectionLost))
    }

    /// Logs out and closes the connection.
    ///
    /// # Errors
    /// The connection was lost before.
    pub async fn logout(&self) -> Result<(), Error> {
        let (done, receiver) = oneshot::channel();
        self.calls.send(Call::Logout { done }).await.map_err(|_| Error::ConnectionLost)?;
        receiver.await.unwrap_or(Err(Error::ConnectionLost))
    }

    /// TEST UNIT READY.
    ///
    /// # Errors
    /// As [`checked`](Self::checked), here and below.
    pub async fn test_unit_ready(&self) -> Result<(), Error> {
        self.checked(Command::new(&[0])).await.map(drop)
    }

    /// INQUIRY; `page` asks for a vital product data page.
    pub async fn inquiry(&self, page: Option<u8>) -> Result<Bytes, Error> {
        let cdb = [0x12, u8::from(page.is_some()), page.unwrap_or(0), 4, 0, 0];
        Ok(self.checked(Command::new(&cdb).input(1024)).await?.data)
    }

    /// READ CAPACITY (16).
    pub async fn read_capacity16(&self) -> Result<Capacity, Error> {
        let mut cdb = [0; 16];
        (cdb[0], cdb[1], cdb[13]) = (0x9e, 0x10, 32);
        let data = self.checked(Command::new(&cdb).input(32)).await?.data;
        let Some(Ok(head)) = data.get(..12).map(<[u8; 12]>::try_from) else {
            return Err(Error::Protocol("READ CAPACITY data is too short"));
        };
        let number = head.iter().fold(0u128, |n, &b| n << 8 | u128::from(b));
        Ok(Capacity { blocks: (number >> 32) as u64 + 1, block_len: number as u32 })
    }

    fn sixteen(opcode: u8, flags: u8, lba: u64, blocks: u32) -> Command {
        let mut cdb = [0; 16];
        (cdb[0], cdb[1]) = (opcode, flags);
        cdb[2..10].copy_from_slice(&lba.to_be_bytes());
        cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
        Command::new(&cdb)
    }

    /// READ (16) of so many 512-byte blocks.
    pub async fn read(&self, lba: u64, blocks: u32) -> Result<Bytes, Error> {
        let len = blocks * 512;
        let data = self.checked(Self::sixteen(0x88, 0, lba, blocks).input(len)).await?.data;
        if data.len() == len as usize { Ok(data) } else { Err(Error::Protocol("a read came back short")) }
    }

    /// WRITE (16); `data` is whole 512-byte blocks.
    pub async fn write(&self, lba: u64, data: Bytes, fua: bool) -> Result<(), Error> {
        let blocks = (data.len() / 512) as u32;
        self.checked(Self::sixteen(0x8a, u8::from(fua) << 3, lba, blocks).output(data)).await.map(drop)
    }

    /// SYNCHRONIZE CACHE (16) of everything.
    pub async fn sync_cache(&self) -> Result<(), Error> {
        self.checked(Self::sixteen(0x91, 0, 0, 0)).await.map(drop)
    }

    /// UNMAP of one extent.
    pub async fn unmap(&self, lba: u64, blocks: u32) -> Result<(), Error> {
        let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
        list.extend(lba.to_be_bytes());
        list.extend(blocks.to_be_bytes());
        list.extend([0; 4]);
        let cdb = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
        self.checked(Command::new(&cdb).output(list.into())).await.map(drop)
    }

    /// WRITE SAME (16) of zeroes; `unmap` allows the space to be freed.
    pub async fn write_zeroes(&self, lba: u64, blocks: u32, unmap: bool) -> Result<(), Error> {
        self.checked(Self::sixteen(0x93, 1 | u8::from(unmap) << 3, lba, blocks)).await.map(drop)
    }
}
