//! Every estimator through the layer and candle's autograd, against plain loops in f64: output, and the gradients of
//! input, router and experts.

use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{E, layer, named};
use crate::{
    model::weights::MoeWeights,
    moe::{
        LayerState, Routing, RoutingMode, TrainState,
        estimator::{Combine, Estimator, Execution, RoutedBatch, catalog},
        policy::RoutingPolicy,
    },
    ops::as_on_a_device,
};

const T: usize = 11;
const D: usize = 5;
const F: usize = 4;

/// One batch and all weights, row-major.
struct Problem {
    x: Vec<f64>,
    router: Vec<f64>,
    gate_up: Vec<f64>,
    down: Vec<f64>,
    means: Vec<f64>,
    /// Gradient of the output.
    upstream: Vec<f64>,
}

/// Output `[T, D]`, then gradients of x, router, gate_up and down.
type Found = [Vec<f64>; 5];

impl Problem {
    fn new(estimator: &Estimator) -> Self {
        let rng = &mut StdRng::seed_from_u64(21);
        // Through f32, so that both forms start from the same numbers.
        let mut random = |count: usize| (0..count).map(|_| f64::from(rng.random_range(-1f32..1.0))).collect::<Vec<f64>>();
        Self {
            x: random(T * D),
            router: random(estimator.router_width(E) * D),
            gate_up: random(E * 2 * F * D),
            down: random(E * D * F),
            means: random(E * D),
            upstream: random(T * D),
        }
    }

