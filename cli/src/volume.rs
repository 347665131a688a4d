//! Volumes: create, look at, serve, delete, recover.

use std::net::ToSocketAddrs;
use std::path::Path;
use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};
use client::control::ControlError;
use client::iscsi::iqn;
use proto::cluster::*;
use proto::limits::{MAX_MIRRORS, MAX_REPLICAS};
use serde_json::json;
use tokio::time::Instant;

use crate::config::Cluster;
use crate::daemon::StopSignals;
use crate::failure::{Failure, Outcome};
use crate::status::Owner;
use crate::{gateway, node, render, size, status};

/// How long nodes may take to create a volume's replicas.
const CREATE_PATIENCE: Duration = Duration::from_secs(60);
/// A node that is down for so long while its replicas are waited for is not waited for any longer.
const DOWN_PATIENCE: Duration = Duration::from_secs(4);
/// How long a gateway may take to open or close a volume: a lease may have to end first.
const SESSION_PATIENCE: Duration = Duration::from_secs(40);
/// How long the owner may take to carry a forced recovery out.
const RECOVER_PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// `on` or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

/// `cluster create-volume`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Its name: letters, digits, '.', '_' and '-'
    name: String,
    /// Its size, like 75GiB: a multiple of 4KiB
    #[arg(long, value_parser = size::parse_blocks)]
    size: u64,
    /// Copies of everything, each on a node of its own
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=MAX_REPLICAS as i64))]
    replicas: u32,
    /// Mirrors in the stripe
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=MAX_MIRRORS as i64))]
    stripes: u32,
    /// Unit of the stripe: a power of two from 4KiB to 16MiB
    #[arg(long, default_value = "256KiB", value_parser = size::parse_chunk)]
    chunk_size: u32,
    /// A mirror with fewer copies in sync makes writes wait
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_REPLICAS as i64))]
    min_in_sync: u32,
    /// off: every write is durable before it is acknowledged
    #[arg(long, value_enum, default_value = "on")]
    write_cache: Switch,
    /// The gateway that is to serve it [default: one that is up and serves the fewest]
    #[arg(long, conflicts_with = "no_export")]
    gateway: Option<String>,
    /// Do not serve it yet
    #[arg(long, action = ArgAction::SetTrue)]
    no_export: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// `cluster list-volumes`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// `cluster show-volume`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// The volume
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// `cluster delete-volume`.
#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// The volume
    name: String,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// `cluster export-volume`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The volume
    name: String,
    /// The gateway that is to serve it [default: one that is up and serves the fewest]
    #[arg(long)]
    gateway: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// `cluster unexport-volume`.
#[derive(Debug, Args)]
pub struct UnexportArgs {
    /// The volume
    name: String,
}

/// `cluster set-volume`.
#[derive(Debug, Args)]
pub struct SetArgs {
    /// The volume
    name: String,
    /// What a resync of it compares in a second at most, like 100MiB, or `none`; it yields to other load by itself
    #[arg(long, value_parser = limit)]
    resync_limit: Limit,
}

/// A limit, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit(Option<u64>);

fn limit(text: &str) -> Result<Limit, size::BadSize> {
    if text == "none" { Ok(Limit(None)) } else { size::parse(text).map(|bytes| Limit(Some(bytes))) }
}

/// `cluster recover-volume`.
#[derive(Debug, Args)]
pub struct RecoverArgs {
    /// The volume
    name: String,
    /// Do it; without this it is only said what would be lost
    #[arg(long)]
    force: bool,
}

fn spec(args: &CreateArgs, export: Option<String>) -> VolumeSpec {
    VolumeSpec {
        name: args.name.clone(),
        size: args.size,
        replicas: args.replicas,
        stripes: args.stripes,
        chunk_size: args.chunk_size,
        min_in_sync: args.min_in_sync,
        write_cache: args.write_cache == Switch::On,
        export,
    }
}

