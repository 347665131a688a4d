//! A node's virtual machine, and the network that joins it to the others and to the host.
//!
//! ```text
//!  10.99.0.1  bridge: witnesses, gateway, load        10.99.0.11, .12, .13  node-1, node-2, node-3
//! ```
//!
//! The bridge and the machines' taps are in this process's own network namespace. A tap stays when its machine dies,
//! as a switch does: what is sent to a dead machine is lost, and nobody says so.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

/// The host's address.
pub const HOST: &str = "10.99.0.1";
/// Memory of a machine in MiB, of which the initramfs takes 30.
const MEMORY: u32 = 256;
/// Bytes of a machine's disk; xfs takes nothing below 300 MiB.
const DISK: u64 = 1 << 30;

/// A command that must succeed; returns what it printed.
pub fn run(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {}", output.status, said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a tool is there.
pub fn have(tool: &str) -> bool {
    Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// Makes the bridge, and a tap for each machine.
pub fn network(machines: u32) -> Result<()> {
    let ip = |words: &str| run("ip", &words.split(' ').collect::<Vec<_>>()).map(drop);
    ip("link set lo up")?;
    ip("link add br0 type bridge")?;
    ip(&format!("addr add {HOST}/24 dev br0"))?;
    ip("link set br0 up")?;
    for number in 1..=machines {
        ip(&format!("tuntap add tap{number} mode tap"))?;
        ip(&format!("link set tap{number} master br0"))?;
        ip(&format!("link set tap{number} up"))?;
    }
    Ok(())
}

/// The file systems that nodes are tried on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    Ext4,
    Xfs,
}

impl FileSystem {
    /// Its name.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

/// What all machines boot.
pub struct Image {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

/// A node's virtual machine.
pub struct Machine {
    /// From 1.
    pub number: u32,
    pub file_system: FileSystem,
    dir: PathBuf,
    qemu: Option<Child>,
}

impl Machine {
    /// With an empty disk; not started.
    pub fn new(dir: &Path, number: u32, file_system: FileSystem) -> Result<Self> {
        let machine = Self { number, file_system, dir: dir.to_owned(), qemu: None };
        let disk = machine.disk();
        File::create(&disk)?.set_len(DISK)?;
        let disk = disk.to_str().context("a plain path")?;
        match file_system {
            FileSystem::Ext4 => run("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0,nodiscard", disk])?,
            FileSystem::Xfs => run("mkfs.xfs", &["-q", "-f", "-K", disk])?,
        };
        Ok(machine)
    }

    /// The node's name.
    pub fn name(&self) -> String {
        format!("node-{}", self.number)
    }

    /// The node's address.
    pub fn address(&self) -> String {
        format!("10.99.0.1{}", self.number)
    }

    fn disk(&self) -> PathBuf {
        self.dir.join(format!("{}.img", self.name()))
    }

    /// Switches it on. `lazy`: its kernel writes nothing to the disk unless something is flushed.
    pub fn boot(&mut self, image: &Image, lazy: bool) -> Result<()> {
        assert!(self.qemu.is_none(), "{} runs already", self.name());
        let file = |path: &Path| path.to_str().map(str::to_owned).context("a plain path");
        let (number, fs) = (self.number, self.file_system.word());
        let said = |what: &str| file(&self.dir.join(format!("{}.{what}", self.name())));
        // An oops ends the guest, and the test with it. Watchdogs that a slow emulation would trip are off. Time comes
        // from the HPET, whose rate is known: that of the TSC and the APIC's timer would be measured at boot, which
        // goes wrong by far more than the cluster allows (1 %) where the host is busy.
        let cmdline = format!(
            "console=ttyS0 quiet panic=-1 oops=panic net.ifnames=0 mitigations=off nokaslr notsc nolapic_timer \
             no_timer_check clocksource=hpet nowatchdog rcupdate.rcu_cpu_stall_suppress=1 audit=0 apparmor=0 random.trust_cpu=1 \
             cryptomgr.notests node={number} fs={fs} lazy={}",
            u8::from(lazy)
        );
        let mut qemu = Command::new("qemu-system-x86_64");
        // A processor without AVX: emulating it costs more than it gives.
        qemu.args(["-accel", "tcg,tb-size=128", "-cpu", "Nehalem,+rdrand,+pclmulqdq", "-smp", "1"])
            .args(["-m", &MEMORY.to_string()])
            .args(["-machine", "q35,graphics=off,vmport=off,hpet=on", "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-no-reboot", "-append", &cmdline])
            .args(["-kernel", &file(&image.kernel)?, "-initrd", &file(&image.initrd)?])
            .args(["-chardev", &format!("file,id=console,path={},append=on", said("console")?)])
            .args(["-chardev", &format!("file,id=log,path={},append=on", said("log")?)])
            .args(["-serial", "chardev:console", "-device", "virtio-serial-pci"])
            .args(["-device", "virtserialport,chardev=log", "-device", "virtio-rng-pci"])
            .args(["-drive", &format!("file={},format=raw,if=virtio,cache=writeback", file(&self.disk())?)])
            .args(["-netdev", &format!("tap,id=net,ifname=tap{number},script=no,downscript=no")])
            .args(["-device", &format!("virtio-net-pci,netdev=net,romfile=,mac=52:54:00:99:00:0{number}")])
            .stdin(Stdio::null());
        let log = File::options().create(true).append(true).open(self.dir.join(format!("{}.qemu", self.name())))?;
        self.qemu = Some(qemu.stdout(log.try_clone()?).stderr(log).spawn().context("qemu-system-x86_64")?);
        Ok(())
    }

    /// The power cut. `collect` is called by somebody who has cut all that are to be cut: waiting takes time.
    pub fn cut(&mut self) -> Result<()> {
        self.qemu.as_mut().expect("it runs").kill().context("cannot kill qemu")
    }

    /// Waits until the process that was cut is gone: its disk is free then.
    pub fn collect(&mut self) -> Result<()> {
        if let Some(mut qemu) = self.qemu.take() {
            qemu.wait()?;
        }
        Ok(())
    }

    /// Fails if it has ended by itself.
    pub fn check(&self) -> Result<()> {
        let Some(qemu) = &self.qemu else { return Ok(()) };
        ensure!(!has_ended(qemu)?, "the machine of {} has ended by itself", self.name());
        Ok(())
    }
}

/// Whether a child has ended; it is left to be waited for.
pub fn has_ended(child: &Child) -> Result<bool> {
    use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
    let pid = Pid::from_raw(child.id() as i32).context("a pid")?;
    let ended = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT)?;
    Ok(ended.is_some())
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(qemu) = &mut self.qemu {
            let _ = qemu.kill();
            let _ = qemu.wait();
        }
    }
}
