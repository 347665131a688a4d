//! Lease renewal for all sessions together (R3).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use proto::cluster::{MirrorReport, RenewalOutcome, ReplicaCondition, ReplicaReport, SessionRenewal, SessionReport};
use proto::limits::LEASE_RENEW_MS;

use super::{Shared, decide, unix_ms};
use crate::clock::now_ms;
use crate::mirror::{MirrorStatus, ReplicaStatus, Standing};
use crate::volume::VolumeCommand;

/// How long one renewal is tried; the lease outlives several.
const TRY: Duration = Duration::from_millis(1_500);
/// After a renewal that was not answered.
const AGAIN: Duration = Duration::from_millis(200);

/// Renews until the task is aborted. Also tells the leader that this gateway lives, with no session at all.
pub(super) async fn renew(shared: Arc<Shared>) {
    let mut told = String::new();
    loop {
        let renewals: Vec<_> = (shared.sessions().iter())
            .map(|(volume, session)| SessionRenewal {
                volume: *volume,
                epoch: session.epoch,
                report: Some(report(&session.status())),
            })
            .collect();
        // The lease counts from before the request is sent.
        let sent = now_ms();
        let pause = match shared.control.renew_leases(&shared.config.name, renewals, TRY).await {
            Ok(answer) => {
                told.clear();
                for result in answer.results {
                    let sessions = shared.sessions();
                    let Some(session) = sessions.get(&result.volume).filter(|s| s.epoch == result.epoch) else {
                        continue;
                    };
                    match result.outcome {
                        RenewalOutcome::Granted { lease_ms } => {
                            let until = decide::lease_until(sent, lease_ms);
                            session.lease_until.fetch_max(until, Ordering::AcqRel);
                        }
                        RenewalOutcome::Refused { current } => {
                            if decide::is_superseded(current.as_ref(), session.epoch) {
                                let _ = session.commands.send(VolumeCommand::Supersede);
                            }
                        }
                    }
                }
                Duration::from_millis(LEASE_RENEW_MS)
            }
            Err(error) => {
                if told != error.to_string() {
                    tracing::warn!(%error, "leases not renewed");
                    told = error.to_string();
                }
                AGAIN
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shared.renew.notified() => {}
        }
    }
}

fn report(mirrors: &[MirrorStatus]) -> SessionReport {
    let (now, unix) = (now_ms(), unix_ms());
    let mirrors = mirrors.iter().map(|mirror| MirrorReport {
        mirror: mirror.mirror,
        replicas: mirror.replicas.iter().map(|r| replica_report(r, now, unix)).collect(),
        waiting: mirror.waits.clone(),
        in_flight: mirror.in_flight as u64,
        dirty_regions: mirror.dirty_regions as u64,
    });
    SessionReport { mirrors: mirrors.collect() }
}

fn replica_report(replica: &ReplicaStatus, now: u64, unix: u64) -> ReplicaReport {
    let mut report = ReplicaReport {
        replica: replica.replica,
        condition: ReplicaCondition::InSync,
        since_unix_ms: unix.saturating_sub(now.saturating_sub(replica.since)),
        regions_todo: 0,
        regions_total: 0,
        bytes_copied: 0,
        bytes_per_second: 0,
        eta_ms: None,
        reason: String::new(),
    };
    match &replica.standing {
        Standing::InSync => {}
        Standing::Leaving(reason) | Standing::Missing(reason) => {
            report.condition = ReplicaCondition::Missing;
            report.reason = reason.to_string();
        }
        Standing::Joining { todo, total, copied_bytes, started } => {
            report.condition = ReplicaCondition::Joining;
            (report.regions_todo, report.regions_total) = (*todo as u64, *total as u64);
            report.bytes_copied = *copied_bytes;
            let elapsed = now.saturating_sub(*started).max(1);
            report.bytes_per_second = copied_bytes * 1_000 / elapsed;
            let done = (total - todo) as u64;
            report.eta_ms = (done > 0).then(|| elapsed * *todo as u64 / done);
        }
    }
    report
}
