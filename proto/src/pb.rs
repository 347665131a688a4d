//! The generated gRPC messages, clients and servers. They stop at [`crate::convert`]: past it, code sees the
//! checked types of [`crate::cluster`].

#![allow(clippy::all, missing_docs)]

tonic::include_proto!("md99.v1");
