//! The real target on loopback, exercised by the real initiator: everything between the two sockets and the device.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use client::block::BlockOutcome;
use client::initiator::{Command, Error, Options, Session, discover};
use client::iscsi::pdu::request::Function;
use client::iscsi::pdu::response::Residual;
use client::iscsi::server::{Portal, Registry};
use client::iscsi::session::WINDOW;
use client::iscsi::target::{MAX_SESSIONS, Target};
use client::iscsi::{PORTAL_GROUP_TAG, iqn};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

mod memory;
use memory::{Hold, Memory};

struct Bed {
    memory: Rc<Memory>,
    target: Rc<Target>,
    registry: Registry,
    portal: SocketAddr,
}

impl Bed {
    fn options(&self) -> Options {
        Options::new(iqn("tank"))
    }

    async fn connect(&self) -> Session {
        Session::connect(self.portal, &self.options()).await.expect("login")
    }

    async fn until(&self, condition: impl Fn(&Bed) -> bool) {
        while !condition(self) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Runs a test beside a target whose device is in memory, with a time limit.
fn with_target<F: Future<Output = ()>>(test: impl FnOnce(Rc<Bed>) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let memory = Memory::new("tank", 64 << 20);
        let target = Target::new(iqn("tank"), memory.clone());
        let registry = Registry::new(PORTAL_GROUP_TAG);
        let (sender, mut logins) = mpsc::unbounded_channel();
        registry.add(target.iqn(), sender);
        let portal = Portal::bind("127.0.0.1:0".parse().unwrap(), registry.clone()).unwrap();
        let bed = Bed { memory, target: target.clone(), registry, portal: portal.local_addr().unwrap() };
        tokio::task::spawn_local(portal.run(std::future::pending()));
        tokio::task::spawn_local(async move {
            while let Some(login) = logins.recv().await {
                tokio::task::spawn_local(target.clone().serve(login));
            }
        });
        tokio::time::timeout(Duration::from_secs(60), test(Rc::new(bed))).await.expect("the test hangs");
    });
}

fn pattern(len: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(len);
    while data.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend_from_slice(&state.to_le_bytes());
    }
    data.truncate(len);
    data.into()
}

#[test]
fn discovery_names_every_target_and_the_address_connected_to() {
    with_target(|bed| async move {
        let (sender, _keep) = mpsc::unbounded_channel();
        for i in 0..300 {
            bed.registry.add(&iqn(&format!("volume-with-a-rather-long-name-{i:04}")), sender.clone());
        }
        let found = discover(bed.portal).await.unwrap();
        assert_eq!(found.len(), 301, "more than one data segment of text");
        assert!(found.iter().any(|t| t.name == iqn("tank")));
        assert!(found.iter().all(|t| t.addresses == [format!("{},1", bed.portal)]));
        bed.registry.remove(&iqn("tank"));
        let refused = Session::connect(bed.portal, &bed.options()).await;
        assert!(matches!(refused, Err(Error::Login { status: 0x0203 })), "{refused:?}");
    });
}

#[test]
fn data_survives_every_way_of_transferring_it() {
    with_target(|bed| async move {
        let mut seed = 0;
        for bits in 0..16u32 {
            let mut options = bed.options();
            options.header_digest = bits & 1 != 0;
            options.data_digest = bits & 2 != 0;
            options.initial_r2t = bits & 4 != 0;
            options.immediate_data = bits & 8 != 0;
            options.isid[5] = bits as u8;
            // Small and odd limits, so that bursts and segments do not divide the data.
            options.max_recv_segment = 5 * 512 + 4;
            options.max_burst = 33 * 1024;
            options.first_burst = 9 * 1024;
            let session = Session::connect(bed.portal, &options).await.unwrap();
            for blocks in [1, 7, 18, 19, 66, 67, 1000] {
                seed += 1;
                let data = pattern(blocks * 512, seed);
                session.write(seed, data.clone(), blocks == 7).await.unwrap();
                assert_eq!(session.read(seed, blocks as u32).await.unwrap(), data, "{options:?}, {blocks} blocks");
            }
            assert_eq!(session.ping(pattern(2000, 1)).await.unwrap(), pattern(2000, 1));
            session.logout().await.unwrap();
        }
        let session = bed.connect().await;
        let data = pattern(4 << 20, 99);
        session.write(0, data.clone(), false).await.unwrap();
        assert_eq!(session.read(0, 8192).await.unwrap(), data);
    });
}

