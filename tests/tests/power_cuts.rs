//! A few power cuts of storage nodes in virtual machines; `tests/vm/power-cuts` makes as many as are wanted.

use std::path::Path;
use std::process::{Command, Stdio};

/// One node, two, and all at once, in an order that the seed decides.
const CUTS: &str = "3";

/// What is missing for virtual machines, in words.
fn missing() -> Option<String> {
    for tool in ["qemu-system-x86_64", "ip", "unshare", "mkfs.ext4", "strip"] {
        let found = Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if found.is_err() {
            return Some(format!("{tool} is not installed"));
        }
    }
    let mut unshare = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    let allowed = unshare.args(["--net", "ip", "tuntap", "add", "tap1", "mode", "tap"]).stderr(Stdio::null()).status();
    if !allowed.is_ok_and(|status| status.success()) {
        return Some("this user may not make a network namespace with a tap in it".into());
    }
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("vm/guest");
    let found = Command::new(guest).arg("--find").stdout(Stdio::null()).status();
    (!found.is_ok_and(|status| status.success())).then(|| "tests/vm/guest has not been run".into())
}

#[test]
fn power_cuts_lose_nothing_that_was_promised() {
    if let Some(missing) = missing() {
        assert!(std::env::var_os("MD99_TESTS_NEED_TOOLS").is_none(), "{missing}");
        eprintln!("skipped: {missing}; tests/run sees to it");
        return;
    }
    let seed = uuid::Uuid::new_v4().as_u64_pair().0.to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_power-cuts"))
        .args(["--cuts", CUTS, "--seed", &seed])
        .stdin(Stdio::null())
        .output()
        .expect("it was built with this test");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    println!("{said}");
}
