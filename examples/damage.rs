//! Damages the routers of a checkpoint, so that there is something for `hardmax tune` to mend.
//!
//! ```sh
//! cargo run --release --example damage -- models/demo damaged 0.25 0.3
//! ```
//!
//! Every router becomes `FACTOR · router + NOISE · σ · N(0, 1)`, σ being the root mean square of its values; FACTOR is 0.25 and NOISE 0.3
//! unless given. Without noise, top-1 is what it was, and any rescaling mends it: only the noise is damage that has to be learned away.

use std::{collections::BTreeMap, error::Error, path::Path};

use candle_core::{DType, Device, Tensor};
use hardmax::checkpoint::{Checkpoint, Delta, LoadOptions, export};
use rand::{Rng, SeedableRng, rngs::StdRng};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (Some(from), Some(to)) = (arguments.first(), arguments.get(1)) else {
        return Err("damage FROM TO [FACTOR] [NOISE]".into());
    };
    let number = |at: usize, default: f64| arguments.get(at).map_or(Ok(default), |text| text.parse());
    let (factor, noise) = (number(2, 0.25)?, number(3, 0.3)?);
    let base = Checkpoint::open(Path::new(from))?;
    let weights = base.load(&LoadOptions { dtype: DType::F32, device: Device::Cpu, progress: false })?;
    let mut rng = StdRng::seed_from_u64(1);
    let mut tensors = BTreeMap::new();
    for (name, router) in weights.named().into_iter().filter(|(name, _)| name.ends_with(".router")) {
        tensors.insert(name, damaged(router, factor, noise, &mut rng)?);
    }
    let routing = base.routing().cloned().unwrap_or_default();
    export(&base, Path::new(to), &Delta { base: base.digest()?, routing, tensors })?;
    Ok(())
}

fn damaged(router: &Tensor, factor: f64, noise: f64, rng: &mut StdRng) -> Result<Tensor, Box<dyn Error>> {
    let values = router.flatten_all()?.to_vec1::<f32>()?;
    let square = values.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>();
    let scale = noise * (square / values.len().max(1) as f64).sqrt();
    let values: Vec<f32> = values.iter().map(|&w| (factor * f64::from(w) + scale * normal(rng)) as f32).collect();
    Ok(Tensor::from_vec(values, router.shape(), &Device::Cpu)?)
}

/// A standard normal number (Box and Muller).
fn normal(rng: &mut StdRng) -> f64 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
}
