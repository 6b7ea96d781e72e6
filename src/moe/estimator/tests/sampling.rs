//! Estimators that draw: by enumeration of every draw where the mean is known exactly, by many draws where it is a
//! distribution.
//!
//! The task of the enumerations: one token, experts with fixed outputs Y, and `L(y) = ½ ‖y - a‖²`, in places with a cubic
//! term.

use super::*;
use crate::moe::estimator::{Baseline, Estimator, Gradient, RoutedBatch, StepContext};

pub(super) const EXPERTS: usize = 4;
const WIDTH: usize = 3;

/// One token with a quadratic loss, or a cubic one.
pub(super) struct Task {
    pub(super) z: Vec<f64>,
    outputs: Vec<Vec<f64>>,
    target: Vec<f64>,
    /// Of the cubic term, `cubic/3 Σ (y - a)³`.
    cubic: f64,
}

impl Task {
    pub(super) fn new(seed: u64) -> Self {
        let numbers = normals(seed, EXPERTS * WIDTH, 1.0);
        Self {
            z: normals(100 + seed, EXPERTS, 0.8),
            outputs: numbers.chunks(WIDTH).map(<[f64]>::to_vec).collect(),
            target: normals(200 + seed, WIDTH, 1.0),
            cubic: 0.0,
        }
    }

    /// With a loss that is no quadratic.
    pub(super) fn cubic(seed: u64) -> Self {
        Self { cubic: 0.3, ..Self::new(seed) }
    }

    /// `y - a`.
    fn error(&self, weights: &[f64]) -> Vec<f64> {
        let y = |d: usize| weights.iter().zip(&self.outputs).map(|(w, output)| w * output[d]).sum::<f64>();
        (0..WIDTH).map(|d| y(d) - self.target[d]).collect()
    }

    pub(super) fn loss(&self, weights: &[f64]) -> f64 {
        self.error(weights).iter().map(|x| x * x * (0.5 + self.cubic / 3.0 * x)).sum()
    }

    pub(super) fn credit(&self, weights: &[f64]) -> Vec<f64> {
        let slope: Vec<f64> = self.error(weights).iter().map(|x| x * (1.0 + self.cubic * x)).collect();
        self.outputs.iter().map(|output| dot(&slope, output)).collect()
    }

    /// `∇_z Σ_e p_e L(Y_e)`.
    fn exact(&self) -> Vec<f64> {
        let losses: Vec<f64> = (0..EXPERTS).map(|e| self.loss(&one_hot(e))).collect();
        jacobian(&softmax(&self.z), &losses)
    }

    /// What the estimator makes of one draw.
    pub(super) fn gradient(&self, estimator: &Estimator, routed: &RoutedBatch) -> Vec<f64> {
        let mut dz = vec![0.0; EXPERTS];
        estimator.vjp(&self.z, routed, &self.credit(&routed.weights), &mut dz);
        dz
    }
}

/// A copy of the whole batch is routed as if it were alone: neither noise nor room is shared with the draws.
#[test]
fn the_greedy_copy_is_routed_by_itself() {
    use crate::moe::{
        capacity::{Capacity, Order, Overflow},
        explore::Exploration,
    };
    let rows = 16;
    let z = normals(1, rows * EXPERTS, 1.0);
    for k in [1, 2] {
        let estimator = spec("reinforce", Some(k), &[("baseline", word("self_critical"))], EXPERTS).at(0, 1);
        assert_eq!((estimator.greedy_from(rows), estimator.greedy_from(usize::MAX)), (4 * rows, usize::MAX));
        for order in [Order::Position, Order::Probability] {
            let context = StepContext {
                capacity: Some(Capacity { factor: 0.75, overflow: Overflow::Drop, order }),
                ..StepContext::train(Draw::new(5, 0, 0))
            };
            let explore = Exploration { epsilon: 0.5, dropout: 0.5 };
            let routed = estimator.route(&z.repeat(5), EXPERTS, &StepContext { copy_rows: rows, explore, ..context });
            let alone = StepContext { copy_rows: rows, ..context };
            let plain = Estimator { noise: crate::moe::estimator::Noise::NONE, ..estimator }.route(&z, EXPERTS, &alone);
            assert_eq!(routed.weights[4 * rows * EXPERTS..], plain.weights, "top-{k}");
            // Room for 0.75 k T / E rows of each expert in every copy.
            for copy in 0..5 {
                let counts = routed.rows().counts(copy * rows..(copy + 1) * rows, EXPERTS);
                assert!(counts.iter().all(|n| *n <= 3.0 * k as f64), "top-{k}, copy {copy}: {counts:?}");
            }
            let dropped = routed.wanted().chosen.len() - routed.chosen.len();
            assert_eq!(routed.capacity.dropped, dropped as u64);
        }
    }
}

