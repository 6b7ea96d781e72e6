//! The backward: from credit to the gradient of the router outputs.

use super::{
    Combine, Estimator, Execution, Gradient, NoiseKind, RoutedBatch, Scope, Weights,
    batch::{finite, mass},
    relax,
    select::top_k,
};

impl Estimator {
    /// `dz += A c`: gradient of `z [T, G]`, which `routed` was made of, from the credit `[T, E]` of the weights.
    ///
    /// Credit is 0 where no expert ran. A row that is not finite gets none.
    pub fn vjp(&self, z: &[f64], routed: &RoutedBatch, credit: &[f64], dz: &mut [f64]) {
        let width = self.router_width(routed.experts).max(1);
        let rows = z.chunks_exact(width).zip(dz.chunks_exact_mut(width)).zip(credit.chunks_exact(routed.experts.max(1)));
        for (token, ((z, dz), credit)) in rows.enumerate().filter(|(_, ((z, _), _))| finite(z)) {
            let mut d_point = vec![0.0; routed.point_row(token).len()];
            RowBackward { estimator: self, routed, token, credit }.add(&mut d_point);
            self.through_noise(z, routed, token, &d_point, dz);
        }
    }

    /// Log-probability `[T]` of the choice of each token, as draws without replacement from the noisy softmax (Plackett
    /// 1975, Luce 1959), the selection bias being part of what was drawn from: it is exact for the choice before
    /// capacity. 0 for a token that is not finite, and for methods that do not choose by the largest noisy logits.
    pub fn log_prob(&self, z: &[f64], routed: &RoutedBatch) -> Vec<f64> {
        let mut log_probs = Vec::with_capacity(routed.tokens);
        for (token, z) in z.chunks_exact(self.router_width(routed.experts).max(1)).enumerate() {
            let mut log_prob = 0.0;
            if finite(z) {
                self.each_draw(routed, token, |expert, p| log_prob += p[expert].max(f64::MIN_POSITIVE).ln());
            }
            log_probs.push(log_prob);
        }
        log_probs
    }

    /// `dz += advantage_t ∇ log π_t` for the choice of every token t; `advantage [T]`.
    pub fn score(&self, z: &[f64], routed: &RoutedBatch, advantage: &[f64], dz: &mut [f64]) {
        let width = self.router_width(routed.experts).max(1);
        let rows = z.chunks_exact(width).zip(dz.chunks_exact_mut(width)).zip(advantage);
        for (token, ((_, dz), advantage)) in rows.enumerate().filter(|(_, ((z, _), _))| finite(z)) {
            let factor = advantage / self.sampling_temperature();
            self.each_draw(routed, token, |expert, p| {
                dz.iter_mut().zip(p).for_each(|(dz, p)| *dz -= factor * p);
                dz[expert] += factor;
            });
        }
    }

    /// Calls `visit` with each drawn expert and the probabilities it was drawn with.
    fn each_draw(&self, routed: &RoutedBatch, token: usize, mut visit: impl FnMut(usize, &[f64])) {
        let mut logits = routed.point_row(token).to_vec();
        if self.reads_columns() || !self.chooses_top_k() {
            return;
        }
        logits.iter_mut().zip(&routed.bias).for_each(|(z, bias)| *z += bias);
        let mut p = vec![0.0; logits.len()];
        for &expert in routed.wanted().of(token) {
            relax::softmax(&logits, self.sampling_temperature(), &mut p);
            visit(expert as usize, &p);
            logits[expert as usize] = f64::NEG_INFINITY;
        }
    }

    /// τ of the softmax that a choice under Gumbel noise is drawn from.
    fn sampling_temperature(&self) -> f64 {
        if self.noise.scale > 0.0 { self.noise.scale } else { 1.0 }
    }

    /// From where the relaxation was evaluated to the router outputs.
    fn through_noise(&self, z: &[f64], routed: &RoutedBatch, token: usize, d_point: &[f64], dz: &mut [f64]) {
        dz.iter_mut().zip(d_point).for_each(|(dz, d)| *dz += d);
        if self.noise.kind == NoiseKind::Learned && self.noise.scope == Scope::Both {
            let experts = routed.experts;
            let normals = &routed.normals[token * experts..][..experts];
            for (e, (d, normal)) in d_point.iter().zip(normals).enumerate() {
                dz[experts + e] += d * normal * relax::sigmoid(z[experts + e]);
            }
        }
    }
}

/// The backward of one row, up to where its relaxation was evaluated.
struct RowBackward<'a> {
    estimator: &'a Estimator,
    routed: &'a RoutedBatch,
    token: usize,
    credit: &'a [f64],
}