/// `cluster create-volume`: returns once the volume is served.
///
/// # Errors
/// What the cluster refuses; nodes that do not create their replicas (then the volume is removed again); a gateway
/// that does not open it (then it stays).
pub async fn create(config: Option<&Path>, args: CreateArgs) -> Outcome {
    if args.min_in_sync > args.replicas {
        return Err(Failure::usage(format!(
            "--min-in-sync {} is more than --replicas {}",
            args.min_in_sync, args.replicas
        )));
    }
    proto::convert::check_name("name", &args.name).map_err(|bad| Failure::usage(bad.to_string()))?;
    let cluster = Cluster::find(config)?;
    let attempt = format!("creating volume {}", args.name);
    let before = cluster.status(false).await.map_err(|failure| failure.while_doing(&attempt))?;
    let export = match args.no_export {
        true => None,
        false => {
            Some(gateway::choose(&before, args.gateway.as_deref()).map_err(|failure| failure.while_doing(&attempt))?)
        }
    };
    make(&cluster, spec(&args, export.clone())).await?;
    let after = cluster.status(false).await?;
    let volume = find(&after, &args.name)?;
    if args.json {
        render::json(&status::volume_json(&after, volume));
        return Ok(());
    }
    let (mirrors, replicas) = (volume.stripes(), volume.replicas);
    let copies = if replicas == 1 { "replica" } else { "replicas" };
    render::line(format!(
        "volume {}: {}, {mirrors} mirrors of {replicas} {copies}",
        volume.name,
        size::show(volume.size)
    ));
    if export.is_some() {
        print_target(&after, volume);
    } else {
        eprintln!("not served yet: `cluster export-volume {}`", volume.name);
    }
    Ok(())
}

/// Creates a volume, waits until its replicas are there and, where it is exported, until it is served. What is half
/// made when nodes fail or a signal comes is removed again.
///
/// # Errors
/// As [`create`].
pub async fn make(cluster: &Cluster, spec: VolumeSpec) -> Outcome {
    let (name, export) = (spec.name.clone(), spec.export.clone());
    let attempt = format!("creating volume {name}");
    let mut stop = StopSignals::catch()?;
    let volume =
        cluster.control.create_volume(spec).await.map_err(|error: ControlError| Failure::control(&attempt, &error))?;
    let made = tokio::select! {
        made = wait_made(cluster, &volume) => made,
        signal = stop.next() => Err(Failure::new(format!("interrupted by {signal}"))),
    };
    if let Err(failure) = made {
        let removed = match cluster.control.delete_volume(volume.id).await {
            Ok(_) => "; what had been made of it is removed again".to_owned(),
            Err(error) => format!("; it could not be removed again ({error})"),
        };
        return Err(failure.while_doing(&attempt).and(&removed));
    }
    let Some(gateway) = &export else { return Ok(()) };
    tokio::select! {
        served = wait_served(cluster, &name, gateway) => served,
        signal = stop.next() => {
            Err(Failure::new(format!("volume {name} exists; interrupted by {signal} before it was served")))
        }
    }
}

fn print_target(status: &ClusterStatus, volume: &VolumeInfo) {
    let Some(gateway) = volume.export.as_ref().and_then(|name| status.view.gateway(name)) else { return };
    let iqn = iqn(&volume.name);
    render::line(format!("IQN     {iqn}"));
    render::line(format!("portal  {}", gateway.portal));
    render::line(format!("URL     {}", url(&gateway.portal, &volume.name)));
}

/// How libiscsi and qemu name a volume's LUN 0.
pub fn url(portal: &str, volume: &str) -> String {
    format!("iscsi://{portal}/{}/0", iqn(volume))
}

fn find<'a>(status: &'a ClusterStatus, name: &str) -> Outcome<&'a VolumeInfo> {
    status.view.volume_named(name).ok_or_else(|| {
        Failure::new(format!("there is no volume {name}")).next("`cluster list-volumes` shows what exists")
    })
}

