//! The flags that say where a model runs, and in what arithmetic.

use clap::Args;

use crate::{
    model::load::{DeviceKind, ServingOptions, WeightType},
    ops::cpu::Reduction,
};

/// Where a model runs, and how.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct ComputeArgs {
    /// Where the model runs. `cuda` needs a build with `--features cuda`.
    #[arg(long, env = "HARDMAX_DEVICE", value_enum, default_value_t)]
    pub device: DeviceKind,
    /// Element type of the large weights. `auto` is f32 on the CPU and bf16 on a GPU.
    #[arg(long, env = "HARDMAX_DTYPE", value_enum, default_value = "auto")]
    pub dtype: WeightType,
    /// Sum every product in an order that does not depend on the batch, so that a request gets exactly the tokens that it gets alone.
    /// Without it, a near-tie between two tokens may be decided otherwise in another batch. CPU only; docs/performance.md says what
    /// it costs.
    #[arg(long, env = "HARDMAX_DETERMINISTIC")]
    pub deterministic: bool,
}

impl ComputeArgs {
    /// The order of sums.
    pub fn reduction(&self) -> Reduction {
        if self.deterministic { Reduction::BatchInvariant } else { Reduction::Fastest }
    }

    /// How a checkpoint is loaded.
    pub fn options(&self) -> ServingOptions {
        ServingOptions { device: self.device, weights: self.dtype, reduction: self.reduction() }
    }
}
