//! What users get wrong, what disks lose, and what strangers send.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use cli::load::{Load, LoadSpec};
use proto::frame::{HEADER_LEN, Header, Kind};
use proto::id::AttachId;
use rustix::process::{Pid, Signal, kill_process};

use crate::support::*;

const VOLUME: &str = "tank";
const PAGE: usize = 4096;

fn seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0
}

fn says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

#[test]
fn wrong_use_ends_with_status_2_and_names_what_is_wrong() {
    for (args, words) in [
        (&["status", "--bogus"][..], &["--bogus"][..]),
        (&["frobnicate"], &["frobnicate"]),
        (&["create-volume", "tank"], &["--size"]),
        (&["create-volume", "tank", "--size", "0"], &["--size", "zero"]),
        (&["create-volume", "tank", "--size", "0GiB"], &["--size", "zero"]),
        (&["create-volume", "tank", "--size", "6KiB"], &["--size", "multiple", "4096"]),
        (&["create-volume", "tank", "--size", "1.5GiB"], &["--size", "whole number"]),
        (&["create-volume", "tank", "--size", "2GB"], &["--size", "GB", "GiB"]),
        (&["create-volume", "tank", "--size", "17"], &["--size", "unit"]),
        (&["create-volume", "tank", "--size", "1GiB", "--chunk-size", "12KiB"], &["--chunk-size", "power of two"]),
        (&["create-volume", "tank", "--size", "1GiB", "--replicas", "9"], &["--replicas", "9"]),
        (&["create-volume", "../etc", "--size", "1GiB"], &["../etc"]),
        (&["create-volume", "tank", "--size", "1GiB", "--replicas", "2", "--min-in-sync", "3"], &["--min-in-sync 3"]),
        (&["dev", "kill", "node-1", "--signal", "NONE", "--dir", "/nowhere"], &["--signal", "NONE"]),
        (&["dev", "up", "--dir", "/nowhere", "--portal", "0.0.0.0:3260"], &["0.0.0.0:3260", "loopback"]),
        (&["--log", "a=b=c", "status"], &["--log"]),
        (&["node"], &["--config"]),
    ] {
        says(&fails(program(args), 2), words);
    }
    for good in [&["--help"][..], &["--version"], &["create-volume", "--help"]] {
        assert!(output(program(good)).status.success(), "{good:?}");
    }
}

#[test]
fn a_configuration_that_is_missing_or_damaged_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("cluster.toml");
    let with = |text: Option<&str>| {
        if let Some(text) = text {
            std::fs::write(&file, text).expect("a file");
        }
        let mut command = program(&["status"]);
        command.env("MD99_CONFIG", &file);
        fails(command, 1)
    };
    says(&with(None), &["cluster.toml", "MD99_CONFIG"]);
    says(&with(Some("name = 7")), &["cluster.toml"]);
    let id = uuid::Uuid::new_v4();
    says(&with(Some(&format!("name = \"x\"\nid = \"{id}\"\nmembers = []"))), &["no member"]);
    let port = cli::dev::ports::free_run(1).expect("a free port");
    says(&with(Some(&format!("name = \"x\"\nid = \"{id}\"\nmembers = [\"127.0.0.1:{port}\"]"))), &["no member gave"]);
}