/// Waits until every replica has been created.
async fn wait_made(cluster: &Cluster, volume: &VolumeInfo) -> Outcome {
    let started = Instant::now();
    let mut progress = render::Progress::new(format!("volume {}:", volume.name));
    let mut only_down_since: Option<Instant> = None;
    loop {
        let status = cluster.status(false).await?;
        let Some(volume) = status.view.volume(volume.id) else {
            return Err(Failure::new("somebody deleted it meanwhile"));
        };
        if volume.state != VolumeState::Creating {
            return Ok(());
        }
        let replicas = || volume.mirrors.iter().flat_map(|mirror| &mirror.replicas);
        if let Some((replica, failure)) = replicas().find_map(|r| r.failure.as_ref().map(|failure| (r, failure))) {
            let place = status::place(&status.view, replica);
            return Err(Failure::new(format!("{place} cannot create its replica: {failure}"))
                .next("mend or leave that pool, then create the volume again"));
        }
        let waiting: Vec<&ReplicaInfo> = replicas().filter(|replica| !replica.ready).collect();
        let down = |replica: &&&ReplicaInfo| status::member_state(&status, replica.node).0 == "down";
        let all_down = !waiting.is_empty() && waiting.iter().filter(down).count() == waiting.len();
        only_down_since = all_down.then(|| only_down_since.unwrap_or_else(Instant::now));
        let too_long = started.elapsed() > CREATE_PATIENCE;
        if too_long || only_down_since.is_some_and(|since| since.elapsed() > DOWN_PATIENCE) {
            let mut nodes: Vec<String> = waiting
                .iter()
                .map(|replica| {
                    let (state, _) = status::member_state(&status, replica.node);
                    format!("{} ({state})", status::name(&status.view, replica.node))
                })
                .collect();
            nodes.sort();
            nodes.dedup();
            return Err(Failure::new(format!("{} did not create their replicas", nodes.join(", ")))
                .next("start them (`cluster list-nodes` shows them), then create the volume again"));
        }
        progress.at(format!("{} of {} replicas made", replicas().count() - waiting.len(), replicas().count()));
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Waits until this gateway serves the volume to initiators.
async fn wait_served(cluster: &Cluster, name: &str, gateway: &str) -> Outcome {
    let started = Instant::now();
    let mut progress = render::Progress::new(format!("volume {name}:"));
    loop {
        let status = cluster.status(false).await?;
        let volume = find(&status, name)?;
        let owner = volume.session.owner();
        if owner == Some(gateway) && is_offered(&status, volume).await {
            return Ok(());
        }
        if started.elapsed() > SESSION_PATIENCE {
            let why = match owner {
                Some(other) if other != gateway => format!("{other} has it open"),
                _ => status::owner_words(&status, volume),
            };
            return Err(Failure::new(format!("volume {name} exists, but {gateway} does not serve it: {why}"))
                .next(format!("look at `cluster status` and at {gateway}'s log")));
        }
        progress.at(format!("waits for {gateway} to open it"));
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether the portal offers the volume; where the portal cannot be reached from here, whether its owner was heard.
async fn is_offered(status: &ClusterStatus, volume: &VolumeInfo) -> bool {
    let Some(gateway) = volume.export.as_ref().and_then(|name| status.view.gateway(name)) else { return false };
    let portal = gateway.portal.to_socket_addrs().ok().and_then(|mut addrs| addrs.next());
    let Some(portal) = portal else { return true };
    match client::initiator::discover(portal).await {
        Ok(found) => found.iter().any(|target| target.name == iqn(&volume.name)),
        Err(_) => matches!(status::owner(status, volume), Owner::Heard(_)),
    }
}

/// Waits until nobody has the volume open.
async fn wait_closed(cluster: &Cluster, name: &str) -> Outcome {
    let started = Instant::now();
    let mut progress = render::Progress::new(format!("volume {name}:"));
    loop {
        let status = cluster.status(false).await?;
        let volume = find(&status, name)?;
        let Some(owner) = volume.session.owner() else { return Ok(()) };
        if started.elapsed() > SESSION_PATIENCE {
            return Err(Failure::new(format!(
                "volume {name} is not exported any more, but still {}",
                status::owner_words(&status, volume)
            ))
            .next(format!("if {owner} is down, start it, or export the volume on another gateway first")));
        }
        progress.at(format!("waits for {owner} to close it"));
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// `cluster list-volumes`.
///
/// # Errors
/// When nobody answers.
pub async fn list(config: Option<&Path>, args: ListArgs) -> Outcome {
    let status = Cluster::find(config)?.status(true).await?;
    let volumes = &status.view.volumes;
    if args.json {
        let all: Vec<_> = volumes.iter().map(|volume| status::volume_json(&status, volume)).collect();
        render::json(&json!({"stale": status.stale, "volumes": all}));
        return Ok(());
    }
    node::warn_stale(status.stale);
    let rows = volumes.iter().map(|volume| {
        let in_sync: usize = volume.mirrors.iter().map(|mirror| mirror.in_sync.members.len()).sum();
        let replicas: usize = volume.mirrors.iter().map(|mirror| mirror.replicas.len()).sum();
        let committed = volume.mirrors.iter().any(|mirror| mirror.in_sync.version.0 > 0);
        [
            volume.name.clone(),
            size::show(volume.size),
            volume.state.to_string(),
            volume.stripes().to_string(),
            volume.replicas.to_string(),
            if committed { format!("{in_sync}/{replicas}") } else { "-".into() },
            volume.export.clone().unwrap_or("-".into()),
            status::owner_words(&status, volume),
        ]
    });
    let header = ["VOLUME", "SIZE", "STATE", "MIRRORS", "REPLICAS", "IN SYNC", "EXPORTED BY", "SESSION"];
    render::line(render::table(header, rows));
    Ok(())
}

/// `cluster show-volume`.
///
/// # Errors
/// When there is no such volume, or nobody answers.
pub async fn show(config: Option<&Path>, args: ShowArgs) -> Outcome {
    let status = Cluster::find(config)?.status(true).await?;
    let volume = find(&status, &args.name)?;
    if args.json {
        let mut value = status::volume_json(&status, volume);
        value["stale"] = json!(status.stale);
        render::json(&value);
        return Ok(());
    }
    node::warn_stale(status.stale);
    render::line(format!("volume {} ({})", volume.name, volume.id));
    let cache = if volume.write_cache { "on" } else { "off" };
    for (what, value) in [
        ("size", size::show(volume.size)),
        ("state", volume.state.to_string()),
        ("mirrors", format!("{} of {} replicas", volume.stripes(), volume.replicas)),
        ("chunk size", size::show(volume.chunk_size.into())),
        ("min in sync", volume.min_in_sync.to_string()),
        ("write cache", cache.into()),
        ("resync limit", volume.resync_limit.map_or("none".into(), |limit| format!("{} a second", size::show(limit)))),
        ("session", status::owner_words(&status, volume)),
        ("exported by", volume.export.clone().unwrap_or("nobody".into())),
    ] {
        render::line(format!("  {what:<12} {value}"));
    }
    if volume.export.is_some() {
        print_target(&status, volume);
    }
    render::line(format!("\n{}", status::mirror_table(&status, volume)));
    Ok(())
}

/// `cluster export-volume`: returns once the volume is served.
///
/// # Errors
/// No such volume or gateway, or one that does not open it.
pub async fn export(config: Option<&Path>, args: ExportArgs) -> Outcome {
    let cluster = Cluster::find(config)?;
    let before = cluster.status(false).await?;
    let volume = find(&before, &args.name)?;
    let gateway = match (&volume.export, &args.gateway) {
        (Some(current), None) => current.clone(),
        (_, asked) => gateway::choose(&before, asked.as_deref())?,
    };
    let attempt = format!("exporting volume {} by {gateway}", args.name);
    cluster
        .control
        .export_volume(volume.id, Some(&gateway))
        .await
        .map_err(|error| Failure::control(&attempt, &error))?;
    wait_served(&cluster, &args.name, &gateway).await?;
    let after = cluster.status(false).await?;
    let volume = find(&after, &args.name)?;
    match args.json {
        true => render::json(&status::volume_json(&after, volume)),
        false => print_target(&after, volume),
    }
    Ok(())
}

/// `cluster unexport-volume`: returns once it is closed.
///
/// # Errors
/// No such volume, or an owner that does not close it.
pub async fn unexport(config: Option<&Path>, args: UnexportArgs) -> Outcome {
    let cluster = Cluster::find(config)?;
    close(&cluster, &args.name).await
}

async fn close(cluster: &Cluster, name: &str) -> Outcome {
    let before = cluster.status(false).await?;
    let volume = find(&before, name)?;
    let attempt = format!("unexporting volume {name}");
    cluster.control.export_volume(volume.id, None).await.map_err(|error| Failure::control(&attempt, &error))?;
    wait_closed(cluster, name).await
}

/// `cluster delete-volume`.
///
/// # Errors
/// No such volume, an owner that does not close it, or a no to the question.
pub async fn delete(config: Option<&Path>, args: DeleteArgs) -> Outcome {
    let cluster = Cluster::find(config)?;
    let before = cluster.status(false).await?;
    let volume = find(&before, &args.name)?;
    let question = format!("Delete volume {} ({}) and everything in it?", volume.name, size::show(volume.size));
    if !args.yes && !render::confirmed(&question) {
        return Err(Failure::new(format!("volume {} is not deleted", volume.name)).next("confirm with --yes"));
    }
    if volume.export.is_some() || volume.session.owner().is_some() {
        close(&cluster, &args.name).await?;
    }
    let attempt = format!("deleting volume {}", args.name);
    cluster.control.delete_volume(volume.id).await.map_err(|error| Failure::control(&attempt, &error))?;
    eprintln!("volume {} is deleted; nodes that are down free its space when they return", args.name);
    Ok(())
}

/// `cluster set-volume`.
///
/// # Errors
/// When there is no such volume, the limit is too small, or nobody answers.
pub async fn set(config: Option<&Path>, args: SetArgs) -> Outcome {
    let cluster = Cluster::find(config)?;
    let status = cluster.status(false).await?;
    let volume = find(&status, &args.name)?;
    let Limit(limit) = args.resync_limit;
    let attempt = format!("setting the resync limit of volume {}", args.name);
    cluster.control.set_volume(volume.id, limit).await.map_err(|error| Failure::control(&attempt, &error))?;
    let limit = limit.map_or("no limit".into(), |limit| format!("at most {} a second", size::show(limit)));
    render::line(format!("volume {}: a resync compares {limit}", args.name));
    Ok(())
}

/// `cluster recover-volume`.
///
/// # Errors
/// Without `--force` always, after saying what may be lost; otherwise when the owner does not carry it out.
pub async fn recover(config: Option<&Path>, args: RecoverArgs) -> Outcome {
    let cluster = Cluster::find(config)?;
    let before = cluster.status(false).await?;
    let volume = find(&before, &args.name)?;
    let losses = at_stake(&before, volume);
    if losses.is_empty() {
        render::line(format!("volume {} waits for no replica: there is nothing to recover", volume.name));
    } else {
        losses.iter().for_each(render::line);
    }
    if !args.force {
        return Err(Failure::new(format!("volume {}: nothing was done", volume.name)).next(format!(
            "bring the replicas back if you can; `cluster recover-volume {} --force` goes on without them",
            volume.name
        )));
    }
    let attempt = format!("recovering volume {}", args.name);
    cluster.control.recover_volume(volume.id).await.map_err(|error| Failure::control(&attempt, &error))?;
    let until = Instant::now() + RECOVER_PATIENCE;
    let mut progress = render::Progress::new(format!("volume {}:", args.name));
    loop {
        let status = cluster.status(false).await?;
        let volume = find(&status, &args.name)?;
        if volume.recover_unix_ms.is_none() && at_stake(&status, volume).is_empty() {
            break;
        }
        if Instant::now() >= until {
            return Err(Failure::new(format!(
                "volume {}: the recovery is asked for and not carried out yet ({})",
                args.name,
                status::owner_words(&status, volume)
            ))
            .next("its owner does it when it has the volume open: look at `cluster status`"));
        }
        progress.at("waits for its owner to recover it");
        tokio::time::sleep(LOOK_EVERY).await;
    }
    progress.done();
    render::line(format!("volume {} goes on without the replicas that could not be reached", args.name));
    Ok(())
}

/// What a forced recovery of the volume may lose, mirror by mirror.
fn at_stake(status: &ClusterStatus, volume: &VolumeInfo) -> Vec<String> {
    let session = match status::owner(status, volume) {
        Owner::Heard(session) | Owner::Silent(Some(session)) => Some(session),
        _ => None,
    };
    let reports = session.iter().flat_map(|session| &session.report.mirrors);
    reports
        .filter_map(|report| {
            let waiting = report.waiting.as_ref()?;
            let index = volume.mirrors.iter().position(|mirror| mirror.id == report.mirror)?;
            let gone = report.replicas.iter().filter(|r| {
                matches!(r.condition, ReplicaCondition::Missing | ReplicaCondition::Refused)
                    && volume.mirrors[index].in_sync.members.contains(&r.replica)
            });
            let gone: Vec<String> = gone.map(|r| status::place_of(&status.view, volume, r.replica)).collect();
            Some(format!(
                "mirror {index} waits: {waiting}\n  writes that only {} holds may be lost, in up to {} of it",
                if gone.is_empty() { "an unreachable replica".into() } else { gone.join(" or ") },
                size::show(report.dirty_regions * proto::limits::REGION_SIZE)
            ))
        })
        .collect()
}
