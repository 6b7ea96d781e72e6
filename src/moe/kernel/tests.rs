//! Every kernel against the reference, over a table of shapes.

use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{CpuKernel, ExpertKernel, Experts, ReferenceKernel};
use crate::{
    moe::{SparseRouting, plan::DispatchPlan},
    ops::cpu::{Arithmetic, Bf16Unit, Isa, Reduction},
};

/// Sizes of one case, and who goes where.
struct Case {
    name: &'static str,
    tokens: usize,
    d: usize,
    f: usize,
    experts: usize,
    /// Experts of each token.
    route: fn(token: usize, experts: usize) -> Vec<u32>,
}

const CASES: &[Case] = &[
    Case { name: "one token, one expert", tokens: 1, d: 16, f: 32, experts: 1, route: |_, _| vec![0] },
    Case { name: "E = 1, many tokens", tokens: 37, d: 24, f: 40, experts: 1, route: |_, _| vec![0] },
    Case { name: "all to one", tokens: 19, d: 33, f: 17, experts: 8, route: |_, _| vec![5] },
    Case { name: "one expert empty", tokens: 12, d: 32, f: 48, experts: 4, route: |t, _| vec![[0, 1, 3][t % 3]] },
    Case { name: "top-2, odd widths", tokens: 23, d: 31, f: 29, experts: 6, route: |t, e| vec![(t % e) as u32, ((t * 5 + 1) % e) as u32] },
    Case { name: "k = E", tokens: 9, d: 20, f: 12, experts: 5, route: |_, e| (0..e as u32).rev().collect() },
    Case { name: "a token without a route", tokens: 5, d: 16, f: 16, experts: 3, route: |t, _| if t == 2 { vec![] } else { vec![1] } },
    Case { name: "ragged k", tokens: 11, d: 18, f: 22, experts: 7, route: |t, e| (0..1 + t % e).map(|i| i as u32).collect() },
    Case { name: "more rows than a task", tokens: 300, d: 16, f: 8, experts: 2, route: |t, _| vec![u32::from(t % 7 == 0)] },
    Case { name: "wide", tokens: 3, d: 256, f: 700, experts: 4, route: |t, _| vec![t as u32, 3] },
    Case { name: "smaller than a vector", tokens: 6, d: 3, f: 2, experts: 2, route: |t, _| vec![(t % 2) as u32] },
];

fn random(shape: &[usize], rng: &mut StdRng) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn plan(case: &Case, rng: &mut StdRng) -> DispatchPlan {
    let mut routing = SparseRouting { offsets: vec![0], ..SparseRouting::default() };
    for token in 0..case.tokens {
        let mut chosen = (case.route)(token, case.experts);
        chosen.dedup();
        routing.weights.extend(chosen.iter().map(|_| rng.random_range(0.1f32..1.0)));
        routing.expert_ids.extend(chosen);
        routing.offsets.push(routing.expert_ids.len() as u32);
    }
    DispatchPlan::new(&routing, case.experts)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// How far each may be from the reference, relative to the largest value: with a bf16 unit, activations are rounded.
fn kernels() -> Vec<(CpuKernel, f32)> {
    let mut kernels = Vec::new();
    for reduction in [Reduction::Fastest, Reduction::BatchInvariant] {
        let best = Arithmetic::detect(reduction);
        kernels.push((CpuKernel::new(Arithmetic::portable(reduction)), 2e-6));
        if best.isa != Isa::Portable {
            kernels.push((CpuKernel::new(Arithmetic { bf16: Bf16Unit::None, ..best }), 2e-6));
        }
        if best.bf16 != Bf16Unit::None {
            kernels.push((CpuKernel::new(best), 1e-2));
        }
    }
    kernels
}

#[test]
fn cpu_equals_reference() {
    let mut rng = StdRng::seed_from_u64(7);
    for case in CASES {
        let x = random(&[case.tokens, case.d], &mut rng);
        let wide = Experts {
            gate_up: random(&[case.experts, 2 * case.f, case.d], &mut rng),
            down: random(&[case.experts, case.d, case.f], &mut rng),
        };
        let plan = plan(case, &mut rng);
        for dtype in [DType::F32, DType::BF16] {
            let experts = Experts { gate_up: wide.gate_up.to_dtype(dtype).unwrap(), down: wide.down.to_dtype(dtype).unwrap() };
            let wanted = ReferenceKernel.grouped(&x, &plan, &experts).unwrap();
            let scale = wanted.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            for (kernel, tolerance) in kernels() {
                let tolerance = if dtype == DType::F32 { 2e-6 } else { tolerance };
                let found = kernel.grouped(&x, &plan, &experts).unwrap();
                let difference = largest_difference(&found, &wanted);
                assert!(difference <= tolerance * scale, "{}, {dtype:?}, {kernel:?}: {difference} of {scale}", case.name);
            }
        }
    }
}

#[test]
fn a_token_alone_gets_the_same_bits() {
    let mut rng = StdRng::seed_from_u64(8);
    let (tokens, d, f, experts) = (21, 40, 56, 4);
    let x = random(&[tokens, d], &mut rng);
    let weights = Experts { gate_up: random(&[experts, 2 * f, d], &mut rng), down: random(&[experts, d, f], &mut rng) };
    let routing = |tokens: std::ops::Range<usize>| SparseRouting {
        offsets: (0..=tokens.len() as u32).map(|t| 2 * t).collect(),
        expert_ids: tokens.clone().flat_map(|t| [(t % experts) as u32, ((t + 1) % experts) as u32]).collect(),
        weights: tokens.flat_map(|t| [0.7, 0.3 + t as f32 * 0.01]).collect(),
    };
    for kernel in [CpuKernel::default(), CpuKernel::new(Arithmetic::portable(Reduction::BatchInvariant))] {
        let whole = kernel.grouped(&x, &DispatchPlan::new(&routing(0..tokens), experts), &weights).unwrap().to_vec2::<f32>().unwrap();
        for (token, wanted) in whole.iter().enumerate() {
            let alone = x.narrow(0, token, 1).unwrap();
            let alone = kernel.grouped(&alone, &DispatchPlan::new(&routing(token..token + 1), experts), &weights).unwrap();
            assert_eq!(&alone.to_vec2::<f32>().unwrap()[0], wanted, "{kernel:?}, token {token}");
        }
    }
}

#[test]
fn a_slice_of_a_tensor_is_read_at_its_offset() {
    let mut rng = StdRng::seed_from_u64(9);
    let (d, f) = (12, 10);
    let packed_up = random(&[3, 2 * f, d], &mut rng);
    let packed_down = random(&[3, d, f], &mut rng);
    let x = random(&[8, d], &mut rng).narrow(0, 2, 4).unwrap();
    let experts = Experts { gate_up: packed_up.narrow(0, 1, 2).unwrap(), down: packed_down.narrow(0, 1, 2).unwrap() };
    let routing = SparseRouting { offsets: vec![0, 1, 2, 3, 4], expert_ids: vec![0, 1, 1, 0], weights: vec![1.0; 4] };
    let plan = DispatchPlan::new(&routing, 2);
    let wanted = ReferenceKernel.grouped(&x, &plan, &experts).unwrap();
    assert!(largest_difference(&CpuKernel::default().grouped(&x, &plan, &experts).unwrap(), &wanted) < 1e-5);
}
