//! The vocabulary that md99's processes share: identifiers, limits, the replica protocol's frames and the gRPC
//! services; and the buffers and socket options of the data path. Nothing here performs I/O.

pub mod buffer;
pub mod cluster;
pub mod convert;
pub mod frame;
pub mod id;
pub mod limits;
pub mod mutant;
pub mod pb;
pub mod socket;
