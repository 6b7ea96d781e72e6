//! Compiles `proto/` without protoc: protox parses, tonic-prost-build generates into `OUT_DIR`. Takes plotly.js for the live page out of
//! the crate that carries it, and compresses it, so that the program has a third of it and no code around it.

use std::{
    env,
    error::Error,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use flate2::{Compression, write::GzEncoder};
use prost::Message as _;

/// Protocol files, relative to `proto/`. Imported files follow by themselves.
const PROTOS: &[&str] = &["hardmax/v1/inference.proto", "hardmax/v1/routing.proto", "hardmax/v1/tuning.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("hardmax_descriptor.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;

    plotly(&out)?;

    println!("cargo:rerun-if-env-changed=HARDMAX_GIT");
    println!("cargo:rustc-env=HARDMAX_GIT={}", env::var("HARDMAX_GIT").unwrap_or_else(|_| "unknown".into()));
    Ok(())
}

/// Writes `plotly.js.gz`, and tells the version of plotly.js as `HARDMAX_PLOTLY`.
fn plotly(out: &Path) -> Result<(), Box<dyn Error>> {
    let elements = plotly::Plot::offline_js_sources();
    let script = elements.split("</script>").find_map(|element| {
        let (_, script) = element.split_once("<script type=\"text/javascript\">")?;
        script.contains("plotly.js v").then_some(script)
    });
    let script = script.ok_or("the crate plotly has no plotly.js")?;
    let version =
        script.split_once("plotly.js v").and_then(|(_, rest)| rest.split_whitespace().next()).ok_or("plotly.js has no version")?;
    println!("cargo:rustc-env=HARDMAX_PLOTLY={version}");
    let mut file = GzEncoder::new(fs::File::create(out.join("plotly.js.gz"))?, Compression::default());
    file.write_all(script.as_bytes())?;
    file.finish()?;
    Ok(())
}
