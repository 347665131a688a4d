//! gRPC, answered from the core. Messages are checked here and refusals become statuses here.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};

use proto::cluster::*;
use proto::convert::{self, BadMessage, refusal_to_status};
use proto::id::*;
use proto::pb;
use proto::pb::admin_server::Admin;
use proto::pb::control_server::Control;
use proto::pb::raft_server::Raft;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request as Rpc, Response, Status, Streaming};

use super::config::NodeConfig;
use super::core::{Reply, Request};
use crate::metadata::Command;
use crate::raft::driver::ControlHandle;
use crate::raft::transport;

/// Sessions in one renewal; more are refused.
const MAX_RENEWALS: usize = crate::metadata::state::MAX_VOLUMES;
/// Views that wait for one watcher; it gets the newest after them.
const WATCH_QUEUE: usize = 1;

type Answer<T> = Result<Response<T>, Status>;

/// Asks for the cluster to be formed by this definition, and is told what came of it.
pub type InitRequest = (ClusterDefinition, oneshot::Sender<Result<(), Refusal>>);

/// The services of one member. They answer before its cluster is formed, too.
#[derive(Clone)]
pub struct Services {
    config: Arc<NodeConfig>,
    /// Set once the member has its cluster.
    formed: Arc<OnceLock<(ClusterId, ControlHandle)>>,
    init: mpsc::Sender<InitRequest>,
}

impl Services {
    /// Services of a member that may have no cluster yet; `init` gets definitions.
    pub fn new(config: Arc<NodeConfig>, init: mpsc::Sender<InitRequest>) -> Self {
        Self { config, formed: Arc::default(), init }
    }

    /// The member has its cluster.
    pub fn formed(&self, cluster: ClusterId, handle: ControlHandle) {
        let _ = self.formed.set((cluster, handle));
    }

    fn handle(&self) -> Result<&ControlHandle, Status> {
        Ok(&self.of_cluster()?.1)
    }

    fn of_cluster(&self) -> Result<&(ClusterId, ControlHandle), Status> {
        let why = "this member has no cluster yet: form one with `cluster init`";
        self.formed.get().ok_or_else(|| refusal_to_status(Refusal::unavailable(why)))
    }

    async fn ask(&self, request: Request) -> Result<Reply, Status> {
        self.handle()?.ask(request).await.map_err(refusal_to_status)
    }

    async fn done(&self, request: RequestId, command: Command) -> Answer<pb::Done> {
        match self.ask(Request::Lead(request, command)).await? {
            Reply::Done(revision) => Ok(Response::new(pb::Done { revision })),
            other => Err(unexpected(&other)),
        }
    }

    async fn volume(&self, request: Request) -> Answer<pb::VolumeReply> {
        match self.ask(request).await? {
            Reply::Volume(volume, revision) => {
                Ok(Response::new(pb::VolumeReply { volume: Some(volume.into()), revision }))
            }
            other => Err(unexpected(&other)),
        }
    }
}

/// A request id that was used for two different requests.
fn unexpected(reply: &Reply) -> Status {
    tracing::warn!(?reply, "a request id was used twice");
    refusal_to_status(Refusal::invalid("request id", "was used for another request before"))
}

fn bad(bad: BadMessage) -> Status {
    refusal_to_status(bad.into())
}

