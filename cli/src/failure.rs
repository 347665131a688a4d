//! What a command says when it fails: the thing, what is wrong with it, and the next step.

use std::fmt;
use std::path::Path;

use client::control::ControlError;
use proto::cluster::{ObjectKind, Refusal};

use crate::size;

/// Why a command could not do its work.
#[derive(Debug)]
pub struct Failure {
    what: String,
    next: Option<String>,
    status: u8,
}

/// What every command returns.
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// `what` names the thing and what is wrong with it.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), next: None, status: 1 }
    }

    /// A wrong use of the command line: exit status 2.
    pub fn usage(what: impl Into<String>) -> Self {
        Self { status: 2, ..Self::new(what) }
    }

    /// Something at this path.
    pub fn path(path: &Path, attempt: &str, error: impl fmt::Display) -> Self {
        Self::new(format!("{}: {attempt}: {error}", path.display()))
    }

    /// What to do about it.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    /// Adds to what is wrong.
    #[must_use]
    pub fn and(mut self, more: &str) -> Self {
        self.what.push_str(more);
        self
    }

    /// Puts the thing that was attempted before it.
    #[must_use]
    pub fn while_doing(mut self, attempt: &str) -> Self {
        self.what = format!("{attempt}: {}", self.what);
        self
    }

    /// The process's exit status.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// What a cluster said to `attempt`.
    pub fn control(attempt: &str, error: &ControlError) -> Self {
        let failure = match error {
            ControlError::Refused(refusal) => refused(refusal),
            ControlError::NoAnswer { tried, waited_ms, last, in_doubt } => {
                let doubt = if *in_doubt { "; it may have been carried out all the same" } else { "" };
                Self::new(format!("no member gave an answer within {waited_ms} ms ({last}){doubt}"))
                    .next(format!("see which members run and lead: `cluster status` (asked: {tried})"))
            }
            ControlError::BadAnswer { .. } => {
                Self::new(error.to_string()).next("check that all members run the same version of md99")
            }
        };
        failure.while_doing(attempt)
    }
}

fn refused(refusal: &Refusal) -> Failure {
    let failure = Failure::new(refusal.to_string());
    match refusal {
        Refusal::NotFound { kind: ObjectKind::Volume, .. } => failure.next("`cluster list-volumes` shows what exists"),
        Refusal::NotFound { kind: ObjectKind::Gateway, .. } => {
            failure.next("`cluster list-gateways` shows what exists")
        }
        Refusal::NotFound { .. } => failure.next("`cluster status` shows what exists"),
        Refusal::AlreadyExists { .. } => failure.next("choose another name, or delete the old one first"),
        Refusal::InUse { volume, gateway, .. } => {
            failure.next(format!("`cluster unexport-volume {volume}` closes it on {gateway}"))
        }
        Refusal::TooFewNodes { available, .. } if *available > 0 => {
            failure.next(format!("add storage nodes, or ask for fewer copies: `--replicas {available}`"))
        }
        Refusal::TooFewNodes { .. } => failure.next("start the storage nodes: `cluster list-nodes` shows them"),
        Refusal::NoSpace { place, wanted, available } => Failure::new(format!(
            "{place} has {} left, and {} are needed there",
            size::show(*available),
            size::show(*wanted)
        ))
        .next("choose a smaller --size, or delete volumes; `cluster list-nodes` shows the pools"),
        Refusal::NotLeader { .. } | Refusal::Unavailable { .. } | Refusal::Rejudge { .. } => {
            failure.next("see which members run and lead: `cluster status`")
        }
        Refusal::OtherCluster { .. } => {
            failure.next("check the members in the file that --config or MD99_CONFIG names")
        }
        Refusal::Superseded { .. }
        | Refusal::SetChanged { .. }
        | Refusal::WrongState { .. }
        | Refusal::Forgotten { .. } => failure.next("look at it again with `cluster status`, then repeat the command"),
        Refusal::Invalid { .. } => failure,
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        match &self.next {
            Some(next) => write!(f, "\n  next: {next}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_thing_and_the_next_step() {
        let error = ControlError::Refused(Refusal::not_found(ObjectKind::Volume, "tank"));
        let text = Failure::control("show volume tank", &error).to_string();
        assert!(text.contains("tank") && text.contains("list-volumes"), "{text}");
        let error = ControlError::Refused(Refusal::NoSpace {
            place: "node-1/pool-1".into(),
            wanted: 2 << 30,
            available: 1 << 30,
        });
        let text = Failure::control("create volume tank", &error).to_string();
        assert!(text.contains("node-1/pool-1 has 1 GiB left"), "{text}");
    }
}
