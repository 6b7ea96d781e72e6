//! How good a gradient of the router is, against the exact one by enumeration of all experts.
//!
//! The exact gradient is that of the expected loss under random routing, `E_{e~p} L(Y_e)`, with weight 1 for the drawn
//! expert: `∂/∂z = p ⊙ (f - <p, f>)` with `f_e = L(Y_e)`. For estimators that draw or mix by a softmax, p is the one they
//! draw from or mix by, masked where they mask it. Where the noise is normal no p is known in closed form: it is the softmax
//! that their weights are without noise, as for `raw_topk`. Others have no p, and no figure.

use super::{
    adam::norm,
    arm::Route,
    metric::{median, quantile},
    net::{Gradients, Means, Net},
    results::{GradientQuality, RouterGradient},
    step::{StepInput, step},
    task::Batch,
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
    let policy = policy(probe.estimator)?;
    let rows = probe.rows.part(0..ROWS);
    let exact = exact(probe.net, &rows, policy);
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
    let GradientQuality { bias, cosine, std, .. } = medians(probes);
    RouterGradient { norm: None, bias, cosine, std }
}

/// Medians and quartiles over those with an exact gradient that is not 0. A mean of 0 has no direction: its cosine counts as 0, and is
/// absent only where all are so, so that the three are of the same probes.
pub fn medians(qualities: &[Quality]) -> GradientQuality {
    let measured: Vec<&Quality> = qualities.iter().filter(|quality| quality.bias.is_finite() && quality.std.is_finite()).collect();
    let middle = |value: fn(&Quality) -> f64| median(&measured.iter().map(|quality| value(quality)).collect::<Vec<_>>());
    let directed = measured.iter().any(|quality| quality.cosine.is_finite());
    let cosine = |quality: &Quality| if quality.cosine.is_finite() { quality.cosine } else { 0.0 };
    let quartiles = |value: fn(&Quality) -> f64| {
        let values: Vec<f64> = measured.iter().map(|quality| value(quality)).collect();
        (!values.is_empty()).then(|| [0.25, 0.75].map(|share| quantile(&values, share)))
    };
    GradientQuality {
        bias: middle(|q| q.bias),
        cosine: directed.then(|| middle(cosine)).flatten(),
        std: middle(|q| q.std),
        bias_quartiles: quartiles(|q| q.bias),
        std_quartiles: quartiles(|q| q.std),
    }
}

/// What a token's one expert is drawn from or mixed by.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Policy {
    /// A softmax, perhaps masked.
    relaxation: Relaxation,
    /// Its temperature.
    temperature: f64,
}

/// Of estimators of one expert per token.
fn policy(estimator: &Estimator) -> Option<Policy> {
    if estimator.k() != 1 {
        return None;
    }
    let scale = estimator.noise.scale;
    match (estimator.relaxation, estimator.noise.kind) {
        (relaxation @ Relaxation::MaskedSoftmax { temperature, .. }, _) => Some(Policy { relaxation, temperature }),
        // The largest of z + s G is a draw from softmax(z / s).
        (Relaxation::Softmax { .. } | Relaxation::KHot { .. }, NoiseKind::Gumbel) if scale > 0.0 => {
            Some(Policy { relaxation: Relaxation::Softmax { temperature: scale }, temperature: scale })
        }
        (relaxation @ Relaxation::Softmax { temperature }, _) => Some(Policy { relaxation, temperature }),
        _ => None,
    }
}

/// Whether a step draws random numbers.
pub fn is_random(estimator: &Estimator) -> bool {
    let noisy = estimator.noise.kind != NoiseKind::None && estimator.noise.scale > 0.0;
    noisy || estimator.noise.dropout > 0.0 || matches!(estimator.relaxation, Relaxation::MaskedSoftmax { .. })
}

/// `[E, D]`: the gradient of the mean over rows of the expected loss under a random expert.
fn exact(net: &Net, rows: &Batch, policy: Policy) -> Vec<f64> {
    let experts = net.shape.experts;
    let all = net.all_outputs(&rows.x);
    let z = net.logits(&rows.x);
    let (mut dz, mut p) = (vec![0.0; z.len()], vec![0.0; experts]);
    let mut unused = vec![0.0; rows.outputs];
    let width = net.shape.router_width;
    for t in 0..rows.rows() {
        let targets = rows.targets.part(t..t + 1, rows.outputs);
        let y = &all[t * experts * rows.outputs..][..experts * rows.outputs];
        let losses: Vec<f64> = y.chunks_exact(rows.outputs).map(|y| targets.loss(y, rows.outputs, &mut unused).iter().sum()).collect();
        policy.relaxation.value(&z[t * width..][..experts], &mut p);
        let gradient = expected_loss_gradient(&p, policy.temperature, &losses);
        dz[t * width..][..experts].iter_mut().zip(gradient).for_each(|(d, g)| *d = g / rows.rows() as f64);
    }
    let mut gradients = Gradients::new(net);
    net.backward_router(&rows.x, &dz, &mut gradients);
    gradients.router.truncate(experts * net.shape.expert.features);
    gradients.router
}

/// `∂/∂z Σ_e p_e f_e` with `p = softmax(z / temperature)`, 0 where p is masked.
pub fn expected_loss_gradient(p: &[f64], temperature: f64, f: &[f64]) -> Vec<f64> {
    let mean: f64 = p.iter().zip(f).map(|(p, f)| p * f).sum();
    p.iter().zip(f).map(|(p, f)| p * (f - mean) / temperature).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::estimator::{
        EstimatorConfig, EstimatorSpec, Purpose,
        catalog::{CATALOG, KRange},
    };

    fn at_the_start(name: &str, k: Option<usize>) -> Estimator {
        let config = EstimatorConfig { name: name.into(), k, params: Default::default() };
        EstimatorSpec::new(&config, 8, 10, Purpose::Laboratory).expect("sound").at(0, 10)
    }

    #[test]
    fn a_softmax_has_a_policy_and_nothing_else_has() {
        let without = ["steep_sigmoid", "sparsemax", "entmax", "soft_topk", "dselect_k", "remoe", "sigmoid_topk"];
        for row in CATALOG {
            let k = (row.k != KRange::None).then_some(1);
            assert_eq!(policy(&at_the_start(row.name, k)).is_some(), !without.contains(&row.name), "{}", row.name);
        }
        assert_eq!(policy(&at_the_start("raw_topk", Some(2))), None);
        assert_eq!(policy(&at_the_start("noisy_topk", Some(1))), policy(&at_the_start("raw_topk", Some(1))));
    }

    #[test]
    fn a_masked_softmax_is_compared_with_itself() {
        let masked = policy(&at_the_start("sparsemixer_v2", Some(1))).expect("a policy");
        let mut p = [0.0; 3];
        masked.relaxation.value(&[2.0, 1.9, -3.0], &mut p);
        assert!(p[2] == 0.0 && (p[0] + p[1] - 1.0).abs() < 1e-12, "{p:?}");
        assert_eq!(expected_loss_gradient(&p, masked.temperature, &[1.0, 1.0, 9.0]), [0.0; 3], "what is masked is never drawn");
    }
}