    /// Through the layer, with this element type in the products of experts.
    fn candle(&self, estimator: Estimator, products: DType) -> (Found, Vec<f64>, RoutedBatch) {
        let var = |values: &[f64], shape: &[usize]| {
            let tensor = Tensor::from_slice(values, shape, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
            Var::from_tensor(&tensor).unwrap()
        };
        let x = var(&self.x, &[T, D]);
        let router = var(&self.router, &[estimator.router_width(E), D]);
        let (gate_up, down) = (var(&self.gate_up, &[E, 2 * F, D]), var(&self.down, &[E, D, F]));
        let [r, g, d] = [&router, &gate_up, &down].map(|var| var.as_tensor().clone());
        let mut layer = layer(MoeWeights { router: r, gate_up: g, down: d, shared: None });
        layer.set_products(products);
        let known = LayerState { means: self.means.iter().map(|&m| m as f32).collect(), seen: vec![true; E], ..LayerState::default() };
        let mut state = TrainState { layers: vec![known], ..TrainState::new(4) };
        let mode = &mut RoutingMode::Train { policy: RoutingPolicy::Estimator(estimator), state: &mut state };
        let (y, routing) = layer.forward(&x, mode).unwrap();
        let upstream = var(&self.upstream, &[T, D]).as_detached_tensor();
        let grads = (&y * upstream).unwrap().sum_all().unwrap().backward().unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        let gradient = |var: &Var| flat(grads.get(var).expect("a gradient"));
        let Routing::Dense { routed, z, .. } = routing.routing else { panic!("training routes densely") };
        ([flat(&y), gradient(&x), gradient(&router), gradient(&gate_up), gradient(&down)], z.to_vec(), (*routed).clone())
    }

    fn loops(&self, estimator: &Estimator, z: &[f64], routed: &RoutedBatch) -> Found {
        let mut found: Found =
            [vec![0.0; T * D], vec![0.0; T * D], vec![0.0; self.router.len()], vec![0.0; self.gate_up.len()], vec![0.0; self.down.len()]];
        let mut credit = vec![0.0; T * E];
        for t in 0..T {
            let credit = &mut credit[t * E..][..E];
            let weights = &routed.weights[t * E..][..E];
            if estimator.combine == Combine::Merged {
                self.merged(t, weights, credit, &mut found);
                continue;
            }
            for e in 0..E {
                let chosen = routed.rows().of(t).contains(&(e as u32));
                if chosen || routed.execution == Execution::All {
                    credit[e] = self.expert(t, e, weights[e], &mut found);
                } else if let Combine::Means { .. } = estimator.combine {
                    credit[e] = self.mean(t, e, weights[e], &mut found);
                }
            }
        }
        let mut dz = vec![0.0; z.len()];
        estimator.vjp(z, routed, &credit, &mut dz);
        for (t, dz) in dz.chunks(z.len() / T).enumerate() {
            for (g, dz) in dz.iter().enumerate() {
                for i in 0..D {
                    found[1][t * D + i] += dz * self.router[g * D + i];
                    found[2][g * D + i] += dz * self.x[t * D + i];
                }
            }
        }
        found
    }

    /// Adds `w Y_te` and what follows for the gradients; returns the credit.
    fn expert(&self, t: usize, e: usize, w: f64, found: &mut Found) -> f64 {
        let (gate_up, down) = (&self.gate_up[e * 2 * F * D..][..2 * F * D], &self.down[e * D * F..][..D * F]);
        let mut d_parts = [vec![0.0; gate_up.len()], vec![0.0; down.len()]];
        let [y, dx, _, d_gate_up, d_down] = found;
        let credit = self.swiglu(t, [gate_up, down], w, [&mut y[t * D..][..D], &mut dx[t * D..][..D]], &mut d_parts);
        d_gate_up[e * 2 * F * D..][..2 * F * D].iter_mut().zip(&d_parts[0]).for_each(|(a, b)| *a += b);
        d_down[e * D * F..][..D * F].iter_mut().zip(&d_parts[1]).for_each(|(a, b)| *a += b);
        credit
    }

    fn mean(&self, t: usize, e: usize, w: f64, found: &mut Found) -> f64 {
        let (mean, upstream) = (&self.means[e * D..][..D], &self.upstream[t * D..][..D]);
        found[0][t * D..][..D].iter_mut().zip(mean).for_each(|(y, mean)| *y += w * mean);
        mean.iter().zip(upstream).map(|(a, b)| a * b).sum()
    }

    /// One expert with the weighted sum of all parameters; the credit of an expert is `<∂L/∂θ, θ_e>`.
    fn merged(&self, t: usize, weights: &[f64], credit: &mut [f64], found: &mut Found) {
        let sum = |all: &[f64]| {
            let size = all.len() / E;
            (0..size).map(|i| (0..E).map(|e| weights[e] * all[e * size + i]).sum()).collect::<Vec<f64>>()
        };
        let (gate_up, down) = (sum(&self.gate_up), sum(&self.down));
        let mut d_parts = [vec![0.0; gate_up.len()], vec![0.0; down.len()]];
        let [y, dx, _, d_gate_up, d_down] = found;
        self.swiglu(t, [&gate_up, &down], 1.0, [&mut y[t * D..][..D], &mut dx[t * D..][..D]], &mut d_parts);
        for (part, all, total) in [(&d_parts[0], &self.gate_up, d_gate_up), (&d_parts[1], &self.down, d_down)] {
            for e in 0..E {
                let own = &all[e * part.len()..][..part.len()];
                credit[e] += own.iter().zip(part).map(|(a, b)| a * b).sum::<f64>();
                total[e * part.len()..][..part.len()].iter_mut().zip(part).for_each(|(total, d)| *total += weights[e] * d);
            }
        }
    }

    /// Adds `w Y` to y, and the gradients of x and of both matrices; returns `<upstream, Y>`.
    fn swiglu(&self, t: usize, [gate_up, down]: [&[f64]; 2], w: f64, [y, dx]: [&mut [f64]; 2], d_parts: &mut [Vec<f64>; 2]) -> f64 {
        let (x, upstream) = (&self.x[t * D..][..D], &self.upstream[t * D..][..D]);
        let project = |row: usize| gate_up[row * D..][..D].iter().zip(x).map(|(a, b)| a * b).sum::<f64>();
        let mut credit = 0.0;
        for f in 0..F {
            let (gate, up) = (project(f), project(F + f));
            let sigmoid = 1.0 / (1.0 + (-gate).exp());
            let hidden = gate * sigmoid * up;
            let d_hidden = (0..D).map(|i| upstream[i] * down[i * F + f]).sum::<f64>();
            credit += hidden * d_hidden;
            let d_gate = w * d_hidden * up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
            let d_up = w * d_hidden * gate * sigmoid;
            for i in 0..D {
                y[i] += w * hidden * down[i * F + f];
                d_parts[1][i * F + f] += w * hidden * upstream[i];
                d_parts[0][f * D + i] += d_gate * x[i];
                d_parts[0][(F + f) * D + i] += d_up * x[i];
                dx[i] += d_gate * gate_up[f * D + i] + d_up * gate_up[(F + f) * D + i];
            }
        }
        credit
    }
}

/// The largest difference of each part, relative to the largest value of it.
fn differences(estimator: Estimator, products: DType) -> [(&'static str, f64); 5] {
    let problem = Problem::new(&estimator);
    let (found, z, routed) = problem.candle(estimator, products);
    let wanted = problem.loops(&estimator, &z, &routed);
    let mut differences = [("y", 0.0), ("dx", 0.0), ("d router", 0.0), ("d gate_up", 0.0), ("d down", 0.0)];
    for ((_, worst), (found, wanted)) in differences.iter_mut().zip(found.iter().zip(&wanted)) {
        assert_eq!(found.len(), wanted.len());
        let largest = wanted.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
        *worst = found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / largest;
    }
    differences
}

fn each_estimator(check: impl Fn(&str, Estimator)) {
    let mut checked = 0;
    for row in catalog::CATALOG {
        for (k, estimator) in [Some(1), Some(2), None].into_iter().filter_map(|k| Some((k, named(row.name, k)?))) {
            check(&format!("{} k={k:?}", row.name), estimator);
            checked += 1;
        }
    }
    assert!(checked > 40, "{checked}");
}

#[test]
fn every_estimator_is_what_plain_loops_make_of_it() {
    each_estimator(|name, estimator| {
        for (part, worst) in differences(estimator, DType::F32) {
            assert!(worst < 1e-5, "{name}: {part} differs by {worst}");
        }
    });
}

/// Whatever an estimator runs, all experts or the chosen ones: in the operations of a device, and with products of bf16 over f32 masters.
#[test]
fn every_estimator_is_the_same_on_a_device() {
    for (products, most) in [(DType::F32, 1e-5), (DType::BF16, 4e-2)] {
        each_estimator(|name, estimator| {
            for (part, worst) in as_on_a_device(|| differences(estimator, products)) {
                assert!(worst < most, "{name}, {products:?}: {part} differs by {worst}");
            }
        });
    }
}

/// A ReLU may open for nobody.
#[test]
fn a_batch_without_any_expert_gives_nothing_and_learns_nothing() {
    let estimator = named("remoe", Some(1)).unwrap();
    let mut problem = Problem::new(&estimator);
    problem.x.iter_mut().for_each(|x| *x = x.abs());
    problem.router.iter_mut().for_each(|w| *w = -w.abs());
    let (found, _, routed) = problem.candle(estimator, DType::F32);
    assert!(routed.chosen.is_empty());
    for (name, values) in ["y", "dx", "d router", "d gate_up", "d down"].into_iter().zip(found) {
        assert!(values.iter().all(|value| *value == 0.0), "{name}: {values:?}");
    }
}
