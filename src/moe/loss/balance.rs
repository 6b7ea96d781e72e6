//! Losses that even out the load, and the z-loss.

use super::softmax::{Sink, View, softmax};

/// `E Σ_e f_e P_e`, f from the largest logit; ties to the lowest index.
pub(super) fn switch(view: &View<'_>, sink: &mut Sink<'_>) -> f64 {
    let mut counts = vec![0.0; view.experts()];
    for &t in &view.live {
        let z = view.z(t);
        counts[(1..z.len()).fold(0, |best, e| if z[e] > z[best] { e } else { best })] += 1.0;
    }
    product(view, sink, &view.live, &shares(counts, view.tokens()), 1.0)
}

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

/// `weight · E Σ_e f_e P_e` over some tokens, with given shares `f [E]`.
fn product(view: &View<'_>, sink: &mut Sink<'_>, tokens: &[usize], f: &[f64], weight: f64) -> f64 {
    let factor = weight * view.experts() as f64 / tokens.len().max(1) as f64;
    tokens.iter().for_each(|&t| sink.through_p(view, t, |e| factor * f[e]));
    factor * view.sum_p(tokens).iter().zip(f).map(|(p, f)| p * f).sum::<f64>()
}

fn shares(counts: Vec<f64>, whole: f64) -> Vec<f64> {
    counts.into_iter().map(|n| n / whole).collect()
}