#[test]
fn what_the_cluster_refuses_is_named_and_leaves_nothing_behind() {
    let cluster = TestCluster::up(&["--pool-size", "64MiB"]);
    let create = |args: &[&str]| {
        let mut all = vec!["create-volume"];
        all.extend(args);
        cluster.fails(&all, 1)
    };
    says(&create(&["big", "--size", "1TiB"]), &["big", "64 MiB left", "needed there"]);
    says(&create(&["wide", "--size", "64MiB", "--replicas", "4"]), &["wide", "4 replicas", "3", "--replicas 3"]);
    says(&create(&["nowhere", "--size", "64MiB", "--gateway", "gateway-9"]), &["gateway-9", "list-gateways"]);
    cluster.create(VOLUME, "64MiB");
    says(&create(&[VOLUME, "--size", "64MiB"]), &[VOLUME, "already"]);
    let volumes = cluster.json(&["list-volumes", "--json"]);
    assert_eq!(volumes["volumes"].as_array().map(Vec::len), Some(1), "{volumes:#}");

    for args in [
        &["show-volume", "nothing"][..],
        &["delete-volume", "nothing", "--yes"],
        &["export-volume", "nothing"],
        &["unexport-volume", "nothing"],
        &["verify-volume", "nothing"],
        &["scrub-volume", "nothing"],
        &["recover-volume", "nothing", "--force"],
    ] {
        says(&cluster.fails(args, 1), &["nothing", "list-volumes"]);
    }
    says(&cluster.fails(&["show-node", "node-9"], 1), &["node-9", "list-nodes"]);
    says(&cluster.fails(&["delete-volume", VOLUME], 1), &[VOLUME, "--yes"]);
    says(&cluster.fails(&["recover-volume", VOLUME], 1), &[VOLUME, "--force"]);

    // With a node down its replicas cannot be made: the volume is not left half made.
    cluster.kill("node-3");
    says(&create(&["half", "--size", "8MiB"]), &["half", "node-3", "down", "removed again"]);
    let names = cluster.ok(&["list-volumes"]);
    assert!(!names.lines().any(|line| line.starts_with("half") && !line.contains("deleting")), "{names}");
    cluster.start("node-3");

    // The gateway is away: nobody could serve a new volume.
    cluster.kill("gateway-1");
    wait_for("the gateway to be noticed", || {
        let status = cluster.json(&["status", "--json"]);
        (status["gateways"][0]["up"] == false).then_some(())
    });
    says(&create(&["unserved", "--size", "8MiB"]), &["gateway", "--no-export"]);
    cluster.ok(&["create-volume", "unserved", "--size", "8MiB", "--no-export"]);
    says(&cluster.fails(&["verify-volume", VOLUME], 1), &[VOLUME, "gateway-1"]);
    cluster.start("gateway-1");
    cluster.wait_in_sync(VOLUME);
    cluster.ok(&["export-volume", "unserved"]);
    cluster.verify("unserved");
    cluster.ok(&["unexport-volume", "unserved"]);
    cluster.verify("unserved");
    cluster.ok(&["delete-volume", "unserved", "--yes"]);
    cluster.ok(&["delete-volume", VOLUME, "--yes"]);
    wait_for("the space to be free again", || {
        let left: Vec<PathBuf> =
            ["node-1", "node-2", "node-3"].iter().flat_map(|node| replica_files(&cluster, node)).collect();
        left.is_empty().then_some(())
    });
    // The name can be used again.
    cluster.create(VOLUME, "64MiB");
}

#[test]
fn without_a_quorum_status_says_so_first_and_changes_fail() {
    let cluster = TestCluster::up(&[]);
    cluster.create(VOLUME, "64MiB");
    for part in ["witness-1", "witness-2", "node-3"] {
        cluster.kill(part);
    }
    let shown = cluster.ok(&["status"]);
    assert!(shown.starts_with("NO QUORUM"), "{shown}");
    says(&shown, &["stale, no quorum", VOLUME]);
    assert_eq!(cluster.json(&["status", "--json"])["stale"], true);
    says(&cluster.fails(&["create-volume", "late", "--size", "8MiB"], 1), &["late", "cluster status"]);
    for part in ["witness-1", "witness-2", "node-3"] {
        cluster.start(part);
    }
    cluster.wait_in_sync(VOLUME);
}

