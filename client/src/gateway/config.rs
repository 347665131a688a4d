//! What a gateway is told.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};

use serde::{Deserialize, Serialize};

/// A gateway's file (TOML).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewayConfig {
    /// Unique in the cluster; a restarted gateway keeps it, and with it its volumes.
    pub name: String,
    /// `host:port` of members' control services.
    pub members: Vec<String>,
    /// `host:port` where its own control service listens.
    pub listen: String,
    /// `host:port` where initiators log in.
    pub portal: String,
    /// Threads that serve volumes; by default as many as processors, at most four.
    #[serde(default)]
    pub threads: Option<usize>,
    /// Allows to listen on addresses other than loopback, although nothing is authenticated or encrypted yet.
    #[serde(default)]
    pub insecure: bool,
}

/// Why a gateway does not run.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    #[error("{field}: {why}")]
    Config { field: &'static str, why: String },
    #[error("{field} {addr} is not a loopback address: set insecure = true to listen there without authentication")]
    Insecure { field: &'static str, addr: SocketAddr },
    #[error("the {what} cannot listen on {addr}: {error}")]
    Listen { what: &'static str, addr: SocketAddr, error: io::Error },
    #[error("cannot start threads: {0}")]
    Threads(io::Error),
}

impl GatewayConfig {
    /// Where its control service listens.
    ///
    /// # Errors
    /// When the address makes no sense, or is not loopback and `insecure` is not set.
    pub fn listen_addr(&self) -> Result<SocketAddr, GatewayError> {
        if self.name.is_empty() || self.members.is_empty() {
            let field = if self.name.is_empty() { "name" } else { "members" };
            return Err(GatewayError::Config { field, why: "is empty".into() });
        }
        self.addr("listen", &self.listen)
    }

    /// Where initiators log in.
    ///
    /// # Errors
    /// As for [`Self::listen_addr`].
    pub fn portal_addr(&self) -> Result<SocketAddr, GatewayError> {
        self.addr("portal", &self.portal)
    }

    fn addr(&self, field: &'static str, text: &str) -> Result<SocketAddr, GatewayError> {
        let bad = |why: String| GatewayError::Config { field, why: format!("{text:?}: {why}") };
        let mut found = text.to_socket_addrs().map_err(|e| bad(e.to_string()))?;
        let addr = found.next().ok_or_else(|| bad("names no address".into()))?;
        if !addr.ip().is_loopback() && !self.insecure {
            return Err(GatewayError::Insecure { field, addr });
        }
        Ok(addr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_than_loopback_needs_insecure() {
        let mut config = GatewayConfig {
            name: "g".into(),
            members: vec!["127.0.0.1:1".into()],
            listen: "127.0.0.1:2".into(),
            portal: "0.0.0.0:3260".into(),
            threads: None,
            insecure: false,
        };
        assert!(config.listen_addr().is_ok());
        assert!(matches!(config.portal_addr(), Err(GatewayError::Insecure { field: "portal", .. })));
        config.insecure = true;
        assert!(config.portal_addr().is_ok());
        config.portal = "nonsense".into();
        assert!(matches!(config.portal_addr(), Err(GatewayError::Config { field: "portal", .. })));
    }
}
