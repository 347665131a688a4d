//! The threads that volumes live on. A volume's links, its core and its initiators' connections share one, so
//! that a request crosses no thread between the initiator's socket and the replicas'.

use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;

use crate::iscsi::server::LoggedIn;
use crate::iscsi::target::Target;
use crate::volume::{Volume, VolumeCommand, VolumeConfig, VolumeEvent};

/// How long initiators' commands that have begun are waited for when a volume closes.
const TARGET_PATIENCE: Duration = Duration::from_secs(5);

/// A volume to be opened on a thread.
pub(super) struct Open {
    pub config: VolumeConfig,
    pub iqn: String,
    pub events: mpsc::UnboundedSender<VolumeEvent>,
    pub commands: mpsc::UnboundedReceiver<VolumeCommand>,
    pub logins: mpsc::UnboundedReceiver<LoggedIn>,
    /// Ends the target's sessions in good order, then closes the volume.
    pub close: oneshot::Receiver<()>,
    pub commander: mpsc::UnboundedSender<VolumeCommand>,
}

/// The threads, ended when this is dropped.
pub(super) struct Threads {
    senders: Vec<mpsc::UnboundedSender<Open>>,
    next: AtomicUsize,
}

impl Threads {
    pub(super) fn start(threads: Option<usize>) -> io::Result<Self> {
        let available = thread::available_parallelism().map_or(1, usize::from);
        let count = threads.unwrap_or(available.min(4)).max(1);
        let senders = (0..count)
            .map(|i| {
                let (sender, mut opens) = mpsc::unbounded_channel::<Open>();
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                thread::Builder::new().name(format!("volumes-{i}")).spawn(move || {
                    let local = LocalSet::new();
                    runtime.block_on(local.run_until(async move {
                        while let Some(open) = opens.recv().await {
                            tokio::task::spawn_local(serve(open));
                        }
                    }));
                })?;
                Ok(sender)
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { senders, next: AtomicUsize::new(0) })
    }

    /// Opens a volume on the thread whose turn it is.
    pub(super) fn open(&self, open: Open) {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.senders.len();
        assert!(self.senders[turn].send(open).is_ok(), "volume threads run as long as the gateway");
    }
}

async fn serve(open: Open) {
    let Open { config, iqn, events, commands, mut logins, mut close, commander } = open;
    let volume = Volume::new(config, events);
    let target = Target::new(iqn, volume.clone());
    let mut running = tokio::task::spawn_local(Rc::clone(&volume).run(commands));
    let mut closing = false;
    loop {
        tokio::select! {
            _ = &mut running => return,
            Some(login) = logins.recv() => {
                tokio::task::spawn_local(target.clone().serve(login));
            }
            _ = &mut close, if !closing => {
                closing = true;
                let (target, commander) = (target.clone(), commander.clone());
                tokio::task::spawn_local(async move {
                    target.close(TARGET_PATIENCE).await;
                    let _ = commander.send(VolumeCommand::Close);
                });
            }
        }
    }
}
