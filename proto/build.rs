//! Compiles the .proto files. protox is a compiler written in Rust: nobody needs protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    // The messages of both are the core's; that they go by gRPC is the agent's business.
    let messages = ["trainer.proto", "peer.proto"];
    let mut files = protox::compile(messages, ["proto"])?;
    for file in &mut files.file {
        file.service.clear();
    }
    prost_build::Config::new().compile_fds(files)?;
    #[cfg(feature = "control")]
    {
        let files = protox::compile(["control.proto", "deviceplugin.proto"], ["proto"])?;
        // Whoever connects brings the transport: a unix socket, or what agents have between them.
        tonic_prost_build::configure().build_transport(false).compile_fds(files)?;
        let ask = tonic_prost_build::manual::Method::builder()
            .name("ask")
            .route_name("Ask")
            .input_type("crate::peer::Request")
            .output_type("crate::peer::Reply")
            .codec_path("tonic_prost::ProstCodec")
            .build();
        let service = tonic_prost_build::manual::Service::builder()
            .name("Peer")
            .package("tierkeep.peer")
            .method(ask)
            .build();
        tonic_prost_build::manual::Builder::new().build_transport(false).compile(&[service]);
    }
    Ok(())
}
