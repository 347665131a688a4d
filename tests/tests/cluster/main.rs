//! Whole clusters of real processes on loopback: what users meet, what they do wrong, and what happens when
//! processes die. Each test brings up its own cluster in a temporary directory on free ports; one at a time, since
//! some measure how long an initiator waits. A test that fails keeps its directory and prints the ends of the logs.

mod bad_input;
mod bench;
mod external;
mod failover;
mod fencing;
mod support;
