//! md99's client side. `iscsi` never speaks to a replica; `mirror` never sees an initiator; they meet in `block`.

pub mod block;
pub mod clock;
pub mod control;
pub mod gateway;
pub mod initiator;
pub mod iscsi;
pub mod link;
pub mod mirror;
pub mod scsi;
pub mod volume;
