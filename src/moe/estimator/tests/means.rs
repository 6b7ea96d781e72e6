//! Means over draws, against the exact gradient where the method is unbiased, and against its known bias where it is not.
//!
//! What a mean has to be is written out from the definitions: by enumeration of draws and coins, or, where noise is
//! continuous, as an integral over the noise of two or three experts. Means over many draws are to lie within four and a
//! half standard errors of it, which are so small that the wrong sign or a tenth more would be seen.

use super::{
    sampling::{EXPERTS, Task, add, distance, drawn, jacobian, one_hot, pair_probability, pairs},
    *,
};
use crate::moe::estimator::{Estimator, RoutedBatch, StepContext};

/// Central differences of `f` at `z`.
fn slopes(z: &[f64], h: f64, f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let at = |j: usize, d: f64| {
        let mut near = z.to_vec();
        near[j] += d;
        f(&near)
    };
    (0..z.len()).map(|j| (at(j, h) - at(j, -h)) / (2.0 * h)).collect()
}

/// The gradient of the router outputs over many draws.
struct Sampled {
    mean: Vec<f64>,
    /// Standard error of each component of the mean.
    error: Vec<f64>,
}

impl Sampled {
    /// Of `draws` rows with the same router outputs `z`; `credit` is that of the weights of a row.
    fn new(estimator: &Estimator, z: &[f64], experts: usize, draws: usize, credit: impl Fn(&[f64]) -> Vec<f64>) -> Self {
        let rows = z.repeat(draws);
        let routed = estimator.route(&rows, experts, &StepContext::train(Draw::new(31, 0, 0)));
        let credit: Vec<f64> = routed.weights.chunks(experts).flat_map(credit).collect();
        let mut dz = vec![0.0; rows.len()];
        estimator.vjp(&rows, &routed, &credit, &mut dz);
        let n = draws as f64;
        let component = |i: usize| {
            let values = || dz.iter().skip(i).step_by(z.len());
            let mean = values().sum::<f64>() / n;
            (mean, (values().map(|d| (d - mean).powi(2)).sum::<f64>() / (n * n)).sqrt())
        };
        let (mean, error) = (0..z.len()).map(component).unzip();
        Self { mean, error }
    }

    fn assert_is(&self, expected: &[f64], what: &str) {
        let Self { mean, error } = self;
        let near = mean.iter().zip(error).zip(expected).all(|((mean, error), expected)| (mean - expected).abs() <= 4.5 * error + 1e-12);
        assert!(near, "{what}: {mean:?} ± {error:?} is not {expected:?}");
        let [size, error] = [expected, &error[..]].map(|values| dot(values, values).sqrt());
        assert!(9.0 * error < 0.1 * size, "{what}: {error} of {size} is too much to tell");
    }
}

/// Of the mask of SparseMixer-v2: between the logits of the tasks there are some near and some far.
const R: f64 = 0.4;

/// SparseMixer-v2 as the paper on GRIN has it, with the mask of the released code.
#[derive(Clone, Copy, Debug)]
struct Grin {
    star: bool,
}

impl Grin {
    const BOTH: [Self; 2] = [Self { star: false }, Self { star: true }];

    fn temperature(self) -> f64 {
        if self.star { 2.0 } else { 1.0 }
    }

    fn estimator(self, k: usize) -> Estimator {
        spec("sparsemixer_v2", Some(k), &[("r", number(R)), ("star", Param::Flag(self.star))], EXPERTS).at(0, 1)
    }

    /// The masked softmax of what the draws of `gone` left.
    fn p(self, z: &[f64], gone: &[usize]) -> Vec<f64> {
        let top = z[largest(z, gone)];
        let near = |e: usize| !gone.contains(&e) && top - z[e] <= 2.0 * R * z[e].abs().max(top);
        softmax(&(0..EXPERTS).map(|e| if near(e) { z[e] / self.temperature() } else { f64::NEG_INFINITY }).collect::<Vec<_>>())
    }

    /// `∂p_e/∂z`.
    fn slope(self, p: &[f64], e: usize) -> Vec<f64> {
        jacobian(p, &one_hot(e)).iter().map(|d| d / self.temperature()).collect()
    }

