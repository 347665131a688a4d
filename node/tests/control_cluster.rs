//! Real members in one process, over tonic on loopback: forming, leading, creating, losing members, restarting.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use client::control::{ControlClient, ControlConfig, ControlError};
use node::control::agent::{HostFuture, PoolUsage};
use node::control::daemon::{Listeners, StartHost, run, run_on};
use node::control::{DaemonError, NodeConfig, ReplicaAssignment, ReplicaHost};
use proto::cluster::*;
use proto::id::*;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use uuid::Uuid;

type Kept = Arc<Mutex<BTreeMap<ReplicaId, ReplicaAssignment>>>;

/// Remembers what it was told to keep.
struct MemoryHost(Kept);

impl ReplicaHost for MemoryHost {
    fn create(&self, assignment: ReplicaAssignment) -> HostFuture<()> {
        self.0.lock().unwrap().insert(assignment.replica, assignment);
        Box::pin(async { Ok(()) })
    }
    fn delete(&self, assignment: ReplicaAssignment) -> HostFuture<()> {
        self.0.lock().unwrap().remove(&assignment.replica);
        Box::pin(async { Ok(()) })
    }
    fn usage(&self) -> HostFuture<Vec<PoolUsage>> {
        let pool = |n: u32| PoolUsage {
            name: format!("p{n}"),
            kind: "file".into(),
            path: format!("/p{n}"),
            capacity: 1 << 30,
            free: 1 << 30,
        };
        Box::pin(async move { Ok((1..=5).map(pool).collect()) })
    }
}

/// Stops it, and how it ended.
type Running = (oneshot::Sender<()>, JoinHandle<Result<(), DaemonError>>);

struct Member {
    config: NodeConfig,
    kept: Kept,
    running: Option<Running>,
}

impl Member {
    fn start_on(&mut self, listeners: Listeners) {
        let (stop, stopped) = oneshot::channel::<()>();
        let kept = self.kept.clone();
        let host: Option<StartHost> = (self.config.role == Role::Node).then(|| {
            let start: StartHost =
                Box::new(|_| Box::pin(async { Ok(Arc::new(MemoryHost(kept)) as Arc<dyn ReplicaHost>) }));
            start
        });
        let daemon = run_on(self.config.clone(), listeners, host, async {
            let _ = stopped.await;
        });
        self.running = Some((stop, tokio::spawn(daemon)));
    }

