//! A short run of chaos on real processes, always the same seed. `tests/chaos --minutes 60 --seed S` is the long
//! one.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MINUTES: &str = "3";
const SEED: &str = "1";
/// Far more than a slow machine takes.
const PATIENCE: Duration = Duration::from_secs(30 * 60);

/// Whether network namespaces can be made here. In CI it is a failure if not.
fn have_namespaces() -> bool {
    let works = |program: &str, args: &[&str]| {
        let status = Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    let why = if !rustix::process::geteuid().is_root() {
        "not root"
    } else if !works("unshare", &["--net", "--mount", "--pid", "--fork", "--mount-proc", "nft", "list", "ruleset"]) {
        "no network namespaces, or no nft"
    } else if !works("ip", &["-V"]) {
        "no ip"
    } else {
        return true;
    };
    assert!(std::env::var_os("MD99_TESTS_NEED_TOOLS").is_none(), "chaos cannot run here: {why}");
    eprintln!("skipped: {why}; tests/run installs iproute2 and nftables, and chaos must be root");
    false
}

#[test]
fn nothing_is_lost_while_processes_links_and_disks_fail() {
    if !have_namespaces() {
        return;
    }
    let mut chaos = Command::new(env!("CARGO_BIN_EXE_chaos"));
    let mut chaos = chaos.args(["--minutes", MINUTES, "--seed", SEED]).stdin(Stdio::null()).spawn().expect("it starts");
    let until = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = chaos.try_wait().expect("a child of ours") {
            break status;
        }
        if Instant::now() > until {
            // Everything that it started ends with it.
            let _ = chaos.kill();
            panic!("chaos did not end in {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    assert!(status.success(), "chaos failed; what it printed tells why, and where its logs are");
}