#[test]
fn dev_refuses_ports_in_use_and_directories_that_are_not_its_own() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (_taken, port) = taken_port();
    let portal = format!("127.0.0.1:{port}");
    let said = fails(program(&["dev", "up", "--dir", &path("a"), "--base-port", "0", "--portal", &portal]), 1);
    says(&said, &[&port.to_string(), "in use", "portal of gateway-1"]);
    let said = fails(
        program(&["dev", "up", "--dir", &path("a"), "--base-port", &port.to_string(), "--portal", "127.0.0.1:0"]),
        1,
    );
    says(&said, &[&port.to_string(), "in use", "node-1"]);

    std::fs::create_dir(path("letters")).expect("a directory");
    std::fs::write(dir.path().join("letters/dear.txt"), "x").expect("a file");
    says(&fails(program(&["dev", "up", "--dir", &path("letters")]), 1), &["letters", "dear.txt"]);
    for verb in [&["dev", "ps"][..], &["dev", "down"], &["dev", "start", "node-1"], &["dev", "kill", "node-1"]] {
        let mut all = verb.to_vec();
        let letters = path("letters");
        all.extend(["--dir", &letters]);
        says(&fails(program(&all), 1), &["letters", "not a dev directory"]);
    }

    let cluster = TestCluster::up(&["--witnesses", "0", "--nodes", "1", "--pools", "1"]);
    let own = cluster.dir().to_str().expect("a plain path");
    says(&fails(program(&["dev", "up", "--dir", own]), 1), &["is running", "node-1", "dev down"]);
    says(&fails(program(&["dev", "start", "node-1", "--dir", own]), 1), &["node-1", "running already"]);
    says(&fails(program(&["dev", "kill", "node-7", "--dir", own]), 1), &["node-7", "gateway-1"]);
    cluster.down();
    cluster.down();
    says(&fails(program(&["dev", "kill", "node-1", "--dir", own]), 1), &["node-1", "is down"]);
    says(&fails(program(&["dev", "up", "--dir", own, "--nodes", "3"]), 1), &["--nodes", "1", "3"]);
    let _in_the_way = TcpListener::bind(cluster.portal("gateway-1")).expect("it is free");
    says(&fails(program(&["dev", "up", "--dir", own]), 1), &["in use", "portal of gateway-1"]);
}

/// A daemon of our own, from a file.
fn daemon(role: &str, config: &Path, args: &[&str]) -> Command {
    let mut command = program(&[role, "--config", config.to_str().expect("a plain path")]);
    command.args(args);
    command
}

#[test]
fn daemons_refuse_what_they_must_not_do() {
    let cluster = TestCluster::up(&["--witnesses", "0", "--nodes", "1", "--pools", "1"]);
    let dir = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path
    };
    let node = std::fs::read_to_string(cluster.home("node-1").join("node.toml")).expect("its configuration");
    let gateway = std::fs::read_to_string(cluster.home("gateway-1").join("gateway.toml")).expect("its configuration");

    // The directory is in use.
    says(&fails(daemon("node", &cluster.home("node-1").join("node.toml"), &[]), 1), &["node-1", "in use"]);
    // So is the address.
    let elsewhere = dir.path().join("state").display().to_string();
    let state = cluster.home("node-1").join("state").display().to_string();
    let path = write("same-port.toml", &node.replace(&state, &elsewhere));
    says(&fails(daemon("node", &path, &[]), 1), &["cannot listen on", "127.0.0.1"]);
    says(&fails(daemon("gateway", &cluster.home("gateway-1").join("gateway.toml"), &[]), 1), &["cannot listen on"]);

    // Listening where anybody can connect needs a word.
    let open = write("open-node.toml", &node.replace(&state, &elsewhere).replace("127.0.0.1:", "0.0.0.0:"));
    says(&fails(daemon("node", &open, &[]), 1), &["0.0.0.0", "--insecure"]);
    let open = write("open-gateway.toml", &gateway.replacen("portal = \"127.0.0.1:", "portal = \"0.0.0.0:", 1));
    says(&fails(daemon("gateway", &open, &[]), 1), &["0.0.0.0", "--insecure"]);

    // Unknown keys, another role, nonsense.
    let path = write("unknown.toml", &format!("speed = 9\n{node}"));
    says(&fails(daemon("node", &path, &[]), 1), &["unknown.toml", "speed"]);
    says(&fails(daemon("gateway", &path, &[]), 1), &["unknown.toml"]);
    says(&fails(daemon("node", &dir.path().join("missing.toml"), &[]), 1), &["missing.toml"]);

    cluster.down();
    // With the word it listens there, and SIGTERM closes it.
    let open = write("open-gateway.toml", &gateway.replacen("portal = \"127.0.0.1:", "portal = \"0.0.0.0:", 1));
    let mut child = daemon("gateway", &open, &["--insecure"]).stderr(Stdio::null()).spawn().expect("it starts");
    let portal: SocketAddr = cluster.portal("gateway-1");
    wait_for("the portal to answer", || TcpStream::connect(portal).ok().map(drop));
    kill_process(Pid::from_raw(child.id() as i32).expect("a pid"), Signal::TERM).expect("it runs");
    assert!(wait_child(&mut child, Duration::from_secs(30)).success());

    // The directory of another cluster.
    let other = uuid::Uuid::new_v4();
    let member = cluster.home("node-1").join("state").join("member.json");
    let text = std::fs::read_to_string(&member).expect("its identity");
    let own = cluster.json_id();
    let definition = format!(
        "\n[cluster]\nid = \"{other}\"\nname = \"other\"\n[[cluster.members]]\nid = 1\nname = \"node-1\"\nrole = \"node\"\n\
         control_addr = \"127.0.0.1:1\"\ndata_addr = \"127.0.0.1:2\"\n"
    );
    assert!(text.contains(&own));
    let path = write("other-cluster.toml", &format!("{node}{definition}"));
    says(&fails(daemon("node", &path, &[]), 1), &[&own, &other.to_string(), "another directory"]);
}