pub(super) fn one_hot(expert: usize) -> Vec<f64> {
    (0..EXPERTS).map(|e| f64::from(e == expert)).collect()
}

pub(super) fn jacobian(p: &[f64], v: &[f64]) -> Vec<f64> {
    let mean = dot(p, v);
    p.iter().zip(v).map(|(p, v)| p * (v - mean)).collect()
}

/// A routing in which the noise happened to choose just this, in this order.
pub(super) fn drawn(estimator: &Estimator, z: &[f64], wanted: &[u32]) -> RoutedBatch {
    let routes = (0..1_000_000).map(|seed| estimator.route(z, EXPERTS, &StepContext::train(Draw::new(seed, 0, 0))));
    routes.into_iter().find(|routed| routed.chosen == wanted).unwrap()
}

pub(super) fn add(sum: &mut [f64], factor: f64, row: &[f64]) {
    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += factor * x);
}

/// `Σ_e p_e gradient(draw e)`.
fn mean_of_draws(task: &Task, estimator: &Estimator) -> Vec<f64> {
    let mut mean = vec![0.0; EXPERTS];
    for (e, p) in softmax(&task.z).into_iter().enumerate() {
        add(&mut mean, p, &task.gradient(estimator, &drawn(estimator, &task.z, &[e as u32])));
    }
    mean
}

pub(super) fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn sampled_straight_through_is_the_dense_mixture_in_the_mean() {
    let estimator = spec("ste", Some(1), &[("sampled", Param::Flag(true))], EXPERTS).at(0, 1);
    for seed in 0..10 {
        let task = Task::new(seed);
        let p = softmax(&task.z);
        let dense = jacobian(&p, &task.credit(&p));
        assert_close(&mean_of_draws(&task, &estimator), &dense, 1e-12, "quadratic loss");
        assert!(distance(&dense, &task.exact()) > 1e-3, "which is not the gradient of the expected loss: it is biased");
    }
}

#[test]
fn reinmax_is_exact_for_quadratic_losses_at_temperature_one() {
    let at = |temperature| spec("reinmax", None, &[("temperature", Param::Number(temperature))], EXPERTS).at(0, 1);
    for seed in 0..10 {
        let task = Task::new(seed);
        assert_close(&mean_of_draws(&task, &at(1.0)), &task.exact(), 1e-12, "temperature 1");
        assert!(distance(&mean_of_draws(&task, &at(1.5)), &task.exact()) > 1e-3, "biased at temperature 1.5");
    }
}

/// The mean over draws in closed form: `Σ_e p_e (2 J(½ (q + h_e)) c_e - ½ J(p) c_e)`, `q = softmax(z / τ)`, c_e at draw
/// e.
#[test]
fn the_mean_of_reinmax_is_that_of_its_formula_at_every_temperature() {
    for temperature in [1.0, 1.5, 4.0] {
        let estimator = spec("reinmax", None, &[("temperature", Param::Number(temperature))], EXPERTS).at(0, 1);
        for seed in 0..5 {
            let task = Task::new(seed);
            let p = softmax(&task.z);
            let q = softmax(&task.z.iter().map(|z| z / temperature).collect::<Vec<_>>());
            let mut mean = vec![0.0; EXPERTS];
            for e in 0..EXPERTS {
                let credit = task.credit(&one_hot(e));
                let pi: Vec<f64> = q.iter().zip(one_hot(e)).map(|(q, h)| 0.5 * (q + h)).collect();
                add(&mut mean, 2.0 * p[e], &jacobian(&pi, &credit));
                add(&mut mean, -0.5 * p[e], &jacobian(&p, &credit));
            }
            assert_close(&mean_of_draws(&task, &estimator), &mean, 1e-12, "temperature");
        }
    }
}