    async fn start(&mut self) {
        // The port was ours a moment ago.
        let started = Instant::now();
        let listeners = loop {
            match Listeners::bind(&self.config) {
                Ok(listeners) => break listeners,
                Err(error) => assert!(started.elapsed() < Duration::from_secs(10), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        self.start_on(listeners);
    }

    async fn stop(&mut self) {
        let (stop, task) = self.running.take().unwrap();
        let _ = stop.send(());
        task.await.unwrap().unwrap();
    }
}

struct Cluster {
    members: Vec<Member>,
    client: ControlClient,
    definition: ClusterDefinition,
    _dir: tempfile::TempDir,
}

fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

async fn cluster(nodes: u64, witnesses: u64, formed_by_init: bool) -> Cluster {
    let dir = tempfile::tempdir().unwrap();
    let mut definition = ClusterDefinition { id: ClusterId(Uuid::new_v4()), name: "test".into(), members: Vec::new() };
    let mut bound = Vec::new();
    for id in 1..=nodes + witnesses {
        let role = if id <= nodes { Role::Node } else { Role::Witness };
        let listeners = Listeners { control: listen(), data: (role == Role::Node).then(listen) };
        definition.members.push(proto::cluster::Member {
            id: NodeId(id),
            name: format!("{role}-{id}"),
            role,
            control_addr: listeners.control.local_addr().unwrap().to_string(),
            data_addr: listeners.data.as_ref().map_or(String::new(), |l| l.local_addr().unwrap().to_string()),
        });
        bound.push(listeners);
    }
    let mut members = Vec::new();
    for (member, listeners) in definition.members.iter().zip(bound) {
        let config = NodeConfig {
            id: member.id,
            name: member.name.clone(),
            role: member.role,
            dir: dir.path().join(&member.name),
            control_listen: member.control_addr.parse().unwrap(),
            data_listen: member.data_addr.parse().ok(),
            insecure: false,
            pools: Vec::new(),
            cluster: (!formed_by_init).then(|| definition.clone()),
        };
        let mut member = Member { config, kept: Kept::default(), running: None };
        member.start_on(listeners);
        members.push(member);
    }
    if formed_by_init {
        ControlClient::init(&definition).await.unwrap();
    }
    let addrs = definition.members.iter().map(|member| member.control_addr.clone());
    let client = ControlClient::new(ControlConfig::new(addrs));
    Cluster { members, client, definition, _dir: dir }
}

impl Cluster {
    async fn until<T>(&self, what: &str, mut found: impl FnMut(&ClusterStatus) -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            let status = self.client.status(false).await.unwrap();
            if let Some(found) = found(&status) {
                return found;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "waited for {what}: {status:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn pools(&self) {
        self.until("pools", |status| {
            let nodes = status.view.members.iter().filter(|m| m.role == Role::Node).count();
            (status.view.pools.len() == nodes * 5).then_some(())
        })
        .await;
    }

    async fn register(&self, name: &str) {
        let gateway =
            GatewayInfo { name: name.into(), control_addr: "127.0.0.1:1".into(), portal: "127.0.0.1:2".into() };
        self.client.register_gateway(gateway).await.unwrap();
    }

    async fn volume(&self, name: &str) -> VolumeInfo {
        let spec = VolumeSpec {
            name: name.into(),
            size: 64 << 20,
            replicas: 3,
            stripes: 5,
            chunk_size: 256 << 10,
            min_in_sync: 1,
            write_cache: true,
            export: None,
        };
        let volume = self.client.create_volume(spec).await.unwrap();
        self.client.wait_volume_ready(volume.id, Duration::from_secs(20)).await.unwrap()
    }

    async fn request(&self) -> RequestId {
        self.client.new_request().await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_created_opened_changed_and_deleted() {
    let cluster = cluster(3, 2, false).await;
    let client = &cluster.client;
    cluster.pools().await;
    cluster.register("gateway-1").await;
    cluster.register("gateway-2").await;
    let volume = cluster.volume("tank").await;
    assert_eq!(volume.state, VolumeState::Ready);
    assert_eq!(volume.mirrors.len(), 5);
    let kept: usize = cluster.members.iter().map(|member| member.kept.lock().unwrap().len()).sum();
    assert_eq!(kept, 15);

    let opened = client.open_session(cluster.request().await, volume.id, "gateway-1", false).await.unwrap();
    assert_eq!((opened.epoch, opened.previous, opened.old_lease_ms), (Epoch(1), PreviousSession::Never, 0));
    let renewal = |epoch| SessionRenewal { volume: volume.id, epoch: Epoch(epoch), report: None };
    let patience = Duration::from_secs(5);
    let renewed = client.renew_leases("gateway-1", vec![renewal(1)], patience).await.unwrap();
    assert!(matches!(renewed.results[0].outcome, RenewalOutcome::Granted { .. }));

    let refused = client.open_session(cluster.request().await, volume.id, "gateway-2", false).await.unwrap_err();
    assert!(matches!(refused.refusal(), Some(Refusal::InUse { gateway, .. }) if gateway == "gateway-1"), "{refused}");
    let taken = client.open_session(cluster.request().await, volume.id, "gateway-2", true).await.unwrap();
    assert_eq!((taken.epoch, taken.previous), (Epoch(2), PreviousSession::Unclean));
    assert!(taken.old_lease_ms > 4_000, "{}", taken.old_lease_ms);
    let renewed = client.renew_leases("gateway-1", vec![renewal(1)], patience).await.unwrap();
    assert!(matches!(renewed.results[0].outcome, RenewalOutcome::Refused { .. }));

    let mirror = &volume.mirrors[2];
    let members = mirror.in_sync.members[1..].to_vec();
    let request = cluster.request().await;
    let change =
        |epoch| client.change_set(request, volume.id, mirror.id, Epoch(epoch), SetVersion(1), members.clone(), vec![]);
    let set = change(2).await.unwrap();
    assert_eq!(set, InSyncSet { version: SetVersion(2), members: members.clone(), awaited: vec![] });
    assert_eq!(change(2).await.unwrap(), set, "the same request again");
    let again = cluster.request().await;
    let refused =
        client.change_set(again, volume.id, mirror.id, Epoch(1), SetVersion(2), members.clone(), vec![]).await;
    assert!(matches!(refused.unwrap_err().refusal(), Some(Refusal::Superseded { .. })));

    let refused = client.delete_volume(volume.id).await.unwrap_err();
    assert!(matches!(refused.refusal(), Some(Refusal::InUse { .. })), "{refused}");
    client.close_session(cluster.request().await, volume.id, Epoch(2), true).await.unwrap();
    client.delete_volume(volume.id).await.unwrap();
    cluster.until("the volume to go", |status| status.view.volumes.is_empty().then_some(())).await;
    assert!(cluster.members.iter().all(|member| member.kept.lock().unwrap().is_empty()));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_of_three_nodes_may_stop_and_everything_comes_back_after_a_restart() {
    let mut cluster = cluster(3, 2, true).await;
    cluster.pools().await;
    cluster.register("gateway-1").await;
    let volume = cluster.volume("tank").await;
    let witness = cluster.until("a witness to lead", |status| status.leader.filter(|id| id.0 > 3)).await;
    let mut views = cluster.client.watch().await.unwrap();
    for at in [0, 1] {
        cluster.members[at].stop().await;
    }
    let down = cluster.until("two members down", |status| {
        let down: Vec<u64> = status.members.iter().filter(|member| !member.up).map(|member| member.id.0).collect();
        (down == [1, 2]).then_some(status.leader)
    });
    assert_eq!(down.await, Some(witness), "killing storage nodes costs no election");
    cluster.client.open_session(cluster.request().await, volume.id, "gateway-1", false).await.unwrap();
    while views.borrow_and_update().volume(volume.id).is_none_or(|volume| volume.session.epoch != Epoch(1)) {
        tokio::time::timeout(Duration::from_secs(10), views.changed()).await.expect("the view changes");
    }

    // Without a quorum there is a stale status only.
    cluster.members[3].stop().await;
    let mut impatient = ControlConfig::new([cluster.definition.members[2].control_addr.clone()]);
    impatient.deadline = Duration::from_secs(4);
    let impatient = ControlClient::new(impatient);
    assert!(matches!(impatient.status(false).await, Err(ControlError::NoAnswer { .. })));
    let stale = impatient.status(true).await.unwrap();
    assert!(stale.stale && stale.view.volume(volume.id).is_some());

    for at in [2, 4] {
        cluster.members[at].stop().await;
    }
    for member in &mut cluster.members {
        member.start().await;
    }
    let found = cluster.client.volume_named("tank").await.unwrap();
    assert_eq!(found.session.epoch, Epoch(1));
    let other = ClusterDefinition { id: ClusterId::default(), ..cluster.definition.clone() };
    let refused = ControlClient::init(&other).await;
    assert!(matches!(refused.unwrap_err().refusal(), Some(Refusal::OtherCluster { .. })));
    ControlClient::init(&cluster.definition).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn senseless_requests_are_refused_and_named() {
    let cluster = cluster(2, 1, false).await;
    cluster.pools().await;
    let spec = |replicas, size| VolumeSpec {
        name: "tank".into(),
        size,
        replicas,
        stripes: 5,
        chunk_size: 256 << 10,
        min_in_sync: 1,
        write_cache: true,
        export: None,
    };
    let refused = |spec| async { cluster.client.create_volume(spec).await.unwrap_err().to_string() };
    assert_eq!(refused(spec(3, 1 << 20)).await, "3 replicas need as many storage nodes with pools, and there are 2");
    assert!(refused(spec(2, 100 << 30)).await.contains("1073741824"));
    assert!(refused(spec(2, 4097)).await.contains("4097"));
    let none = VolumeId(Uuid::from_u128(9));
    let refused = cluster.client.open_session(cluster.request().await, none, "g", false).await.unwrap_err();
    assert!(refused.to_string().contains(&none.to_string()), "{refused}");
}

#[tokio::test]
async fn a_daemon_that_cannot_start_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let config = |dir: &Path, control_listen: &str| NodeConfig {
        id: NodeId(1),
        name: "witness-1".into(),
        role: Role::Witness,
        dir: dir.into(),
        control_listen: control_listen.parse().unwrap(),
        data_listen: None,
        insecure: false,
        pools: Vec::new(),
        cluster: None,
    };
    let definition = |id| ClusterDefinition {
        id: ClusterId(Uuid::from_u128(id)),
        name: "test".into(),
        members: vec![proto::cluster::Member {
            id: NodeId(1),
            name: "witness-1".into(),
            role: Role::Witness,
            control_addr: "127.0.0.1:9".into(),
            data_addr: String::new(),
        }],
    };
    let taken = listen();
    let addr = taken.local_addr().unwrap().to_string();
    let error = run(config(dir.path(), &addr), None, async {}).await.unwrap_err();
    assert!(error.to_string().contains(&addr), "{error}");
    let error = run(config(dir.path(), "0.0.0.0:0"), None, async {}).await.unwrap_err();
    assert!(error.to_string().contains("insecure"), "{error}");

    let first = NodeConfig { cluster: Some(definition(1)), ..config(dir.path(), "127.0.0.1:0") };
    run(first.clone(), None, tokio::time::sleep(Duration::from_millis(300))).await.unwrap();
    let other = NodeConfig { cluster: Some(definition(2)), ..first.clone() };
    let error = run(other, None, async {}).await.unwrap_err().to_string();
    let both = [definition(1).id.to_string(), definition(2).id.to_string()];
    assert!(both.iter().all(|id| error.contains(id)), "{error}");

    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(run(first.clone(), None, async {
        let _ = stopped.await;
    }));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let error = run(first, None, async {}).await.unwrap_err();
    assert!(matches!(error, DaemonError::Locked { .. }), "{error}");
    stop.send(()).unwrap();
    running.await.unwrap().unwrap();
}

/// Alone in its process, since it measures that: `cargo test --test control_cluster -- --ignored`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures the process: to be run alone"]
async fn five_members_at_rest_cost_little() {
    let cluster = cluster(3, 2, false).await;
    cluster.pools().await;
    cluster.until("a witness to lead", |status| status.leader.filter(|id| id.0 > 3)).await;
    let ticks = || {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = ticks();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let used = ticks() - before;
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let rss = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    println!("{used} ticks of 1000; {rss}");
    assert!(used < 40, "five members at rest used {used} of 1000 ticks");
}
