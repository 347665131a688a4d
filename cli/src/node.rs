//! Nodes and witnesses: the daemon, and looking at them.

use std::path::Path;

use ::node::control::{self as member, NodeConfig};
use clap::Args;
use proto::cluster::Role;
use serde_json::{Value, json};

use crate::config::Cluster;
use crate::daemon::{StopSignals, detach};
use crate::failure::{Failure, Outcome};
use crate::{render, size, status};

/// `cluster node`.
#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// Listen elsewhere than on loopback, although nothing is authenticated or encrypted yet
    #[arg(long)]
    insecure: bool,
    /// Begin a session of its own
    #[arg(long, hide = true)]
    detached: bool,
}

/// `cluster list-nodes`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// `cluster show-node`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// The node or witness
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// `cluster node`: runs until told to stop.
///
/// # Errors
/// A configuration that makes no sense, an address in use, a directory of another member or cluster, and whatever
/// stops it later.
pub async fn daemon(config: Option<&Path>, args: DaemonArgs) -> Outcome {
    if args.detached {
        detach();
    }
    let path =
        config.ok_or_else(|| Failure::usage("a node needs its configuration").next("give --config node.toml"))?;
    let text = std::fs::read_to_string(path).map_err(|error| Failure::path(path, "cannot read", error))?;
    let mut config: NodeConfig =
        toml::from_str(&text).map_err(|error| Failure::path(path, "is not a node's configuration", error))?;
    config.insecure |= args.insecure;
    let name = config.name.clone();
    let stop = StopSignals::catch()?;
    let host = (config.role == Role::Node).then(::node::data::host::start_host);
    member::run(config, host, stop.stop()).await.map_err(|error| {
        let failure = Failure::new(format!("{name}: {error}"));
        match error {
            member::DaemonError::Config(member::config::ConfigError::NotLoopback { .. }) => {
                failure.next("pass --insecure if the network is trusted")
            }
            member::DaemonError::Listen { .. } => failure.next("see what listens there, for example with `ss -ltnp`"),
            _ => failure,
        }
    })
}

/// `cluster list-nodes`.
///
/// # Errors
/// When no quorum answers.
pub async fn list(config: Option<&Path>, args: ListArgs) -> Outcome {
    let status = Cluster::find(config)?.status(true).await?;
    if args.json {
        let all = status::as_json(&status);
        render::json(&json!({"stale": all["stale"], "members": all["members"], "pools": all["pools"]}));
    } else {
        warn_stale(status.stale);
        render::line(status::member_table(&status, |_| true));
    }
    Ok(())
}

/// Says that what follows may be old.
pub fn warn_stale(stale: bool) {
    if stale {
        eprintln!("warning: stale, no quorum: this is what one member last knew");
    }
}

/// `cluster show-node`.
///
/// # Errors
/// When there is no such member, or nobody answers.
pub async fn show(config: Option<&Path>, args: ShowArgs) -> Outcome {
    let status = Cluster::find(config)?.status(true).await?;
    let view = &status.view;
    let Some(found) = view.members.iter().find(|member| member.name == args.name) else {
        return Err(Failure::new(format!("there is no node {}", args.name)).next("`cluster list-nodes` shows them"));
    };
    let pools: Vec<_> = view.pools.iter().filter(|pool| pool.node == found.id).collect();
    let replicas = view.volumes.iter().flat_map(|volume| {
        volume.mirrors.iter().enumerate().flat_map(move |(index, mirror)| {
            mirror.replicas.iter().filter(|replica| replica.node == found.id).map(move |replica| {
                let in_sync = mirror.in_sync.members.contains(&replica.id);
                (volume, index, mirror, replica, in_sync)
            })
        })
    });
    if args.json {
        let mut value = status::as_json(&status)["members"]
            .as_array()
            .and_then(|members| members.iter().find(|member| member["name"] == args.name.as_str()).cloned())
            .unwrap_or(Value::Null);
        value["stale"] = json!(status.stale);
        value["pools"] = json!(pools);
        let replicas = replicas.map(|(volume, index, mirror, replica, in_sync)| {
            json!({"volume": volume.name, "mirror": index, "mirror_id": mirror.id, "size": mirror.size,
                   "replica": replica, "in_sync": in_sync})
        });
        value["replicas"] = json!(replicas.collect::<Vec<_>>());
        render::json(&value);
        return Ok(());
    }
    warn_stale(status.stale);
    render::line(status::member_table(&status, |member| member.id == found.id));
    let rows = pools.iter().map(|pool| {
        [
            pool.name.clone(),
            pool.kind.clone(),
            size::show(pool.capacity),
            size::show(status::allotted(view, |node, name| node == found.id && name == pool.name)),
            size::show(pool.free),
            pool.path.clone(),
        ]
    });
    if found.role == Role::Node {
        render::line(format!("\n{}", render::table(["POOL", "KIND", "CAPACITY", "ALLOTTED", "FREE", "PATH"], rows)));
        let rows = replicas.map(|(volume, index, mirror, replica, in_sync)| {
            [
                volume.name.clone(),
                index.to_string(),
                replica.pool.clone(),
                size::show(mirror.size),
                if in_sync { "yes" } else { "no" }.into(),
                replica.id.to_string(),
            ]
        });
        render::line(format!("\n{}", render::table(["VOLUME", "MIRROR", "POOL", "SIZE", "IN SYNC", "REPLICA"], rows)));
    }
    Ok(())
}