    /// Factors that the weight of a draw may get, with their probabilities.
    fn coin(self, z: &[f64], gone: &[usize], e: usize) -> Vec<(f64, f64)> {
        let heads = if self.star { 0.625 } else { 0.25 };
        if e == largest(z, gone) { vec![(1.0, 1.0)] } else { vec![(heads, 1.0), (1.0 - heads, 1.0 / 3.0)] }
    }

    /// What the mean over its coin gives a draw to multiply `∂p_e/∂z` with. By Heun's third-order method the coin
    /// integrates the slope of the loss from no output to that of the draw, exactly for a cubic loss. The largest logit
    /// has no coin.
    fn pull(self, Parts { choice, weight }: Parts, largest: bool) -> f64 {
        match (self.star, largest) {
            (false, false) => choice,
            (false, true) => weight,
            (true, false) => choice + weight,
            (true, true) => 2.0 * weight,
        }
    }

    /// Every outcome of draws and coins with its probability: noise is drawn until they are all there.
    fn outcomes(self, z: &[f64], estimator: &Estimator) -> Vec<(f64, RoutedBatch)> {
        let mut outcomes: Vec<(f64, RoutedBatch)> = Vec::new();
        let mut total = 0.0;
        for seed in 0..1_000_000 {
            let routed = estimator.route(z, EXPERTS, &StepContext::train(Draw::new(seed, 2, 0)));
            if outcomes.iter().all(|(_, known)| (&known.chosen, &known.weights) != (&routed.chosen, &routed.weights)) {
                let probability = self.probability(z, &routed);
                total += probability;
                outcomes.push((probability, routed));
            }
            if total > 1.0 - 1e-9 {
                assert!(total < 1.0 + 1e-9, "{self:?}: more outcomes than there are");
                return outcomes;
            }
        }
        panic!("{self:?}: outcomes of {total} only");
    }

    fn probability(self, z: &[f64], routed: &RoutedBatch) -> f64 {
        let (mut gone, mut probability) = (Vec::new(), 1.0);
        for e in routed.chosen.iter().map(|e| *e as usize) {
            let p = self.p(z, &gone)[e];
            let coin = self.coin(z, &gone, e).into_iter().find(|(_, factor)| (factor * p - routed.weights[e]).abs() < 1e-12);
            probability *= p * coin.expect("a factor of the coin").0;
            gone.push(e);
        }
        probability
    }

    /// The mean of the gradient, every outcome with its probability.
    fn mean(self, task: &Task, k: usize) -> Vec<f64> {
        let estimator = self.estimator(k);
        let mut mean = vec![0.0; EXPERTS];
        for (probability, routed) in self.outcomes(&task.z, &estimator) {
            add(&mut mean, probability, &task.gradient(&estimator, &routed));
        }
        mean
    }

    /// What the mean has to be of one draw: the slope of `Σ_e p_e L(p_e Y_e)`, and the known bias. The starred form lacks at
    /// the largest logit what the coin is for, and has the gradient of its weight twice. The other leaves out the gradient
    /// of the weight but there, and there that of the choice.
    fn of_one(self, task: &Task) -> Vec<f64> {
        let p = self.p(&task.z, &[]);
        let objective = |z: &[f64]| self.p(z, &[]).into_iter().enumerate().map(|(e, p)| p * task.loss(&only(e, p))).sum::<f64>();
        let mut mean = slopes(&task.z, 1e-5, objective);
        for e in 0..EXPERTS {
            let parts = Parts::new(task, &[0.0; EXPERTS], e, p[e]);
            let bias = self.pull(parts, e == largest(&task.z, &[])) - parts.choice - parts.weight;
            add(&mut mean, bias, &self.slope(&p, e));
        }
        mean
    }