fn filled(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn unix_ms() -> u64 {
    crate::raft::driver::now().unix_ms
}

#[tonic::async_trait]
impl Raft for Services {
    async fn messages(&self, rpc: Rpc<Streaming<pb::RaftBatch>>) -> Answer<pb::RaftStreamEnd> {
        let (cluster, handle) = self.of_cluster()?;
        let mut batches = rpc.into_inner();
        while let Some(batch) = batches.message().await? {
            match transport::decode(*cluster, self.config.id, &batch) {
                Ok(messages) => {
                    if !handle.messages(messages).await {
                        return Ok(Response::new(pb::RaftStreamEnd {}));
                    }
                }
                Err(why) => {
                    tracing::warn!(member = %self.config.name, from = batch.from, %why, "raft stream refused");
                    return Err(Status::failed_precondition(why));
                }
            }
        }
        Ok(Response::new(pb::RaftStreamEnd {}))
    }
}

#[tonic::async_trait]
impl Control for Services {
    async fn register_gateway(&self, rpc: Rpc<pb::RegisterGatewayRequest>) -> Answer<pb::Done> {
        let message = rpc.into_inner();
        let request = RequestId::try_from(message.request).map_err(bad)?;
        let gateway = message.gateway.ok_or_else(|| refusal_to_status(Refusal::invalid("gateway", "is missing")))?;
        self.done(request, Command::RegisterGateway { gateway: gateway.try_into().map_err(bad)? }).await
    }

    async fn open_session(&self, rpc: Rpc<pb::OpenSessionRequest>) -> Answer<pb::OpenSessionReply> {
        let message = rpc.into_inner();
        let open = Request::Open {
            request: message.request.try_into().map_err(bad)?,
            volume: convert::volume_id("volume", &message.volume).map_err(bad)?,
            gateway: message.gateway,
            take_over: message.take_over,
        };
        match self.ask(open).await? {
            Reply::Opened(opened) => Ok(Response::new(opened.into())),
            other => Err(unexpected(&other)),
        }
    }

    async fn close_session(&self, rpc: Rpc<pb::CloseSessionRequest>) -> Answer<pb::Done> {
        let message = rpc.into_inner();
        let volume = convert::volume_id("volume", &message.volume).map_err(bad)?;
        let command = Command::CloseSession { volume, epoch: Epoch(message.epoch), clean: message.clean };
        self.done(message.request.try_into().map_err(bad)?, command).await
    }

    async fn renew_lease(&self, rpc: Rpc<pb::RenewLeaseRequest>) -> Answer<pb::RenewLeaseReply> {
        let message = rpc.into_inner();
        if message.sessions.len() > MAX_RENEWALS {
            let why = format!("{} of them, at most {MAX_RENEWALS} are allowed", message.sessions.len());
            return Err(refusal_to_status(Refusal::invalid("sessions", why)));
        }
        let sessions = message.sessions.into_iter().map(SessionRenewal::try_from).collect::<Result<_, _>>();
        let renew = Request::Renew { gateway: message.gateway, sessions: sessions.map_err(bad)? };
        match self.ask(renew).await? {
            Reply::Renewed(renewals) => Ok(Response::new(renewals.into())),
            other => Err(unexpected(&other)),
        }
    }

    async fn change_set(&self, rpc: Rpc<pb::ChangeSetRequest>) -> Answer<pb::ChangeSetReply> {
        let message = rpc.into_inner();
        let read =
            |ids: &[Vec<u8>]| ids.iter().map(|id| convert::replica_id("member", id)).collect::<Result<Vec<_>, _>>();
        let command = Command::ChangeSet {
            volume: convert::volume_id("volume", &message.volume).map_err(bad)?,
            mirror: convert::mirror_id("mirror", &message.mirror).map_err(bad)?,
            epoch: Epoch(message.epoch),
            expected: SetVersion(message.expected),
            members: read(&message.members).map_err(bad)?,
            awaited: read(&message.awaited).map_err(bad)?,
        };
        match self.ask(Request::Lead(message.request.try_into().map_err(bad)?, command)).await? {
            Reply::Set(current, revision) => {
                Ok(Response::new(pb::ChangeSetReply { current: Some(current.into()), revision }))
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn finish_recovery(&self, rpc: Rpc<pb::FinishRecoveryRequest>) -> Answer<pb::Done> {
        let message = rpc.into_inner();
        let volume = convert::volume_id("volume", &message.volume).map_err(bad)?;
        let command = Command::FinishRecovery { volume, epoch: Epoch(message.epoch) };
        self.done(message.request.try_into().map_err(bad)?, command).await
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<pb::ClusterView, Status>> + Send>>;

    async fn watch(&self, _: Rpc<pb::WatchRequest>) -> Answer<Self::WatchStream> {
        let mut shown = self.handle()?.shown();
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        tokio::spawn(async move {
            loop {
                let view = shown.borrow_and_update().view.clone();
                // Before the first command there is nothing to show.
                if view.revision > 0 && sender.send(Ok((*view).clone().into())).await.is_err() {
                    return;
                }
                tokio::select! {
                    changed = shown.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

#[tonic::async_trait]
impl Admin for Services {
    async fn identify(&self, _: Rpc<pb::IdentifyRequest>) -> Answer<pb::IdentifyReply> {
        let mut reply =
            pb::IdentifyReply { node: self.config.id.0, name: self.config.name.clone(), ..Default::default() };
        reply.set_role(self.config.role.into());
        if let Some((cluster, handle)) = self.formed.get() {
            let shown = handle.shown();
            let shown = shown.borrow();
            reply.cluster = cluster.to_bytes().to_vec();
            reply.revision = shown.view.revision;
            (reply.leader, reply.leader_addr) =
                shown.leader.clone().map_or((0, String::new()), |(id, addr)| (id.0, addr));
        }
        Ok(Response::new(reply))
    }

    async fn init(&self, rpc: Rpc<pb::InitRequest>) -> Answer<pb::InitReply> {
        let missing = || refusal_to_status(Refusal::invalid("definition", "is missing"));
        let definition = rpc.into_inner().definition.ok_or_else(missing)?;
        let definition = ClusterDefinition::try_from(definition).map_err(bad)?;
        let down = |_| refusal_to_status(Refusal::unavailable("the member is shutting down"));
        if let Some((ours, _)) = self.formed.get() {
            return match *ours == definition.id {
                true => Ok(Response::new(pb::InitReply {})),
                false => Err(refusal_to_status(Refusal::OtherCluster { ours: *ours, theirs: definition.id })),
            };
        }
        let (sender, done) = oneshot::channel();
        self.init
            .send((definition, sender))
            .await
            .map_err(|error| error.0.1)
            .map_err(|_| refusal_to_status(Refusal::unavailable("the member is shutting down")))?;
        done.await.map_err(down)?.map_err(refusal_to_status)?;
        Ok(Response::new(pb::InitReply {}))
    }

    async fn status(&self, rpc: Rpc<pb::StatusRequest>) -> Answer<pb::ClusterStatus> {
        let request = if rpc.into_inner().stale { Request::StaleStatus } else { Request::Status };
        match self.ask(request).await? {
            Reply::Status(status) => Ok(Response::new((*status).into())),
            other => Err(unexpected(&other)),
        }
    }

    async fn create_volume(&self, rpc: Rpc<pb::CreateVolumeRequest>) -> Answer<pb::VolumeReply> {
        let message = rpc.into_inner();
        let request = RequestId::try_from(message.request).map_err(bad)?;
        let spec = VolumeSpec {
            name: message.name,
            size: message.size,
            replicas: message.replicas,
            stripes: message.stripes,
            chunk_size: message.chunk_size,
            min_in_sync: message.min_in_sync,
            write_cache: message.write_cache,
            export: filled(message.export),
        };
        self.volume(Request::Create(request, spec)).await
    }

    async fn delete_volume(&self, rpc: Rpc<pb::DeleteVolumeRequest>) -> Answer<pb::Done> {
        let message = rpc.into_inner();
        let volume = convert::volume_id("volume", &message.volume).map_err(bad)?;
        self.done(message.request.try_into().map_err(bad)?, Command::DeleteVolume { volume }).await
    }

    async fn export_volume(&self, rpc: Rpc<pb::ExportVolumeRequest>) -> Answer<pb::VolumeReply> {
        let message = rpc.into_inner();
        let volume = convert::volume_id("volume", &message.volume).map_err(bad)?;
        let command = Command::ExportVolume { volume, gateway: filled(message.gateway) };
        self.volume(Request::Lead(message.request.try_into().map_err(bad)?, command)).await
    }

    async fn set_volume(&self, rpc: Rpc<pb::SetVolumeRequest>) -> Answer<pb::VolumeReply> {
        let message = rpc.into_inner();
        let volume = convert::volume_id("volume", &message.volume).map_err(bad)?;
        let resync_limit = Some(message.resync_limit).filter(|limit| *limit > 0);
        let command = Command::SetVolume { volume, resync_limit };
        self.volume(Request::Lead(message.request.try_into().map_err(bad)?, command)).await
    }

    async fn recover_volume(&self, rpc: Rpc<pb::RecoverVolumeRequest>) -> Answer<pb::VolumeReply> {
        let message = rpc.into_inner();
        let volume = convert::volume_id("volume", &message.volume).map_err(bad)?;
        let command = Command::RecoverVolume { volume, unix_ms: unix_ms() };
        self.volume(Request::Lead(message.request.try_into().map_err(bad)?, command)).await
    }
}