#[test]
fn score_functions_are_unbiased_with_every_baseline() {
    let estimator = spec("reinforce", Some(1), &[], EXPERTS).at(0, 1);
    for seed in 0..5 {
        let task = Task::new(seed);
        let p = softmax(&task.z);
        let routed: Vec<RoutedBatch> = (0..EXPERTS as u32).map(|e| drawn(&estimator, &task.z, &[e])).collect();
        let score = |e: usize, advantage: f64| {
            let mut dz = vec![0.0; EXPERTS];
            estimator.score(&task.z, &routed[e], &[advantage], &mut dz);
            dz
        };
        let losses: Vec<f64> = routed.iter().map(|routed| task.loss(&routed.weights)).collect();
        let greedy = estimator.route(&task.z, EXPERTS, &StepContext::evaluate(Draw::new(0, 0, 0)));
        // Nothing, a moving average (any constant), the loss without noise.
        for baseline in [0.0, 0.37, task.loss(&greedy.weights)] {
            let mut mean = vec![0.0; EXPERTS];
            (0..EXPERTS).for_each(|e| add(&mut mean, p[e], &score(e, losses[e] - baseline)));
            assert_close(&mean, &task.exact(), 1e-12, "one draw");
        }
        // Two draws, each with the other's loss for a baseline: 16 pairs.
        let mut mean = vec![0.0; EXPERTS];
        for (i, j) in (0..EXPERTS).flat_map(|i| (0..EXPERTS).map(move |j| (i, j))) {
            add(&mut mean, 0.5 * p[i] * p[j], &score(i, losses[i] - losses[j]));
            add(&mut mean, 0.5 * p[i] * p[j], &score(j, losses[j] - losses[i]));
        }
        assert_close(&mean, &task.exact(), 1e-12, "leave one out");
        // Weight 1 at k = 1: nothing of the gradient comes through it.
        assert_eq!(task.gradient(&estimator, &routed[0]), [0.0; EXPERTS]);
    }
}

/// Drawn under a selection bias, it is the gradient of what is drawn from: `softmax(z + bias)`.
#[test]
fn a_score_function_knows_the_bias() {
    let estimator = spec("reinforce", Some(1), &[], EXPERTS).at(0, 1);
    let bias = [0.7, -1.1, 0.0, 0.4];
    let ctx = |seed| StepContext { bias: Some(&bias), ..StepContext::train(Draw::new(seed, 0, 0)) };
    for seed in 0..5 {
        let task = Task::new(seed);
        let p = softmax(&task.z.iter().zip(bias).map(|(z, b)| z + b).collect::<Vec<_>>());
        let losses: Vec<f64> = (0..EXPERTS).map(|e| task.loss(&one_hot(e))).collect();
        let mut mean = vec![0.0; EXPERTS];
        for (e, loss) in losses.iter().enumerate() {
            let routes = (0..1_000_000).map(|seed| estimator.route(&task.z, EXPERTS, &ctx(seed)));
            let routed = routes.into_iter().find(|routed| routed.chosen == [e as u32]).unwrap();
            estimator.score(&task.z, &routed, &[p[e] * loss], &mut mean);
        }
        assert_close(&mean, &jacobian(&p, &losses), 1e-12, "biased policy");
    }
}

/// Ordered pairs without repetition.
pub(super) fn pairs() -> impl Iterator<Item = [u32; 2]> {
    (0..EXPERTS as u32).flat_map(|a| (0..EXPERTS as u32).filter(move |b| *b != a).map(move |b| [a, b]))
}

/// Plackett and Luce: `p_a p_b / (1 - p_a)`.
pub(super) fn pair_probability(z: &[f64], [a, b]: [u32; 2]) -> f64 {
    let p = softmax(z);
    p[a as usize] * p[b as usize] / (1.0 - p[a as usize])
}

