//! Gateways: the daemon, and looking at them.

use std::path::Path;

use clap::Args;
use client::gateway::{GatewayConfig, GatewayError};
use proto::cluster::{ClusterStatus, ClusterView};
use serde_json::json;

use crate::config::Cluster;
use crate::daemon::{StopSignals, detach};
use crate::failure::{Failure, Outcome};
use crate::{node, render, status};

/// `cluster gateway`.
#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// Listen elsewhere than on loopback, although nothing is authenticated or encrypted yet
    #[arg(long)]
    insecure: bool,
    /// Begin a session of its own
    #[arg(long, hide = true)]
    detached: bool,
}

/// `cluster list-gateways`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// `cluster gateway`: runs until told to stop, then closes its sessions.
///
/// # Errors
/// A configuration that makes no sense, or an address in use.
pub async fn daemon(config: Option<&Path>, args: DaemonArgs) -> Outcome {
    if args.detached {
        detach();
    }
    let path =
        config.ok_or_else(|| Failure::usage("a gateway needs its configuration").next("give --config gateway.toml"))?;
    let text = std::fs::read_to_string(path).map_err(|error| Failure::path(path, "cannot read", error))?;
    let mut config: GatewayConfig =
        toml::from_str(&text).map_err(|error| Failure::path(path, "is not a gateway's configuration", error))?;
    config.insecure |= args.insecure;
    let name = config.name.clone();
    let stop = StopSignals::catch()?;
    client::gateway::run(config, stop.stop()).await.map_err(|error| {
        let failure = Failure::new(format!("{name}: {error}"));
        match error {
            GatewayError::Insecure { .. } => failure.next("pass --insecure if the network is trusted"),
            GatewayError::Listen { .. } => failure.next("see what listens there, for example with `ss -ltnp`"),
            _ => failure,
        }
    })
}

/// `cluster list-gateways`.
///
/// # Errors
/// When nobody answers.
pub async fn list(config: Option<&Path>, args: ListArgs) -> Outcome {
    let status = Cluster::find(config)?.status(true).await?;
    if args.json {
        let all = status::as_json(&status);
        render::json(&json!({"stale": all["stale"], "gateways": all["gateways"]}));
    } else {
        node::warn_stale(status.stale);
        render::line(status::gateway_table(&status));
    }
    Ok(())
}

/// Whether this leader has heard the gateway lately.
pub fn is_up(status: &ClusterStatus, name: &str) -> bool {
    let heard = status.gateways.iter().find(|gateway| gateway.name == name).and_then(|gateway| gateway.heard_unix_ms);
    heard.is_some_and(|heard| status.now_unix_ms.saturating_sub(heard) < status::SILENT_AFTER_MS)
}

/// The gateway that is to serve one more volume: the one asked for, else of those that are up the one that serves
/// the fewest.
///
/// # Errors
/// When there is none such.
pub fn choose(status: &ClusterStatus, asked: Option<&str>) -> Outcome<String> {
    let view = &status.view;
    if let Some(asked) = asked {
        return match view.gateway(asked) {
            Some(_) => Ok(asked.to_owned()),
            None => {
                Err(Failure::new(format!("there is no gateway {asked}")).next("`cluster list-gateways` shows them"))
            }
        };
    }
    let up = view.gateways.iter().filter(|gateway| is_up(status, &gateway.name));
    match up.min_by_key(|gateway| (exports(view, &gateway.name), gateway.name.clone())) {
        Some(gateway) => Ok(gateway.name.clone()),
        None if view.gateways.is_empty() => Err(Failure::new("the cluster has no gateway that could serve it")
            .next("start one with `cluster gateway`, or pass --no-export")),
        None => Err(Failure::new("no gateway of the cluster is up")
            .next("start one (`cluster list-gateways` shows them), name one with --gateway, or pass --no-export")),
    }
}

fn exports(view: &ClusterView, gateway: &str) -> usize {
    view.volumes.iter().filter(|volume| volume.export.as_deref() == Some(gateway)).count()
}