#[test]
fn the_usual_commands_do_what_they_say() {
    with_target(|bed| async move {
        let session = bed.connect().await;
        let capacity = session.read_capacity16().await.unwrap();
        assert_eq!((capacity.blocks, capacity.block_len), (131_072, 512));
        assert_eq!(&session.inquiry(None).await.unwrap()[8..16], b"md99    ");
        assert_eq!(session.inquiry(Some(0xb2)).await.unwrap()[5], 0xe4);
        let data = pattern(16 * 512, 1);
        session.write(0, data.clone(), true).await.unwrap();
        session.sync_cache().await.unwrap();
        session.unmap(0, 4).await.unwrap();
        session.write_zeroes(12, 4, false).await.unwrap();
        let back = session.read(0, 16).await.unwrap();
        assert!(back[..2048].iter().all(|&b| b == 0) && back[12 * 512..].iter().all(|&b| b == 0));
        assert_eq!(back[2048..12 * 512], data[2048..12 * 512]);
        let far = session.read(131_072, 1).await;
        assert!(matches!(far, Err(Error::Status { status: 2, key: 5, code: 0x2100 })), "{far:?}");
    });
}

#[test]
fn outcomes_of_the_device_reach_the_initiator_as_sense() {
    with_target(|bed| async move {
        let session = bed.connect().await;
        for (outcome, key, code) in [
            (BlockOutcome::Medium { offset: 4096 }, 3, 0x1100),
            (BlockOutcome::WriteFailed, 4, 0x4400),
            (BlockOutcome::NoSpace, 7, 0x2707),
        ] {
            *bed.memory.fail.borrow_mut() = Some(outcome);
            let result = session.write(0, pattern(512, 1), false).await;
            assert!(matches!(result, Err(Error::Status { status: 2, key: k, code: c }) if (k, c) == (key, code)));
        }
        session.write(0, pattern(512, 1), false).await.unwrap();
    });
}

#[test]
fn residuals_tell_what_was_not_transferred() {
    with_target(|bed| async move {
        let session = bed.connect().await;
        let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 2, 0];
        let more = session.execute(Command::new(&read).input(4096)).await.unwrap();
        assert_eq!((more.status, more.residual, more.data.len()), (0, Residual::Underflow(3072), 1024));
        let less = session.execute(Command::new(&read).input(512)).await.unwrap();
        assert_eq!((less.status, less.residual, less.data.len()), (0, Residual::Overflow(512), 512));
        let write = [0x2a, 0, 0, 0, 0, 0, 0, 0, 2, 0];
        let less = session.execute(Command::new(&write).output(pattern(512, 1))).await.unwrap();
        assert_eq!((less.status, less.residual), (0, Residual::Overflow(512)));
        let refused = session.execute(Command::new(&[0xc1]).input(512)).await.unwrap();
        assert_eq!((refused.status, refused.residual), (2, Residual::Underflow(512)));
    });
}

#[test]
fn the_command_window_holds_back_and_opens_again() {
    with_target(|bed| async move {
        let session = bed.connect().await;
        bed.memory.hold(Hold::Locked);
        let mut issued = Vec::new();
        for i in 0..WINDOW + 50 {
            issued
                .push(session.issue(Command::new(&[0x28, 0, 0, 0, 0, i as u8, 0, 0, 1, 0]).input(512)).await.unwrap());
        }
        bed.until(|bed| bed.memory.held() == WINDOW as usize).await;
        // A ping is immediate and gets through; nothing else does.
        session.calls_are_blocked_but_pings_are_not(&bed).await;
        bed.memory.hold(Hold::None);
        for command in issued {
            assert_eq!(command.response().await.unwrap().data.len(), 512);
        }
    });
}

trait Blocked {
    async fn calls_are_blocked_but_pings_are_not(&self, bed: &Bed);
}

impl Blocked for Session {
    async fn calls_are_blocked_but_pings_are_not(&self, bed: &Bed) {
        // Our initiator queues a ping behind the commands; another session's goes through at once.
        let mut options = bed.options();
        options.isid[5] = 77;
        let other = Session::connect(bed.portal, &options).await.unwrap();
        other.ping(Bytes::from_static(b"there?")).await.unwrap();
        assert_eq!(bed.memory.held(), WINDOW as usize);
    }
}

#[test]
fn large_commands_wait_for_memory_and_all_complete() {
    with_target(|bed| async move {
        let session = bed.connect().await;
        let data = pattern(4 << 20, 5);
        let mut issued = Vec::new();
        for i in 0..24u32 {
            let mut cdb = [0; 16];
            cdb[0] = if i % 2 == 0 { 0x8a } else { 0x88 };
            cdb[10..14].copy_from_slice(&8192u32.to_be_bytes());
            let command = Command::new(&cdb);
            let command = if i % 2 == 0 { command.output(data.clone()) } else { command.input(4 << 20) };
            issued.push(session.issue(command).await.unwrap());
        }
        for (i, command) in issued.into_iter().enumerate() {
            let response = command.response().await.unwrap();
            assert_eq!(response.status, 0, "command {i}");
        }
    });
}

