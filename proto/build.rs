//! Compiles the .proto files. protox is a compiler written in Rust: nobody needs protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["trainer.proto"], ["proto"])?;
    prost_build::Config::new().compile_fds(files)?;
    #[cfg(feature = "control")]
    {
        let files = protox::compile(["control.proto"], ["proto"])?;
        // Whoever connects brings the transport: it is a unix socket.
        tonic_prost_build::configure().build_transport(false).compile_fds(files)?;
    }
    Ok(())
}