impl TestCluster {
    /// The cluster's id, from `cluster.toml`.
    fn json_id(&self) -> String {
        let config = cli::config::ClusterConfig::load(&self.dir().join("cluster.toml")).expect("dev wrote it");
        config.id.to_string()
    }
}

#[test]
fn a_file_of_another_cluster_is_noticed_before_anything_is_done() {
    let cluster = TestCluster::up(&["--witnesses", "0", "--nodes", "1", "--pools", "1"]);
    let file = cluster.dir().join("other.toml");
    let own = cluster.json_id();
    let text = std::fs::read_to_string(cluster.dir().join("cluster.toml")).expect("dev wrote it");
    let other = uuid::Uuid::new_v4().to_string();
    std::fs::write(&file, text.replace(&own, &other)).expect("a file");
    let file = file.display().to_string();
    let said = cluster.fails(&["--config", &file, "create-volume", "v", "--size", "8MiB", "--replicas", "1"], 1);
    says(&said, &["other.toml", &own, &other]);
}

#[test]
fn daemons_close_cleanly_whenever_they_are_told_to() {
    let cluster = TestCluster::up(&["--witnesses", "0", "--nodes", "1", "--pools", "2"]);
    cluster.ok(&["create-volume", VOLUME, "--size", "64MiB", "--replicas", "1", "--stripes", "2"]);
    cluster.down();
    for part in ["node-1", "gateway-1"] {
        let role = part.trim_end_matches("-1");
        let config = cluster.home(part).join(format!("{role}.toml"));
        for (delay_ms, signal) in
            [(20, Signal::TERM), (60, Signal::INT), (150, Signal::TERM), (400, Signal::INT), (1200, Signal::TERM)]
        {
            let mut child = daemon(role, &config, &[]).stderr(Stdio::piped()).spawn().expect("it starts");
            std::thread::sleep(Duration::from_millis(delay_ms));
            kill_process(Pid::from_raw(child.id() as i32).expect("a pid"), signal).expect("it runs");
            let status = wait_child(&mut child, Duration::from_secs(30));
            let mut said = String::new();
            child.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
            // Before the first instruction of ours it is the system that ends the process.
            let unborn = status.code().is_none() && said.is_empty();
            assert!(status.success() || unborn, "{part} after {delay_ms} ms: {status}: {said}");
            assert!(!said.contains("panicked"), "{part} after {delay_ms} ms: {said}");
        }
    }
    cluster.dev_up(&[]);
    cluster.wait_in_sync(VOLUME);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn every_part_closes_cleanly_under_load_and_comes_back() {
    let cluster = TestCluster::up(&[]);
    cluster.create(VOLUME, "256MiB");
    let spec = LoadSpec { depth: 4, area: Some(64 << 20), ..cluster.load_spec(VOLUME, seed()) };
    let load = Load::start(spec).await.unwrap_or_else(|error| panic!("{error}"));
    for (part, signal) in [("node-1", "TERM"), ("witness-1", "INT"), ("gateway-1", "TERM"), ("gateway-1", "INT")] {
        answered(&load, 100).await;
        cluster.signal(part, signal);
        cluster.wait_down(part);
        cluster.start(part);
        answered(&load, 100).await;
        cluster.wait_in_sync(VOLUME);
        assert!(!cluster.log(part).contains("panicked"), "{part}: {}", cluster.log(part));
    }
    finish(load).await;
    cluster.verify(VOLUME);
}

/// The replicas' files of a node.
fn replica_files(cluster: &TestCluster, node: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for pool in std::fs::read_dir(cluster.home(node).join("pools")).into_iter().flatten().flatten() {
        for entry in std::fs::read_dir(pool.path()).into_iter().flatten().flatten() {
            found.push(entry.path());
        }
    }
    found.sort();
    found.retain(|path| path.extension().is_some_and(|extension| extension == "meta" || extension == "data"));
    found
}

fn metas(cluster: &TestCluster, node: &str) -> Vec<PathBuf> {
    let mut found = replica_files(cluster, node);
    found.retain(|path| path.extension().is_some_and(|extension| extension == "meta"));
    found
}

fn flip(path: &Path, at: u64) {
    let file = std::fs::File::options().read(true).write(true).open(path).expect("a replica's file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("it is that long");
    byte[0] ^= 0x10;
    file.write_all_at(&byte, at).expect("room for it");
}

fn superblock(path: &Path, copy: usize) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    let file = std::fs::File::open(path).expect("a replica's file");
    file.read_exact_at(&mut page, (copy * PAGE) as u64).expect("it is that long");
    page
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn damaged_replica_files_are_repaired_or_refused_named_and_resynchronised() {
    let cluster = TestCluster::up(&[]);
    cluster.create(VOLUME, "128MiB");
    let load = Load::idle(cluster.load_spec(VOLUME, seed())).await.unwrap_or_else(|error| panic!("{error}"));
    load.write(0..64 << 20).await.unwrap_or_else(|error| panic!("{error}"));
    let files = metas(&cluster, "node-2");
    assert_eq!(files.len(), 5);
    let replica = |path: &Path| path.file_stem().expect("a name").to_string_lossy().into_owned();
    cluster.terminate("node-2");

    // One copy of two: the other is used, and it is repaired.
    flip(&files[0], 100);
    flip(&files[1], PAGE as u64 + 100);
    // Both copies: refused, named, resynchronised.
    flip(&files[2], 100);
    flip(&files[2], PAGE as u64 + 100);
    // Truncated.
    std::fs::File::options().write(true).open(&files[3]).expect("a file").set_len(3 * PAGE as u64).expect("it shrinks");
    cluster.start("node-2");
    cluster.wait_in_sync(VOLUME);
    let log = cluster.log("node-2");
    for path in &files[..2] {
        assert_eq!(superblock(path, 0), superblock(path, 1), "both copies are good again");
    }
    for path in &files[..4] {
        let named =
            log.lines().any(|line| (line.contains("WARN") || line.contains("ERROR")) && line.contains(&replica(path)));
        assert!(named, "{} is not named in: {log}", replica(path));
    }
    load.read_back(None).await.unwrap_or_else(|error| panic!("{error}"));
    cluster.verify(VOLUME);

    // A file of somebody else: another replica's under this one's name. It is refused and named; nothing of it is
    // ever read, and the volume goes on without it until the right one is back.
    cluster.terminate("node-2");
    let foreign = files[4].with_extension("meta");
    let kept = foreign.with_extension("kept");
    std::fs::rename(&foreign, &kept).expect("a file");
    std::fs::copy(&files[0], &foreign).expect("a file");
    cluster.start("node-2");
    let begun = log.len();
    wait_for("the foreign file to be named", || {
        let log = cluster.log("node-2");
        let named = |line: &str| line.contains("can't be opened") && line.contains(&replica(&foreign));
        log[begun..].lines().any(named).then_some(())
    });
    load.write(0..32 << 20).await.unwrap_or_else(|error| panic!("{error}"));
    load.read_back(None).await.unwrap_or_else(|error| panic!("{error}"));
    let status = cluster.ok(&["status"]);
    assert!(status.starts_with("DEGRADED"), "{status}");
    cluster.terminate("node-2");
    std::fs::rename(&kept, &foreign).expect("a file");
    cluster.start("node-2");
    cluster.wait_in_sync(VOLUME);
    finish(load).await;
    cluster.verify(VOLUME);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn lost_or_rotten_data_of_a_replica_is_never_returned() {
    let cluster = TestCluster::up(&[]);
    cluster.create(VOLUME, "128MiB");
    let load = Load::idle(cluster.load_spec(VOLUME, seed())).await.unwrap_or_else(|error| panic!("{error}"));
    load.write(0..64 << 20).await.unwrap_or_else(|error| panic!("{error}"));
    let data: Vec<PathBuf> = metas(&cluster, "node-1").iter().map(|path| path.with_extension("data")).collect();
    // Rot while nobody looks: one byte in each replica of one node.
    cluster.terminate("node-1");
    for path in &data {
        flip(path, 5 * PAGE as u64 + 7);
    }
    cluster.start("node-1");
    cluster.wait_in_sync(VOLUME);
    load.read_back(None).await.unwrap_or_else(|error| panic!("{error}"));
    // Whatever reading has not found is found and named by comparing, and repaired by scrubbing.
    let found = output(cluster.command(&["verify-volume", VOLUME]));
    if !found.status.success() {
        let said = stdout(&found);
        says(&said, &["mirror", "block 5", "volume byte", "node-1/pool-"]);
        let scrubbed = output(cluster.command(&["scrub-volume", VOLUME]));
        assert!(scrubbed.status.success(), "{}{}", stdout(&scrubbed), stderr(&scrubbed));
    }
    cluster.verify(VOLUME);
    finish(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_full_disk_costs_its_replica_and_nothing_else() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: mounting a small file system needs root");
        return;
    }
    let cluster = TestCluster::up(&["--pool-size", "256MiB"]);
    cluster.terminate("node-2");
    let pool = cluster.home("node-2").join("pools").join("pool-1");
    let mounted = Mounted::tmpfs(&pool, "12m");
    if mounted.is_none() {
        eprintln!("skipped: this machine does not allow to mount a tmpfs");
        return;
    }
    cluster.start("node-2");
    cluster.create(VOLUME, "256MiB");
    let load = Load::idle(cluster.load_spec(VOLUME, seed())).await.unwrap_or_else(|error| panic!("{error}"));
    load.write(0..192 << 20).await.unwrap_or_else(|error| panic!("{error}"));
    wait_for("the full replica to leave", || {
        let volume = cluster.volume(VOLUME);
        let mirrors = volume["mirrors"].as_array().expect("mirrors");
        let sizes: Vec<usize> =
            mirrors.iter().filter_map(|m| m["in_sync"]["members"].as_array().map(Vec::len)).collect();
        assert!(sizes.iter().sum::<usize>() >= 14, "only the full one leaves: {sizes:?}");
        (sizes.iter().sum::<usize>() == 14).then_some(())
    });
    load.write(64 << 20..96 << 20).await.unwrap_or_else(|error| panic!("{error}"));
    finish(load).await;
    let status = cluster.ok(&["status"]);
    assert!(status.starts_with("DEGRADED"), "{status}");
    cluster.down();
    drop(mounted);
}

/// A small file system, until dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(path: &Path, size: &str) -> Option<Self> {
        let options = format!("size={size}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path).status();
        mount.is_ok_and(|status| status.success()).then(|| Self(path.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn frame(change: impl FnOnce(&mut [u8; HEADER_LEN]), tail: &[u8]) -> Vec<u8> {
    let header = Header {
        kind: Kind::Hello,
        is_reply: false,
        flags: 0,
        channel: 0,
        code: 0,
        tag: 1,
        attach: AttachId::default(),
        block: 0,
        count: 0,
        body_len: 0,
        payload_len: 0,
    };
    let mut bytes = header.encode();
    change(&mut bytes);
    let mut all = bytes.to_vec();
    all.extend(tail);
    all
}

fn with_sum(bytes: &mut [u8; HEADER_LEN]) {
    let sum = crc32fast::hash(&bytes[..60]);
    bytes[60..].copy_from_slice(&sum.to_le_bytes());
}

/// Sends bytes and waits until the other side closes.
fn closes(addr: SocketAddr, bytes: &[u8], what: &str) {
    let mut stream = TcpStream::connect(addr).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a time-out");
    // It may close before it has read everything.
    let _ = stream.write_all(bytes);
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("{what}: the connection is still open: {error}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn hostile_bytes_close_their_connection_and_harm_nothing_else() {
    let cluster = TestCluster::up(&[]);
    cluster.create(VOLUME, "128MiB");
    let spec = LoadSpec { depth: 2, area: Some(32 << 20), ..cluster.load_spec(VOLUME, seed()) };
    let load = Load::start(spec).await.unwrap_or_else(|error| panic!("{error}"));
    answered(&load, 50).await;
    load.take();

    let data: SocketAddr =
        cluster.part("node-1")["data"].as_str().expect("a data address").parse().expect("an address");
    let portal = cluster.portal("gateway-1");
    let control: SocketAddr =
        cluster.part("node-1")["control"].as_str().expect("an address").parse().expect("an address");
    let before = (cluster.log("node-1").len(), cluster.log("gateway-1").len());
    let hostile = tokio::task::spawn_blocking(move || {
        let mut noise = cli::load::Rng::new(7);
        let noise: Vec<u8> = (0..8192).map(|_| noise.draw() as u8).collect();
        for (what, bytes) in [
            ("noise", noise.clone()),
            ("another protocol", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".repeat(8)),
            ("a bad header checksum", frame(|b| b[60] ^= 1, &[])),
            (
                "a bad version",
                frame(
                    |b| {
                        b[4] = 9;
                        with_sum(b)
                    },
                    &[],
                ),
            ),
            (
                "an unknown kind",
                frame(
                    |b| {
                        b[5] = 0x7e;
                        with_sum(b)
                    },
                    &[],
                ),
            ),
            (
                "a body without end",
                frame(
                    |b| {
                        b[52..56].fill(0xff);
                        with_sum(b)
                    },
                    &[],
                ),
            ),
            (
                "a payload without end",
                frame(
                    |b| {
                        b[56..60].fill(0xff);
                        with_sum(b)
                    },
                    &[],
                ),
            ),
            (
                "a bad body",
                frame(
                    |b| {
                        b[52] = 64;
                        with_sum(b)
                    },
                    &[0xaa; 64],
                ),
            ),
            (
                "a request before the greeting",
                frame(
                    |b| {
                        b[5] = Kind::Read as u8;
                        with_sum(b)
                    },
                    &[],
                ),
            ),
        ] {
            closes(data, &bytes, what);
        }
        let login = |change: fn(&mut [u8; 48]), tail: &[u8]| {
            // An immediate login request.
            let mut bhs = [0u8; 48];
            (bhs[0], bhs[1]) = (0x43, 0x87);
            bhs[8] = 0x80;
            change(&mut bhs);
            let mut all = bhs.to_vec();
            all.extend(tail);
            all
        };
        for (what, bytes) in [
            ("noise", noise),
            ("an unknown opcode", login(|b| b[0] = 0x3f, &[])),
            ("a data segment of 16 MiB", login(|b| b[5..8].fill(0xff), &[0; 4096])),
            ("additional headers without end", login(|b| b[4] = 0xff, &[0; 2048])),
            ("text that is none", login(|b| b[7] = 8, b"\xff\xff\xff\xff\xff\xff\xff\xff")),
            ("a command before the login", login(|b| b[0] = 0x01, &[])),
        ] {
            closes(portal, &bytes, what);
        }
        // gRPC answers noise as HTTP/2 says; it only has to survive.
        let mut stream = TcpStream::connect(control).expect("it listens");
        let _ = stream.write_all(&[0xff; 4096]);
    });
    hostile.await.expect("every connection is closed");

    answered(&load, 50).await;
    assert_eq!(load.take().reconnects, 0, "the initiator's own connection is not touched");
    for part in ["node-1", "gateway-1"] {
        assert_eq!(cluster.part(part)["state"], "running", "{part}");
        assert!(!cluster.log(part).contains("panicked"), "{part}");
    }
    let after = (cluster.log("node-1").len(), cluster.log("gateway-1").len());
    assert!(after.0 > before.0 && after.1 > before.1, "it is logged: {before:?} {after:?}");
    finish(load).await;
    cluster.wait_in_sync(VOLUME);
    cluster.verify(VOLUME);
}
