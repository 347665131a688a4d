//! A block device in memory: sparse, and able to hold requests back.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};

use bytes::{Bytes, BytesMut};
use client::block::{BlockDevice, BlockOutcome, BlockRequest, CompletionSink, DeviceInfo, DeviceState};
use tokio::sync::{Notify, watch};

const PAGE: u64 = 64 * 1024;

/// What a test decides about requests that are held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Nothing is held back.
    None,
    /// Requests wait and have no effect yet: an abort drops them.
    Unlocked,
    /// Requests wait with an effect on their way: an abort waits for them (R4).
    Locked,
}

struct Pending {
    sink: Rc<dyn CompletionSink>,
    tag: u64,
    request: BlockRequest,
    aborted: bool,
}

/// The device. Requests complete from a task of its own, never from inside `submit`.
pub struct Memory {
    info: RefCell<DeviceInfo>,
    pages: RefCell<BTreeMap<u64, Box<[u8]>>>,
    queue: RefCell<Vec<Pending>>,
    wake: Notify,
    hold: Cell<Hold>,
    state: watch::Sender<DeviceState>,
    /// The outcome that the next request has instead of being done.
    pub fail: RefCell<Option<BlockOutcome>>,
}

impl Memory {
    /// A device of this size; call inside a `LocalSet`.
    pub fn new(name: &str, bytes: u64) -> Rc<Self> {
        let info = DeviceInfo {
            id: uuid::Uuid::from_u128(0x6d64_3939_0000_4000_8000_0000_0000_0001),
            name: name.into(),
            bytes,
            chunk: 256 * 1024,
            write_cache: true,
        };
        let state = watch::Sender::new(DeviceState { power_on: 0, capacity: 0, gone: false });
        let memory = Rc::new(Memory {
            info: RefCell::new(info),
            pages: RefCell::default(),
            queue: RefCell::default(),
            wake: Notify::new(),
            hold: Cell::new(Hold::None),
            state,
            fail: RefCell::default(),
        });
        tokio::task::spawn_local(Self::run(Rc::downgrade(&memory)));
        memory
    }

    /// Holds requests back, or lets them go.
    pub fn hold(&self, hold: Hold) {
        self.hold.set(hold);
        self.wake.notify_one();
    }

    /// Requests that are held back.
    pub fn held(&self) -> usize {
        self.queue.borrow().len()
    }

    /// Changes the device's state.
    pub fn change(&self, change: impl FnOnce(&mut DeviceState, &mut DeviceInfo)) {
        let mut info = self.info.borrow_mut();
        self.state.send_modify(|state| change(state, &mut info));
    }

    async fn run(memory: Weak<Self>) {
        loop {
            let Some(strong) = memory.upgrade() else { return };
            strong.step();
            // Held by a raw borrow for one wait only; dropped devices end the task at the next wake-up.
            let woken = strong.wake.notified();
            if strong.hold.get() != Hold::None || strong.queue.borrow().is_empty() {
                tokio::select! {
                    () = woken => {}
                    () = tokio::time::sleep(std::time::Duration::from_secs(1)) => {}
                }
            }
        }
    }

    fn step(&self) {
        let hold = self.hold.get();
        let queue = std::mem::take(&mut *self.queue.borrow_mut());
        for pending in queue {
            if hold == Hold::None {
                let failed = self.fail.borrow_mut().take();
                let outcome = failed.unwrap_or_else(|| self.perform(&pending.request));
                pending.sink.complete(pending.tag, outcome);
            } else if hold == Hold::Unlocked && pending.aborted {
                pending.sink.complete(pending.tag, BlockOutcome::Aborted);
            } else {
                self.queue.borrow_mut().push(pending);
            }
        }
    }

    fn perform(&self, request: &BlockRequest) -> BlockOutcome {
        let size = self.info.borrow().bytes;
        let check = |offset: u64, len: u64| {
            assert!(offset.is_multiple_of(512) && len.is_multiple_of(512) && offset + len <= size);
        };
        match request {
            BlockRequest::Read { offset, len } => {
                check(*offset, u64::from(*len));
                let mut pieces = Vec::new();
                self.each(*offset, u64::from(*len), |page, at, len, _| {
                    let pages = self.pages.borrow();
                    let mut piece = BytesMut::zeroed(len);
                    if let Some(page) = pages.get(&page) {
                        piece.copy_from_slice(&page[at..at + len]);
                    }
                    pieces.push(piece.freeze());
                });
                return BlockOutcome::Done(pieces);
            }
            BlockRequest::Write { offset, data, .. } => {
                check(*offset, data.len() as u64);
                self.put(*offset, data.len() as u64, Some(data));
            }
            BlockRequest::Flush => {}
            BlockRequest::Discard { offset, len } | BlockRequest::WriteZeroes { offset, len, .. } => {
                check(*offset, *len);
                self.put(*offset, *len, None);
            }
        }
        BlockOutcome::Done(vec![])
    }

    fn put(&self, offset: u64, len: u64, data: Option<&Bytes>) {
        self.each(offset, len, |page, at, len, done| {
            let mut pages = self.pages.borrow_mut();
            match data {
                Some(data) => {
                    let page = pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into());
                    page[at..at + len].copy_from_slice(&data[done..done + len]);
                }
                None if len as u64 == PAGE => drop(pages.remove(&page)),
                None => {
                    if let Some(page) = pages.get_mut(&page) {
                        page[at..at + len].fill(0);
                    }
                }
            }
        });
    }

    fn each(&self, offset: u64, len: u64, mut f: impl FnMut(u64, usize, usize, usize)) {
        let mut done = 0;
        while done < len {
            let at = (offset + done) % PAGE;
            let part = (PAGE - at).min(len - done);
            f((offset + done) / PAGE, at as usize, part as usize, done as usize);
            done += part;
        }
    }
}

impl BlockDevice for Memory {
    fn info(&self) -> DeviceInfo {
        self.info.borrow().clone()
    }

    fn submit(&self, sink: &Rc<dyn CompletionSink>, tag: u64, request: BlockRequest) {
        self.queue.borrow_mut().push(Pending { sink: sink.clone(), tag, request, aborted: false });
        self.wake.notify_one();
    }

    fn abort(&self, sink: &Rc<dyn CompletionSink>, tag: u64) {
        for pending in self.queue.borrow_mut().iter_mut() {
            if pending.tag == tag && Rc::ptr_eq(&pending.sink, sink) {
                pending.aborted = true;
            }
        }
        self.wake.notify_one();
    }

    fn watch(&self) -> watch::Receiver<DeviceState> {
        self.state.subscribe()
    }
}
