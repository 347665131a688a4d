//! Two gateways and one volume (R1, R3): whoever lost the session gets nothing through any more.

use std::time::Duration;

use bytes::Bytes;
use client::initiator::{Error, Options, Session};
use client::iscsi::iqn;

use crate::support::*;

const VOLUME: &str = "tank";
const SECTORS: u32 = 8;

fn block(fill: u8) -> Bytes {
    Bytes::from(vec![fill; SECTORS as usize * 512])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn nothing_of_a_superseded_gateway_gets_through() {
    let cluster = TestCluster::up(&["--gateways", "2"]);
    cluster.create(VOLUME, "256MiB");
    let options = Options::new(iqn(VOLUME));
    let old = Session::connect(cluster.portal("gateway-1"), &options).await.expect("it is served there");
    // One block in each mirror.
    let lbas: Vec<u64> = (0..5).map(|mirror| mirror * 512).collect();
    for lba in &lbas {
        old.write(*lba, block(1), false).await.expect("it is healthy");
    }
    old.sync_cache().await.expect("it is healthy");

    cluster.signal("gateway-1", "STOP");
    // These are in the stopped gateway's socket when it wakes up.
    let mut late = Vec::new();
    for lba in &lbas {
        let (session, lba) = (old.clone(), *lba);
        late.push(tokio::spawn(async move { session.write(lba, block(2), false).await.map(|()| None) }));
        let session = old.clone();
        late.push(tokio::spawn(async move { session.read(lba, SECTORS).await.map(Some) }));
    }
    // gateway-2 waits the old lease out, takes over, and goes on.
    cluster.ok(&["export-volume", VOLUME, "--gateway", "gateway-2"]);
    let new = Session::connect(cluster.portal("gateway-2"), &options).await.expect("it is served there now");
    for lba in &lbas {
        let found = new.read(*lba, SECTORS).await.expect("it is served");
        assert_eq!(found, block(1), "what was acknowledged is there");
        new.write(*lba, block(3), false).await.expect("it is served");
    }
    new.sync_cache().await.expect("it is served");

    cluster.signal("gateway-1", "CONT");
    for command in late {
        let answer =
            tokio::time::timeout(PATIENCE, command).await.expect("the connection is dropped").expect("no panic");
        match answer {
            Err(Error::ConnectionLost) => {}
            other => panic!("the old gateway answered: {other:?}"),
        }
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    for lba in &lbas {
        assert_eq!(new.read(*lba, SECTORS).await.expect("it is served"), block(3), "lba {lba}");
    }
    let refused = Session::connect(cluster.portal("gateway-1"), &options).await;
    assert!(refused.is_err(), "gateway-1 serves it no more");
    cluster.wait_in_sync(VOLUME);
    cluster.verify(VOLUME);
    new.logout().await.expect("it is served");
}
