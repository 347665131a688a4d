//! Requests to the members: who leads is found by asking, a try that is not answered is repeated elsewhere.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::cluster::*;
use proto::convert::{BadMessage, status_to_refusal};
use proto::id::*;
use proto::pb;
use proto::pb::admin_client::AdminClient;
use proto::pb::control_client::ControlClient as ControlStub;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use uuid::Uuid;

/// The first wait between tries, doubled each time up to [`MAX_BACK_OFF`].
const MIN_BACK_OFF: Duration = Duration::from_millis(20);
const MAX_BACK_OFF: Duration = Duration::from_millis(500);
/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Largest message accepted: a view of a full cluster stays far below.
pub(super) const MAX_MESSAGE: usize = 64 << 20;

/// How to reach a cluster.
#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// `host:port` of members' control services; one that is up is enough.
    pub members: Vec<String>,
    /// How long one try at one member may take.
    pub try_timeout: Duration,
    /// How long a request is tried altogether.
    pub deadline: Duration,
}

impl ControlConfig {
    /// A second and a half for a try, fifteen for a request.
    pub fn new(members: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            members: members.into_iter().map(Into::into).collect(),
            try_timeout: Duration::from_millis(1500),
            deadline: Duration::from_secs(15),
        }
    }
}

/// Why a request has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The cluster's definite answer: it has not been and will not be carried out.
    #[error("{0}")]
    Refused(Refusal),
    /// No member answered definitely within the deadline.
    #[error("no definite answer from {tried} within {waited_ms} ms: {last}")]
    NoAnswer {
        /// The members' addresses.
        tried: String,
        /// For how long.
        waited_ms: u64,
        /// What the last try met.
        last: String,
        /// The request may have been carried out, or may still be: ask again under the same request id (R2).
        in_doubt: bool,
    },
    /// A member's answer makes no sense.
    #[error("bad answer from {member}: {bad}")]
    BadAnswer {
        /// Who sent it.
        member: String,
        /// What is wrong.
        bad: BadMessage,
    },
}

impl ControlError {
    /// The cluster's definite refusal, if it is one.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }
    /// Whether it is unknown what became of the request.
    pub fn in_doubt(&self) -> bool {
        matches!(self, Self::NoAnswer { in_doubt: true, .. } | Self::BadAnswer { .. })
    }
}

struct Known {
    /// Members' addresses; those given first, those learned from views after.
    addrs: Vec<String>,
    channels: BTreeMap<String, Channel>,
    leader: Option<String>,
    next: usize,
}

struct Inner {
    config: ControlConfig,
    known: Mutex<Known>,
    /// The highest revision seen in any answer.
    revision: AtomicU64,
}

/// A cheap handle to the cluster. Methods may be cancelled: the request may then still be carried out.
#[derive(Clone)]
pub struct ControlClient {
    inner: Arc<Inner>,
}

/// One try: what to do next.
enum Tried<T> {
    Answered(T),
    /// Nothing was carried out; ask this member, or any other.
    Elsewhere(Option<String>, String),
    /// It may have been carried out.
    Doubt(String),
}