    /// What the mean has to be of two draws: each has the pull that it would have alone, beside what the other one gives,
    /// over the draws and the coin of the other.
    fn of_two(self, task: &Task) -> Vec<f64> {
        let z = &task.z;
        let first = self.p(z, &[]);
        let mut mean = vec![0.0; EXPERTS];
        for [a, b] in pairs().map(|pair| pair.map(|e| e as usize)) {
            let second = self.p(z, &[a]);
            for (probability, factor) in self.coin(z, &[a], b) {
                let parts = Parts::new(task, &only(b, factor * second[b]), a, first[a]);
                add(&mut mean, second[b] * probability * self.pull(parts, a == largest(z, &[])), &self.slope(&first, a));
            }
            for (probability, factor) in self.coin(z, &[], a) {
                let parts = Parts::new(task, &only(a, factor * first[a]), b, second[b]);
                add(&mut mean, first[a] * probability * self.pull(parts, b == largest(z, &[a])), &self.slope(&second, b));
            }
        }
        mean
    }
}

fn largest(z: &[f64], gone: &[usize]) -> usize {
    (0..z.len()).filter(|e| !gone.contains(e)).max_by(|a, b| z[*a].total_cmp(&z[*b])).expect("one is left")
}

fn only(e: usize, weight: f64) -> Vec<f64> {
    one_hot(e).iter().map(|one| weight * one).collect()
}

/// What depends on the probability of a draw.
#[derive(Clone, Copy)]
struct Parts {
    /// The loss with the draw, above that without it.
    choice: f64,
    /// The probability as a weight, times its credit.
    weight: f64,
}

impl Parts {
    /// Of expert e with weight p beside those of `rest`.
    fn new(task: &Task, rest: &[f64], e: usize, p: f64) -> Self {
        let mut with = rest.to_vec();
        with[e] += p;
        Self { choice: task.loss(&with) - task.loss(rest), weight: p * task.credit(&with)[e] }
    }
}

#[test]
fn sparsemixer_has_the_bias_that_it_is_known_for() {
    for grin in Grin::BOTH {
        let mut masked = 0;
        for seed in 0..6 {
            let task = Task::cubic(seed);
            masked += grin.p(&task.z, &[]).iter().filter(|p| **p == 0.0).count();
            assert_close(&grin.mean(&task, 1), &grin.of_one(&task), 1e-8, &format!("{grin:?}, task {seed}"));
        }
        assert!((1..6 * (EXPERTS - 1)).contains(&masked), "{grin:?}: some are masked, {masked}");
    }
}

#[test]
fn sparsemixer_of_two_draws_integrates_one_beside_the_other() {
    for grin in Grin::BOTH {
        for seed in 0..4 {
            let task = Task::cubic(seed);
            assert_close(&grin.mean(&task, 2), &grin.of_two(&task), 1e-12, &format!("{grin:?}, task {seed}"));
        }
    }
}

/// Now without forcing draws and coins.
#[test]
fn many_draws_of_sparsemixer_have_that_mean() {
    let task = Task::cubic(1);
    for grin in Grin::BOTH {
        for (k, expected) in [(1, grin.of_one(&task)), (2, grin.of_two(&task))] {
            let found = Sampled::new(&grin.estimator(k), &task.z, EXPERTS, 50_000, |weights| task.credit(weights));
            found.assert_is(&expected, &format!("{grin:?}, k = {k}"));
        }
    }
}

/// Two experts drawn and renormalised: the gradient of the dense mixture, its credit taken at the mean over draws.
#[test]
fn sampled_straight_through_of_two_credits_all_with_what_was_drawn() {
    let estimator = spec("ste", Some(2), &[("sampled", Param::Flag(true))], EXPERTS).at(0, 1);
    for seed in 0..5 {
        let task = Task::new(seed);
        let (mut mean, mut credit) = (vec![0.0; EXPERTS], vec![0.0; EXPERTS]);
        for pair in pairs() {
            let (probability, routed) = (pair_probability(&task.z, pair), drawn(&estimator, &task.z, &pair));
            add(&mut mean, probability, &task.gradient(&estimator, &routed));
            add(&mut credit, probability, &task.credit(&routed.weights));
        }
        assert_close(&mean, &jacobian(&softmax(&task.z), &credit), 1e-12, "k = 2");
    }
}

