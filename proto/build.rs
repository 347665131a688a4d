//! Generates the gRPC services from `proto/*.proto`. protox parses them, so that no machine needs `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = ["types.proto", "raft.proto", "control.proto", "admin.proto", "gateway.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().emit_rerun_if_changed(false).bytes(".md99.v1.RaftBatch").compile_fds(descriptors)?;
    Ok(())
}
