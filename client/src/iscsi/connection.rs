//! Drives a session core between its socket and the device, on the device's thread. One task per connection; it is
//! woken once for whatever has come meanwhile, carries everything out, and writes all answers with one system call.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::pdu::wire::Receiver;
use super::session::{Clear, End, IscsiSession, Outputs};
use crate::block::{BlockDevice, BlockOutcome, CompletionSink, DeviceState};

/// Bytes that wait to be written at which no more is read: an initiator that does not read is not listened to.
const MAX_UNWRITTEN: u64 = 8 << 20;
/// Reads per wake-up, so that one connection does not keep the thread.
const READS_PER_TURN: usize = 16;
/// Pieces per vectored write.
const SLICES: usize = 128;

/// What other parts of the target tell a connection.
pub(super) enum Event {
    /// Clear the tasks for another session's function, and drop the token when that is done.
    Clear(Clear, Rc<Token>),
    /// All other sessions have cleared their tasks.
    OthersDone(u64),
    /// End at once, as far as R4 lets it.
    End(End),
    /// Finish what has begun, take nothing new.
    Close,
}

/// Shared by the sessions that clear their tasks for one function; the last to drop it reports to the one who asked.
pub(super) struct Token {
    pub(super) inbox: Rc<Inbox>,
    pub(super) id: u64,
}

impl Drop for Token {
    fn drop(&mut self) {
        self.inbox.push(Event::OthersDone(self.id));
    }
}

/// Where a connection's news arrive.
#[derive(Default)]
pub(super) struct Inbox {
    outcomes: RefCell<Vec<(u64, BlockOutcome)>>,
    events: RefCell<Vec<Event>>,
    waker: RefCell<Option<Waker>>,
}

impl Inbox {
    pub(super) fn push(&self, event: Event) {
        self.events.borrow_mut().push(event);
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }
}

impl CompletionSink for Inbox {
    fn complete(&self, tag: u64, outcome: BlockOutcome) {
        self.outcomes.borrow_mut().push((tag, outcome));
        self.wake();
    }
}

/// A connection in full-feature phase.
pub(super) struct Connection<'a> {
    pub(super) stream: TcpStream,
    pub(super) receiver: Receiver,
    pub(super) session: IscsiSession,
    pub(super) out: Outputs,
    pub(super) inbox: Rc<Inbox>,
    pub(super) device: Rc<dyn BlockDevice>,
    pub(super) state: watch::Receiver<DeviceState>,
    /// Passes a function on to all other sessions of the target.
    pub(super) others: &'a dyn Fn(Clear, Rc<Token>),
}

