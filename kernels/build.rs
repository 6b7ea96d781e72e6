//! Compiles `csrc/`: with nvcc under the feature `cuda`, with a C++ compiler under `emulated`. Without either there is nothing to compile.
//!
//! | variable | what it says |
//! |---|---|
//! | `CUDA_COMPUTE_CAP` | compute capability to compile for, as `90`; the default is 90 |
//! | `NVCC`, `CUDA_HOME` | where nvcc is; else on the `PATH` |
//! | `CUTLASS_INCLUDE` | CUTLASS's headers; needed from 90 on |

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
};

/// Needs CUTLASS and Hopper; everything else runs from sm_80 on.
const HOPPER: &str = "grouped_sm90.cu";
const HOPPER_CAPABILITY: u32 = 90;

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    for name in ["CUDA_COMPUTE_CAP", "NVCC", "NVCC_APPEND_FLAGS", "CUDA_HOME", "CUTLASS_INCLUDE"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let (cuda, emulated) = (env::var_os("CARGO_FEATURE_CUDA").is_some(), env::var_os("CARGO_FEATURE_EMULATED").is_some());
    match (cuda, emulated) {
        (true, true) => panic!("the features `cuda` and `emulated` exclude each other: choose one"),
        (true, false) => compile_for_gpus(),
        (false, true) => compile_for_processors(),
        (false, false) => {}
    }
}

/// The files of a folder with this extension, in order of their names.
fn sources(folder: &str, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder}: {error}"));
    let paths = entries.map(|entry| entry.expect("a folder that can be read").path());
    let mut found: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect();
    found.sort();
    found
}

fn compile_for_processors() {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).include("csrc/emulator").include("csrc");
    build.define("HM_EMULATED", None).define("HM_BUILT_FOR", "90").flag("-fno-strict-aliasing").flag("-ffp-contract=off");
    // The extension is nvcc's, and so is `#pragma unroll`.
    build.flag("-x").flag("c++").flag("-Wno-unknown-pragmas");
    build.files(sources("csrc", "cu").into_iter().filter(|path| !path.ends_with(HOPPER)));
    build.files(sources("csrc/emulator", "cpp"));
    build.compile("hardmax_kernels");
}

/// With nvcc itself and not with `cc`, which has it compile for a debugger, without optimisation, wherever the profile asks for debug information.
fn compile_for_gpus() {
    let capability = capability();
    let mut files = sources("csrc", "cu");
    files.retain(|path| capability == HOPPER_CAPABILITY || !path.ends_with(HOPPER));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let objects: Vec<PathBuf> = files.iter().map(|file| out.join(file.file_name().expect("a file")).with_extension("o")).collect();

    let (nvcc, flags) = (nvcc(), flags(capability));
    let work = Mutex::new(files.iter().zip(&objects));
    let next = || work.lock().expect("no thread panics with it").next();
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some((file, object)) = next() {
                    let status = Command::new(&nvcc).args(&flags).arg("-c").arg(file).arg("-o").arg(object).status();
                    let status = status.unwrap_or_else(|error| panic!("{}: {error}", nvcc.display()));
                    assert!(status.success(), "{} of {}: {status}", nvcc.display(), file.display());
                }
            });
        }
    });
    cc::Build::new().cpp(true).objects(objects).compile("hardmax_kernels");
    link(&nvcc);
}

fn capability() -> u32 {
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| HOPPER_CAPABILITY.to_string());
    let capability = capability.parse().unwrap_or_else(|_| panic!("CUDA_COMPUTE_CAP={capability}: write it as {HOPPER_CAPABILITY}"));
    assert!(capability >= 80, "CUDA_COMPUTE_CAP={capability}: bf16 on tensor cores begins at 80");
    capability
}

fn flags(capability: u32) -> Vec<String> {
    // The `a` has wgmma and TMA, and runs on 9.0 alone.
    let suffix = if capability == HOPPER_CAPABILITY { "a" } else { "" };
    let mut flags: Vec<String> =
        ["-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-Icsrc"].map(String::from).into();
    flags.push(format!("-gencode=arch=compute_{capability}{suffix},code=sm_{capability}{suffix}"));
    flags.push(format!("-DHM_BUILT_FOR={capability}"));
    if capability == HOPPER_CAPABILITY {
        let include = env::var("CUTLASS_INCLUDE").unwrap_or_else(|_| {
            panic!("CUTLASS_INCLUDE is not set: the folder of CUTLASS's headers, which the Python package nvidia-cutlass 4.2 brings")
        });
        assert!(Path::new(&include).join("cutlass/cutlass.h").is_file(), "CUTLASS_INCLUDE={include}: there is no cutlass/cutlass.h");
        flags.extend(["-DHM_HOPPER".into(), format!("-I{include}")]);
    }
    flags
}

/// Where the environment says it is, else on the `PATH`.
fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    let found = home.into_iter().chain(env::split_paths(&path)).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file());
    found.expect("no nvcc: put it on the PATH, or set CUDA_HOME or NVCC; kernels/toolkit.sh lays out a toolkit where there is none")
}

/// CUDA's libraries, of the toolkit that `nvcc` belongs to.
fn link(nvcc: &Path) {
    let toolkit = nvcc.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    for folder in ["lib64", "targets/x86_64-linux/lib"].map(|folder| toolkit.join(folder)) {
        if folder.is_dir() {
            println!("cargo:rustc-link-search=native={}", folder.display());
        }
    }
    for library in ["cudart", "cublas"] {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
}
