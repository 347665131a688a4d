//! `cluster status`: the truth at this moment, and where it is not known, that.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use proto::cluster::*;
use proto::id::{NodeId, ReplicaId};
use serde_json::{Value, json};

use crate::config::Cluster;
use crate::failure::Outcome;
use crate::{render, size};

/// A gateway or owner that was not heard for so long is shown as silent: it renews every second.
pub const SILENT_AFTER_MS: u64 = 3_500;
/// How long a quorum is asked for before what one member knows is shown.
const PATIENCE: Duration = Duration::from_secs(4);
/// Between two looks of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Show it again every second until interrupted
    #[arg(long)]
    watch: bool,
    /// Print JSON (with --watch one document per line)
    #[arg(long)]
    json: bool,
}

/// The one word about a cluster. Later ones are worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    /// Everything that should be there is.
    Healthy,
    /// Everything is served; something is missing or on its way back.
    Degraded,
    /// Some I/O waits.
    Waiting,
    /// Nobody leads: what is shown may be old.
    NoQuorum,
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Healthy => "HEALTHY",
            Self::Degraded => "DEGRADED",
            Self::Waiting => "WAITING",
            Self::NoQuorum => "NO QUORUM",
        })
    }
}

/// Health, and why it is not better.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The word.
    pub health: Health,
    /// One sentence each.
    pub why: Vec<String>,
}

impl Verdict {
    fn note(&mut self, health: Health, why: String) {
        self.health = self.health.max(health);
        self.why.push(why);
    }
}

/// What is known of a volume's owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner<'a> {
    /// Nobody has it open.
    None,
    /// Heard lately: its report is the truth.
    Heard(&'a SessionStatus),
    /// It has the session, but has not been heard, since then where that is known.
    Silent(Option<&'a SessionStatus>),
}

/// What is known of the volume's owner.
pub fn owner<'a>(status: &'a ClusterStatus, volume: &VolumeInfo) -> Owner<'a> {
    if volume.session.owner().is_none() {
        return Owner::None;
    }
    match status.session(volume) {
        Some(session) if status.now_unix_ms.saturating_sub(session.heard_unix_ms) < SILENT_AFTER_MS => {
            Owner::Heard(session)
        }
        other => Owner::Silent(other),
    }
}

/// How the cluster is.
pub fn judge(status: &ClusterStatus) -> Verdict {
    let mut verdict = Verdict { health: Health::Healthy, why: Vec::new() };
    if status.stale {
        let by = name(&status.view, status.answered_by);
        verdict.note(
            Health::NoQuorum,
            format!("stale, no quorum: this is what {by} last knew, and changes to the cluster wait"),
        );
    }
    for member in status.members.iter().filter(|member| !member.up) {
        let since = member.since_unix_ms.map(|since| format!(" since {}", render::ago(status.now_unix_ms, since)));
        let name = name(&status.view, member.id);
        verdict.note(Health::Degraded, format!("{name} is down{}", since.unwrap_or_default()));
    }
    for gateway in status.gateways.iter().filter(|gateway| !heard(status, gateway.heard_unix_ms)) {
        verdict.note(Health::Degraded, format!("{} is silent", gateway.name));
    }
    for volume in &status.view.volumes {
        judge_volume(status, volume, &mut verdict);
    }
    verdict
}