#[test]
fn two_experts_drawn_without_replacement_are_unbiased_too() {
    let estimator = spec("reinforce", Some(2), &[], EXPERTS).at(0, 1);
    assert!(matches!(estimator.gradient, Gradient::Score { baseline: Baseline::LeaveOneOut, samples: 4 }));
    for seed in 0..5 {
        let task = Task::new(seed);
        // Σ over ordered pairs of their probability times the loss of their renormalised mixture, as a function of z.
        let objective = |z: &[f64]| {
            let p = softmax(z);
            pairs()
                .map(|[a, b]| {
                    let sum = p[a as usize] + p[b as usize];
                    let weights: Vec<f64> = (0..EXPERTS as u32).map(|e| if e == a || e == b { p[e as usize] / sum } else { 0.0 }).collect();
                    pair_probability(z, [a, b]) * task.loss(&weights)
                })
                .sum::<f64>()
        };
        let mut mean = vec![0.0; EXPERTS];
        let mut total = 0.0;
        for pair in pairs() {
            let routed = drawn(&estimator, &task.z, &pair);
            let probability = estimator.log_prob(&task.z, &routed)[0].exp();
            assert!((probability - pair_probability(&task.z, pair)).abs() < 1e-14);
            total += probability;
            let mut one = task.gradient(&estimator, &routed);
            estimator.score(&task.z, &routed, &[task.loss(&routed.weights)], &mut one);
            add(&mut mean, probability, &one);
        }
        assert!((total - 1.0).abs() < 1e-13);
        let h = 1e-5;
        let exact: Vec<f64> = (0..EXPERTS)
            .map(|j| {
                let at = |d: f64| {
                    let mut z = task.z.clone();
                    z[j] += d;
                    objective(&z)
                };
                (at(h) - at(-h)) / (2.0 * h)
            })
            .collect();
        assert_close(&mean, &exact, 1e-9, "k = 2");
    }
}

#[test]
fn the_score_is_the_gradient_of_the_log_probability() {
    for bias in [None, Some(&[0.3, -0.2, 0.0, 0.9][..])] {
        let estimator = spec("reinforce", Some(2), &[], EXPERTS).at(0, 1);
        let z = normals(1, 3 * EXPERTS, 1.0);
        let ctx = StepContext { bias, ..StepContext::train(Draw::new(4, 0, 0)) };
        let routed = estimator.route(&z, EXPERTS, &ctx);
        let mut dz = vec![0.0; z.len()];
        estimator.score(&z, &routed, &[1.0, -2.0, 0.5], &mut dz);
        for j in 0..z.len() {
            // The draw stays the same; z moves it in the routed batch only, so route the moved one and compare like with like.
            let at = |d: f64| {
                let mut near = z.clone();
                near[j] += d;
                let moved = estimator.route(&near, EXPERTS, &ctx);
                assert_eq!(moved.chosen, routed.chosen);
                dot(&estimator.log_prob(&near, &moved), &[1.0, -2.0, 0.5])
            };
            let expected = (at(1e-6) - at(-1e-6)) / 2e-6;
            assert!((dz[j] - expected).abs() < 1e-7, "{} is not {expected}", dz[j]);
        }
    }
}

const DRAWS: usize = 100_000;

/// How often each choice is made over many rows of the same logits, as shares.
fn shares<const K: usize>(estimator: &Estimator, z: &[f64], choices: &[[u32; K]]) -> Vec<f64> {
    let routed = estimator.route(&z.repeat(DRAWS), EXPERTS, &StepContext::train(Draw::new(11, 0, 0)));
    let count = |choice: &[u32; K]| routed.chosen.chunks(K).filter(|row| row == choice).count();
    choices.iter().map(|choice| count(choice) as f64 / DRAWS as f64).collect()
}

fn assert_shares(found: &[f64], expected: &[f64], what: &str) {
    for (found, p) in found.iter().zip(expected) {
        // Four standard errors.
        assert!((found - p).abs() <= 4.0 * (p * (1.0 - p) / DRAWS as f64).sqrt(), "{what}: {found} is not {p}");
    }
}

