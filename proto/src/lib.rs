//! The vocabulary that md99's processes share: identifiers, limits, the replica protocol's frames and the gRPC
//! services. Nothing here performs I/O.

pub mod cluster;
pub mod convert;
pub mod frame;
pub mod id;
pub mod limits;
pub mod mutant;
pub mod pb;