/// Under the same noise, with a step that moves no choice: the mean gradient of a mixture is that of its objective; of a
/// choice it is that of the weights, the choice held.
#[test]
fn means_are_slopes_under_the_same_noise() {
    const ROWS: usize = 500;
    for (name, k, params) in [
        ("gumbel_soft", None, vec![("temperature", number(0.7)), ("noise", number(1.0))]),
        ("gumbel_soft", None, vec![("temperature", number(0.4)), ("noise", number(0.5))]),
        ("noisy_topk", Some(1), vec![]),
        ("noisy_topk", Some(2), vec![]),
    ] {
        let (estimator, task) = (spec(name, k, &params, EXPERTS).at(0, STEPS), Task::new(4));
        let mut z = task.z.clone();
        z.extend(normals(7, estimator.router_width(EXPERTS) - EXPERTS, 0.5));
        let route = |z: &[f64]| estimator.route(&z.repeat(ROWS), EXPERTS, &StepContext::train(Draw::new(31, 0, 0)));
        let held = route(&z);
        let objective = |near: &[f64]| {
            let routed = route(near);
            assert!(name == "gumbel_soft" || routed.chosen == held.chosen, "{name}: the step is too wide");
            routed.weights.chunks(EXPERTS).map(|weights| task.loss(weights)).sum::<f64>() / ROWS as f64
        };
        let found = Sampled::new(&estimator, &z, EXPERTS, ROWS, |weights| task.credit(weights));
        assert_close(&found.mean, &slopes(&z, 1e-6, objective), 1e-8, name);
    }
}

/// Two experts with a number each for output, logits `gap` and 0, and `L(y) = ½ (y - a)²`.
struct Two {
    gap: f64,
    outputs: [f64; 2],
    target: f64,
}

const TWO: Two = Two { gap: 0.4, outputs: [1.0, -0.5], target: 2.0 };

impl Two {
    fn error(&self, weights: &[f64]) -> f64 {
        dot(weights, &self.outputs) - self.target
    }

    fn loss(&self, weights: &[f64]) -> f64 {
        0.5 * self.error(weights).powi(2)
    }

    fn credit(&self, weights: &[f64]) -> Vec<f64> {
        self.outputs.iter().map(|output| self.error(weights) * output).collect()
    }

    /// `∂/∂gap` of the expected loss, one expert drawn from the softmax.
    fn exact(&self) -> f64 {
        let p = open(self.gap);
        p * (1.0 - p) * (self.loss(&[1.0, 0.0]) - self.loss(&[0.0, 1.0]))
    }
}

