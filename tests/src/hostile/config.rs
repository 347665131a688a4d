//! The text of `node.toml` and `gateway.toml`.

use client::gateway::GatewayConfig;
use node::control::NodeConfig;

use super::source::Seen;

/// A text of 48 KiB, as values and as an error that shows where it is wrong.
pub const MEMORY: usize = 32 << 20;

pub fn run(input: &[u8], seen: &mut Seen) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    match NodeConfig::parse(text) {
        Ok(config) => {
            assert!(config.check().is_ok(), "what was taken once is taken again");
            let again = toml::to_string(&config).expect("a configuration is TOML");
            assert_eq!(NodeConfig::parse(&again).ok(), Some(config), "it comes back");
            seen.note("node");
        }
        // The last line says what is wrong; those before show where.
        Err(error) => seen.words(error.to_string().trim_end().lines().last().unwrap_or_default()),
    }
    match toml::from_str::<GatewayConfig>(text) {
        Ok(config) => {
            // Names would be looked up, which is no part of this.
            let numbers = |addr: &str| addr.parse::<std::net::SocketAddr>().is_ok();
            if numbers(&config.listen) && numbers(&config.portal) {
                seen.note((config.listen_addr().is_ok(), config.portal_addr().is_ok()));
            }
            let again = toml::to_string(&config).expect("a configuration is TOML");
            assert_eq!(toml::from_str::<GatewayConfig>(&again).ok(), Some(config), "it comes back");
        }
        Err(error) => seen.words(error.message()),
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let node = r#"id = 1
name = "node-1"
role = "node"
dir = "/var/lib/md99/node-1"
control_listen = "127.0.0.1:7400"
data_listen = "[::1]:7401"
insecure = false
[[pools]]
name = "pool-1"
path = "/srv/md99/pool-1"
capacity = 107374182400
[[pools]]
name = "pool-2"
path = "/srv/md99/pool-2"
[cluster]
id = "1f0e8e9c-6a52-4bb8-9a4e-3f3f1a0f7a11"
name = "demo"
[[cluster.members]]
id = 1
name = "node-1"
role = "node"
control_addr = "127.0.0.1:7400"
data_addr = "127.0.0.1:7401"
[[cluster.members]]
id = 2
name = "witness-1"
role = "witness"
control_addr = "127.0.0.1:7402"
"#;
    let gateway = r#"name = "gateway-1"
members = ["127.0.0.1:7400", "127.0.0.1:7402"]
listen = "127.0.0.1:7500"
portal = "127.0.0.1:3260"
threads = 2
insecure = true
"#;
    vec![node.into(), gateway.into()]
}

/// Lines.
pub fn records(input: &[u8]) -> Vec<usize> {
    let ends = input.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    std::iter::once(0).chain(ends).collect()
}

pub const WORDS: &[&[u8]] = &[
    b"[[pools]]\n",
    b"[cluster]\n",
    b"= 18446744073709551615",
    b"= -1",
    b"= 1e400",
    b"= [[[[[[[[[[[[[[[[",
    b"= {a = {b = {c = {",
    b"\"\"\"",
    b"'''",
    b"\\u0000",
    b"0.0.0.0:0",
    b"role = \"witness\"\n",
    b"a.b.c.d.e.f.g.h = 1\n",
];