impl ControlClient {
    /// A client of the cluster with these members. Connects when first used.
    ///
    /// # Panics
    /// When no member is given.
    pub fn new(config: ControlConfig) -> Self {
        assert!(!config.members.is_empty(), "a control client needs the address of a member");
        let known = Known {
            addrs: config.members.clone(),
            channels: BTreeMap::new(),
            leader: None,
            // Not everybody asks the first member first.
            next: Uuid::new_v4().as_bytes()[0] as usize,
        };
        Self { inner: Arc::new(Inner { config, known: Mutex::new(known), revision: AtomicU64::new(0) }) }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.inner.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn try_timeout(&self) -> Duration {
        self.inner.config.try_timeout
    }

    pub(super) fn deadline(&self) -> Duration {
        self.inner.config.deadline
    }

    pub(super) fn members(&self) -> Vec<String> {
        self.known().addrs.clone()
    }

    pub(super) fn saw_view(&self, view: &ClusterView) {
        self.saw(view.revision);
        let mut known = self.known();
        for member in &view.members {
            if !known.addrs.contains(&member.control_addr) {
                known.addrs.push(member.control_addr.clone());
            }
        }
    }

    fn saw(&self, revision: u64) {
        self.inner.revision.fetch_max(revision, Ordering::Relaxed);
    }

    pub(super) fn next_member(&self) -> String {
        let mut known = self.known();
        known.next = known.next.wrapping_add(1);
        let at = known.next % known.addrs.len();
        known.addrs[at].clone()
    }

    /// A channel to this member, made when first used; `Err` says what is wrong with the address.
    pub(super) fn channel(&self, addr: &str) -> Result<Channel, String> {
        let mut known = self.known();
        if let Some(channel) = known.channels.get(addr) {
            return Ok(channel.clone());
        }
        let channel = Endpoint::from_shared(format!("http://{addr}"))
            .map_err(|error| format!("{addr}: {error}"))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(2))
            .connect_lazy();
        known.channels.insert(addr.to_owned(), channel.clone());
        Ok(channel)
    }