fn judge_volume(status: &ClusterStatus, volume: &VolumeInfo, verdict: &mut Verdict) {
    let name = &volume.name;
    if volume.state == VolumeState::Deleting {
        return;
    }
    for replica in volume.mirrors.iter().flat_map(|mirror| &mirror.replicas) {
        if let Some(failure) = &replica.failure {
            let node = self::name(&status.view, replica.node);
            verdict.note(
                Health::Degraded,
                format!("volume {name}: {node} cannot create replica {}: {failure}", replica.id),
            );
        }
    }
    match owner(status, volume) {
        Owner::None => {
            if let (Some(gateway), VolumeState::Ready) = (&volume.export, volume.state) {
                verdict.note(Health::Waiting, format!("volume {name} waits for {gateway} to open it"));
            }
        }
        // A stale answer never has a report; the missing quorum says enough.
        Owner::Silent(_) if status.stale => {}
        Owner::Silent(_) => {
            let gateway = volume.session.owner().unwrap_or_default();
            verdict.note(Health::Waiting, format!("volume {name} waits: its owner {gateway} is not heard"));
        }
        Owner::Heard(session) => {
            for (index, mirror) in session.report.mirrors.iter().enumerate() {
                if let Some(waiting) = &mirror.waiting {
                    verdict.note(Health::Waiting, format!("volume {name}: mirror {index} waits: {waiting}"));
                }
            }
        }
    }
    let session = last_report(status, volume);
    let standings: Vec<Standing<'_>> = volume
        .mirrors
        .iter()
        .flat_map(|mirror| mirror.replicas.iter().map(move |replica| standing(mirror, replica, session)))
        .collect();
    for (words, is) in [
        ("coming back", (|s| matches!(s, Standing::Joining(_))) as fn(&Standing<'_>) -> bool),
        ("missing", |s| matches!(s, Standing::Missing(_))),
        ("refused", |s| matches!(s, Standing::Refused(_))),
        ("not in sync", |s| matches!(s, Standing::NotInSync)),
    ] {
        let n = standings.iter().filter(|standing| is(standing)).count();
        if n > 0 {
            verdict.note(Health::Degraded, format!("volume {name}: {n} of {} replicas {words}", standings.len()));
        }
    }
}

/// What the volume's owner said last, heard lately or not.
fn last_report<'a>(status: &'a ClusterStatus, volume: &VolumeInfo) -> Option<&'a SessionStatus> {
    match owner(status, volume) {
        Owner::Heard(session) | Owner::Silent(Some(session)) => Some(session),
        _ => None,
    }
}

