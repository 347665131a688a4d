//! `cluster bench`: what it measures is there and is right in kind; what it overwrites is what it said.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::Duration;

use client::initiator::{Options, Session};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::*;

const VOLUME: &str = "tank";
const MIB: u64 = 1 << 20;

fn says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

/// Whether these MiB of the volume hold nothing but zeroes.
fn is_empty(cluster: &TestCluster, mib: std::ops::Range<u64>) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let options = Options::new(client::iscsi::iqn(VOLUME));
        let session = Session::connect(cluster.portal("gateway-1"), &options).await.expect("it is served");
        let mut empty = true;
        for at in mib {
            let data = session.read(at * MIB / 512, (MIB / 512) as u32).await.expect("it is read");
            empty &= data.iter().all(|byte| *byte == 0);
        }
        session.logout().await.expect("it was logged in");
        empty
    })
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no number {key} in {value:#}"))
}

/// Every figure is there and makes sense beside the others.
fn check(measurement: &Value, rounds: usize) {
    let median = &measurement["median"];
    assert!(number(median, "iops") > 0.0 && number(median, "mb_per_s") > 0.0, "{median:#}");
    let latencies = ["p50_us", "p90_us", "p99_us", "p999_us", "max_us"].map(|key| number(median, key));
    assert!(latencies[0] > 0.0 && latencies.is_sorted(), "{latencies:?}");
    assert!(number(median, "load_us_per_io") > 0.0);
    assert_eq!(measurement["errors"], 0, "{measurement:#}");
    let each = measurement["rounds"].as_array().expect("rounds");
    assert_eq!(each.len(), rounds);
    for round in each {
        let requests = number(round, "requests");
        let block = number(&measurement["shape"], "block_size");
        assert_eq!(number(round, "bytes"), requests * block);
        assert!(number(round, "iops") <= number(measurement, "highest_iops"));
        let series = round["series"].as_array().expect("a series");
        assert!(!series.is_empty());
        let in_series: f64 = series.iter().map(|point| number(point, "iops") * number(point, "seconds")).sum();
        // What was answered in a sliver at the end has no point of its own.
        assert!(in_series <= requests * 1.001 && in_series >= requests * 0.5, "{in_series} of {requests}");
    }
}