impl RowBackward<'_> {
    fn add(&self, d: &mut [f64]) {
        match self.estimator.gradient {
            Gradient::Zero => {}
            Gradient::Exact | Gradient::Score { .. } => self.exact(d),
            Gradient::StraightThrough { normalised } => self.straight_through(normalised, d),
            Gradient::ReinMax => self.reinmax(d),
            Gradient::Corrected { star } => self.corrected(if star { 2.0 } else { 1.0 }, d),
        }
    }

    fn exact(&self, d: &mut [f64]) {
        match self.estimator.weights {
            Weights::Relaxed => self.relaxation(self.credit, d),
            Weights::Chosen => self.relaxation(&self.of_chosen(|e| self.credit[e]), d),
            Weights::Renorm => self.relaxation(&self.normalised(|_| 0.0), d),
            // The second has a rule of its own, which leaves its coin out: [`Gradient::Corrected`].
            Weights::Unit | Weights::Corrected { .. } => {}
        }
    }

    fn straight_through(&self, normalised: bool, d: &mut [f64]) {
        let Estimator { weights, combine, .. } = self.estimator;
        match (combine, weights) {
            (Combine::Mixture(Execution::Chosen), _) => self.relaxation(&self.of_chosen(|e| self.credit[e]), d),
            (_, Weights::Renorm) if normalised => {
                // Of what was not chosen: over the sum that the choice has by rights. Where epsilon, a bias or capacity
                // chose in its place, the sum of the chosen may be as small as it likes.
                let best = self.most_probable();
                self.relaxation(&self.normalised(|e| self.credit[e] / best), d);
            }
            _ => self.relaxation(self.credit, d),
        }
    }

    /// `2 J(π) c - ½ J(p) c` (Liu et al. 2023, algorithm 2): `p = softmax(z)` is what the choice D was drawn from,
    /// whatever the temperature; `π = ½ (softmax(z / τ) + D)`. Both Jacobians are those of a softmax at temperature 1:
    /// line 4 of the algorithm writes π as `softmax(ln π - sg(z) + z)`.
    fn reinmax(&self, d: &mut [f64]) {
        let point = self.routed.point_row(self.token);
        let mut p = vec![0.0; point.len()];
        relax::softmax(point, 1.0, &mut p);
        let mut pi: Vec<f64> = self.routed.relaxed_row(self.token).iter().map(|p| 0.5 * p).collect();
        self.routed.wanted().of(self.token).iter().take(1).for_each(|&e| pi[e as usize] += 0.5);
        relax::softmax_vjp(&pi, self.credit, 2.0, d);
        relax::softmax_vjp(&p, self.credit, -0.5, d);
    }

    /// Of each draw by itself: `factor · J (c ⊙ m)`.
    fn corrected(&self, factor: f64, d: &mut [f64]) {
        for draw in self.estimator.draws(self.routed, self.token) {
            let mut v = vec![0.0; self.credit.len()];
            v[draw.expert] = factor * self.credit[draw.expert];
            self.estimator.relaxation.vjp(&draw.point, &draw.relaxed, &v, d);
        }
    }

    fn relaxation(&self, v: &[f64], d: &mut [f64]) {
        let (point, p) = (self.routed.point_row(self.token), self.routed.relaxed_row(self.token));
        self.estimator.relaxation.vjp(point, p, v, d);
    }

    /// A value for each chosen expert, 0 elsewhere.
    fn of_chosen(&self, value: impl Fn(usize) -> f64) -> Vec<f64> {
        let mut v = vec![0.0; self.credit.len()];
        self.routed.rows().of(self.token).iter().for_each(|&e| v[e as usize] = value(e as usize));
        v
    }

    /// Relaxed weight of the k most probable experts together.
    fn most_probable(&self) -> f64 {
        let p = self.routed.relaxed_row(self.token);
        mass(p, &top_k(p, self.estimator.k()))
    }

    /// Backward of the division by the sum n of the chosen: `(c - <g,c>)/n` for those, `other` for the rest.
    fn normalised(&self, other: impl Fn(usize) -> f64) -> Vec<f64> {
        let chosen = self.routed.rows().of(self.token);
        let sum = mass(self.routed.relaxed_row(self.token), chosen);
        if sum <= 0.0 {
            return vec![0.0; self.credit.len()];
        }
        let weights = self.routed.weights_row(self.token);
        let mean: f64 = chosen.iter().map(|&e| weights[e as usize] * self.credit[e as usize]).sum();
        let mut v: Vec<f64> = (0..self.credit.len()).map(other).collect();
        chosen.iter().for_each(|&e| v[e as usize] = (self.credit[e as usize] - mean) / sum);
        v
    }
}