#[test]
fn single_draws_follow_the_softmax() {
    let z = [0.4, -0.3, 1.1, 0.0];
    let singles = [[0], [1], [2], [3]];
    let warm = softmax(&z.map(|z| z / 2.0));
    for (name, params, expected) in [
        ("gumbel_st", vec![], softmax(&z)),
        ("reinmax", vec![("temperature", Param::Number(2.0))], softmax(&z)),
        ("reinforce", vec![], softmax(&z)),
        ("ste", vec![("sampled", Param::Flag(true))], softmax(&z)),
        ("ste", vec![("sampled", Param::Flag(true)), ("temperature", Param::Number(2.0))], warm.clone()),
        ("sparsemixer_v2", vec![("r", Param::Number(9.0))], softmax(&z)),
        ("sparsemixer_v2", vec![("r", Param::Number(9.0)), ("star", Param::Flag(true))], warm),
    ] {
        let estimator = spec(name, None, &params, EXPERTS).at(0, STEPS);
        assert_shares(&shares(&estimator, &z, &singles), &expected, name);
    }
}

#[test]
fn pairs_follow_plackett_and_luce() {
    let z = [0.4, -0.3, 1.1, 0.0];
    let all: Vec<[u32; 2]> = pairs().collect();
    let expected: Vec<f64> = all.iter().map(|pair| pair_probability(&z, *pair)).collect();
    for name in ["gumbel_topk", "reinforce"] {
        assert_shares(&shares(&spec(name, Some(2), &[], EXPERTS).at(0, STEPS), &z, &all), &expected, name);
    }
    // The second draw of a masked softmax is from what the first one left.
    let masked = spec("sparsemixer_v2", Some(2), &[("r", Param::Number(9.0))], EXPERTS).at(0, 1);
    let routed = masked.route(&z, EXPERTS, &StepContext::train(Draw::new(0, 0, 0)));
    let [a, b] = [routed.chosen[0] as usize, routed.chosen[1] as usize];
    let left = softmax(&z.iter().enumerate().map(|(e, z)| if e == a { f64::NEG_INFINITY } else { *z }).collect::<Vec<_>>());
    let scale = [routed.weights[a] / softmax(&z)[a], routed.weights[b] / left[b]];
    assert!(scale.iter().all(|s| (s - 1.0).abs() < 1e-12 || (s - 1.0 / 3.0).abs() < 1e-12), "{scale:?}");
}

/// What the first draw masks the second one may let in; it is drawn from the masked softmax of what is left all the same.
#[test]
fn masked_draws_are_independent_of_what_lost_before() {
    // Of 1.0 the mask keeps 0.85 alone; of 0.85 it keeps 0.75 too.
    let z = [1.0, 0.85, 0.75, -2.0];
    let over = |logits: &[f64], temperature: f64| softmax(&logits.iter().map(|z| z / temperature).collect::<Vec<_>>());
    for (star, temperature) in [(false, 1.0), (true, 2.0)] {
        let (first, second) = (over(&z[..2], temperature), over(&z[1..3], temperature));
        let estimator = spec("sparsemixer_v2", Some(2), &[("r", Param::Number(0.1)), ("star", Param::Flag(star))], EXPERTS).at(0, 1);
        let found = shares(&estimator, &z, &[[0, 1], [0, 2], [1, 0], [1, 2]]);
        assert_shares(&found, &[first[0] * second[0], first[0] * second[1], first[1], 0.0], &format!("star: {star}"));
    }
}

