//! An open volume: a stripe over mirrors, under one session.
//!
//! - `stripe`: where a byte of the volume is;
//! - `session`: the core that splits requests over the mirrors, joins their ends, and lets nothing out without a
//!   live lease (R3);
//! - `driver`: the session's place on a thread: its links, its initiators, its clock.

mod driver;
mod session;
mod stripe;

pub use driver::{Volume, VolumeCommand, VolumeConfig, VolumeEvent};
pub use session::{Ended, SessionInput, SessionOutput, VolumeSession};
pub use stripe::{Piece, Stripe};