/// Where a replica stands: what raft has committed, and beyond that what the owner reports. The owner knows first
/// that a replica is in trouble, raft that one has left: of both the worse is believed.
enum Standing<'a> {
    Failed(&'a str),
    Creating,
    /// Made, and no set is committed yet.
    Ready,
    /// `true`: the owner says so too.
    InSync(bool),
    /// Left the set, and the owner has not said more about it.
    NotInSync,
    Joining(&'a ReplicaReport),
    Missing(&'a ReplicaReport),
    Refused(&'a ReplicaReport),
}

fn standing<'a>(mirror: &'a MirrorInfo, replica: &'a ReplicaInfo, session: Option<&'a SessionStatus>) -> Standing<'a> {
    if let Some(failure) = &replica.failure {
        return Standing::Failed(failure);
    }
    if !replica.ready {
        return Standing::Creating;
    }
    let reports = session.into_iter().flat_map(|session| &session.report.mirrors);
    let report = reports
        .filter(|known| known.mirror == mirror.id)
        .flat_map(|known| &known.replicas)
        .find(|known| known.replica == replica.id);
    match report.map(|report| (report.condition, report)) {
        Some((ReplicaCondition::Joining, report)) => return Standing::Joining(report),
        Some((ReplicaCondition::Missing, report)) => return Standing::Missing(report),
        Some((ReplicaCondition::Refused, report)) => return Standing::Refused(report),
        Some((ReplicaCondition::InSync, _)) | None => {}
    }
    match mirror.in_sync.version.0 {
        0 => Standing::Ready,
        _ if mirror.in_sync.members.contains(&replica.id) => Standing::InSync(report.is_some()),
        _ => Standing::NotInSync,
    }
}

fn heard(status: &ClusterStatus, heard_unix_ms: Option<u64>) -> bool {
    heard_unix_ms.is_some_and(|heard| status.now_unix_ms.saturating_sub(heard) < SILENT_AFTER_MS)
}

/// A member's name, or its number where it is not known.
pub fn name(view: &ClusterView, id: NodeId) -> String {
    view.member(id).map_or_else(|| format!("member {id}"), |member| member.name.clone())
}

/// A replica as people find it: node and pool.
pub fn place(view: &ClusterView, replica: &ReplicaInfo) -> String {
    format!("{}/{}", name(view, replica.node), replica.pool)
}

/// Names a replica by volume-wide id.
pub fn place_of(view: &ClusterView, volume: &VolumeInfo, id: ReplicaId) -> String {
    let mut replicas = volume.mirrors.iter().flat_map(|mirror| &mirror.replicas);
    replicas.find(|replica| replica.id == id).map_or_else(|| id.to_string(), |replica| place(view, replica))
}

/// Where a replica stands, in words.
fn standing_words(now_unix_ms: u64, standing: &Standing<'_>) -> String {
    let since = |word: &str, report: &ReplicaReport| {
        let reason = if report.reason.is_empty() { String::new() } else { format!(" ({})", report.reason) };
        format!("{word} since {}{reason}", render::ago(now_unix_ms, report.since_unix_ms))
    };
    match standing {
        Standing::Failed(failure) => format!("cannot be created: {failure}"),
        Standing::Creating => "being created".into(),
        Standing::Ready => "ready".into(),
        Standing::InSync(true) => "in sync".into(),
        Standing::InSync(false) => "in sync (last committed)".into(),
        Standing::NotInSync => "not in sync".into(),
        Standing::Missing(report) => since("missing", report),
        Standing::Refused(report) => since("refused", report),
        Standing::Joining(report) => {
            let done = report.regions_total.saturating_sub(report.regions_todo);
            let percent = done * 100 / report.regions_total.max(1);
            let left = report.eta_ms.map(|eta| format!(", {} left", render::span(Duration::from_millis(eta))));
            let reason = if report.reason.is_empty() { String::new() } else { format!(" ({})", report.reason) };
            format!(
                "joining {percent}%, {} copied, {}/s{}{reason}",
                size::show(report.bytes_copied),
                size::show(report.bytes_per_second),
                left.unwrap_or_default()
            )
        }
    }
}

/// The mirrors of a volume, a row for each replica.
pub fn mirror_table(status: &ClusterStatus, volume: &VolumeInfo) -> String {
    let session = last_report(status, volume);
    let rows = volume.mirrors.iter().enumerate().flat_map(|(index, mirror)| {
        let report = session.and_then(|session| session.report.mirrors.iter().find(|known| known.mirror == mirror.id));
        let serves = match report {
            Some(MirrorReport { waiting: Some(waiting), .. }) => format!("waits: {waiting}"),
            Some(_) => "serving".into(),
            None => "-".into(),
        };
        let dirty = report.map_or("-".into(), |report| report.dirty_regions.to_string());
        mirror.replicas.iter().enumerate().map(move |(at, replica)| {
            let first = |text: String| if at == 0 { text } else { String::new() };
            [
                first(index.to_string()),
                first(serves.clone()),
                first(dirty.clone()),
                place(&status.view, replica),
                standing_words(status.now_unix_ms, &standing(mirror, replica, session)),
            ]
        })
    });
    render::table(["MIRROR", "STATE", "DIRTY", "REPLICA", "REPLICA STATE"], rows)
}

/// Who has it open, in words.
pub fn owner_words(status: &ClusterStatus, volume: &VolumeInfo) -> String {
    let epoch = volume.session.epoch;
    match (owner(status, volume), &volume.session.state) {
        (_, SessionState::Never) => "never opened".into(),
        (_, SessionState::Closed { gateway, clean }) => {
            let how = if *clean { "cleanly" } else { "with regions left to reconcile" };
            format!("closed {how} by {gateway} (epoch {epoch})")
        }
        (Owner::Heard(_), SessionState::Open { gateway }) => format!("open on {gateway} (epoch {epoch})"),
        (Owner::Silent(Some(session)), SessionState::Open { gateway }) => {
            let ago = render::ago(status.now_unix_ms, session.heard_unix_ms);
            format!("open on {gateway} (epoch {epoch}), which was last heard {ago} ago")
        }
        (_, SessionState::Open { gateway }) => format!("open on {gateway} (epoch {epoch}), not heard"),
    }
}

/// The whole status as text.
pub fn text(status: &ClusterStatus) -> String {
    let verdict = judge(status);
    let view = &status.view;
    let mut out = vec![format!("{}  cluster {} ({})", verdict.health, view.name, view.id)];
    out.extend(verdict.why.iter().map(|why| format!("  - {why}")));
    let leads = match (status.stale, status.leader) {
        (false, Some(leader)) => {
            let since =
                status.leader_since_unix_ms.map(|since| format!(" since {}", render::ago(status.now_unix_ms, since)));
            format!("{} leads{}", name(view, leader), since.unwrap_or_default())
        }
        _ => "nobody is known to lead".into(),
    };
    out.push(format!("{leads}, term {}, revision {}", status.term, view.revision));
    out.push(String::new());
    out.push(member_table(status, |_| true));
    if !view.gateways.is_empty() {
        out.push(String::new());
        out.push(gateway_table(status));
    }
    for volume in &view.volumes {
        let export = volume.export.as_deref().map_or("not exported".into(), |gateway| format!("exported by {gateway}"));
        out.push(String::new());
        out.push(format!(
            "volume {}: {}, {}, {}, {}",
            volume.name,
            size::show(volume.size),
            volume.state,
            export,
            owner_words(status, volume)
        ));
        if volume.recover_unix_ms.is_some() {
            out.push("  a forced recovery was asked for and is not finished".into());
        }
        out.push(mirror_table(status, volume));
    }
    if view.volumes.is_empty() {
        out.push("\nno volumes".into());
    }
    out.join("\n")
}

/// Up or down, since when.
pub fn member_state(status: &ClusterStatus, id: NodeId) -> (&'static str, String) {
    let found = status.members.iter().find(|member| member.id == id);
    let since = found.and_then(|member| member.since_unix_ms);
    let since = since.map_or("-".into(), |since| render::ago(status.now_unix_ms, since));
    match found {
        Some(member) if member.up => ("up", since),
        Some(_) => ("down", since),
        None => ("unknown", since),
    }
}

/// Members and their pools' sums.
pub fn member_table(status: &ClusterStatus, wanted: impl Fn(&Member) -> bool) -> String {
    let view = &status.view;
    let rows = view.members.iter().filter(|member| wanted(member)).map(|member| {
        let (state, since) = member_state(status, member.id);
        let pools: Vec<&Pool> = view.pools.iter().filter(|pool| pool.node == member.id).collect();
        let dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
        let storage = member.role == Role::Node;
        [
            member.name.clone(),
            member.role.to_string(),
            state.into(),
            since,
            member.control_addr.clone(),
            dash(member.data_addr.clone()),
            if storage { pools.len().to_string() } else { "-".into() },
            if storage { size::show(pools.iter().map(|pool| pool.capacity).sum()) } else { "-".into() },
            if storage { size::show(allotted(view, |node, _| node == member.id)) } else { "-".into() },
        ]
    });
    render::table(["MEMBER", "ROLE", "STATE", "SINCE", "CONTROL", "DATA", "POOLS", "CAPACITY", "ALLOTTED"], rows)
}

/// Bytes of replicas placed where `wanted` says.
pub fn allotted(view: &ClusterView, wanted: impl Fn(NodeId, &str) -> bool) -> u64 {
    let mirrors = view.volumes.iter().flat_map(|volume| &volume.mirrors);
    let replicas = mirrors.flat_map(|mirror| mirror.replicas.iter().map(|replica| (mirror.size, replica)));
    replicas.filter(|(_, replica)| wanted(replica.node, &replica.pool)).map(|(size, _)| size).sum()
}

/// Gateways and what they serve.
pub fn gateway_table(status: &ClusterStatus) -> String {
    let rows = status.view.gateways.iter().map(|gateway| {
        let known =
            status.gateways.iter().find(|known| known.name == gateway.name).and_then(|known| known.heard_unix_ms);
        let state = match (status.stale, heard(status, known)) {
            (true, _) => "unknown",
            (_, true) => "up",
            (_, false) => "silent",
        };
        let since = known.map_or("-".into(), |heard| format!("{} ago", render::ago(status.now_unix_ms, heard)));
        let exports = status.view.volumes.iter().filter(|volume| volume.export.as_ref() == Some(&gateway.name));
        let exports: Vec<&str> = exports.map(|volume| volume.name.as_str()).collect();
        [
            gateway.name.clone(),
            state.into(),
            since,
            gateway.control_addr.clone(),
            gateway.portal.clone(),
            if exports.is_empty() { "-".into() } else { exports.join(", ") },
        ]
    });
    render::table(["GATEWAY", "STATE", "HEARD", "CONTROL", "PORTAL", "VOLUMES"], rows)
}

/// A volume as JSON: the metadata, and what its owner reports.
pub fn volume_json(status: &ClusterStatus, volume: &VolumeInfo) -> Value {
    let mut value = serde_json::to_value(volume).expect("plain values");
    let (heard, session) = match owner(status, volume) {
        Owner::Heard(session) => (true, Some(session)),
        Owner::Silent(session) => (false, session),
        Owner::None => (false, None),
    };
    value["iqn"] = json!(client::iscsi::iqn(&volume.name));
    value["portal"] =
        json!(volume.export.as_ref().and_then(|name| status.view.gateway(name)).map(|gateway| &gateway.portal));
    value["owner_heard"] = json!(heard);
    value["owner_heard_unix_ms"] = json!(session.map(|session| session.heard_unix_ms));
    value["report"] = json!(session.map(|session| &session.report));
    value
}

/// The whole status as JSON.
pub fn as_json(status: &ClusterStatus) -> Value {
    let verdict = judge(status);
    let view = &status.view;
    let members: Vec<Value> = view
        .members
        .iter()
        .map(|member| {
            let known = status.members.iter().find(|known| known.id == member.id);
            let mut value = serde_json::to_value(member).expect("plain values");
            value["up"] = json!(known.map(|known| known.up));
            value["since_unix_ms"] = json!(known.and_then(|known| known.since_unix_ms));
            value["matched"] = json!(known.map(|known| known.matched));
            value
        })
        .collect();
    let gateways: Vec<Value> = view
        .gateways
        .iter()
        .map(|gateway| {
            let known = status.gateways.iter().find(|known| known.name == gateway.name);
            let heard_ms = known.and_then(|known| known.heard_unix_ms);
            let mut value = serde_json::to_value(gateway).expect("plain values");
            value["heard_unix_ms"] = json!(heard_ms);
            value["up"] = if status.stale { Value::Null } else { json!(heard(status, heard_ms)) };
            value
        })
        .collect();
    json!({
        "health": verdict.health.to_string(),
        "why": verdict.why,
        "stale": status.stale,
        "cluster": view.id,
        "name": view.name,
        "revision": view.revision,
        "leader": status.leader.map(|leader| name(view, leader)),
        "leader_since_unix_ms": status.leader_since_unix_ms,
        "term": status.term,
        "applied": status.applied,
        "answered_by": name(view, status.answered_by),
        "now_unix_ms": status.now_unix_ms,
        "members": members,
        "pools": view.pools,
        "gateways": gateways,
        "volumes": view.volumes.iter().map(|volume| volume_json(status, volume)).collect::<Vec<_>>(),
    })
}

/// `cluster status`.
///
/// # Errors
/// When no member answers at all.
pub async fn run(config: Option<&Path>, args: StatusArgs) -> Outcome {
    let cluster = Cluster::with_patience(config, PATIENCE)?;
    loop {
        let status = cluster.status(true).await;
        let shown = match (status, args.json, args.watch) {
            (Ok(status), true, true) => as_json(&status).to_string(),
            (Ok(status), true, false) => format!("{:#}", as_json(&status)),
            (Ok(status), false, _) => text(&status),
            // A watcher wants to see the members come back.
            (Err(failure), false, true) => failure.to_string(),
            (Err(failure), _, _) => return Err(failure),
        };
        if args.watch && !args.json && std::io::IsTerminal::is_terminal(&std::io::stdout()) {
            // Home, clear to the end.
            render::line("\x1b[H\x1b[2J\x1b[3J");
        }
        render::line(shown);
        if !args.watch {
            return Ok(());
        }
        if !args.json {
            render::line("");
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::id::*;
    use uuid::Uuid;

    fn status() -> ClusterStatus {
        let replica = |n: u128, node| ReplicaInfo {
            id: ReplicaId(Uuid::from_u128(n)),
            node: NodeId(node),
            pool: "pool-1".into(),
            ready: true,
            failure: None,
        };
        let replicas: Vec<ReplicaInfo> = (1..=3).map(|n| replica(n.into(), n)).collect();
        let mirror = MirrorInfo {
            id: MirrorId(Uuid::from_u128(9)),
            size: 1 << 30,
            in_sync: InSyncSet {
                version: SetVersion(1),
                members: replicas.iter().map(|r| r.id).collect(),
                awaited: vec![],
            },
            replicas,
        };
        let volume = VolumeInfo {
            id: VolumeId(Uuid::from_u128(7)),
            name: "tank".into(),
            size: 1 << 30,
            replicas: 3,
            chunk_size: 256 << 10,
            min_in_sync: 1,
            write_cache: true,
            state: VolumeState::Ready,
            mirrors: vec![mirror],
            export: Some("gateway-1".into()),
            session: VolumeSession {
                epoch: Epoch(4),
                state: SessionState::Open { gateway: "gateway-1".into() },
                settled: true,
            },
            recover_unix_ms: None,
            resync_limit: None,
            created_unix_ms: 1,
        };
        let member = |id| Member {
            id: NodeId(id),
            name: format!("node-{id}"),
            role: Role::Node,
            control_addr: "127.0.0.1:1".into(),
            data_addr: "127.0.0.1:2".into(),
        };
        let report = |n: u128| ReplicaReport {
            replica: ReplicaId(Uuid::from_u128(n)),
            condition: ReplicaCondition::InSync,
            since_unix_ms: 0,
            regions_todo: 0,
            regions_total: 0,
            bytes_copied: 0,
            bytes_per_second: 0,
            eta_ms: None,
            reason: String::new(),
        };
        ClusterStatus {
            view: ClusterView {
                id: ClusterId(Uuid::from_u128(5)),
                name: "dev".into(),
                revision: 12,
                stale: false,
                members: (1..=3).map(member).collect(),
                pools: Vec::new(),
                gateways: vec![GatewayInfo {
                    name: "gateway-1".into(),
                    control_addr: "127.0.0.1:3".into(),
                    portal: "127.0.0.1:4".into(),
                }],
                volumes: vec![volume],
            },
            stale: false,
            leader: Some(NodeId(1)),
            leader_since_unix_ms: Some(90_000),
            term: 3,
            applied: 12,
            members: (1..=3)
                .map(|id| MemberStatus { id: NodeId(id), up: true, since_unix_ms: Some(10), matched: 12 })
                .collect(),
            gateways: vec![GatewayStatus { name: "gateway-1".into(), heard_unix_ms: Some(99_500) }],
            sessions: vec![SessionStatus {
                volume: VolumeId(Uuid::from_u128(7)),
                epoch: Epoch(4),
                heard_unix_ms: 99_500,
                report: SessionReport {
                    mirrors: vec![MirrorReport {
                        mirror: MirrorId(Uuid::from_u128(9)),
                        replicas: (1..=3).map(report).collect(),
                        waiting: None,
                        in_flight: 0,
                        dirty_regions: 2,
                    }],
                },
            }],
            answered_by: NodeId(1),
            now_unix_ms: 100_000,
        }
    }

    #[test]
    fn all_present_is_healthy() {
        assert_eq!(judge(&status()), Verdict { health: Health::Healthy, why: Vec::new() });
    }

    #[test]
    fn the_worst_thing_known_decides_and_everything_is_said() {
        let mut degraded = status();
        degraded.members[1].up = false;
        degraded.members[1].since_unix_ms = Some(88_000);
        let replica = &mut degraded.sessions[0].report.mirrors[0].replicas[1];
        replica.condition = ReplicaCondition::Missing;
        replica.since_unix_ms = 88_000;
        replica.reason = "connection lost".into();
        assert_eq!(judge(&degraded).health, Health::Degraded);
        let shown = text(&degraded);
        assert!(shown.contains("node-2 is down since 12 s"), "{shown}");
        assert!(shown.contains("missing since 12 s (connection lost)"), "{shown}");

        let mut waiting = degraded.clone();
        waiting.sessions[0].report.mirrors[0].waiting = Some("no replica can be reached".into());
        assert_eq!(judge(&waiting).health, Health::Waiting);
        assert!(text(&waiting).contains("waits: no replica can be reached"));

        let mut silent = status();
        silent.sessions[0].heard_unix_ms = 80_000;
        assert_eq!(judge(&silent).health, Health::Waiting);
        assert!(text(&silent).contains("last heard 20 s ago"));
    }

    #[test]
    fn a_replica_that_left_the_set_is_not_called_in_sync_by_an_older_report() {
        let mut left = status();
        left.view.volumes[0].mirrors[0].in_sync.members.pop();
        assert_eq!(judge(&left).why, ["volume tank: 1 of 3 replicas not in sync"]);
        left.sessions[0].report.mirrors.clear();
        assert_eq!(judge(&left).health, Health::Degraded, "before the first report too");
    }

    #[test]
    fn a_stale_answer_says_so_first() {
        let mut stale = status();
        stale.stale = true;
        stale.leader = None;
        stale.members.clear();
        stale.gateways.clear();
        stale.sessions.clear();
        let shown = text(&stale);
        assert!(shown.starts_with("NO QUORUM"), "{shown}");
        assert!(shown.contains("stale, no quorum"), "{shown}");
        assert_eq!(as_json(&stale)["members"][0]["up"], Value::Null);
    }

    #[test]
    fn a_joining_replica_shows_progress_rate_and_time_left() {
        let mut joining = status();
        let replica = &mut joining.sessions[0].report.mirrors[0].replicas[2];
        replica.condition = ReplicaCondition::Joining;
        (replica.regions_todo, replica.regions_total) = (30, 40);
        (replica.bytes_copied, replica.bytes_per_second, replica.eta_ms) = (10 << 20, 5 << 20, Some(6_000));
        let shown = text(&joining);
        assert!(shown.contains("joining 25%, 10 MiB copied, 5 MiB/s, 6 s left"), "{shown}");
    }
}