#[test]
fn a_volume_is_measured_and_only_what_was_named_is_overwritten() {
    let cluster = TestCluster::up(&[]);
    let url = cluster.create(VOLUME, "24MiB");

    // Not without a word; and not when nothing is to be written.
    let said = cluster.fails(&["bench", VOLUME, "--region", "8MiB", "--seconds", "1"], 1);
    says(&said, &["the first 8 MiB of volume tank (24 MiB)", "nothing was done", "--yes"]);
    let read = cluster.json(&["bench", VOLUME, "--shape", "randread1", "--seconds", "1", "--region", "8MiB", "--json"]);
    check(&read["measurements"][0], 1);
    assert_eq!(read["filled"], false);
    assert!(is_empty(&cluster, 0..24), "something was written that nobody allowed");

    // Two ways to the same volume, side by side, with a page of plots.
    let page = cluster.dir().join("bench.html");
    let gateway = cluster.part("gateway-1")["pid"].to_string();
    let found = cluster.json(&[
        "bench",
        VOLUME,
        "--url",
        &url,
        "--name",
        "one",
        "--name",
        "<two>",
        "--pids",
        &gateway,
        "--shape",
        "randwrite32,mixed,database",
        "--seconds",
        "1",
        "--rounds",
        "2",
        "--region",
        "8MiB",
        "--yes",
        "--json",
        "--report",
        page.to_str().expect("a plain path"),
    ]);
    let measurements = found["measurements"].as_array().expect("a list");
    let order: Vec<_> = measurements.iter().map(|m| (&m["shape"]["name"], &m["target"])).collect();
    assert_eq!(order.len(), 6, "{order:?}");
    assert!(order[0] == (&"randwrite32".into(), &"one".into()) && order[5] == (&"database".into(), &"<two>".into()));
    for measurement in measurements {
        check(measurement, 2);
        assert!(number(measurement, "ratio") > 0.0);
        let of_gateway = measurement["median"]["target_us_per_io"].is_number();
        assert_eq!(of_gateway, measurement["target"] == "one", "{measurement:#}");
    }
    assert_eq!((&found["filled"], &found["interrupted"]), (&true.into(), &false.into()));
    assert!(!is_empty(&cluster, 0..1) && !is_empty(&cluster, 7..8), "the region is written once before");
    assert!(is_empty(&cluster, 8..24), "more than the region was written");
    let page = std::fs::read_to_string(page).expect("the page is there");
    says(&page, &["<!doctype html>", "<svg", "randwrite32", "&lt;two&gt;", "prefers-color-scheme"]);
    for outside in ["<script", "http:", "https:", "src=", "href=", "<two>"] {
        assert!(!page.contains(outside), "{outside} is in the page");
    }

    // The table, of a shape of one's own.
    let args =
        ["--block-size", "512", "--read-percent", "50", "--queue-depth", "3", "--sessions", "2", "--total", "1MiB"];
    let table = cluster.ok(&[&["bench", VOLUME, "--region", "4MiB", "--yes"][..], &args].concat());
    says(&table, &["SHAPE", "IOPS", "P99.9", "randrw50-512B-q3", "load average"]);

    // By the client library: not while a gateway has it.
    let direct = ["bench", VOLUME, "--direct", "--shape", "randread1,seqwrite", "--seconds", "1", "--region", "8MiB"];
    let direct = [&direct[..], &["--yes", "--json"]].concat();
    says(&cluster.fails(&direct, 1), &["volume tank is open on gateway-1", "unexport-volume tank"]);
    cluster.ok(&["unexport-volume", VOLUME]);
    says(&cluster.fails(&["bench", VOLUME, "--yes"], 1), &["not served", "export-volume tank"]);
    let found = cluster.json(&direct);
    for measurement in found["measurements"].as_array().expect("a list") {
        check(measurement, 1);
    }
    cluster.ok(&["export-volume", VOLUME]);
    assert!(is_empty(&cluster, 8..24), "more than the region was written");
    cluster.verify(VOLUME);

    // Ended by the user, it says what it has.
    let mut command = cluster.command(&["bench", VOLUME, "--shape", "randread32", "--seconds", "600", "--json"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let mut err = BufReader::new(child.stderr.take().expect("a pipe"));
    let mut line = String::new();
    while !line.contains("randread32 on tank") {
        line.clear();
        assert!(err.read_line(&mut line).expect("it is text") > 0, "it ended");
    }
    std::thread::sleep(Duration::from_millis(500));
    let pid = Pid::from_raw(child.id() as i32).expect("a pid");
    kill_process(pid, Signal::INT).expect("it is ours");
    let mut out = String::new();
    child.stdout.take().expect("a pipe").read_to_string(&mut out).expect("it is text");
    assert_eq!(wait_child(&mut child, PATIENCE).code(), Some(1));
    let found: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(found["interrupted"], true);
    let mut said = String::new();
    err.read_to_string(&mut said).expect("it is text");
    says(&said, &["interrupted"]);
}

#[test]
fn what_cannot_be_measured_is_named() {
    let url = "iscsi://127.0.0.1:1/iqn.2026-11.io.md99:tank/0";
    let (held, port) = taken_port();
    drop(held);
    let silent = format!("iscsi://127.0.0.1:{port}/iqn.2026-11.io.md99:tank/0");
    for (args, status, words) in [
        (&["bench"][..], 2, &["VOLUME", "--url <URL>"][..]),
        (&["bench", "--url", url, "--shape", "fast"], 2, &["fast", "randread1"]),
        (&["bench", "--url", url, "--shape", "mixed", "--queue-depth", "3"], 2, &["--queue-depth"]),
        (&["bench", "--url", url, "--fua"], 2, &["--fua", "--read-percent"]),
        (&["bench", "--url", url, "--block-size", "1000"], 2, &["--block-size", "multiple of 512"]),
        (&["bench", "--url", url, "--url", url], 2, &["two targets", "--name"]),
        (&["bench", "--url", url, "--name", "a", "--name", "b"], 2, &["--name", "2 times"]),
        (&["bench", "--url", url, "--pids", "one"], 2, &["--pids", "one"]),
        (&["bench", "--url", "iscsi://127.0.0.1/tank"], 2, &["--url", "iscsi://HOST:PORT/IQN/LUN"]),
        (&["bench", "--url", url, "--direct"], 2, &["VOLUME"]),
        (&["bench", "--url", &silent], 1, &[&silent, "cannot connect"]),
    ] {
        says(&fails(program(args), status), words);
    }
    let shapes = output(program(&["bench", "--list"]));
    assert!(shapes.status.success());
    says(&stdout(&shapes), &["randwritefua1", "FUA", "database"]);
}
