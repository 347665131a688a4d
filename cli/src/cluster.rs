//! `cluster init`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use client::control::ControlClient;
use proto::cluster::{ClusterDefinition, Member, Role};
use proto::convert::check_name;
use proto::id::{ClusterId, NodeId};
use tokio::time::Instant;
use uuid::Uuid;

use crate::config::{Cluster, ClusterConfig, DEFAULT_PATH};
use crate::failure::{Failure, Outcome};
use crate::render;

/// How long a cluster that was just formed may take to elect a leader.
const LEADER_PATIENCE: Duration = Duration::from_secs(20);

/// `cluster init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// The cluster's name
    #[arg(long, default_value = "md99")]
    name: String,
    /// A storage node: its name, control address and data address, as in its own configuration; ids count up from 1
    /// in the order given, nodes before witnesses
    #[arg(long = "node", value_name = "NAME=HOST:PORT,HOST:PORT", required = true, value_parser = parse_node)]
    nodes: Vec<Address>,
    /// A witness: its name and control address
    #[arg(long = "witness", value_name = "NAME=HOST:PORT", value_parser = parse_witness)]
    witnesses: Vec<Address>,
}

#[derive(Clone, Debug)]
struct Address {
    name: String,
    control: String,
    data: String,
}

fn parse_named(text: &str) -> Result<(String, &str), String> {
    let (name, rest) = text.split_once('=').ok_or("begins with NAME=")?;
    check_name("name", name).map_err(|bad| bad.to_string())?;
    Ok((name.to_owned(), rest))
}

fn parse_address(text: &str) -> Result<String, String> {
    let port =
        text.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
    match port {
        Some(1..) => Ok(text.to_owned()),
        _ => Err(format!("{text:?} is not HOST:PORT")),
    }
}

fn parse_node(text: &str) -> Result<Address, String> {
    let (name, rest) = parse_named(text)?;
    let (control, data) = rest.split_once(',').ok_or("a node has two addresses: control, then data")?;
    Ok(Address { name, control: parse_address(control)?, data: parse_address(data)? })
}

fn parse_witness(text: &str) -> Result<Address, String> {
    let (name, control) = parse_named(text)?;
    Ok(Address { name, control: parse_address(control)?, data: String::new() })
}

/// `cluster init`. The configuration is written before any member is asked, so that a repeated call goes on under
/// the same cluster id.
///
/// # Errors
/// A file of another cluster, or a member that refuses or does not answer.
pub async fn init(config: Option<&Path>, args: InitArgs) -> Outcome {
    let path: PathBuf = config.unwrap_or(Path::new(DEFAULT_PATH)).to_owned();
    check_name("cluster name", &args.name).map_err(|bad| Failure::usage(format!("--name: {bad}")))?;
    let all: Vec<(Role, Address)> = args
        .nodes
        .into_iter()
        .map(|address| (Role::Node, address))
        .chain(args.witnesses.into_iter().map(|address| (Role::Witness, address)))
        .collect();
    if all.len() > node::control::config::MAX_VOTERS {
        return Err(Failure::usage(format!("{} voters, at most five are allowed", all.len())));
    }
    let members: Vec<Member> = (1..)
        .zip(all)
        .map(|(id, (role, address))| Member {
            id: NodeId(id),
            name: address.name,
            role,
            control_addr: address.control,
            data_addr: address.data,
        })
        .collect();
    for (at, member) in members.iter().enumerate() {
        if let Some(other) =
            members[..at].iter().find(|o| o.name == member.name || o.control_addr == member.control_addr)
        {
            return Err(Failure::usage(format!("{} and {} have the same name or address", other.name, member.name)));
        }
    }
    if members.len().is_multiple_of(2) {
        eprintln!(
            "warning: {} voters survive the loss of no more of them than {} do; a witness more would help",
            members.len(),
            members.len() - 1
        );
    }
    let addrs: Vec<String> = members.iter().map(|member| member.control_addr.clone()).collect();
    let known = match path.exists() {
        true => Some(ClusterConfig::load(&path)?),
        false => None,
    };
    let known = match known {
        Some(known) if known.members == addrs && known.name == args.name => known,
        Some(known) => {
            return Err(Failure::new(format!(
                "{} is of cluster {} ({}) with members {}",
                path.display(),
                known.name,
                known.id,
                known.members.join(", ")
            ))
            .next("name another file with --config, or remove this one if that cluster is gone"));
        }
        None => {
            let new = ClusterConfig { name: args.name, id: ClusterId(Uuid::new_v4()), members: addrs };
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(|error| Failure::path(parent, "cannot create it", error))?;
            }
            new.save(&path)?;
            new
        }
    };
    let definition = ClusterDefinition { id: known.id, name: known.name.clone(), members };
    ControlClient::init(&definition)
        .await
        .map_err(|error| Failure::control("forming the cluster", &error))
        .map_err(|failure| failure.next("start the members that are missing, then repeat the same command"))?;
    let cluster = Cluster::find(Some(&path))?;
    let until = Instant::now() + LEADER_PATIENCE;
    let status = loop {
        match cluster.status(false).await {
            Ok(status) => break status,
            Err(failure) if Instant::now() >= until => return Err(failure),
            Err(_) => {}
        }
    };
    let leader = status.leader.map_or("nobody".into(), |leader| crate::status::name(&status.view, leader));
    eprintln!("cluster {} ({}) is formed, {leader} leads", definition.name, definition.id);
    render::line(format!("export MD99_CONFIG={}", path.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_given_by_name_and_address() {
        let node = parse_node("node-1=10.0.0.1:7400,10.0.0.1:7401").unwrap();
        assert_eq!((node.name.as_str(), node.data.as_str()), ("node-1", "10.0.0.1:7401"));
        assert!(parse_witness("w-1=host:7400").is_ok());
        for bad in ["node-1", "node-1=a:1", "=a:1,b:2", "n=a:0,b:1", "n=a,b:1", "../x=a:1,b:2"] {
            assert!(parse_node(bad).is_err(), "{bad}");
        }
    }
}
