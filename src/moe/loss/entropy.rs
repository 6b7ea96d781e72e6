//! Entropies, per token and of the mean, and the z-loss.

use super::softmax::{Sink, View, softmax};

/// `mean_t logsumexp(z_t)²`.
pub(super) fn router_z(view: &View<'_>, sink: &mut Sink<'_>) -> f64 {
    let (n, mut p, mut sum) = (view.tokens(), vec![0.0; view.experts()], 0.0);
    for &t in &view.live {
        let lse = softmax(view.z(t), 1.0, &mut p);
        sum += lse * lse;
        sink.direct(view, t, |e| 2.0 / n * lse * p[e]);
    }
    sum / n
}

/// `mean_t H(p_t)`.
pub(super) fn token(view: &View<'_>, sink: &mut Sink<'_>) -> f64 {
    let (n, mut sum) = (view.tokens(), 0.0);
    for &t in &view.live {
        let p = view.p(t);
        sum += entropy(p);
        sink.through_p(view, t, |e| -ln(p[e]) / n);
    }
    sum / n
}

/// `-H(mean_t p_t)`.
pub(super) fn marginal(view: &View<'_>, sink: &mut Sink<'_>) -> f64 {
    let n = view.tokens();
    let mean: Vec<f64> = view.sum_p(&view.live).iter().map(|sum| sum / n).collect();
    view.live.iter().for_each(|&t| sink.through_p(view, t, |e| ln(mean[e]) / n));
    -entropy(&mean)
}

fn entropy(p: &[f64]) -> f64 {
    p.iter().map(|&p| -p * ln(p)).sum()
}

/// The logarithm, finite at 0: there `p ln p` and its part in the gradient are 0.
fn ln(p: f64) -> f64 {
    p.max(f64::MIN_POSITIVE).ln()
}