#[test]
fn an_ordered_command_waits_for_those_before_it() {
    with_target(|bed| async move {
        let session = bed.connect().await;
        bed.memory.hold(Hold::Locked);
        let read = Command::new(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]).input(512);
        let mut ordered = read.clone();
        ordered.attribute = 2;
        let first = session.issue(read.clone()).await.unwrap();
        let second = session.issue(ordered).await.unwrap();
        let third = session.issue(read).await.unwrap();
        session.ping(Bytes::new()).await.unwrap();
        bed.until(|bed| bed.memory.held() == 1).await;
        bed.memory.hold(Hold::None);
        for command in [first, second, third] {
            assert_eq!(command.response().await.unwrap().status, 0);
        }
    });
}

#[test]
fn an_abort_drops_what_has_no_effect_and_awaits_what_has() {
    // R4
    with_target(|bed| async move {
        let session = bed.connect().await;
        let write = Command::new(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0]).output(pattern(512, 3));
        bed.memory.hold(Hold::Unlocked);
        let dropped = session.issue(write.clone()).await.unwrap();
        bed.until(|bed| bed.memory.held() == 1).await;
        assert_eq!(session.manage(Function::AbortTask, dropped.itt()).await.unwrap(), 0);
        assert!(matches!(dropped.response().await, Err(Error::Aborted)));
        assert_eq!(bed.memory.held(), 0);

        bed.memory.hold(Hold::Locked);
        let awaited = session.issue(write).await.unwrap();
        bed.until(|bed| bed.memory.held() == 1).await;
        let abort = session.manage(Function::AbortTask, awaited.itt());
        tokio::pin!(abort);
        // While the device holds the write, the function is not answered; pings show that the session is alive.
        tokio::select! {
            biased;
            answer = &mut abort => panic!("answered {answer:?} before the write had ended"),
            pong = session.ping(Bytes::new()) => drop(pong.unwrap()),
        }
        session.ping(Bytes::new()).await.unwrap();
        assert!(futures::poll!(&mut abort).is_pending());
        bed.memory.hold(Hold::None);
        assert_eq!(abort.await.unwrap(), 0);
        assert!(matches!(awaited.response().await, Err(Error::Aborted)));
        assert_eq!(session.read(0, 1).await.unwrap(), pattern(512, 3), "the awaited write has happened");
        assert_eq!(session.manage(Function::AbortTask, 0x1234).await.unwrap(), 1);
    });
}

#[test]
fn a_lun_reset_clears_all_sessions_and_tells_them() {
    with_target(|bed| async move {
        let one = bed.connect().await;
        let mut options = bed.options();
        options.isid[5] = 9;
        let two = Session::connect(bed.portal, &options).await.unwrap();
        bed.memory.hold(Hold::Locked);
        let write = Command::new(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0]).output(pattern(512, 3));
        let victim = two.issue(write).await.unwrap();
        bed.until(|bed| bed.memory.held() == 1).await;
        let reset = one.manage(Function::LunReset, 0);
        tokio::pin!(reset);
        tokio::select! {
            biased;
            answer = &mut reset => panic!("answered {answer:?} before the other session's write had ended"),
            pong = one.ping(Bytes::new()) => drop(pong.unwrap()),
        }
        bed.memory.hold(Hold::None);
        assert_eq!(reset.await.unwrap(), 0);
        for session in [&one, &two] {
            let answer = session.execute(Command::new(&[0])).await.unwrap();
            assert_eq!(answer.sense_code(), (6, 0x2903));
        }
        drop(victim); // never answered
    });
}

#[test]
fn a_reinstated_session_ends_the_older_one_after_its_commands() {
    with_target(|bed| async move {
        let old = bed.connect().await;
        bed.memory.hold(Hold::Locked);
        let write = Command::new(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0]).output(pattern(512, 8));
        let lost = old.issue(write).await.unwrap();
        bed.until(|bed| bed.memory.held() == 1).await;
        let options = bed.options();
        let portal = bed.portal;
        let mut new = tokio::task::spawn_local(async move { Session::connect(portal, &options).await });
        assert!(matches!(lost.response().await, Err(Error::ConnectionLost)));
        // R4: the login is not answered while the old session's write may still land.
        tokio::select! {
            early = &mut new => panic!("logged in too early: {early:?}"),
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
        }
        assert_eq!(bed.target.sessions().len(), 2);
        bed.memory.hold(Hold::None);
        let new = new.await.unwrap().unwrap();
        assert_eq!(new.read(0, 1).await.unwrap(), pattern(512, 8));
        assert_eq!(bed.target.sessions().len(), 1);
        assert!(old.is_closed());
    });
}

