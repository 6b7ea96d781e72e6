//! `hardmax forward`: one forward, with everything it computed in a file. The door for comparisons with other
//! implementations.

use std::{collections::BTreeMap, path::PathBuf};

use candle_core::{Device, Tensor};

use super::compute::ComputeArgs;
use crate::{
    error::{Error, Result},
    model::{Batch, CacheShape, Forward, LogitRows, load::load_to_serve},
    moe::{LayerRouting, Routing, policy::RoutingChoice},
    ops::cpu_slice,
};

/// Run token ids through a model once and write logits and routing to a safetensors file.
///
/// The file holds `logits [T, V]` f32 and, for each MoE layer N (decoder layer from 0), `router_logits.N [T, E]` f32,
/// `expert_ids.N [T, k]` u32 and `expert_weights.N [T, k]` f32, by descending weight. Where the model computes NaN or
/// infinity there is no file, but an error.
#[derive(clap::Args, Debug)]
pub struct ForwardArgs {
    /// Checkpoint folder in Hugging Face layout.
    #[arg(long, env = "HARDMAX_MODEL", default_value = "models/demo")]
    pub model: PathBuf,
    /// Token ids, separated by commas.
    #[arg(long, value_delimiter = ',', required = true)]
    pub input_ids: Vec<u32>,
    /// native, top-K, top-K:raw|renorm|unit, soft or soft:TEMPERATURE. Top-K weighs as the family does; soft mixes all
    /// experts by the full softmax, at the temperature of the reference routing, else 1.
    #[arg(long, default_value = "native")]
    pub routing: RoutingChoice,
    /// File to write.
    #[arg(long)]
    pub output: PathBuf,
    /// Where the model runs, and how.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// Runs the model and writes the file.
pub fn run(args: ForwardArgs) -> Result<()> {
    let (_, model) = load_to_serve(&args.model, args.compute.options(), true)?;
    model.spec().check_routing(&args.routing.into())?;
    let shape = CacheShape { block_tokens: 16, num_blocks: args.input_ids.len().div_ceil(16) };
    let blocks: Vec<u32> = (0..shape.num_blocks as u32).collect();
    let mut batch = Batch::default();
    batch.push(&blocks, &args.input_ids, 0, args.routing, LogitRows::All);
    let forward = model.start(shape)?.forward(&batch)?;
    let tensors = tensors(&forward)?;
    safetensors::serialize_to_file(tensors.iter(), None, &args.output)
        .map_err(|error| Error::io(&args.output, std::io::Error::other(error)))?;
    Ok(())
}

/// By name, on the host.
fn tensors(forward: &Forward) -> Result<BTreeMap<String, Tensor>> {
    let logits = forward.logits.to_device(&Device::Cpu)?;
    if !cpu_slice::<f32, _>(&logits, |logits| Ok(logits.iter().all(|z| z.is_finite())))? {
        return Err(Error::NonFinite);
    }
    let mut tensors = BTreeMap::from([("logits".to_owned(), logits)]);
    for LayerRouting { layer, router_logits, routing, stats } in &forward.layers {
        if stats.non_finite > 0 {
            return Err(Error::NonFinite);
        }
        tensors.insert(format!("router_logits.{layer}"), router_logits.to_device(&Device::Cpu)?);
        let Routing::Sparse(routing) = routing else {
            return Err(Error::Internal("a serving forward routed densely".into()));
        };
        let rows = routing.num_tokens();
        let k = routing.expert_ids.len() / rows.max(1);
        if (0..rows).any(|token| routing.routes(token).len() != k) {
            return Err(Error::Internal(format!("tokens with more and with fewer experts in layer {layer}")));
        }
        tensors.insert(format!("expert_ids.{layer}"), Tensor::from_slice(&routing.expert_ids, (rows, k), &Device::Cpu)?);
        tensors.insert(format!("expert_weights.{layer}"), Tensor::from_slice(&routing.weights, (rows, k), &Device::Cpu)?);
    }
    Ok(tensors)
}