impl Connection<'_> {
    /// Serves until the session has ended and every command that had an effect has too. Why is returned.
    pub(super) async fn run(mut self) -> End {
        let sink: Rc<dyn CompletionSink> = self.inbox.clone();
        let mut state = self.state.clone();
        let mut cleared = Vec::new();
        let end = loop {
            let deadline = tokio::time::Instant::from_std(self.session.deadline());
            tokio::select! {
                biased;
                end = std::future::poll_fn(|cx| self.poll(cx, &sink, &mut cleared)) => break end,
                changed = state.changed() => {
                    let now = *state.borrow_and_update();
                    if changed.is_err() || now.gone {
                        break End::Gone;
                    }
                    self.session.update(self.device.info(), now);
                }
                () = tokio::time::sleep_until(deadline) => {
                    if self.session.tick(Instant::now(), &mut self.out) {
                        break self.out.close.unwrap_or(End::Silent);
                    }
                }
            }
        };
        if end == End::Gone {
            return end;
        }
        // R4: locked commands are awaited before anybody may believe that the session is over.
        let Connection { stream, session, out, inbox, device, .. } = &mut self;
        let _ = rustix::net::shutdown(&*stream, rustix::net::Shutdown::Both);
        session.end(out);
        std::future::poll_fn(|cx| {
            inbox.waker.borrow_mut().replace(cx.waker().clone());
            loop {
                carry_out(out, device, &sink, inbox, &mut cleared, None);
                let outcomes = std::mem::take(&mut *inbox.outcomes.borrow_mut());
                let events = std::mem::take(&mut *inbox.events.borrow_mut());
                let quiet = outcomes.is_empty() && events.is_empty();
                for (tag, outcome) in outcomes {
                    session.complete(tag, outcome, out);
                }
                for event in events {
                    if let Event::Clear(clear, token) = event {
                        clear_for(session, clear, token, &mut cleared, out);
                    }
                }
                if quiet {
                    break;
                }
            }
            if session.is_drained() { Poll::Ready(()) } else { Poll::Pending }
        })
        .drained_or_gone(&mut state)
        .await;
        end
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        sink: &Rc<dyn CompletionSink>,
        cleared: &mut Vec<(u64, Rc<Token>)>,
    ) -> Poll<End> {
        self.inbox.waker.borrow_mut().replace(cx.waker().clone());
        let mut reads = READS_PER_TURN;
        let mut readable = true;
        let mut lost = None;
        loop {
            let outcomes = std::mem::take(&mut *self.inbox.outcomes.borrow_mut());
            let events = std::mem::take(&mut *self.inbox.events.borrow_mut());
            let mut progress = !outcomes.is_empty() || !events.is_empty();
            for (tag, outcome) in outcomes {
                self.session.complete(tag, outcome, &mut self.out);
            }
            for event in events {
                match event {
                    Event::Clear(clear, token) => clear_for(&mut self.session, clear, token, cleared, &mut self.out),
                    Event::OthersDone(id) => self.session.others_done(id, &mut self.out),
                    Event::End(end) => return Poll::Ready(end),
                    Event::Close => {
                        self.session.close(&mut self.out);
                        self.out.close = self.out.close.or(Some(End::Closed));
                    }
                }
            }
            if readable && reads > 0 && self.out.close.is_none() && self.out.wire.pending() < MAX_UNWRITTEN {
                match self.read(cx) {
                    Poll::Ready(Ok(())) => progress = true,
                    Poll::Ready(Err(end)) => {
                        lost = Some(end);
                        readable = false;
                    }
                    Poll::Pending => readable = false,
                }
                reads -= 1;
            }
            carry_out(&mut self.out, &self.device, sink, &self.inbox, cleared, Some(self.others));
            // Asked anew before every write: what is superseded answers nothing (R1).
            if self.state.borrow().gone {
                return Poll::Ready(End::Gone);
            }
            match self.write(cx) {
                Poll::Ready(Ok(true)) => progress = true,
                Poll::Ready(Ok(false)) => {}
                Poll::Ready(Err(_)) => return Poll::Ready(lost.unwrap_or(End::Lost)),
                Poll::Pending => {}
            }
            if let Some(end) = lost {
                return Poll::Ready(end);
            }
            let finished = self.out.close != Some(End::Closed) || self.session.is_idle();
            if let Some(end) = self.out.close
                && finished
                && self.out.wire.is_empty()
            {
                return Poll::Ready(end);
            }
            if !progress {
                return Poll::Pending;
            }
            if reads == 0 && readable {
                // Others' turn; come back at once.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// Reads once and takes every PDU that is whole.
    fn read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let mut space = self.receiver.space();
        let read = pin!(self.stream.read_buf(&mut space)).poll(cx);
        match read {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(0)) => return Poll::Ready(Err(End::Lost)),
            Poll::Ready(Err(e)) if e.kind() == io::ErrorKind::Interrupted => return Poll::Ready(Ok(())),
            Poll::Ready(Err(_)) => return Poll::Ready(Err(End::Lost)),
            Poll::Ready(Ok(_)) => {}
        }
        let now = Instant::now();
        loop {
            match self.receiver.next(|bhs| self.session.place(bhs)) {
                Ok(Some(pdu)) => self.session.receive(now, pdu, &mut self.out),
                Ok(None) => return Poll::Ready(Ok(())),
                Err(error) => return Poll::Ready(Err(End::Wire(error))),
            }
        }
    }

    /// Writes as much as the socket takes; true if anything was written.
    fn write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut any = false;
        while !self.out.wire.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let n = self.out.wire.slices(&mut slices);
            match Pin::new(&mut self.stream).poll_write_vectored(cx, &slices[..n]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) => {
                    self.out.wire.advance(written);
                    any = true;
                }
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                Poll::Pending => break,
            }
        }
        if any {
            self.session.written(&mut self.out);
        }
        Poll::Ready(Ok(any))
    }
}

fn clear_for(
    session: &mut IscsiSession,
    clear: Clear,
    token: Rc<Token>,
    cleared: &mut Vec<(u64, Rc<Token>)>,
    out: &mut Outputs,
) {
    // Ids of different sessions' tokens may be equal: number them anew here.
    let id = cleared.last().map_or(0, |(id, _)| id + 1);
    cleared.push((id, token));
    session.clear(id, clear, out);
}

fn carry_out(
    out: &mut Outputs,
    device: &Rc<dyn BlockDevice>,
    sink: &Rc<dyn CompletionSink>,
    inbox: &Rc<Inbox>,
    cleared: &mut Vec<(u64, Rc<Token>)>,
    others: Option<&dyn Fn(Clear, Rc<Token>)>,
) {
    for (tag, request) in out.requests.drain(..) {
        device.submit(sink, tag, request);
    }
    for tag in out.aborts.drain(..) {
        device.abort(sink, tag);
    }
    for done in out.cleared.drain(..) {
        cleared.retain(|(id, _)| *id != done);
    }
    for ask in out.others.drain(..) {
        if let Some(others) = others {
            others(ask.clear, Rc::new(Token { inbox: inbox.clone(), id: ask.id }));
        }
    }
}

trait DrainedOrGone: Future<Output = ()> + Sized {
    /// Waits for the end, or for the device to be gone: then no outcome will come.
    async fn drained_or_gone(self, state: &mut watch::Receiver<DeviceState>) {
        tokio::select! {
            () = self => {}
            _ = state.wait_for(|state| state.gone) => {}
        }
    }
}

impl<F: Future<Output = ()>> DrainedOrGone for F {}