#[test]
fn device_news_are_unit_attentions() {
    with_target(|bed| async move {
        let session = bed.connect().await;
        bed.memory.change(|state, info| {
            state.capacity += 1;
            info.bytes *= 2;
        });
        let ready = Command::new(&[0]);
        bed.until(|_| true).await;
        session.ping(Bytes::new()).await.unwrap();
        assert_eq!(session.execute(ready.clone()).await.unwrap().sense_code(), (6, 0x2a09));
        assert_eq!(session.read_capacity16().await.unwrap().blocks, 262_144);
        bed.memory.change(|state, _| state.power_on += 1);
        session.ping(Bytes::new()).await.unwrap();
        assert_eq!(session.execute(ready.clone()).await.unwrap().sense_code(), (6, 0x2901));
        assert_eq!(session.execute(ready).await.unwrap().status, 0);
    });
}

#[test]
fn a_device_that_is_gone_drops_connections_unanswered() {
    // R1
    with_target(|bed| async move {
        let session = bed.connect().await;
        bed.memory.hold(Hold::Locked);
        let read = session.issue(Command::new(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]).input(512)).await.unwrap();
        bed.until(|bed| bed.memory.held() == 1).await;
        bed.memory.change(|state, _| state.gone = true);
        assert!(matches!(read.response().await, Err(Error::ConnectionLost)));
        bed.until(|bed| bed.target.sessions().is_empty()).await;
        let again = Session::connect(bed.portal, &bed.options()).await;
        assert!(matches!(again, Err(Error::ConnectionLost)), "{again:?}");
    });
}

#[test]
fn a_closing_target_finishes_what_it_has_begun() {
    with_target(|bed| async move {
        let session = bed.connect().await;
        bed.memory.hold(Hold::Locked);
        let read = session.issue(Command::new(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]).input(512)).await.unwrap();
        bed.until(|bed| bed.memory.held() == 1).await;
        let target = bed.target.clone();
        let close = tokio::task::spawn_local(async move { target.close(Duration::from_secs(10)).await });
        tokio::time::sleep(Duration::from_millis(20)).await;
        bed.memory.hold(Hold::None);
        assert_eq!(read.response().await.unwrap().status, 0);
        close.await.unwrap();
        assert!(bed.target.sessions().is_empty());
        assert!(matches!(session.test_unit_ready().await, Err(Error::ConnectionLost)));
        let again = Session::connect(bed.portal, &bed.options()).await;
        assert!(matches!(again, Err(Error::Login { status: 0x0301 })), "{again:?}");
    });
}

#[test]
fn nonsense_on_one_connection_harms_no_other() {
    with_target(|bed| async move {
        let session = bed.connect().await;
        for seed in 0..30 {
            let mut stream = TcpStream::connect(bed.portal).await.unwrap();
            let mut junk = pattern(4096, seed + 1).to_vec();
            if seed % 2 == 0 {
                // A login header with random text behind it.
                junk[..48].fill(0);
                (junk[0], junk[1], junk[6]) = (0x43, 0x87, 4);
            }
            let _ = stream.write_all(&junk).await;
            let mut answer = Vec::new();
            let _ = stream.shutdown().await;
            let _ = stream.read_to_end(&mut answer).await;
        }
        session.write(0, pattern(512, 1), false).await.unwrap();
        assert_eq!(session.read(0, 1).await.unwrap(), pattern(512, 1));
    });
}

#[test]
fn sessions_beyond_the_limit_are_refused_and_room_is_made_by_a_logout() {
    with_target(|bed| async move {
        let mut options = bed.options();
        let mut sessions = Vec::new();
        for i in 0..MAX_SESSIONS {
            options.isid[4..6].copy_from_slice(&(i as u16).to_be_bytes());
            sessions.push(Session::connect(bed.portal, &options).await.unwrap());
        }
        options.isid[3] = 0xff;
        let refused = Session::connect(bed.portal, &options).await;
        assert!(matches!(refused, Err(Error::Login { status: 0x0302 })), "{refused:?}");
        sessions.pop().unwrap().logout().await.unwrap();
        bed.until(|bed| bed.target.sessions().len() < MAX_SESSIONS).await;
        Session::connect(bed.portal, &options).await.unwrap();
    });
}

#[test]
fn another_lun_is_not_there() {
    with_target(|bed| async move {
        let session = bed.connect().await;
        let mut command = Command::new(&[0]);
        command.lun = 1 << 48;
        assert_eq!(session.execute(command).await.unwrap().sense_code(), (5, 0x2500));
    });
}
