//! An iSCSI target whose one volume is in memory: to try initiators against the target alone.
//!
//! `cargo run -p client --example memory_target -- --listen 127.0.0.1:3261 --size 1GiB`

use std::net::SocketAddr;
use std::rc::Rc;

use client::iscsi::server::{Portal, Registry};
use client::iscsi::target::Target;
use client::iscsi::{PORTAL_GROUP_TAG, iqn};
use tokio::sync::mpsc;

#[path = "../tests/memory/mod.rs"]
#[expect(dead_code, reason = "what only tests need of it")]
mod memory;

fn main() -> anyhow::Result<()> {
    tracing_target();
    let (mut listen, mut size) = ("127.0.0.1:3261".parse::<SocketAddr>()?, 1_u64 << 30);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let value = args.next().ok_or_else(|| anyhow::anyhow!("{arg} needs a value"))?;
        match arg.as_str() {
            "--listen" => listen = value.parse()?,
            "--size" => size = parse_size(&value)?,
            _ => anyhow::bail!("unknown option {arg}"),
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let device = memory::Memory::new("memory", size);
        let target = Target::new(iqn("memory"), device);
        let registry = Registry::new(PORTAL_GROUP_TAG);
        let (sender, mut logins) = mpsc::unbounded_channel();
        registry.add(target.iqn(), sender);
        let portal = Portal::bind(listen, registry)?;
        println!("iscsi://{}/{}/0", portal.local_addr()?, target.iqn());
        let accept = {
            let target = Rc::clone(&target);
            async move {
                while let Some(login) = logins.recv().await {
                    tokio::task::spawn_local(Rc::clone(&target).serve(login));
                }
            }
        };
        tokio::select! {
            () = portal.run(std::future::pending()) => {}
            () = accept => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        target.close(std::time::Duration::from_secs(2)).await;
        Ok(())
    })
}

fn parse_size(text: &str) -> anyhow::Result<u64> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let shift = match unit {
        "" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => anyhow::bail!("unknown unit {unit}"),
    };
    let size = number.parse::<u64>()? << shift;
    anyhow::ensure!(size > 0 && size.is_multiple_of(4096), "the size must be a multiple of 4096");
    Ok(size)
}

/// Log lines on standard error, without a dependency for it.
fn tracing_target() {
    use tracing::field::{Field, Visit};
    struct Stderr;
    struct Line(String);
    impl Visit for Line {
        fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
            use std::fmt::Write;
            let _ = write!(self.0, " {}={value:?}", field.name());
        }
    }
    impl tracing::Subscriber for Stderr {
        fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
            *metadata.level() <= tracing::Level::INFO && metadata.target().starts_with("client")
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, event: &tracing::Event<'_>) {
            let mut line = Line(event.metadata().level().to_string());
            event.record(&mut line);
            eprintln!("{}", line.0);
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }
    let _ = tracing::subscriber::set_global_default(Stderr);
}
