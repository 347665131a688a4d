//! Follows the metadata: one task holds a stream to one member and goes to the next when it ends, falls silent,
//! or says that it may be stale.

use std::sync::Arc;
use std::time::Duration;

use proto::cluster::ClusterView;
use proto::pb;
use proto::pb::control_client::ControlClient as ControlStub;
use tokio::sync::watch;

use super::client::MAX_MESSAGE;
use super::{ControlClient, ControlError};

/// Between one member that cannot be followed and the next.
const NEXT_MEMBER_AFTER: Duration = Duration::from_millis(200);

/// The newest view. Revisions never go back, whichever member sends them.
#[derive(Clone)]
pub struct ViewReceiver(watch::Receiver<Option<Arc<ClusterView>>>);

impl ViewReceiver {
    /// The newest view, marked as seen.
    pub fn borrow_and_update(&mut self) -> Arc<ClusterView> {
        self.0.borrow_and_update().clone().expect("handed out with a first view")
    }
    /// The newest view.
    pub fn borrow(&self) -> Arc<ClusterView> {
        self.0.borrow().clone().expect("handed out with a first view")
    }
    /// Waits for a view that was not seen yet. Cancellation safe.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            // The task lives as long as a receiver does, unless the runtime ends.
            std::future::pending::<()>().await;
        }
    }
}

impl ControlClient {
    /// Follows the metadata from now on. Returns once the first view is here.
    ///
    /// # Errors
    /// [`ControlError::NoAnswer`] when no member sends one within the client's deadline.
    pub async fn watch(&self) -> Result<ViewReceiver, ControlError> {
        // Finds a member that answers, or says why none does.
        self.new_request().await?;
        let (sender, mut receiver) = watch::channel(None);
        tokio::spawn(follow(self.clone(), sender));
        let deadline = self.deadline();
        let came = tokio::time::timeout(deadline, receiver.wait_for(Option::is_some)).await.is_ok();
        if !came {
            return Err(ControlError::NoAnswer {
                tried: self.members().join(", "),
                waited_ms: deadline.as_millis() as u64,
                last: "no member sends the metadata".into(),
                in_doubt: false,
            });
        }
        Ok(ViewReceiver(receiver))
    }
}

async fn follow(client: ControlClient, sender: watch::Sender<Option<Arc<ClusterView>>>) {
    loop {
        let addr = client.next_member();
        tokio::select! {
            () = sender.closed() => return,
            result = follow_one(&client, &addr, &sender) => {
                if let Err(why) = result {
                    tracing::debug!(member = %addr, %why, "following the metadata elsewhere");
                }
            }
        }
        tokio::select! {
            () = sender.closed() => return,
            () = tokio::time::sleep(NEXT_MEMBER_AFTER) => {}
        }
    }
}

async fn follow_one(
    client: &ControlClient,
    addr: &str,
    sender: &watch::Sender<Option<Arc<ClusterView>>>,
) -> Result<(), String> {
    let channel = client.channel(addr)?;
    let mut control = ControlStub::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let stream = tokio::time::timeout(client.try_timeout(), control.watch(pb::WatchRequest {})).await;
    let mut stream = stream.map_err(|_| "no answer")?.map_err(|status| status.to_string())?.into_inner();
    while let Some(view) = stream.message().await.map_err(|status| status.to_string())? {
        let view = ClusterView::try_from(view).map_err(|bad| bad.to_string())?;
        client.saw_view(&view);
        let stale = view.stale;
        sender.send_if_modified(|newest| {
            let newer = newest.as_ref().is_none_or(|old| {
                view.revision > old.revision || (view.revision == old.revision && view.stale != old.stale)
            });
            if newer {
                *newest = Some(Arc::new(view));
            }
            newer
        });
        if stale {
            return Err("knows no leader".into());
        }
    }
    Ok(())
}