    /// Tries `ask` at the leader, or at one member after the other, until a definite answer or the deadline.
    async fn ask<T, F>(&self, deadline: Duration, mut ask: impl FnMut(Channel) -> F) -> Result<T, ControlError>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let started = Instant::now();
        let mut back_off = MIN_BACK_OFF;
        let mut doubt = false;
        let mut redirects = 0;
        let mut failed = String::new();
        loop {
            let leader = self.known().leader.clone();
            let mut addr = leader.unwrap_or_else(|| self.next_member());
            if addr == failed {
                // A member that was stopped takes a whole try to find out: not twice in a row.
                addr = self.next_member();
            }
            let left = deadline.saturating_sub(started.elapsed());
            let last = match self.try_once(&addr, left, &mut ask).await {
                Ok(Tried::Answered(answer)) => {
                    self.known().leader = Some(addr);
                    return Ok(answer);
                }
                Err(refusal) => return Err(ControlError::Refused(refusal)),
                Ok(Tried::Elsewhere(hint, why)) => {
                    let led_on = hint.is_some() && hint.as_ref() != Some(&addr) && redirects < 3;
                    self.known().leader = hint.filter(|hint| *hint != addr);
                    if led_on {
                        redirects += 1;
                        continue;
                    }
                    why
                }
                Ok(Tried::Doubt(why)) => {
                    doubt = true;
                    failed.clone_from(&addr);
                    self.known().leader = None;
                    why
                }
            };
            redirects = 0;
            if started.elapsed() + back_off >= deadline {
                return Err(ControlError::NoAnswer {
                    tried: self.known().addrs.join(", "),
                    waited_ms: started.elapsed().as_millis() as u64,
                    last: format!("{addr}: {last}"),
                    in_doubt: doubt,
                });
            }
            tokio::time::sleep(back_off).await;
            back_off = (back_off * 2).min(MAX_BACK_OFF);
        }
    }

    async fn try_once<T, F>(
        &self,
        addr: &str,
        patience: Duration,
        ask: &mut impl FnMut(Channel) -> F,
    ) -> Result<Tried<T>, Refusal>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let channel = match self.channel(addr) {
            Ok(channel) => channel,
            Err(why) => return Ok(Tried::Elsewhere(None, why)),
        };
        match tokio::time::timeout(patience.min(self.inner.config.try_timeout), ask(channel)).await {
            Err(_) => Ok(Tried::Doubt("no answer in time".into())),
            Ok(Ok(answer)) => Ok(Tried::Answered(answer.into_inner())),
            Ok(Err(status)) => match status_to_refusal(&status) {
                Some(Refusal::NotLeader { leader }) => {
                    Ok(Tried::Elsewhere(leader.map(|(_, addr)| addr), "does not lead and knows no leader".into()))
                }
                // The leader asked may know no quorum and yet have put the request into its log.
                Some(refusal @ (Refusal::Unavailable { .. } | Refusal::Rejudge { .. })) => {
                    Ok(Tried::Doubt(refusal.to_string()))
                }
                Some(refusal) => Err(refusal),
                None => Ok(Tried::Doubt(transport_error(&status))),
            },
        }
    }

    /// A new request id, to be kept over every try of one request. Asks a member for its revision where none has
    /// been seen yet.
    ///
    /// # Errors
    /// When no member answers.
    pub async fn new_request(&self) -> Result<RequestId, ControlError> {
        if self.inner.revision.load(Ordering::Relaxed) == 0 {
            let answer = self
                .ask(self.inner.config.deadline, |channel| async move {
                    AdminClient::new(channel).identify(pb::IdentifyRequest {}).await
                })
                .await?;
            self.saw(answer.revision);
            let leader = (!answer.leader_addr.is_empty()).then_some(answer.leader_addr);
            self.known().leader = leader;
        }
        Ok(RequestId { id: Uuid::new_v4(), since: self.inner.revision.load(Ordering::Relaxed) })
    }

    fn checked<T, P>(&self, from: P) -> Result<T, ControlError>
    where
        T: TryFrom<P, Error = BadMessage>,
    {
        T::try_from(from).map_err(|bad| self.bad(bad))
    }

    fn bad(&self, bad: BadMessage) -> ControlError {
        ControlError::BadAnswer { member: self.known().leader.clone().unwrap_or_default(), bad }
    }

    fn done(&self, done: pb::Done) -> u64 {
        self.saw(done.revision);
        done.revision
    }

    // ---- gateways ----

    /// Makes this gateway known, or updates its addresses. Repeated safely. Returns the revision.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn register_gateway(&self, gateway: GatewayInfo) -> Result<u64, ControlError> {
        let request = self.new_request().await?;
        let message = pb::RegisterGatewayRequest { request: Some(request.into()), gateway: Some(gateway.into()) };
        let deadline = self.inner.config.deadline;
        let done = self.ask(deadline, |c| {
            let message = message.clone();
            async move { ControlStub::new(c).register_gateway(message).await }
        });
        Ok(self.done(done.await?))
    }

    /// Opens the volume for this gateway under a new epoch (R1).
    ///
    /// # Errors
    /// [`Refusal::InUse`] while another gateway's lease may live and `take_over` is not set;
    /// [`Refusal::WrongState`] unless the volume is ready; otherwise see [`ControlError`].
    pub async fn open_session(
        &self,
        request: RequestId,
        volume: VolumeId,
        gateway: &str,
        take_over: bool,
    ) -> Result<OpenedSession, ControlError> {
        let message = pb::OpenSessionRequest {
            request: Some(request.into()),
            volume: volume.into(),
            gateway: gateway.into(),
            take_over,
        };
        let answer = self
            .ask(self.inner.config.deadline, |c| {
                let message = message.clone();
                async move { ControlStub::new(c).open_session(message).await }
            })
            .await?;
        self.saw(answer.revision);
        self.checked(answer)
    }

    /// Gives the session up. Promises that nothing is sent to a replica or initiator under it any more; `clean`
    /// also that everything is flushed and no region is dirty. Returns the revision.
    ///
    /// # Errors
    /// [`Refusal::Superseded`] when `epoch` is not the open session's; otherwise see [`ControlError`].
    pub async fn close_session(
        &self,
        request: RequestId,
        volume: VolumeId,
        epoch: Epoch,
        clean: bool,
    ) -> Result<u64, ControlError> {
        let message =
            pb::CloseSessionRequest { request: Some(request.into()), volume: volume.into(), epoch: epoch.0, clean };
        let done = self.ask(self.inner.config.deadline, |c| {
            let message = message.clone();
            async move { ControlStub::new(c).close_session(message).await }
        });
        Ok(self.done(done.await?))
    }

    /// Renews the leases of all of this gateway's sessions at once (R3), and tells the leader that it lives; also
    /// with no session. A granted lease lives `lease_ms` from *before this call*: read the boot-time clock first.
    /// Tried until `deadline`; an error says nothing about the sessions.
    ///
    /// # Errors
    /// See [`ControlError`]; refused sessions are results, not errors.
    pub async fn renew_leases(
        &self,
        gateway: &str,
        sessions: Vec<SessionRenewal>,
        deadline: Duration,
    ) -> Result<Renewals, ControlError> {
        let message =
            pb::RenewLeaseRequest { gateway: gateway.into(), sessions: sessions.into_iter().map(Into::into).collect() };
        let answer = self
            .ask(deadline, |c| {
                let message = message.clone();
                async move { ControlStub::new(c).renew_lease(message).await }
            })
            .await?;
        self.saw(answer.revision);
        self.checked(answer)
    }

    /// Changes a mirror's in-sync set from version `expected` to `members` (sorted here) (R2). While the error is
    /// [`ControlError::in_doubt`], call again with the same `request`: it is carried out at most once.
    ///
    /// # Errors
    /// [`Refusal::Superseded`] and [`Refusal::SetChanged`] with what is current; otherwise see [`ControlError`].
    pub async fn change_set(
        &self,
        request: RequestId,
        volume: VolumeId,
        mirror: MirrorId,
        epoch: Epoch,
        expected: SetVersion,
        mut members: Vec<ReplicaId>,
        mut awaited: Vec<ReplicaId>,
    ) -> Result<InSyncSet, ControlError> {
        members.sort_unstable();
        awaited.sort_unstable();
        let message = pb::ChangeSetRequest {
            request: Some(request.into()),
            volume: volume.into(),
            mirror: mirror.into(),
            epoch: epoch.0,
            expected: expected.0,
            members: members.into_iter().map(Into::into).collect(),
            awaited: awaited.into_iter().map(Into::into).collect(),
        };
        let answer = self
            .ask(self.inner.config.deadline, |c| {
                let message = message.clone();
                async move { ControlStub::new(c).change_set(message).await }
            })
            .await?;
        self.saw(answer.revision);
        let current =
            answer.current.ok_or_else(|| self.bad(BadMessage { field: "current set", why: "is missing".into() }))?;
        self.checked(current)
    }

    /// Says that the forced recovery asked for has been carried out by this session (R8).
    ///
    /// # Errors
    /// [`Refusal::Superseded`]; otherwise see [`ControlError`].
    pub async fn finish_recovery(
        &self,
        request: RequestId,
        volume: VolumeId,
        epoch: Epoch,
    ) -> Result<u64, ControlError> {
        let message =
            pb::FinishRecoveryRequest { request: Some(request.into()), volume: volume.into(), epoch: epoch.0 };
        let done = self.ask(self.inner.config.deadline, |c| {
            let message = message.clone();
            async move { ControlStub::new(c).finish_recovery(message).await }
        });
        Ok(self.done(done.await?))
    }

    // ---- administration ----

    /// The cluster's state, confirmed by a quorum. With `allow_stale`, where no quorum answers within the
    /// deadline, what one member last knew, with `stale` set.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn status(&self, allow_stale: bool) -> Result<ClusterStatus, ControlError> {
        let fresh = self
            .ask(self.inner.config.deadline, |c| async move {
                let mut admin = AdminClient::new(c).max_decoding_message_size(MAX_MESSAGE);
                admin.status(pb::StatusRequest { stale: false }).await
            })
            .await;
        let error = match fresh {
            Ok(status) => return self.status_checked(status),
            Err(error @ ControlError::NoAnswer { .. }) if allow_stale => error,
            Err(error) => return Err(error),
        };
        let addrs = self.known().addrs.clone();
        let mut newest: Option<ClusterStatus> = None;
        for addr in addrs {
            let mut ask = |c| async move {
                let mut admin = AdminClient::new(c).max_decoding_message_size(MAX_MESSAGE);
                admin.status(pb::StatusRequest { stale: true }).await
            };
            if let Ok(Tried::Answered(status)) = self.try_once(&addr, self.inner.config.try_timeout, &mut ask).await {
                let status = self.status_checked(status)?;
                if newest.as_ref().is_none_or(|best| status.applied > best.applied) {
                    newest = Some(status);
                }
            }
        }
        newest.ok_or(error)
    }

    fn status_checked(&self, status: pb::ClusterStatus) -> Result<ClusterStatus, ControlError> {
        let status: ClusterStatus = self.checked(status)?;
        self.saw_view(&status.view);
        Ok(status)
    }

    /// The volume of this name, read through a quorum.
    ///
    /// # Errors
    /// [`Refusal::NotFound`]; otherwise see [`ControlError`].
    pub async fn volume_named(&self, name: &str) -> Result<VolumeInfo, ControlError> {
        let status = self.status(false).await?;
        let volume = status.view.volume_named(name).cloned();
        volume.ok_or_else(|| ControlError::Refused(Refusal::not_found(ObjectKind::Volume, name)))
    }

    /// Creates a volume; its nodes then make its replicas: see [`Self::wait_volume_ready`].
    ///
    /// # Errors
    /// Refusals that name what is wrong; otherwise see [`ControlError`].
    pub async fn create_volume(&self, spec: VolumeSpec) -> Result<VolumeInfo, ControlError> {
        let request = self.new_request().await?;
        let message = pb::CreateVolumeRequest {
            request: Some(request.into()),
            name: spec.name,
            size: spec.size,
            replicas: spec.replicas,
            stripes: spec.stripes,
            chunk_size: spec.chunk_size,
            min_in_sync: spec.min_in_sync,
            write_cache: spec.write_cache,
            export: spec.export.unwrap_or_default(),
        };
        let reply = self
            .ask(self.inner.config.deadline, |c| {
                let message = message.clone();
                async move { AdminClient::new(c).create_volume(message).await }
            })
            .await?;
        self.volume_reply(reply)
    }

    fn volume_reply(&self, reply: pb::VolumeReply) -> Result<VolumeInfo, ControlError> {
        self.saw(reply.revision);
        let volume = reply.volume.ok_or_else(|| self.bad(BadMessage { field: "volume", why: "is missing".into() }))?;
        self.checked(volume)
    }

    /// Waits until every replica of the volume has been created, and returns it; also once a node has said why it
    /// could not create one (then `state` is still [`VolumeState::Creating`] and the replica's `failure` tells).
    ///
    /// # Errors
    /// [`Refusal::NotFound`] when the volume is gone; [`ControlError::NoAnswer`] when `patience` is over.
    pub async fn wait_volume_ready(&self, volume: VolumeId, patience: Duration) -> Result<VolumeInfo, ControlError> {
        let settled = |volume: &VolumeInfo| {
            let mut replicas = volume.mirrors.iter().flat_map(|mirror| &mirror.replicas);
            volume.state != VolumeState::Creating || replicas.any(|replica| replica.failure.is_some())
        };
        let waited = tokio::time::timeout(patience, async {
            // A member that lags may not know the volume yet: only a quorum read tells that it is gone.
            self.status(false).await?;
            let least = self.inner.revision.load(Ordering::Relaxed);
            let mut views = self.watch().await?;
            loop {
                let view = views.borrow_and_update().clone();
                match view.volume(volume) {
                    Some(found) if settled(found) => return Ok(found.clone()),
                    None if view.revision >= least => {
                        return Err(ControlError::Refused(Refusal::not_found(ObjectKind::Volume, volume)));
                    }
                    _ => views.changed().await,
                }
            }
        });
        waited.await.unwrap_or_else(|_| {
            Err(ControlError::NoAnswer {
                tried: self.known().addrs.join(", "),
                waited_ms: patience.as_millis() as u64,
                last: "the volume is still being created".into(),
                in_doubt: false,
            })
        })
    }

    /// Deletes a volume that nobody has open. Its name is free at once; nodes that are down delete their replicas
    /// when they return. Returns the revision.
    ///
    /// # Errors
    /// [`Refusal::InUse`] while a session is open; otherwise see [`ControlError`].
    pub async fn delete_volume(&self, volume: VolumeId) -> Result<u64, ControlError> {
        let request = self.new_request().await?;
        let message = pb::DeleteVolumeRequest { request: Some(request.into()), volume: volume.into() };
        let done = self.ask(self.inner.config.deadline, |c| {
            let message = message.clone();
            async move { AdminClient::new(c).delete_volume(message).await }
        });
        Ok(self.done(done.await?))
    }

    /// Sets the gateway that is to serve the volume; `None`: none.
    ///
    /// # Errors
    /// [`Refusal::NotFound`]; otherwise see [`ControlError`].
    pub async fn export_volume(&self, volume: VolumeId, gateway: Option<&str>) -> Result<VolumeInfo, ControlError> {
        let request = self.new_request().await?;
        let message = pb::ExportVolumeRequest {
            request: Some(request.into()),
            volume: volume.into(),
            gateway: gateway.unwrap_or_default().into(),
        };
        let reply = self
            .ask(self.inner.config.deadline, |c| {
                let message = message.clone();
                async move { AdminClient::new(c).export_volume(message).await }
            })
            .await?;
        self.volume_reply(reply)
    }

    /// Asks the volume's owner, or its next one, to go on without replicas that cannot be reached (R8).
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn recover_volume(&self, volume: VolumeId) -> Result<VolumeInfo, ControlError> {
        let request = self.new_request().await?;
        let message = pb::RecoverVolumeRequest { request: Some(request.into()), volume: volume.into() };
        let reply = self
            .ask(self.inner.config.deadline, |c| {
                let message = message.clone();
                async move { AdminClient::new(c).recover_volume(message).await }
            })
            .await?;
        self.volume_reply(reply)
    }

    /// Sets how many bytes a second a resync of the volume compares at most; `None`: no limit. Takes effect at once.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn set_volume(&self, volume: VolumeId, resync_limit: Option<u64>) -> Result<VolumeInfo, ControlError> {
        let request = self.new_request().await?;
        let resync_limit = resync_limit.unwrap_or(0);
        let message = pb::SetVolumeRequest { request: Some(request.into()), volume: volume.into(), resync_limit };
        let reply = self
            .ask(self.inner.config.deadline, |c| {
                let message = message.clone();
                async move { AdminClient::new(c).set_volume(message).await }
            })
            .await?;
        self.volume_reply(reply)
    }

    /// Forms the cluster: gives every member its definition. Repeated safely with the same definition, also after
    /// it has reached some members only.
    ///
    /// # Errors
    /// The first member that refused or did not answer, by address; [`Refusal::OtherCluster`] where a member
    /// belongs to another cluster.
    pub async fn init(definition: &ClusterDefinition) -> Result<(), ControlError> {
        for member in &definition.members {
            let client = Self::new(ControlConfig::new([member.control_addr.clone()]));
            client
                .ask(client.inner.config.deadline, |c| {
                    let message = pb::InitRequest { definition: Some(definition.clone().into()) };
                    async move { AdminClient::new(c).init(message).await }
                })
                .await?;
        }
        Ok(())
    }

    /// The cluster that the member at this address belongs to; `None`: to none yet.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn cluster_of(addr: &str) -> Result<Option<ClusterId>, ControlError> {
        let client = Self::new(ControlConfig::new([addr]));
        let answer = client
            .ask(
                client.inner.config.deadline,
                |c| async move { AdminClient::new(c).identify(pb::IdentifyRequest {}).await },
            )
            .await?;
        if answer.cluster.is_empty() {
            return Ok(None);
        }
        proto::convert::cluster_id("cluster id", &answer.cluster).map(Some).map_err(|bad| client.bad(bad))
    }
}

/// What the transport met, with its cause: tonic's own text says "transport error" only.
fn transport_error(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
