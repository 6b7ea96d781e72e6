//! `hardmax gpu-check`: every kernel against its definition, and a model on the GPU against the same on the CPU.

use std::{collections::BTreeMap, path::PathBuf};

use hardmax_kernels::{
    Device, Stream,
    check::{self, Outcome},
};

use crate::{
    error::{Error, Result},
    model::gpu::parity,
};

/// Hold the CUDA kernels of this program against their definitions, and a model on the GPU against the same on the CPU.
///
/// Prints a table and exits with 1 if anything deviates by more than its tolerance, which is 1 in the table. In a build with
/// `cuda-emulated` the kernels run on the processor.
#[derive(clap::Args, Debug)]
pub struct GpuCheckArgs {
    /// Checkpoint folder for the comparison of models.
    #[arg(long, env = "HARDMAX_MODEL", default_value = "models/demo")]
    pub model: PathBuf,
    /// Small shapes only.
    #[arg(long)]
    pub quick: bool,
    /// Kernels only, no model.
    #[arg(long)]
    pub kernels_only: bool,
}

/// Runs the checks and prints what came of them.
pub fn run(args: GpuCheckArgs) -> Result<()> {
    let device = Device::open(0)?;
    let properties = device.properties();
    let (major, minor) = properties.capability;
    println!(
        "{}: compute capability {major}.{minor}, {} multiprocessors, {} MiB, driver for CUDA {}, built with {}\n",
        properties.name,
        properties.multiprocessors,
        properties.total_bytes >> 20,
        properties.driver,
        properties.runtime
    );
    let stream = Stream::create()?;
    let kernels = check::all(stream, args.quick);
    // SAFETY: the checks have dropped what they made on it.
    unsafe { stream.destroy() };
    let mut bad = print(&kernels?);
    if !args.kernels_only {
        println!();
        bad += print(&parity::compare(&args.model, args.quick)?);
    }
    if bad == 0 {
        return Ok(());
    }
    Err(Error::Internal(format!("{bad} checks deviate by more than they may")))
}

/// A row for each kernel; how many outcomes are bad.
fn print(outcomes: &[Outcome]) -> usize {
    let mut kernels: BTreeMap<&str, Vec<&Outcome>> = BTreeMap::new();
    for outcome in outcomes {
        kernels.entry(outcome.kernel).or_default().push(outcome);
    }
    let width = kernels.keys().map(|name| name.len()).max().unwrap_or(0);
    println!("{:<width$}  shapes  worst  on", "check");
    for (kernel, outcomes) in &kernels {
        let worst = outcomes.iter().fold(outcomes[0], |worst, outcome| if outcome.deviation > worst.deviation { outcome } else { worst });
        println!("{kernel:<width$}  {:>6}  {:>5.2}  {}", outcomes.len(), worst.deviation, worst.shape);
    }
    let is_bad = |outcome: &&Outcome| outcome.deviation.is_nan() || outcome.deviation > 1.0;
    for outcome in outcomes.iter().filter(is_bad) {
        println!("DEVIATES: {} on {}: {:.2} times what is allowed", outcome.kernel, outcome.shape, outcome.deviation);
    }
    outcomes.iter().filter(is_bad).count()
}