fn open(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Of the difference of two standard Gumbel variables.
fn logistic(x: f64) -> f64 {
    open(x) * open(-x)
}

/// `∫ density(x) f(x) dx` by midpoints of strips of about two thousandths. f may jump at `seam`, which is a seam of strips.
fn integral(density: impl Fn(f64) -> f64, seam: f64, f: impl Fn(f64) -> f64) -> f64 {
    const STRIPS: usize = 20_000;
    const REACH: f64 = 40.0;
    let side = |end: f64| {
        let width = (end - seam) / STRIPS as f64;
        let middles = (0..STRIPS).map(|i| seam + (i as f64 + 0.5) * width);
        middles.map(|x| density(x) * f(x)).sum::<f64>() * width.abs()
    };
    side(-REACH) + side(REACH)
}

/// `∂/∂gap` that a Gumbel estimator has in the mean: of `J c` of the relaxation, the credit taken at the mixture or at the
/// draw.
fn gumbel_mean(two: &Two, mixture: bool, temperature: f64) -> f64 {
    integral(logistic, -two.gap, |noise| {
        let q = open((two.gap + noise) / temperature);
        let won = f64::from(two.gap + noise > 0.0);
        let weight = if mixture { q } else { won };
        let credit = two.credit(&[weight, 1.0 - weight]);
        (credit[0] - credit[1]) * q * (1.0 - q) / temperature
    })
}

/// Gumbel-softmax is unbiased for the mixture that it trains; for the choice that is served in its place it has a bias, as
/// its straight-through forms have, which falls with the temperature.
#[test]
fn gumbel_softmax_has_the_bias_of_its_temperature() {
    for temperature in [1.0, 0.5, 0.25] {
        let objective = |gap: &[f64]| {
            integral(logistic, -TWO.gap, |noise| {
                let q = open((gap[0] + noise) / temperature);
                TWO.loss(&[q, 1.0 - q])
            })
        };
        let unbiased = slopes(&[TWO.gap], 1e-4, objective)[0];
        assert!((gumbel_mean(&TWO, true, temperature) / unbiased - 1.0).abs() < 1e-6, "the mixture's own, at {temperature}");
    }
    for (name, biases) in [
        ("gumbel_soft", [-0.3406, -0.1559, -0.0588]),
        ("gumbel_st", [-0.3607, -0.1698, -0.0666]),
        ("gumbel_topk", [-0.3607, -0.1698, -0.0666]),
    ] {
        for (temperature, bias) in [1.0, 0.5, 0.25].into_iter().zip(biases) {
            let params = [("temperature", number(temperature)), ("noise", number(1.0))];
            let estimator = spec(name, None, &params, 2).at(0, 1);
            let found = Sampled::new(&estimator, &[TWO.gap, 0.0], 2, 25_000, |weights| TWO.credit(weights));
            let mean = gumbel_mean(&TWO, name == "gumbel_soft", temperature);
            found.assert_is(&[mean, -mean], &format!("{name} at {temperature}"));
            let relative = mean / TWO.exact() - 1.0;
            assert!((relative - bias).abs() < 1e-4, "{name} at {temperature}: a bias of {relative}");
            assert!((found.mean[0] - TWO.exact()).abs() > 4.5 * found.error[0], "{name} at {temperature}: seen above the noise");
        }
    }
}

/// Of a linear loss at equal logits and temperature 1 the relaxed weight is uniform: `E q (1-q)` is 1/6 where `p (1-p)` is
/// 1/4.
#[test]
fn gumbel_softmax_misses_a_third_of_a_linear_loss() {
    assert!((integral(logistic, 0.0, |x| open(x) * open(-x)) - 1.0 / 6.0).abs() < 1e-7);
    for name in ["gumbel_soft", "gumbel_st", "gumbel_topk"] {
        let estimator = spec(name, None, &[("temperature", number(1.0)), ("noise", number(1.0))], 2).at(0, 1);
        let found = Sampled::new(&estimator, &[0.0, 0.0], 2, 10_000, |_| vec![1.0, 0.0]);
        found.assert_is(&[1.0 / 6.0, -1.0 / 6.0], name);
        assert!(0.25 - found.mean[0] > 9.0 * found.error[0], "{name}");
    }
}

/// Two of three under a linear loss: the mean is the slope of the relaxed objective, an integral over the noise of two
/// experts less that of the third, and comes to that of the drawn pair (Plackett and Luce) as the temperature falls.
#[test]
fn gumbel_top_two_has_the_bias_of_its_temperature() {
    let (z, credit) = ([0.5, 0.0, -0.3], [1.0, -0.4, 0.3]);
    let pair = |z: &[f64]| {
        let p = softmax(z);
        let ordered = (0..3).flat_map(|a| (0..3).filter(move |b| *b != a).map(move |b| (a, b)));
        ordered.map(|(a, b)| p[a] * p[b] / (1.0 - p[a]) * 0.5 * (credit[a] + credit[b])).sum::<f64>()
    };
    let exact = slopes(&z, 1e-5, pair);
    for (temperature, bias) in [(1.0, 0.2258), (0.5, 0.1473)] {
        let params = [("temperature", number(temperature)), ("noise", number(1.0))];
        let estimator = spec("gumbel_topk", Some(2), &params, 3).at(0, 1);
        let expected = slopes(&z, 1e-4, |z| two_of_three(z, temperature, &credit));
        let found = Sampled::new(&estimator, &z, 3, 25_000, |_| credit.to_vec());
        found.assert_is(&expected, &format!("temperature {temperature}"));
        let relative = distance(&expected, &exact) / dot(&exact, &exact).sqrt();
        assert!((relative - bias).abs() < 1e-4, "temperature {temperature}: a bias of {relative}");
    }
}

/// `E <credit, w>` of the 2-hot relaxation w, over the noise of experts 1 and 2 less that of expert 0.
fn two_of_three(z: &[f64], temperature: f64, credit: &[f64; 3]) -> f64 {
    const STEP: f64 = 0.25;
    let grid = || (-64..=64).map(|i| STEP * f64::from(i));
    let density = |a: f64, b: f64| 2.0 * (-a - b).exp() / (1.0 + (-a).exp() + (-b).exp()).powi(3);
    let relaxed = |mut logits: [f64; 3]| {
        let mut value = 0.0;
        for _ in 0..2 {
            let q = softmax(&logits.map(|z| z / temperature));
            value += 0.5 * dot(&q, credit);
            logits.iter_mut().zip(q).for_each(|(z, q)| *z += (1.0 - q).ln());
        }
        value
    };
    let at = |a: f64, b: f64| density(a, b) * relaxed([z[0], z[1] + a, z[2] + b]);
    grid().flat_map(|a| grid().map(move |b| (a, b))).map(|(a, b)| at(a, b)).sum::<f64>() * STEP * STEP
}

/// Router outputs of `noisy_topk` over two experts, and the normal noise between them.
struct Noisy {
    z: [f64; 4],
}

impl Noisy {
    fn deviation(&self, e: usize) -> f64 {
        (1.0 + self.z[2 + e].exp()).ln() + 0.01
    }

    fn variance(&self) -> f64 {
        self.deviation(0).powi(2) + self.deviation(1).powi(2)
    }

    fn density(&self, x: f64) -> f64 {
        (-0.5 * x * x / self.variance()).exp() / (std::f64::consts::TAU * self.variance()).sqrt()
    }

    fn gap(&self) -> f64 {
        self.z[0] - self.z[1]
    }

    /// `E f(gap + noise)`; f may jump at 0.
    fn mean(&self, f: impl Fn(f64) -> f64) -> f64 {
        integral(|x| self.density(x), -self.gap(), |noise| f(self.gap() + noise))
    }

    /// The mean gradient of the four outputs, from the slope of the loss in the noisy gap.
    ///
    /// Given the noise of the gap, that of an expert is in the mean its share of the variance.
    fn gradient(&self, slope: impl Fn(f64) -> f64) -> [f64; 4] {
        let of_gap = self.mean(&slope);
        let spread = self.mean(|u| slope(u) * (u - self.gap())) / self.variance();
        let of_noise = |e: usize| open(self.z[2 + e]) * self.deviation(e) * spread;
        [of_gap, -of_gap, of_noise(0), of_noise(1)]
    }
}

/// With all experts chosen the objective is smooth, and the mean its slope. With one of two, weighed by the softmax, the
/// mean is the slope of the weights alone: it lacks how often the choice falls on the other side, which is the density of
/// the seam times the jump of the loss there.
#[test]
fn noisy_top_k_lacks_the_slope_of_its_choice() {
    let noisy = Noisy { z: [0.7, 0.3, 0.2, -0.4] };
    let weights = |u: f64, k: usize| match k {
        1 if u > 0.0 => [open(u), 0.0],
        1 => [0.0, open(-u)],
        _ => [open(u), open(-u)],
    };
    let held = |k: usize| {
        noisy.gradient(|u| {
            let (w, credit, slope) = (weights(u, k), TWO.credit(&weights(u, k)), open(u) * open(-u));
            (0..2).map(|e| if w[e] > 0.0 { [slope, -slope][e] * credit[e] } else { 0.0 }).sum()
        })
    };
    let whole = |k: usize| {
        let objective = |z: &[f64]| Noisy { z: [z[0], z[1], z[2], z[3]] }.mean(|u| TWO.loss(&weights(u, k)));
        slopes(&noisy.z, 1e-4, objective)
    };
    let sampled = |k: usize| {
        let estimator = spec("noisy_topk", Some(k), &[], 2).at(0, 1);
        Sampled::new(&estimator, &noisy.z, 2, 25_000, |weights| TWO.credit(weights))
    };
    assert_close(&held(2), &whole(2), 1e-6, "both chosen");
    sampled(2).assert_is(&whole(2), "both chosen");

    let jump = TWO.loss(&[0.5, 0.0]) - TWO.loss(&[0.0, 0.5]);
    let lacks = noisy.density(-noisy.gap()) * jump;
    let (held, whole, found) = (held(1), whole(1), sampled(1));
    assert_close(&whole[..2], &[held[0] + lacks, held[1] - lacks], 1e-6, "one chosen");
    found.assert_is(&held, "one chosen");
    assert!(lacks.abs() > 9.0 * found.error[0], "seen above the noise");
}
