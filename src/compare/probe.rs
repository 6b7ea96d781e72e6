//! How good a gradient of the router is, against the exact one by enumeration of all experts.
//!
//! The exact gradient is that of the expected loss under random routing, `E_{e~p} L(Y_e)`, with weight 1 for the drawn
//! expert: `∂/∂z = p ⊙ (f - <p, f>)` with `f_e = L(Y_e)`. For estimators that draw or mix by a softmax, p is the one they
//! draw from or mix by. Others have no p, and no figure.

use super::{
    adam::norm,
    arm::Route,
    metric::median,
    net::{Gradients, Means, Net},
    results::{GradientQuality, RouterGradient},
    step::{StepInput, step},
    task::{Batch, targets::log_sum_exp},
};
use crate::moe::{
    draw::Draw,
    estimator::{Estimator, NoiseKind, Relaxation, StepContext},
};

/// Tokens of a probe.
const ROWS: usize = 64;
/// Draws of a random estimator.
pub const DRAWS: usize = 64;

/// What is probed.
#[derive(Clone, Copy, Debug)]
pub struct Probe<'a> {
    /// Weights.
    pub net: &'a Net,
    /// As in force now.
    pub estimator: &'a Estimator,
    /// The first 64 are used.
    pub rows: &'a Batch,
    /// Running means of the experts' outputs.
    pub means: &'a Means,
    /// Moving average of the loss.
    pub average_loss: f64,
    /// Of the draws.
    pub seed: u64,
}

/// Relative errors of a gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quality {
    /// `‖mean - exact‖ / ‖exact‖`.
    pub bias: f64,
    /// Of mean and exact; NaN where the mean is 0.
    pub cosine: f64,
    /// `√(E‖g - mean‖²) / ‖exact‖`.
    pub std: f64,
}

/// Measures; `None` where there is no exact gradient to compare with.
pub fn quality(probe: &Probe<'_>) -> Option<Quality> {
    let temperature = policy_temperature(probe.estimator)?;
    let rows = probe.rows.part(0..ROWS);
    let exact = exact(probe.net, &rows, temperature);
    let draws = if is_random(probe.estimator) { DRAWS } else { 1 };
    let gradients = (0..draws).map(|draw| {
        let step = step(&StepInput {
            net: probe.net,
            estimator: probe.estimator,
            route: Route::Learned,
            batch: &rows,
            // Layer 1: the training's own noise is of layer 0.
            context: StepContext::train(Draw::new(probe.seed, draw, 1)),
            jitter: 0.0,
            means: probe.means,
            average_loss: probe.average_loss,
            teacher: None,
        });
        step.gradients.router[..exact.len()].to_vec()
    });
    Some(compare(&exact, &gradients.collect::<Vec<_>>()))
}

/// Of the draws of a gradient.
pub fn compare(exact: &[f64], draws: &[Vec<f64>]) -> Quality {
    let n = draws.len().max(1) as f64;
    let mean: Vec<f64> = (0..exact.len()).map(|i| draws.iter().map(|g| g[i]).sum::<f64>() / n).collect();
    let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
    let spread = draws.iter().map(|g| apart(g, &mean)).sum::<f64>() / (n - 1.0).max(1.0);
    let length = norm(exact);
    let dot: f64 = exact.iter().zip(&mean).map(|(a, b)| a * b).sum();
    Quality { bias: apart(&mean, exact).sqrt() / length, cosine: dot / (length * norm(&mean)), std: spread.sqrt() / length }
}

/// Medians over the probes of a run.
pub fn summary(probes: &[Quality]) -> RouterGradient {
    let GradientQuality { bias, cosine, std } = medians(probes);
    RouterGradient { norm: None, bias, cosine, std }
}

/// Medians over those with an exact gradient that is not 0. A mean of 0 has no direction: its cosine counts as 0, and is
/// absent only where all are so, so that the three are of the same probes.
pub fn medians(qualities: &[Quality]) -> GradientQuality {
    let measured: Vec<&Quality> = qualities.iter().filter(|quality| quality.bias.is_finite() && quality.std.is_finite()).collect();
    let middle = |value: fn(&Quality) -> f64| median(&measured.iter().map(|quality| value(quality)).collect::<Vec<_>>());
    let directed = measured.iter().any(|quality| quality.cosine.is_finite());
    let cosine = |quality: &Quality| if quality.cosine.is_finite() { quality.cosine } else { 0.0 };
    GradientQuality { bias: middle(|q| q.bias), cosine: directed.then(|| middle(cosine)).flatten(), std: middle(|q| q.std) }
}

/// τ of the softmax that the estimator draws from or mixes by, for estimators of one expert per token.
pub fn policy_temperature(estimator: &Estimator) -> Option<f64> {
    if estimator.k() != 1 {
        return None;
    }
    match (estimator.relaxation, estimator.noise.kind) {
        // The largest of z + s G is a draw from softmax(z / s).
        (Relaxation::Softmax { .. } | Relaxation::KHot { .. } | Relaxation::MaskedSoftmax { .. }, NoiseKind::Gumbel)
            if estimator.noise.scale > 0.0 =>
        {
            Some(estimator.noise.scale)
        }
        (Relaxation::Softmax { temperature } | Relaxation::MaskedSoftmax { temperature, .. }, _) => Some(temperature),
        _ => None,
    }
}

/// Whether a step draws random numbers.
pub fn is_random(estimator: &Estimator) -> bool {
    let noisy = estimator.noise.kind != NoiseKind::None && estimator.noise.scale > 0.0;
    noisy || estimator.noise.dropout > 0.0 || matches!(estimator.relaxation, Relaxation::MaskedSoftmax { .. })
}

/// `[E, D]`: the gradient of the mean over rows of the expected loss under a random expert.
fn exact(net: &Net, rows: &Batch, temperature: f64) -> Vec<f64> {
    let experts = net.shape.experts;
    let all = net.all_outputs(&rows.x);
    let z = net.logits(&rows.x);
    let mut dz = vec![0.0; z.len()];
    let mut unused = vec![0.0; rows.outputs];
    let width = net.shape.router_width;
    for t in 0..rows.rows() {
        let targets = rows.targets.part(t..t + 1, rows.outputs);
        let y = &all[t * experts * rows.outputs..][..experts * rows.outputs];
        let losses: Vec<f64> = y.chunks_exact(rows.outputs).map(|y| targets.loss(y, rows.outputs, &mut unused).iter().sum()).collect();
        let gradient = expected_loss_gradient(&z[t * width..][..experts], temperature, &losses);
        dz[t * width..][..experts].iter_mut().zip(gradient).for_each(|(d, g)| *d = g / rows.rows() as f64);
    }
    let mut gradients = Gradients::new(net);
    net.backward_router(&rows.x, &dz, &mut gradients);
    gradients.router.truncate(experts * net.shape.expert.features);
    gradients.router
}

/// `∂/∂z Σ_e p_e f_e` with `p = softmax(z / temperature)`.
pub fn expected_loss_gradient(z: &[f64], temperature: f64, f: &[f64]) -> Vec<f64> {
    let scaled: Vec<f64> = z.iter().map(|z| z / temperature).collect();
    let normaliser = log_sum_exp(&scaled);
    let p: Vec<f64> = scaled.iter().map(|z| (z - normaliser).exp()).collect();
    let mean: f64 = p.iter().zip(f).map(|(p, f)| p * f).sum();
    p.iter().zip(f).map(|(p, f)| p * (f - mean) / temperature).collect()
}