#[test]
fn the_coin_of_sparsemixer_has_its_mean() {
    // 1 for the largest logit; else 1 with probability ¼ (⅝), and ⅓.
    let z = [0.4, -0.3, 1.1, 0.0];
    for (star, mean) in [(false, 1.0 / 3.0 + 2.0 / 3.0 * 0.25), (true, 1.0 / 3.0 + 2.0 / 3.0 * 0.625)] {
        let estimator = spec("sparsemixer_v2", Some(1), &[("r", Param::Number(9.0)), ("star", Param::Flag(star))], EXPERTS).at(0, 1);
        let routed = estimator.route(&z.repeat(DRAWS), EXPERTS, &StepContext::train(Draw::new(12, 0, 0)));
        let p = softmax(&z.map(|z| if star { z / 2.0 } else { z }));
        let scales = |largest: bool| -> Vec<f64> {
            let rows = routed.chosen.iter().enumerate().filter(|(_, e)| (**e == 2) == largest);
            rows.map(|(row, &e)| routed.weights[row * EXPERTS + e as usize] / p[e as usize]).collect()
        };
        assert!(scales(true).iter().all(|scale| (scale - 1.0).abs() < 1e-12));
        let others = scales(false);
        let found = others.iter().sum::<f64>() / others.len() as f64;
        assert!((found - mean).abs() < 4.0 / 3.0 / (others.len() as f64).sqrt(), "{found} is not {mean}");
    }
}

#[test]
fn evaluation_throws_no_coin() {
    // A bias keeps the largest logit from being chosen: in training the coin decides, in evaluation nothing does.
    let estimator = spec("sparsemixer_v2", Some(1), &[("r", Param::Number(9.0))], EXPERTS).at(0, 1);
    let (z, bias) = ([0.4, -0.3, 1.1, 0.0].repeat(50), [5.0, 0.0, 0.0, 0.0]);
    let p = softmax(&z[..EXPERTS])[0];
    let ctx = StepContext { bias: Some(&bias), ..StepContext::evaluate(Draw::new(0, 0, 0)) };
    let routed = estimator.route(&z, EXPERTS, &ctx);
    assert!(routed.chosen.iter().all(|e| *e == 0) && routed.weights.chunks(EXPERTS).all(|row| (row[0] - p).abs() < 1e-15));
}

/// Relative bias of the mean over many draws, and the standard error of that mean.
fn bias(task: &Task, estimator: &Estimator) -> (f64, f64) {
    let draws = 40_000;
    let (mut mean, mut squares) = (vec![0.0; EXPERTS], 0.0);
    for seed in 0..draws {
        let routed = estimator.route(&task.z, EXPERTS, &StepContext::train(Draw::new(seed, 1, 0)));
        let gradient = task.gradient(estimator, &routed);
        add(&mut mean, 1.0 / draws as f64, &gradient);
        squares += dot(&gradient, &gradient) / draws as f64;
    }
    let exact = task.exact();
    let size = dot(&exact, &exact).sqrt();
    (distance(&mean, &exact) / size, ((squares - dot(&mean, &mean)) / draws as f64).sqrt() / size)
}

#[test]
fn gumbel_softmax_loses_bias_and_gains_variance_as_it_cools() {
    let task = Task::new(3);
    for name in ["gumbel_soft", "gumbel_st"] {
        let at = |temperature: f64| {
            let params = [("temperature", Param::Number(temperature)), ("noise", Param::Number(1.0))];
            bias(&task, &spec(name, None, &params, EXPERTS).at(0, 1))
        };
        let [(warm, warm_error), (cool, cool_error)] = [at(1.0), at(0.25)];
        assert!(warm - cool > 4.0 * (warm_error + cool_error), "{name}: bias {warm} ± {warm_error}, then {cool} ± {cool_error}");
        assert!(cool_error > 1.5 * warm_error, "{name}: deviation {warm_error}, then {cool_error}");
    }
}

#[test]
fn means_over_draws_agree_with_enumeration() {
    // The same two facts as above, now without forcing the draw.
    let task = Task::new(1);
    let (reinmax, error) = bias(&task, &spec("reinmax", None, &[], EXPERTS).at(0, 1));
    assert!(reinmax < 4.0 * error, "reinmax: {reinmax} ± {error}");
    let (ste, error) = bias(&task, &spec("ste", Some(1), &[("sampled", Param::Flag(true))], EXPERTS).at(0, 1));
    assert!(ste > 4.0 * error, "sampled straight-through: {ste} ± {error}");
}
