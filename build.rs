//! Compiles `proto/` without protoc: protox parses, tonic-prost-build generates into `OUT_DIR`.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

/// Protocol files, relative to `proto/`. Imported files follow by themselves.
const PROTOS: &[&str] = &["hardmax/v1/inference.proto", "hardmax/v1/routing.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("hardmax_descriptor.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;

    println!("cargo:rerun-if-env-changed=HARDMAX_GIT");
    println!("cargo:rustc-env=HARDMAX_GIT={}", env::var("HARDMAX_GIT").unwrap_or_else(|_| "unknown".into()));
    Ok(())
}
