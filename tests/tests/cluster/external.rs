//! Initiators that we did not write: libiscsi's tools and qemu's.

use std::process::Command;

use crate::support::*;

const VOLUME: &str = "tank";

fn run(tool: &str, args: &[&str]) -> String {
    let mut command = Command::new(tool);
    command.args(args);
    let described = format!("{command:?}");
    let output = output(command);
    assert!(output.status.success(), "{described}: {}{}", stdout(&output), stderr(&output));
    stdout(&output) + &stderr(&output)
}

fn random_image(path: &std::path::Path, bytes: usize) {
    use std::io::Write;
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).expect("a file"));
    let mut rng = cli::load::Rng::new(uuid::Uuid::new_v4().as_u64_pair().0);
    for _ in 0..bytes / 8 {
        file.write_all(&rng.draw().to_le_bytes()).expect("room for it");
    }
}

#[test]
fn libiscsi_tools_find_and_read_a_volume() {
    if !have("iscsi-ls") {
        return;
    }
    let cluster = TestCluster::up(&[]);
    let url = cluster.create(VOLUME, "64MiB");
    let portal = cluster.portal("gateway-1");
    let listed = run("iscsi-ls", &["-s", &format!("iscsi://{portal}")]);
    assert!(listed.contains("iqn.2026-11.io.md99:tank"), "{listed}");
    let inquiry = run("iscsi-inq", &[&url]);
    assert!(inquiry.to_lowercase().contains("md99"), "{inquiry}");
    for page in ["0x00", "0x80", "0x83", "0xb0", "0xb1", "0xb2"] {
        let page = u8::from_str_radix(&page[2..], 16).expect("hexadecimal").to_string();
        run("iscsi-inq", &["-e", "1", "-c", &page, &url]);
    }
    let capacity = run("iscsi-readcapacity16", &[&url]);
    assert!(capacity.contains(&(64 << 20).to_string()) || capacity.contains("131071"), "{capacity}");

    // Several initiators and volumes at once: a copy from one volume to the other.
    let second = cluster.create("copy", "64MiB");
    let image = cluster.dir().join("image");
    random_image(&image, 8 << 20);
    if have("qemu-img") {
        run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", path(&image), &url]);
        run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &url, &second]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &url, &second]);
        cluster.verify("copy");
    }
    cluster.verify(VOLUME);
}

fn path(path: &std::path::Path) -> &str {
    path.to_str().expect("a plain path")
}

#[test]
fn qemu_copies_an_image_while_two_nodes_die() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let cluster = TestCluster::up(&[]);
    let url = cluster.create(VOLUME, "512MiB");
    let image = cluster.dir().join("image");
    random_image(&image, 300_000_000 / 4096 * 4096);
    let mut copying = Command::new("qemu-img")
        .args(["convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", path(&image), &url])
        .spawn()
        .expect("qemu-img is there");
    // When it has begun to write, not before and not after.
    let written = || cluster.conditions(VOLUME).len() == 15 && taken(&cluster) > 20 << 20;
    wait_for("the copy to be under way", || written().then_some(()));
    cluster.kill("node-2");
    let at = taken(&cluster);
    wait_for("the copy to go on", || (taken(&cluster) > at + (10 << 20) || ended(&mut copying)).then_some(()));
    cluster.kill("node-3");
    let status = wait_child(&mut copying, PATIENCE);
    assert!(status.success(), "qemu-img convert: {status}");
    compare(&image, &url);
    cluster.start("node-2");
    cluster.start("node-3");
    cluster.wait_in_sync(VOLUME);
    compare(&image, &url);

    let io = |command: &str| run("qemu-io", &["-f", "raw", "-c", command, &url]);
    for command in ["write -P 0xab 1M 64k", "write -z 4M 1M", "discard 8M 2M", "write -P 0xcd 512 512", "flush"] {
        let said = io(command);
        assert!(!said.contains("failed"), "{command}: {said}");
    }
    for command in ["read -P 0xab 1M 64k", "read -P 0 4M 1M", "read -P 0 8M 2M", "read -P 0xcd 512 512"] {
        let said = io(command);
        assert!(!said.contains("failed") && !said.contains("verification"), "{command}: {said}");
    }
    cluster.verify(VOLUME);
}

/// Bytes that node-1's replicas take on its disk.
fn taken(cluster: &TestCluster) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut sum = 0;
    for pool in 1..=5 {
        let pool = cluster.home("node-1").join("pools").join(format!("pool-{pool}"));
        for entry in std::fs::read_dir(pool).into_iter().flatten().flatten() {
            sum += entry.metadata().map_or(0, |meta| meta.blocks() * 512);
        }
    }
    sum
}

fn ended(child: &mut std::process::Child) -> bool {
    child.try_wait().expect("a child of ours").is_some()
}

/// The image is smaller than the volume; what lies behind it reads as zeroes.
fn compare(image: &std::path::Path, url: &str) {
    let said = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", path(image), url]);
    assert!(said.contains("identical"), "{said}");
}
